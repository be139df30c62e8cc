"""Checks of the graph as a graph: cycles, orphans, sources, outputs, duplicates, connection."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.checks.reach import reach, readers_of
from truedag.tracer.audit.copies import connect
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject, read_members
from truedag.tracer.topology import number_nodes

_MADE = ("compute", "collective", "send", "recv", "output")


def check_structure(subject: Subject, plan: Plan | None, audit: Audit) -> None:
    """Check the graph as a graph, whatever it is a graph of."""
    num_nodes, num_edges = subject.num_nodes, subject.num_edges
    what = f"{write_count(num_nodes, 'node')}, {write_count(num_edges, 'edge')}"
    audit.judge("structure.cycle", _cycles(subject), what)
    audit.judge("structure.orphan", _orphans(subject), f"{num_nodes:,} nodes")
    audit.judge("structure.dangling-edge", _dangling(subject), f"{num_edges:,} edges")
    audit.judge("structure.duplicate-edge", _duplicates(subject), f"{num_edges:,} edges")
    if subject.form == "dataset":
        audit.judge("structure.source", _sources(subject), "every input of every operator")
    outputs = subject.nodes.filter(pl.col("kind") == "output")
    if outputs.is_empty():
        audit.skip("structure.unreachable-output", "there is no output")
    else:
        number = len(subject.expand(outputs["node"]))
        audit.judge("structure.unreachable-output", _outputs(subject, outputs), write_count(number, "output"))
    if subject.form == "dataset" and plan is None:
        audit.skip("structure.components", "without a deployment it is not known what depends on what")
    else:
        audit.judge("structure.components", _components(subject, plan), what)


def _finding(check: str, title: str, expected: str, found: str, subject: Subject, nodes: pl.Series) -> Finding:
    ranks = subject.ranks_of(nodes)
    return Finding(
        check=check,
        title=title,
        expected=expected,
        found=found,
        fix=CHECKS[check].fix,
        severity=CHECKS[check].severity,
        nodes=subject.name_nodes(nodes),
        num_nodes=len(nodes),
        ranks=tuple(ranks),
    )


def _cycles(subject: Subject) -> Iterator[Finding]:
    edges = subject.edges
    if edges.filter(pl.col("src") >= pl.col("dst")).is_empty():
        return
    ids = subject.nodes["node"].sort()
    src, dst = _places(ids, edges["src"]), _places(ids, edges["dst"])
    known = (src >= 0) & (dst >= 0)
    _, cycle = number_nodes(np.arange(len(ids)), src[known], dst[known])
    if cycle:
        path = pl.Series([ids[place] for place in cycle], dtype=pl.Int64)
        shown = subject.name_nodes(path)
        arrows = " -> ".join((*shown, *(("...",) if len(path) > len(shown) else ()), shown[0]))
        yield _finding(
            "structure.cycle", f"A cycle of {write_count(len(cycle), 'node')}: {arrows}", "no cycle",
            f"{write_count(len(cycle), 'node')} in a circle",
            subject, path,
        )  # fmt: skip
    elif subject.form == "dataset":
        wrong = subject.expand(edges.filter(pl.col("src") >= pl.col("dst"))["src"].unique())
        yield _finding(
            "structure.cycle", f"{len(wrong)} nodes have edges to nodes of lower or equal number",
            "every edge has src < dst", "numbers that are no topological order", subject, wrong,
        )  # fmt: skip


def _places(ids: pl.Series, nodes: pl.Series) -> NDArray[np.int64]:
    """Return where each node is among the sorted ids, -1 where it is not."""
    known, wanted = ids.to_numpy(), nodes.to_numpy()
    if len(known) == 0:
        return np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, places, -1)


def _orphans(subject: Subject) -> Iterator[Finding]:
    touched = pl.concat([subject.edges["src"], subject.edges["dst"]]).unique()
    alone = subject.nodes.filter(~pl.col("node").is_in(touched.implode()) & (pl.col("kind") != "remark"))
    if subject.form == "dataset":  # what makes a tensor that nobody reads depends on nothing
        told = (pl.col("inputs").fill_null("") != "") | pl.col("kind").is_in(["collective", "send", "recv"])
        alone = alone.filter(told & pl.col("kind").is_in(_MADE))
        alone = _without_silent(subject, alone)
    if len(alone):
        nodes = subject.expand(alone["node"])
        yield _finding(
            "structure.orphan", f"{write_count(len(nodes), 'node')} without any edge",
            "every node has a producer or a reader",
            f"{len(nodes)} without", subject, nodes,
        )  # fmt: skip


def _without_silent(subject: Subject, alone: pl.DataFrame) -> pl.DataFrame:
    """Leave out barriers, which carry no data."""
    barriers = subject.communications.filter(pl.col("kind") == "barrier")["node"]
    return alone.filter(~pl.col("node").is_in(barriers.implode()))


def _dangling(subject: Subject) -> Iterator[Finding]:
    ids = subject.nodes["node"].sort()
    lost = (_places(ids, subject.edges["src"]) < 0) | (_places(ids, subject.edges["dst"]) < 0)
    wrong = subject.edges.filter(pl.Series(lost))
    number = subject.count_edges(wrong) + len(subject.dangling)
    if number:
        shown = [f"{source} -> {target}" for source, target in wrong.select("src", "dst").head(3).iter_rows()]
        shown += subject.dangling[:3]
        yield _finding(
            "structure.dangling-edge",
            f"{write_count(number, 'edge')} with an end that is no node: {', '.join(shown)}",
            "two nodes for each edge",
            f"{number} without",
            subject,
            pl.Series([], dtype=pl.Int64),
        )


def _duplicates(subject: Subject) -> Iterator[Finding]:
    # A class graph's edge is one of each rank of a class.
    own = [] if subject.copies is None else ["rank_class", "place"]
    copies = subject.edges.group_by("src", "dst", "kind", "type", "bytes", *own).len().filter(pl.col("len") > 1)
    if subject.form == "dataset":
        copies = copies.join(subject.nodes.select(dst="node", inputs="inputs", to="kind"), on="dst", how="left")
        read = pl.col("inputs").str.count_matches(pl.col("type"), literal=True)
        # A collective lists one participant's inputs, an output what is kept.
        copies = copies.filter((pl.col("to") == "compute") & (pl.col("len") > read) & (pl.col("bytes") > 0))
    if len(copies):
        times = pl.Series([1] * len(copies)) if subject.copies is None else (
            subject.copies.num_of_edges(copies["rank_class"])
        )  # fmt: skip
        number = int(((copies["len"] - 1) * times).sum())
        nodes = subject.expand(copies["src"].append(copies["dst"]).unique(maintain_order=True))
        yield _finding(
            "structure.duplicate-edge", f"{write_count(number, 'edge')} drawn more than once", "each edge once",
            f"{number} copies", subject, nodes,
        )  # fmt: skip


def _sources(subject: Subject) -> Iterator[Finding]:
    """An operator that reads tensors of some type and has an edge for none of any type."""
    reading = subject.nodes.filter((pl.col("kind") == "compute") & (pl.col("inputs").fill_null("") != ""))
    lost = reading.join(subject.edges.select(node="dst").unique(), on="node", how="anti")
    touched = subject.edges.select(node="src").unique()
    lost = lost.join(touched, on="node", how="semi")  # the others are orphans
    silent = subject.nodes.filter(pl.col("kind").is_in(["collective", "send"]) & (pl.col("inputs").fill_null("") != ""))
    silent = silent.join(subject.edges.select(node="dst").unique(), on="node", how="anti").join(
        touched, on="node", how="semi"
    )
    nodes = subject.expand(pl.concat([lost["node"], silent["node"]]))
    if len(nodes):
        yield _finding(
            "structure.source", f"{write_count(len(nodes), 'node')} that read what nobody made",
            "an edge from a producer for each tensor that is read", f"{len(nodes)} without any producer",
            subject, nodes,
        )  # fmt: skip


def _outputs(subject: Subject, outputs: pl.DataFrame) -> Iterator[Finding]:
    if subject.form == "dataset":
        reached = subject.edges.filter(pl.col("bytes") > 0).select(node="dst").unique()
    else:
        starts = subject.nodes.filter(pl.col("kind").is_in(["input", "parameter"]))["node"]
        if starts.is_empty():
            targets = subject.edges["dst"].unique()
            starts = subject.nodes.filter(~pl.col("node").is_in(targets.implode()) & (pl.col("kind") != "output"))[
                "node"
            ]
        reached = pl.DataFrame({"node": sorted(reach(starts, readers_of(subject)))}, schema={"node": pl.Int64})
    lost = outputs.join(reached, on="node", how="anti")
    if len(lost):
        nodes = subject.expand(lost["node"])
        total = len(subject.expand(outputs["node"]))
        yield _finding(
            "structure.unreachable-output", f"{write_count(len(nodes), 'output')} that no input leads to",
            "a path from an input to every output", f"{len(nodes)} of {total} without", subject, nodes,
        )  # fmt: skip


def _components(subject: Subject, plan: Plan | None) -> Iterator[Finding]:
    bare = subject.nodes.filter(pl.col("kind") != "remark")
    if subject.form == "dataset":
        bare = bare.filter(pl.col("role").is_not_null() | pl.col("kind").is_in(["collective", "send", "recv"]))
        bare = _without_silent(subject, bare)
        # The norm of the gradient goes through Python (`item()`), where no observer follows it.
        scalars = subject.communications.filter(pl.col("purpose") == "optimizer")["node"]
        bare = bare.filter(~pl.col("node").is_in(scalars.implode()))
    touched = pl.concat([subject.edges["src"], subject.edges["dst"]]).unique()
    counted = _parts(subject, bare.filter(pl.col("node").is_in(touched.implode()))["node"])
    sizes = counted.group_by("part").agg(pl.len(), pl.col("node")).sort("len", descending=True)
    allowed = 1 if plan is None else _num_islands(plan)
    if len(sizes) > allowed:
        lost = sizes[allowed:]["node"].explode(empty_as_null=False, keep_nulls=False)
        shown = ", ".join(f"{size:,}" for size in sizes["len"][:6].to_list()) + (", ..." if len(sizes) > 6 else "")
        yield _finding(
            "structure.components", f"The graph falls into {len(sizes)} parts without a connection ({shown} nodes)",
            write_count(allowed, "connected part"), f"{len(sizes)}", subject, lost,
        )  # fmt: skip


def _parts(subject: Subject, nodes: pl.Series) -> pl.DataFrame:
    """Return node, part of what nodes stand for, the part equal where edges connect them."""
    if subject.copies is not None:
        return subject.copies.parts_of(nodes)
    ids = subject.nodes["node"].sort()
    src, dst = _places(ids, subject.edges["src"]), _places(ids, subject.edges["dst"])
    known = (src >= 0) & (dst >= 0)
    label = connect(len(ids), src[known], dst[known])
    return nodes.to_frame("node").join(pl.DataFrame({"node": ids, "part": label}), on="node")


def _num_islands(plan: Plan) -> int:
    """Return into how many sets the communications of the deployment join its ranks."""
    members = pl.concat([plan.exact["members"], plan.totals["members"]]).unique().to_list()
    parent = list(range(plan.expectation.world_size))

    def root(rank: int) -> int:
        while parent[rank] != rank:
            parent[rank] = parent[parent[rank]]
            rank = parent[rank]
        return rank

    for group in members:
        first, *others = read_members(group)
        for other in others:
            parent[root(other)] = root(first)
    return len({root(rank) for rank in range(len(parent))})
