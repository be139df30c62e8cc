"""What is at the other end of edges that leave a sheet of operators: another layer, phase or call, or a parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import polars as pl

from truedag.tracer.views import captions
from truedag.tracer.views.calls import CALL, Calls

PARAMETER = "parameter "
_LAYERS = "\0layers"  # stands for their numbers


def name_ends(
    calls: Calls, items: pl.DataFrame, inside: pl.DataFrame
) -> tuple[dict[str, dict[int, list[int]]], dict[str, dict[int, list[int]]]]:
    """Say where the data of the other edges come from and go to, each text with operators, edges and bytes."""
    own = items.select("node", "number", "layer", "phase", *CALL).unique("node")
    others = calls.items.select("node", "kind", "layer", "phase", "path", "op", "label", "expert", *CALL).unique("node")
    crossing = calls.edges.join(inside, on=["src", "dst"], how="anti")
    found: list[dict[str, dict[int, list[int]]]] = []
    for near, far in (("dst", "src"), ("src", "dst")):
        rows = (
            crossing.select(pl.col(near).alias("node"), pl.col(far).alias("other"), "bytes")
            .join(own, on="node")
            .join(others.rename({"node": "other"}), on="other", suffix="_there")
            .rename({"kind": "kind_there", "path": "path_there", "op": "op_there", "label": "label_there"})
        )
        is_same_call = pl.all_horizontal(pl.col(name) == pl.col(f"{name}_there") for name in CALL)
        by = (
            "number",
            "kind_there",
            "layer",
            "layer_there",
            "phase",
            "phase_there",
            "path_there",
            "op_there",
            "label_there",
            "expert",
            "is_same_call",
        )
        grouped = (
            rows.with_columns(is_same_call=is_same_call).group_by(by).agg(num=pl.len(), size=pl.col("bytes").sum())
        )
        texts: dict[str, dict[int, list[int]]] = defaultdict(dict)
        layers: dict[str, set[int]] = defaultdict(set)
        for row in grouped.sort(*by, nulls_last=True).to_dicts():
            text = _name_other(row)
            layers[text].add(row["layer_there"])
            into = texts[text].setdefault(row["number"], [0, 0])
            into[0] += row["num"]
            into[1] += row["size"] or 0
        found.append({text.replace(_LAYERS, captions.name_layers(layers[text])): into for text, into in texts.items()})
    return found[0], found[1]


def _name_other(row: Mapping[str, Any]) -> str:
    """Say what is at an edge's other end: a parameter, what another phase keeps, another layer, another call."""
    path, op = row["path_there"] or "", (row["op_there"] or "").rpartition("::")[2]
    kind, layer = row["kind_there"], row["layer_there"]
    if kind == "parameter":
        return PARAMETER + captions.relative_module(row["label_there"], layer)
    if kind in ("input", "output"):
        return f"the program's {kind}"
    away = layer - row["layer"]
    if layer == -1 and away:
        where = "outside the layers"
    elif away and row["layer"] == -1:
        where = _LAYERS
    elif away:
        where = {-1: "the layer before", 1: "the layer after"}.get(away, f"{abs(away)} layers off")
    else:
        where = ""
    if row["phase_there"] != row["phase"]:
        return " ".join(part for part in (row["phase_there"] or "no phase", where, "" if where else path) if part)
    call = "" if row["is_same_call"] or where else "another call"
    return " ".join(part for part in (call, where, "" if where else path, op) if part)
