"""Decode steps that are alike, drawn once: the first of them in full, the others as one node that says which they are.

Theory of operation. Two steps are alike where they have the same parts on the same ranks, as many recorded nodes behind
each, the same edges inside, the same edges out of the graph's passes, and the same edges from earlier passes, whichever
pass those come from: step 5 reads the cache of five steps, step 6 of six. A run of steps like one that is drawn becomes
one node, for all stages together: each step's first stage waits for the last stage of the step before, so one node for
each stage would stand in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from truedag.tracer.analysis.quantities import write_runs

_PART = ("what", "layer", "expert", "stage", "end", "turn")
FOLD = "fold of steps"
"""The `end` of a node that stands for whole steps."""


def fold_steps(
    folded: pl.DataFrame, edges: Sequence[tuple[int, int]], gpu: str
) -> tuple[pl.DataFrame, list[tuple[int, int]]]:
    """Return nodes and edges with each run of steps like an earlier one as one node; `lines` is what that one says.

    Args:
        folded: fold, phase, decode_step (-1: none), ranks, num_nodes, places and what tells a part of the model.
        edges: between folds.
        gpu: the drawing's word before the numbers of GPUs.
    """
    nodes = {row["fold"]: row for row in folded.iter_rows(named=True)}
    runs = _find_runs(nodes, edges)
    if not runs:
        return folded.with_columns(lines=pl.lit(None, pl.List(pl.String))), list(edges)
    free = max(nodes) + 1
    into: dict[int, int] = {}
    rows = []
    for turn, (like, steps) in enumerate(runs):
        inside = [row for row in nodes.values() if row["decode_step"] in steps]
        into.update(dict.fromkeys((row["fold"] for row in inside), free + turn))
        rows.append(_row_of(free + turn, like, steps, inside))
    for row in rows:
        within = {fold for fold, run in into.items() if run == row["fold"]}
        earlier = {nodes[source]["what"] for source, target in edges if target in within and source not in within}
        row["lines"] = _write(row, [nodes[fold] for fold in within], sorted(earlier), gpu)
    schema = {**folded.schema, "lines": pl.List(pl.String)}
    new = pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)
    kept = folded.filter(~pl.col("fold").is_in(list(into)))
    drawn = {(into.get(source, source), into.get(target, target)) for source, target in edges}
    return pl.concat([kept, new], how="diagonal"), sorted(edge for edge in drawn if edge[0] != edge[1])


def _find_runs(nodes: Mapping[int, Mapping[str, Any]], edges: Iterable[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Return runs of steps that are like an earlier one: that one, and the steps."""
    told: dict[int, set[tuple[object, ...]]] = {}
    part: dict[int, tuple[object, ...]] = {}
    for fold, row in nodes.items():
        part[fold] = tuple(row[name] for name in _PART)
        if row["decode_step"] >= 0:
            mine = (*part[fold], tuple(row["ranks"]), row["num_nodes"], str(row["places"]))
            told.setdefault(row["decode_step"], set()).add(mine)
    for source, target in edges:
        start, end = nodes[source], nodes[target]
        step = end["decode_step"]
        if step >= 0:
            if start["phase"] in ("prefill", "decode"):
                place = "inside" if start["decode_step"] == step else "before"
                told[step].add((place, *part[source], *part[target]))
            else:
                told[step].add(("beside", source, *part[target]))
        elif start["decode_step"] >= 0:
            told[start["decode_step"]].add(("after", target, *part[source]))
    runs: list[tuple[int, list[int]]] = []
    drawn: dict[frozenset[tuple[object, ...]], int] = {}
    before = None
    for step in sorted(told):
        like = drawn.setdefault(frozenset(told[step]), step)
        if like != step:
            if before == like:
                runs[-1][1].append(step)
            else:
                runs.append((like, [step]))
        before = like if like != step else None
    return runs


def _row_of(fold: int, like: int, steps: Sequence[int], inside: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "fold": fold,
        "what": f"step{'s' if len(steps) > 1 else ''} {write_runs(steps)} like step {like}",
        "layer": -1,
        "expert": -1,
        "phase": "decode",
        "decode_step": steps[0],
        "stage": -1,
        "end": FOLD,
        "turn": 1,
        "kind": "compute",
        "ranks": sorted({rank for row in inside for rank in row["ranks"]}),
        "num_nodes": sum(row["num_nodes"] for row in inside),
    }


def _write(row: Mapping[str, Any], inside: Iterable[Mapping[str, Any]], earlier: Sequence[str], gpu: str) -> list[str]:
    steps, _, like = str(row["what"]).partition(" like ")
    ranks = write_runs(row["ranks"], pair="-").replace(",", " and ")
    lines = [f"decode {steps}, {'each ' if steps.startswith('steps') else ''}like decode {like}", f"{gpu} {ranks}"]
    if earlier:
        lines.append(f"reads of the passes before: {', '.join(earlier)}")
    of_stage: dict[int, int] = {}
    for node in inside:
        of_stage[node["stage"]] = of_stage.get(node["stage"], 0) + node["num_nodes"]
    if len(of_stage) > 1:
        parts = (f"{of_stage[stage]:,} on stage {stage}" for stage in sorted(of_stage))
        lines.append(f"of them {', '.join(parts)}")
    return [*lines, f"stands for {row['num_nodes']:,} recorded"]
