"""The schema reader against PyTorch's own parse of every operator it knows."""

import pytest
import torch

from truedag.tracer.schema import parse_schema

ALL_SCHEMAS = torch._C._jit_get_all_schemas()


def test_every_schema_of_pytorch_is_read_as_pytorch_reads_it() -> None:
    checked = 0
    for schema in ALL_SCHEMAS:
        if schema.name.startswith("c10d::") or "..." in str(schema) or "Dict(" in str(schema):
            continue  # c10d has a table of its own; the others are TorchScript's, not the dispatcher's
        parsed = parse_schema(str(schema), name=schema.name, inplace_view=False)
        written = {
            i
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write and "Tensor" in str(argument.type)
        }
        fresh = {
            i for i, result in enumerate(schema.returns) if "Tensor" in str(result.type) and result.alias_info is None
        }
        assert parsed.writes == written, schema
        assert {i for i in parsed.fresh if "Tensor" in str(schema.returns[i].type)} == fresh, schema
        checked += 1
    assert checked > 2000


def test_every_operator_of_c10d_is_known() -> None:
    names = {schema.name for schema in ALL_SCHEMAS if schema.name.startswith("c10d::")}
    assert len(names) > 15
    # An unknown one would be taken to read and write its first argument.
    from truedag.tracer.schema import _C10D_WRITES

    assert {name.removeprefix("c10d::") for name in names} <= set(_C10D_WRITES)


@pytest.mark.parametrize(
    ("name", "overload", "writes", "unread", "is_view"),
    [
        ("aten::mm", "", set(), set(), False),
        ("aten::mm", "out", {2}, {2}, False),
        ("aten::add_", "Tensor", {0}, set(), False),
        ("aten::copy_", "", {0}, {0}, False),
        ("aten::transpose", "int", set(), set(), True),
        ("aten::split", "Tensor", set(), set(), True),
        ("aten::zeros_like", "", set(), {0}, False),
        ("aten::_foreach_add_", "List", {0}, set(), False),
    ],
)
def test_what_an_operator_does(name: str, overload: str, writes: set[int], unread: set[int], is_view: bool) -> None:
    schema = torch._C._get_schema(name, overload)
    parsed = parse_schema(str(schema), name=name, inplace_view=False)
    assert parsed.writes == writes
    assert parsed.unread == unread
    assert parsed.is_view == is_view


def test_an_operator_that_only_changes_metadata_is_a_view() -> None:
    schema = torch._C._get_schema("aten::detach_", "")
    assert parse_schema(str(schema), name="aten::detach_", inplace_view=True).is_view
