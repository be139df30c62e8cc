"""Checks of shapes: from producer to reader, through an operator, from shards to the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import polars as pl

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import Audit, Finding
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject

_TYPE = re.compile(r"^([a-z_0-9]+)\[([0-9,]*)\]$")
_ELEMENTWISE = frozenset(
    {
        "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::gelu", "aten::silu", "aten::relu", "aten::_softmax",
        "aten::rsqrt", "aten::neg", "aten::pow", "aten::clone", "aten::masked_fill", "aten::sin", "aten::cos",
    }
)  # fmt: skip
_COMPUTED = (*sorted(_ELEMENTWISE), "aten::mm", "aten::bmm", "aten::_log_softmax")
_WIDTHS = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip


def check_dimensions(subject: Subject, plan: Plan | None, audit: Audit) -> None:
    """Check shapes, as far as they are told."""
    told = subject.nodes.filter(pl.col("inputs").fill_null("") != "")
    if told.is_empty():
        for check in ("dimension.edge", "dimension.operator", "dimension.shard"):
            audit.skip(check, "no node states its shapes")
        return
    if subject.form == "dataset":
        audit.judge("dimension.edge", _edges(subject), f"{subject.num_edges:,} edges")
    computed = told.filter(pl.col("op").is_in(_COMPUTED) & (pl.col("outputs").fill_null("") != ""))
    if computed.is_empty():
        audit.skip("dimension.operator", "no operator is known whose output follows from its inputs")
    else:
        what = f"{len(subject.expand(computed['node'])):,} operators with shapes"
        audit.judge("dimension.operator", _operators(computed, subject), what)
    if plan is not None and subject.form == "dataset":
        held = _held(subject, plan)
        if held.is_empty():
            audit.skip("dimension.shard", "no parameter has the name of one of the model's")
        else:
            names = held["label"].n_unique() if subject.copies is None else len(subject.copies.labels_of(held))
            audit.judge("dimension.shard", _shards(subject, plan, held), f"{names:,} parameters")


def parse_types(text: str) -> list[tuple[str, tuple[int, ...]]] | None:
    """Return the types in a node's inputs or outputs, as (dtype, shape); None: it is no list of types."""
    types = []
    for word in text.split():
        match = _TYPE.match(word)
        if match is None:
            return None
        types.append((match.group(1), tuple(int(size) for size in match.group(2).split(",") if size)))
    return types


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor; 0 where the width of the type is not known."""
    return math.prod(shape) * _WIDTHS.get(dtype, 0)


def _finding(check: str, title: str, expected: str, found: str, subject: Subject, nodes: pl.Series) -> Finding:
    told = subject.rows_of(nodes)
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=CHECKS[check].fix,
        severity=CHECKS[check].severity, nodes=subject.name_nodes(nodes), num_nodes=len(nodes),
        ranks=tuple(subject.ranks_of(nodes)),
        layers=tuple(sorted(layer for layer in told["layer"].unique() if layer >= 0)),
    )  # fmt: skip


def _edges(subject: Subject) -> Iterator[Finding]:
    readers = subject.nodes.filter(pl.col("kind") == "compute").select(dst="node", inputs="inputs")
    edges = subject.edges.filter((pl.col("kind") == "data") & (pl.col("bytes") > 0))
    read = edges.join(readers, on="dst").filter(~pl.col("inputs").str.contains(pl.col("type"), literal=True))
    if len(read):
        first = read.row(0, named=True)
        yield _finding(
            "dimension.edge",
            f"{subject.count_edges(read)} edges carry a tensor that their reader does not read: {first['type']}",
            f"an input {first['type']} at node {first['dst']}", first["inputs"] or "no inputs", subject,
            subject.expand(read["dst"].unique(maintain_order=True)),
        )  # fmt: skip
    # The other way round: a tensor that is read and that no edge brings, of an operator that has edges.
    inputs = readers.select(node="dst", type=pl.col("inputs").str.split(" ")).explode(
        "type", empty_as_null=False, keep_nulls=False
    )
    inputs = inputs.filter(pl.col("type") != "")
    brought = subject.edges.select(node="dst", type="type").unique()
    lost = inputs.join(brought, on=["node", "type"], how="anti").join(brought, on="node", how="semi")
    lost = lost.filter(~pl.col("node").is_in(read["dst"].implode()))
    if len(lost):
        first = lost.row(0, named=True)
        yield _finding(
            "dimension.edge",
            f"{len(subject.expand(lost['node']))} tensors are read that no edge brings: {first['type']}",
            f"an edge with {first['type']} into node {first['node']}", "none", subject,
            subject.expand(lost["node"].unique(maintain_order=True)),
        )  # fmt: skip
    makers = subject.nodes.filter(pl.col("kind") == "compute").select(src="node", outputs="outputs")
    sizes = makers.select("outputs").unique()
    written = sizes.with_columns(
        written=pl.Series(
            [sum(size_of(*one) for one in parse_types(text or "") or []) for text in sizes["outputs"]], dtype=pl.Int64
        )
    )
    more = edges.join(makers.join(written, on="outputs"), on="src").filter(
        (pl.col("bytes") > pl.col("written")) & (pl.col("written") > 0)
    )
    if len(more):
        first = more.row(0, named=True)
        yield _finding(
            "dimension.edge",
            f"{subject.count_edges(more)} edges carry more than their producer writes: {first['bytes']:,} bytes of "
            f"{first['type']} from {first['outputs']}", first["type"], first["outputs"], subject,
            subject.expand(more["src"].unique(maintain_order=True)),
        )  # fmt: skip


def _operators(told: pl.DataFrame, subject: Subject) -> Iterator[Finding]:
    kinds = told.select("op", "inputs", "outputs").unique()
    wanted = pl.Series(
        [_wanted_output(op, inputs or "", outputs) for op, inputs, outputs in kinds.iter_rows()], dtype=pl.String
    )
    wrong = told.join(
        kinds.with_columns(wanted=wanted).filter(pl.col("wanted").is_not_null()), on=["op", "inputs", "outputs"]
    )
    for rows in [] if wrong.is_empty() else wrong.partition_by("op", maintain_order=True):
        first = rows.row(0, named=True)
        nodes = subject.expand(rows["node"])
        yield _finding(
            "dimension.operator",
            f"{len(nodes)} {first['op'].removeprefix('aten::')} whose output does not follow from its inputs: "
            f"{first['inputs']} gives {first['wanted']}, not {first['outputs']}",
            first["wanted"], first["outputs"], subject, nodes,
        )  # fmt: skip


def _wanted_output(op: str, inputs: str, outputs: str) -> str | None:
    """Return the output's shape as it should be; None: it is so, or cannot be told."""
    ins, outs = parse_types(inputs), parse_types(outputs)
    if not ins or not outs or len(outs) != 1:
        return None
    shape = _shape_after(op, [shape for _, shape in ins])
    if shape is None or shape == outs[0][1]:
        return None
    return "[" + ",".join(map(str, shape)) + "]"


def _shape_after(op: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    if op in ("aten::mm", "aten::bmm"):
        if len(shapes) != 2 or len(shapes[0]) != len(shapes[1]):
            return None
        left, right = shapes
        if left[-1] != right[-2] or left[:-2] != right[:-2]:
            return (*left[:-1], right[-1], -1)
        return (*left[:-1], right[-1])
    rank = max(len(shape) for shape in shapes)
    sizes = []
    for place in range(rank):
        across = {shape[place - rank + len(shape)] for shape in shapes if place - rank + len(shape) >= 0} - {1}
        if len(across) > 1:
            return (-1,)
        sizes.append(across.pop() if across else 1)
    return tuple(sizes)


def _held(subject: Subject, plan: Plan) -> pl.DataFrame:
    """Return the parameters that the model has too, each with the shard (`local`) that its rank must hold."""
    sizes = plan.expectation.sizes
    wanted = pl.DataFrame(
        [
            (
                parameter.name,
                ",".join(
                    str(size // sizes[parameter.axis] if place == parameter.dim else size)
                    for place, size in enumerate(parameter.shape)
                ),
                ",".join(map(str, parameter.shape)),
                "" if parameter.dim is None else parameter.axis,
            )
            for parameter in plan.expectation.parameters
        ],
        schema={"label": pl.String, "local": pl.String, "whole": pl.String, "axis": pl.String},
        orient="row",
    )
    return subject.nodes.filter(pl.col("kind") == "parameter").join(wanted, on="label")


def _shards(subject: Subject, plan: Plan, held: pl.DataFrame) -> Iterator[Finding]:
    sizes = plan.expectation.sizes
    shape = pl.col("outputs").str.extract(r"\[([0-9,]*)\]")
    wrong = held.with_columns(shape=shape).filter(pl.col("shape") != pl.col("local"))
    if len(wrong):
        first = wrong.row(0, named=True)
        nodes = subject.expand(wrong["node"])
        axis = f" / {first['axis'].upper()}{sizes[first['axis']]}" if first["axis"] else ", replicated"
        yield _finding(
            "dimension.shard",
            f"{len(nodes)} parameters are not the shard that the strategy gives: {first['label']} is "
            f"[{first['shape']}], not [{first['local']}]",
            f"[{first['whole']}]{axis} = [{first['local']}]", f"[{first['shape']}]", subject, nodes,
        )  # fmt: skip
