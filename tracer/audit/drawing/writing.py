"""A graph as a drawing that can be read back: one node for each part of the model and each communication.

Operators without a role (views, masks, bookkeeping) are left out, and a path through them is an edge; so what is drawn
is a DAG, and every dependency between what is drawn is in it. Shapes and colours follow the conventions of the views:
ellipses communicate, boxes compute, parallelograms route.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.subject import Subject

_ROUTING = ("router", "top-k choice", "expert aggregation")
_COLORS = ("#dbe9f6", "#fde2c8", "#d9efd8", "#f6d6d9", "#e5dcf1", "#eadfd9", "#f9dfee", "#e6e6e6")
_SHOWN_PHASES = ("forward", "backward", "prefill", "decode")


def drawn_nodes(subject: Subject) -> tuple[pl.DataFrame, list[tuple[int, int]]]:
    """Return the nodes of a dataset that are drawn, and the edges between them, a path through others being one."""
    nodes = subject.nodes.filter(
        (pl.col("role").is_not_null() & pl.col("phase").is_in(_SHOWN_PHASES))
        | pl.col("kind").is_in(["collective", "send", "recv"])
        | ((pl.col("kind") == "input") & pl.col("label").is_in(["tokens", "labels"]))
        | ((pl.col("kind") == "output") & pl.col("label").is_in(["loss", "sampled_tokens"]))
    )
    silent = subject.communications.filter(
        (pl.col("purpose") == "optimizer") | pl.col("purpose").is_null() | ~pl.col("members").str.contains("[,>]")
    )
    nodes = nodes.filter(~pl.col("node").is_in(silent["node"].implode()))
    edges = list(contract(subject.edges, set(nodes["node"]), subject.nodes["node"]))
    touched = pl.Series(sorted({node for edge in edges for node in edge}), dtype=pl.Int64)
    ends = pl.col("kind").is_in(["input", "output"])
    return nodes.filter(~ends | pl.col("node").is_in(touched.implode())), edges


def draw_subject(subject: Subject) -> Iterator[str]:
    """Yield a dataset's graph as lines of DOT, a node for each operator with a role, rank and pass."""
    nodes, edges = drawn_nodes(subject)
    met = {row["node"]: row for row in subject.communications.iter_rows(named=True)}
    receives = dict(subject.edges.filter(pl.col("kind") == "p2p").select("dst", "src").iter_rows())
    gave = dict(subject.parts.group_by("node").agg(pl.col("send_bytes").drop_nulls().unique().sort()).iter_rows())
    ranks = dict(subject.where.group_by("node").agg(pl.col("rank").sort()).iter_rows())
    yield "digraph truedag {"
    yield '  node [fontname="Helvetica", style=filled, fillcolor="#f4f4f4"];'
    for row in nodes.iter_rows(named=True):
        where = ranks.get(row["node"], [])
        told = met.get(row["node"])
        if row["kind"] == "recv" and receives.get(row["node"]) in met:
            told = met[receives[row["node"]]]
        label, shape = _label(row, told, gave.get(row["node"], []))
        label.insert(1, ", ".join(_place(row, where)))
        color = _COLORS[where[0] % len(_COLORS)] if where else "#ffffff"
        text = "\\n".join(part.replace('"', "'") for part in label if part)
        yield f'  n{row["node"]} [label="{text}", shape={shape}, fillcolor="{color}"];'
    dashed = set(nodes.filter(pl.col("role").is_in(["router", "top-k choice"]))["node"])
    for source, target in edges:
        style = " [style=dashed]" if source in dashed or (source in receives.values() and target in receives) else ""
        yield f"  n{source} -> n{target}{style};"
    yield "}"


def _label(row: Mapping[str, object], told: Mapping[str, object] | None, gave: list[int]) -> tuple[list[str], str]:
    if row["kind"] in ("input", "output"):
        return [f"{str(row['kind']).capitalize()}: {str(row['label']).replace('_', ' ')}"], "box"
    if row["kind"] in ("send", "recv"):
        purpose = "message" if told is None else str(told["purpose"])
        lines = [f"{'send' if row['kind'] == 'send' else 'receive'} {purpose}"]
        return lines + ([f"{gave[-1]} bytes"] if row["kind"] == "send" and gave else []), "ellipse"
    if told is not None:
        part = "" if told["weight"] == 1 else f", part of {round(1 / float(str(told['weight'])))}"
        lines = [f"{told['purpose']}: {told['kind']} over {told['axis']}{part}"]
        return lines + ([f"{'up to ' if len(gave) > 1 else ''}{gave[-1]} bytes each"] if gave else []), "ellipse"
    lines = [str(row["role"])]
    if row["inputs"]:
        lines.append(f"in: {row['inputs']}")
    if row["outputs"]:
        lines.append(f"out: {row['outputs']}")
    return lines, "parallelogram" if row["role"] in _ROUTING else "box"


def _place(row: Mapping[str, object], ranks: Iterable[int]) -> Iterator[str]:
    layer, expert, batch, step = (int(str(row[name])) for name in ("layer", "expert", "microbatch", "decode_step"))
    if layer >= 0:
        yield f"layer {layer}"
    if expert >= 0:
        yield f"expert {expert}"
    told = list(ranks)
    if told:
        yield f"rank{'s' if len(told) > 1 else ''} {write_runs(told).replace(',', ' and ')}"
    if row["phase"]:
        yield str(row["phase"])
    if batch >= 0:
        yield f"microbatch {batch}"
    if step >= 0:
        yield f"decode step {step}"


def contract(edges: pl.DataFrame, kept: set[int], order: pl.Series) -> Iterator[tuple[int, int]]:
    """Yield the edges between kept nodes, a path through others being one; nodes are in a topological order."""
    sources: dict[int, list[int]] = {}
    for source, target in edges.select("src", "dst").unique().iter_rows():
        sources.setdefault(target, []).append(source)
    behind: dict[int, frozenset[int]] = {}
    for node in order.sort().to_list():
        reached: set[int] = set()
        for source in sources.get(node, ()):
            if source in kept:
                reached.add(source)
            else:
                reached |= behind.get(source, frozenset())
        if node in kept:
            yield from ((source, node) for source in sorted(reached))
        else:
            behind[node] = frozenset(reached)
