"""The schema reader against PyTorch's own parse of every operator it knows."""

import pytest
import torch

from truedag.tracer.merge.schema import _STATISTICS, _STATISTICS_IN_TRAINING, in_role, parse_schema

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
        written |= set((_STATISTICS | _STATISTICS_IN_TRAINING).get(schema.name, ()))
        assert parsed.writes == written, schema
        assert {i for i in parsed.fresh if "Tensor" in str(schema.returns[i].type)} == fresh, schema
        checked += 1
    assert checked > 2000


def test_every_operator_of_c10d_is_known() -> None:
    names = {schema.name for schema in ALL_SCHEMAS if schema.name.startswith("c10d::")}
    assert len(names) > 15
    # An unknown one would be taken to read and write its first argument.
    from truedag.tracer.merge.schema import _C10D_WRITES

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
        ("aten::native_batch_norm", "", {3, 4}, set(), False),
        ("aten::cudnn_batch_norm", "", {3, 4}, set(), False),
        ("aten::miopen_batch_norm", "", {3, 4}, set(), False),
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


def test_tensors_that_normalizations_write_unsaid_are_their_running_statistics() -> None:
    found = {}
    for schema in ALL_SCHEMAS:
        names = [argument.name for argument in schema.arguments]
        places = _STATISTICS.get(schema.name) or _STATISTICS_IN_TRAINING.get(schema.name)
        if places and not schema.overload_name:
            found[schema.name] = [names[place] for place in places]
    assert found == {name: ["running_mean", "running_var"] for name in _STATISTICS | _STATISTICS_IN_TRAINING}


def test_a_written_keyword_is_an_out_variant_in_aten_only() -> None:
    text = "(Tensor x, *, Tensor(a!) out) -> Tensor(a!)"
    assert parse_schema(f"aten::f.out{text}", name="aten::f", inplace_view=False).unread == {1}
    elsewhere = parse_schema(f"mine::f{text}", name="mine::f", inplace_view=False)
    assert (elsewhere.writes, elsewhere.unread, elsewhere.rewritten) == ({1}, set(), ((0, 1),))


def test_a_root_does_not_what_the_others_do() -> None:
    broadcast = parse_schema("", name="c10d::broadcast_", inplace_view=False)
    assert not in_role(broadcast, is_root=True).writes
    assert in_role(broadcast, is_root=False).writes == in_role(broadcast, is_root=False).unread == {0}
    reduce = parse_schema("", name="c10d::reduce_", inplace_view=False)
    assert (in_role(reduce, is_root=True).writes, in_role(reduce, is_root=True).unread) == ({0}, set())
    assert not in_role(reduce, is_root=False).writes
