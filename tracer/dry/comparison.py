"""Whether two ranks ran the same program: operator by operator and edge by edge, whoever the other ranks are.

Theory of operation. Each rank's trace is merged alone, so that a communication is what this rank did of it. The
operators of both, in the order in which they were called, must be the same: name, labels, and what goes in and out.
What differs between ranks of one program is allowed and no more: the numbers of a layer's experts, counted from the
rank's own first; which ranks a group has, since groups are compared by axis, description and size; and sizes where the
routing decides them, which is inside the module that moves tokens to experts. An operator that reads nothing and makes
no element is autograd's, for an expert without tokens, and left out; so is what flows from and to empty tensors.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces

Row: TypeAlias = dict[str, Any]
Edges: TypeAlias = Counter[tuple[object, ...]]

_EXPERT = re.compile(r"(\.local_experts\.)(\d+)")
_SIZES = re.compile(r"\d+(?=[,\]])")
_EMPTY = re.compile(r"[\[,]0[,\]]")
_ENDS = ("parameter", "input", "output")
_SAID = ("kind", "category", "op", "label", "layer", "microbatch", "phase", "step", "decode_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two ranks' traces show of each other."""

    difference: str
    """The first place where the programs differ; '': they are the same."""

    num_sizes: int
    """Operators whose sizes differ, since the routing sent them other numbers of tokens."""

    groups: list[tuple[str | None, tuple[int, ...], tuple[int, ...]]]
    """Each group of the first rank and the same of the second: axis, ranks, ranks."""


def compare_ranks(first: Path, second: Path) -> Comparison:
    """Compare two ranks' traces.

    Raises:
        TruedagError: a trace cannot be read.
    """
    ours, theirs = _Program(_open(first)), _Program(_open(second))
    groups = [(axis, own, other) for (axis, _, own), (_, _, other) in zip(ours.groups, theirs.groups, strict=False)]
    difference, num_sizes = _compare(ours, theirs)
    return Comparison(difference=difference, num_sizes=num_sizes, groups=groups)


def _open(trace: Path) -> tuple[Graph, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="truedag-")
    traces = Path(folder.name) / "traces"
    traces.mkdir()
    (traces / trace.name).symlink_to(trace.absolute())
    merge_traces(traces, Path(folder.name) / "dag")
    return Graph.open(folder.name), folder


class _Program:
    """One rank's operators in their order, what flows between them, and its groups."""

    def __init__(self, opened: tuple[Graph, tempfile.TemporaryDirectory[str]]) -> None:
        graph, folder = opened
        with folder:
            nodes = graph.nodes.sort("node").collect()
            edges = graph.edges.filter(pl.col("kind") != "order").select("src", "dst", "kind").collect()
            groups = graph.groups.sort("group").collect()
            calls = dict(graph.participants.select("node", "arrive_ns").collect().iter_rows())
        # Grouped experts are one module: only their weights' names say which they are.
        named = nodes["module"].str.extract(_EXPERT.pattern, 2).cast(pl.Int64)
        told = [one for one in (named.min(), nodes.filter(pl.col("expert") >= 0)["expert"].min()) if one is not None]
        self._first_expert = min((int(one) for one in told if isinstance(one, int)), default=0)
        rows = [row for row in nodes.iter_rows(named=True) if not _makes_nothing(row)]
        ran = [row for row in rows if row["kind"] not in _ENDS]
        self.operators = sorted(ran, key=lambda row: (calls.get(row["node"], row["host_start_ns"]), row["node"]))
        self.ends = Counter(self.said(row) for row in rows if row["kind"] in _ENDS and row["label"])
        place = {row["node"]: number for number, row in enumerate(self.operators)}
        self.edges: Edges = Counter(
            (place[src], place[dst]) for src, dst, _ in edges.iter_rows() if src in place and dst in place
        )
        self.groups = sorted(
            (
                (row["axis"], row["description"] or "", tuple(row["ranks"]))
                for row in groups.iter_rows(named=True)
                if row["ranks"]
            ),
            key=lambda group: (group[0] or "", group[1], len(group[2])),
        )

    def said(self, row: Row) -> tuple[object, ...]:
        """What a row says that all ranks of the program say, its sizes not included."""
        module = None if row["module"] is None else _EXPERT.sub(self._renumber, row["module"])
        label = _EXPERT.sub(self._renumber, row["label"])
        shapes = (_SIZES.sub("n", row["inputs"]), _SIZES.sub("n", row["outputs"]))
        return (*(label if name == "label" else row[name] for name in _SAID), module, *shapes)

    def _renumber(self, match: re.Match[str]) -> str:
        return f"{match[1]}+{int(match[2]) - self._first_expert}"


def _makes_nothing(row: Row) -> bool:
    return row["kind"] == "compute" and not row["inputs"] and bool(_EMPTY.search(row["outputs"]))


def _compare(ours: _Program, theirs: _Program) -> tuple[str, int]:
    num_sizes = 0
    for number, (own, other) in enumerate(zip(ours.operators, theirs.operators, strict=False)):
        if ours.said(own) != theirs.said(other):
            return f"operator {number} is {_show(own)} there and {_show(other)} here", num_sizes
        if (own["inputs"], own["outputs"]) != (other["inputs"], other["outputs"]):
            if not _is_routed(own):
                return f"operator {number}, {_show(own)}, has other sizes here: {_show(other)}", num_sizes
            num_sizes += 1
    if len(ours.operators) != len(theirs.operators):
        return f"it runs {len(theirs.operators)} operators, not {len(ours.operators)}", num_sizes
    if ours.ends != theirs.ends:
        odd = next(iter((ours.ends - theirs.ends) + (theirs.ends - ours.ends)))
        return f"what goes in or comes out differs: {odd}", num_sizes
    empty = {
        number
        for pair in (ours, theirs)
        for number, row in enumerate(pair.operators)
        if _EMPTY.search(row["inputs"]) or _EMPTY.search(row["outputs"])
    }
    for edge in (ours.edges - theirs.edges) + (theirs.edges - ours.edges):
        if empty.isdisjoint(edge):
            src, dst = (_show(ours.operators[place]) for place in edge)  # type: ignore[call-overload]
            return f"data flows from {src} to {dst} on one of them only", num_sizes
    if len(ours.groups) != len(theirs.groups):
        return f"it is in {len(theirs.groups)} groups, not {len(ours.groups)}", num_sizes
    return "", num_sizes


def _is_routed(row: Row) -> bool:
    """Whether the routing decides the sizes of an operator: it moves tokens to experts, or is theirs."""
    return row["category"] == "routing" or row["expert"] >= 0 or ".mlp" in (row["module"] or "")


def _show(row: Row) -> str:
    where = f" of {row['module']}" if row["module"] else ""
    return f"{row['op']}{where}, {row['inputs']} -> {row['outputs']}"
