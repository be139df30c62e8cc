"""Writes the page of a graph: folds it, adds up, and puts all of it into one HTML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph
from truedag.tracer.views.page.bundle import bundle
from truedag.tracer.views.page.clock import Occupation, occupy
from truedag.tracer.views.page.figures import measure, on_ranks
from truedag.tracer.views.page.leaves import Leaves, find_leaves
from truedag.tracer.views.page.payload import Payload
from truedag.tracer.views.page.slices import Slices, cut_slices
from truedag.tracer.views.page.traffic import collective_traffic, message_traffic, stage_matrix
from truedag.tracer.views.page.tree import Tree, build_tree, name_parts
from truedag.tracer.views.page.verdicts import Paths, find_paths, place_findings

AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")
MOST_SLICES = 600_000  # in the page itself; more lie beside it
SLICES_FILE = "slices.parquet"
_ROW_GROUP = 1 << 16
_MARK = re.compile("@@([A-Z]+)@@")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What was written.

    Attributes:
        html: the page.
        num_bytes: its size.
        num_nodes: nodes of the graph.
        num_shown: nodes of the tree that they are folded to, at the finest.
        slices: the file with every slice, where the page cannot hold them; None: it does, or there are none.
    """

    html: Path
    num_bytes: int
    num_nodes: int
    num_shown: int
    slices: Path | None


def write_page(
    graph: Graph,
    out: Path,
    *,
    audit: Mapping[str, Any] | None = None,
    why_no_audit: str = "",
    note: str = "",
    most_slices: int = MOST_SLICES,
    progress: Callable[[str], None] = lambda _: None,
) -> Page:
    """Write `out`/index.html, and slices.parquet beside it where there are more slices than a page should carry.

    Args:
        graph: what is shown.
        out: a folder; it is made.
        audit: what an audit found, as `audit.report.to_json` has it; None: none was made.
        why_no_audit: why there is none.
        note: what the page says of itself on top, "synthetic" say.
        most_slices: as many slices go into the page; of ranks that are alike those of one, and as many are made of them
            when it opens.
        progress: is told what goes on.

    Raises:
        GraphError: the graph is broken, or the files cannot be written.
    """
    progress("folding the graph")
    leaves = find_leaves(graph)
    tree = build_tree(leaves)
    spent = on_ranks(leaves)
    progress("adding up")
    payload = Payload()
    occupation = occupy(graph, leaves)
    slices = None
    if occupation is not None:
        slices = cut_slices(leaves, tree, occupation.start_ns, occupation.end_ns)
    is_apart = slices is not None and len(slices.table) > most_slices
    _add_tree(payload, leaves, tree, spent)
    _add_ranks(payload, graph, leaves, occupation, spent)
    _add_traffic(payload, graph, leaves, spent)
    progress("finding the critical path")
    paths = find_paths(graph, leaves)
    origin = 0 if occupation is None else occupation.start_ns
    _add_paths(payload, paths, tree, origin)
    if slices is not None and not is_apart:
        _add_slices(payload, slices)
    findings = [
        {**finding, "leaves": sorted(tree.order[finding["leaves"]].tolist())}
        for finding in place_findings(audit, leaves)
    ]
    payload.add_document("findings", findings)
    payload.add_document("why_no_audit", why_no_audit)
    meta = _describe(graph, leaves, occupation, slices, paths, audit, note, is_apart=is_apart)
    payload.add_document("meta", meta | {"most_slices": most_slices})
    progress("writing the page")
    return _write(out, payload, slices if is_apart else None, leaves.num_nodes, len(leaves.table), _title(graph))


def _add_tree(payload: Payload, leaves: Leaves, tree: Tree, spent: pl.DataFrame) -> None:
    for name, values in (("parent", tree.parent), ("depth", tree.depth), ("low", tree.low), ("high", tree.high)):
        payload.add("tree", name, values)
    payload.add_strings("tree", "name", tree.name)
    figures = measure(leaves, tree, spent).table
    for name in ("num_nodes", "num_measured", "num_estimated", "num_communications"):
        payload.add("tree", name, figures[name].fill_null(0).to_numpy())
    for name in ("flops", "bytes_read", "bytes_written", "sent_bytes"):
        payload.add("tree", name, _floats(figures[name].cast(pl.Float64)))
    for name in ("mean_ns", "max_ns", "wait_mean_ns", "wait_max_ns", "call_mean_ns", "call_max_ns", "estimated_mean_ns",
                 "estimated_max_ns", "estimated_wait_mean_ns", "estimated_wait_max_ns"):  # fmt: skip
        payload.add("tree", name, _floats(figures[name].cast(pl.Float32)))
    for name in ("worst_rank", "wait_rank", "call_rank", "estimated_rank", "estimated_wait_rank"):
        payload.add("tree", name, figures[name].fill_null(-1).cast(pl.Int64).to_numpy())
    for name in ("ranks", "microbatches"):
        payload.add_lists("tree", name, [one if one is not None else [] for one in figures[name].to_list()])
    walked = leaves.table.with_columns(name_parts(leaves.table), place=pl.Series(tree.order)).sort("place")
    for name in ("step", "decode_step", "stage", "layer", "expert"):
        payload.add("leaves", name, walked[name].fill_null(-1).to_numpy())
    for name in ("phase", "kind", "category", "op", "label", "module", "part", "inputs", "outputs"):
        payload.add_strings("leaves", name, walked[name])
    payload.add("leaves", "num_shapes", walked["num_shapes"].to_numpy())
    payload.add("leaves", "node", tree.leaf_node, delta=True)
    edges = leaves.edges.with_columns(
        src=pl.Series(tree.order[leaves.edges["src"].to_numpy()]),
        dst=pl.Series(tree.order[leaves.edges["dst"].to_numpy()]),
    ).sort("src", "dst")
    payload.add("edges", "src", edges["src"].to_numpy(), delta=True)
    payload.add("edges", "dst", edges["dst"].to_numpy())
    payload.add_strings("edges", "kind", edges["kind"])
    payload.add("edges", "num_edges", edges["num_edges"].to_numpy())
    payload.add("edges", "bytes", edges["bytes"].fill_null(0).cast(pl.Float64).to_numpy())


def _add_ranks(
    payload: Payload, graph: Graph, leaves: Leaves, occupation: Occupation | None, spent: pl.DataFrame
) -> None:
    ranks, groups = graph.ranks.sort("rank").collect(), graph.groups.sort("group").collect()
    for name in ("rank", *AXES):
        payload.add("ranks", name, ranks[name].fill_null(-1).cast(pl.Int64).to_numpy())
    payload.add("ranks", "rank_class", ranks["rank_class"].fill_null(-1).cast(pl.Int64).to_numpy())
    for name in ("host", "device"):
        payload.add_strings("ranks", name, ranks[name])
    payload.add("ranks", "clock_error_ns", _floats(ranks["clock_error_ns"].cast(pl.Float64)))
    sent = spent.group_by(alike=pl.col("rank").cast(pl.Int64)).agg(pl.col("sent_bytes").sum(), pl.col("calls").sum())
    told = leaves.ranks.sort("rank").join(sent, on="alike", how="left", maintain_order="left")
    payload.add("ranks", "sent_bytes", told["sent_bytes"].fill_null(0).cast(pl.Float64).to_numpy())
    payload.add("ranks", "num_parts", told["calls"].fill_null(0).to_numpy())
    names = ("compute_ns", "transfer_ns", "waiting_ns", "bubble_ns", "host_ns", "overlap_ns")
    for place, name in enumerate(names):
        values = np.full(len(ranks), np.nan) if occupation is None else occupation.spent_ns[place]
        payload.add("ranks", name, values.astype(np.float64))
    if occupation is not None:
        for place, name in enumerate(("compute", "transfer", "waiting", "bubble")):
            payload.add("heat", name, occupation.bins[place].reshape(-1))
    payload.add("groups", "group", groups["group"].to_numpy())
    payload.add_strings("groups", "axis", groups["axis"])
    payload.add_strings("groups", "description", groups["description"])
    payload.add_lists("groups", "ranks", groups["ranks"].list.sort().to_list())


def _add_traffic(payload: Payload, graph: Graph, leaves: Leaves, spent: pl.DataFrame) -> None:
    messages, pairs = message_traffic(graph)
    if not leaves.has_times:
        pairs = pairs.clear()  # they tie slices, of which there are none
    for name in ("source", "destination"):
        payload.add("pairs", name, pairs[name].to_numpy(), delta=True)
    for name in ("source", "destination", "num"):
        payload.add("messages", name, messages[name].cast(pl.Int64).to_numpy())
    payload.add("messages", "bytes", messages["bytes"].cast(pl.Float64).to_numpy())
    collectives = collective_traffic(leaves)
    for name in ("group", "rank", "num"):
        payload.add("collectives", name, collectives[name].cast(pl.Int64).to_numpy())
    payload.add_strings("collectives", "kind", collectives["kind"])
    for name in ("bytes", "wait_ns", "transfer_ns"):
        payload.add("collectives", name, _floats(collectives[name].cast(pl.Float64)))
    cells = stage_matrix(leaves, spent)
    for name in ("phase", "part"):
        payload.add_strings("cells", name, cells[name])
    for name in ("stage", "layer", "num_ranks", "num_nodes"):
        payload.add("cells", name, cells[name].fill_null(-1).cast(pl.Int64).to_numpy())
    payload.add("cells", "worst_rank", cells["worst_rank"].fill_null(-1).cast(pl.Int64).to_numpy())
    for name in ("mean_ns", "max_ns", "estimated_ns", "estimated_max_ns", "wait_ns", "estimated_wait_ns", "sent_bytes",
                 "flops"):  # fmt: skip
        payload.add("cells", name, _floats(cells[name].cast(pl.Float64)))


def _add_paths(payload: Payload, paths: Paths, tree: Tree, origin: int) -> None:
    payload.add_document("steps", [
        {**step, "start_ns": step["start_ns"] - origin, "end_ns": step["end_ns"] - origin} for step in paths.steps
    ])  # fmt: skip
    if paths.pieces.is_empty():
        return
    pieces = paths.pieces
    for name in ("start_ns", "end_ns"):
        payload.add("pieces", name, (pieces[name] - origin).cast(pl.Float64).to_numpy())
    for name in ("step", "rank", "node"):
        payload.add("pieces", name, pieces[name].cast(pl.Int64).to_numpy())
    payload.add_strings("pieces", "spent", pieces["spent"])
    payload.add("pieces", "leaf", tree.order[pieces["leaf"].to_numpy()])
    late = paths.stragglers
    for name in ("node", "group", "layer", "rank", "held_rank", "held_node"):
        payload.add("stragglers", name, late[name].fill_null(-1).cast(pl.Int64).to_numpy())
    for name in ("late_ns", "waited_ns", "held_ns"):
        payload.add("stragglers", name, _floats(late[name].cast(pl.Float64)))
    for name in ("start_ns", "end_ns"):
        payload.add("stragglers", name, _floats((late[name] - origin).cast(pl.Float64)))
    for name in ("label", "phase", "held_spent", "held_label"):
        payload.add_strings("stragglers", name, late[name])
    payload.add("stragglers", "leaf", tree.order[late["leaf"].to_numpy()])


def _add_slices(payload: Payload, slices: Slices) -> None:
    table = slices.table
    for name in ("rank", "node", "lane", "microbatch", "leaf", "wait", "span", "is_estimated"):
        payload.add("slices", name, table[name].fill_null(-1).cast(pl.Int64).to_numpy())
    payload.add("slices", "start", table["start"].cast(pl.Int64).to_numpy(), delta=True)
    if slices.turn is None:
        return
    teams, code = np.unique(table["team"].to_numpy(), return_inverse=True)
    payload.add("slices", "team", code)
    payload.add("turns", "turn", np.maximum(slices.turn[teams], 0).reshape(-1))
    for name in ("like", "alike"):
        payload.add("ranks", name, slices.ranks[name].to_numpy())
    for name in ("alike", "place", "leaf"):
        payload.add("moved", name, slices.leaves[name].to_numpy())


def _describe(
    graph: Graph, leaves: Leaves, occupation: Occupation | None, slices: Slices | None, paths: Paths,
    audit: Mapping[str, Any] | None, note: str, *, is_apart: bool,
) -> dict[str, Any]:  # fmt: skip
    meta = graph.meta
    kinds = leaves.table.group_by("kind").agg(pl.col("num_nodes").sum()).sort("num_nodes", descending=True)
    told = ("deployment", "strategy", "world_size", "steps", "torch", "truedag", "recorder", "num_unmatched",
            "missing_ranks", "dry", "estimate")  # fmt: skip
    return {name: meta.get(name) for name in told} | {
        "unmatched": [str(one) for one in meta.get("unmatched") or []][:200],
        "note": note,
        "nodes": dict(kinds.iter_rows()),
        "edges": leaves.num_edges,
        "num_inner_edges": leaves.num_inner_edges,
        "num_decode_steps": leaves.num_decode_steps,
        "num_carried_edges": leaves.num_carried_edges,
        "num_measured": int(leaves.table["num_measured"].sum()),
        "num_estimated": int(leaves.table["num_estimated"].sum()),
        "window_ns": None if occupation is None else [0, occupation.end_ns - occupation.start_ns],
        "origin_ns": None if occupation is None else occupation.start_ns,
        "num_bins": None if occupation is None else occupation.bins.shape[2],
        "is_estimated": occupation is not None and occupation.is_estimated,
        "tick_ns": None if slices is None else slices.tick_ns,
        "num_slices": 0 if slices is None else slices.num_slices,
        "slices_file": SLICES_FILE if is_apart else None,
        "no_path": paths.why_not,
        "num_stragglers": paths.num_stragglers,
        "audit": None if audit is None else {key: audit[key] for key in ("verdict", "against", "passed", "unchecked")},
    }


def _write(out: Path, payload: Payload, apart: Slices | None, num_nodes: int, num_shown: int, title: str) -> Page:
    folder = files("truedag.tracer.views.page") / "front"
    sources = {
        one.name.removesuffix(".js"): one.read_text(encoding="utf-8")
        for one in folder.iterdir()
        if one.name.endswith(".js")
    }
    parts = {
        "TITLE": title,
        "STYLE": (folder / "style.css").read_text(encoding="utf-8"),
        "SCRIPT": bundle(sources, "main"),
        "PAYLOAD": payload.encode(),
    }
    frame = (folder / "page.html").read_text(encoding="utf-8")
    html = _MARK.sub(lambda found: parts[found[1]], frame)
    page, beside = out / "index.html", out / SLICES_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
        if apart is not None:
            # What browsers can unpack by themselves, and row groups small enough to be fetched one by one.
            apart.spread().with_columns(pl.col("node", "start", "span", "wait").cast(pl.Int64)).write_parquet(
                beside, compression="gzip", row_group_size=_ROW_GROUP, statistics=True
            )
        else:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise GraphError(f"cannot write the page into {out}: {error}") from error
    return Page(
        html=page,
        num_bytes=page.stat().st_size,
        num_nodes=num_nodes,
        num_shown=num_shown,
        slices=None if apart is None else beside,
    )


def _title(graph: Graph) -> str:
    return escape(str(graph.meta.get("deployment") or "recorded program"))


def _floats(series: pl.Series) -> np.ndarray[Any, Any]:
    return series.fill_null(float("nan")).to_numpy()
