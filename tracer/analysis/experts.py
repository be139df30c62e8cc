"""Experts: where each one is, and how many tokens it got.

An expert's tokens are the rows of its first matrix product of each pass, forward: what it was really given to compute.
Ranks that share an expert by tensor parallelism get the same ones, which count once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl

from truedag.tracer.graph.tensor_types import read_tensors

_PASS = ("rank", "layer", "expert", "step", "phase", "decode_step", "microbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlace:
    """Which ranks ran which experts, in layers that agree in it."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """What the experts of a layer got.

    Attributes:
        layer: the layer.
        tokens: of each expert, over all recorded steps.
        imbalance: the most that one got by the mean; None if nobody got any.
        busiest: the expert that got most, the first of those.
        num_idle: how many got none.
    """

    layer: int
    tokens: Mapping[int, int]
    imbalance: float | None
    busiest: int
    num_idle: int


def place_experts(held: pl.DataFrame) -> list[ExpertPlace]:
    """Say where each expert's operators ran, layers and experts that agree together.

    Args:
        held: layer, expert and rank, unique.
    """
    grouped = held.group_by("layer", "expert").agg(pl.col("rank").sort()).sort("layer", "expert")
    places: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for layer, expert, ranks in grouped.iter_rows():
        places.setdefault((layer, tuple(ranks)), []).append(expert)
    layers: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for (layer, ranks), experts in places.items():
        layers.setdefault((tuple(experts), ranks), []).append(layer)
    return [
        ExpertPlace(layers=tuple(found), experts=experts, ranks=ranks) for (experts, ranks), found in layers.items()
    ]


def measure_loads(nodes_where: Callable[[pl.Expr], pl.LazyFrame], ranks: pl.DataFrame) -> list[ExpertLoad]:
    """Return the tokens of each expert, layer by layer; none where no product is an expert's own.

    Args:
        nodes_where: gives the nodes of the dataset for which a condition holds.
        ranks: rank and etp.
    """
    is_of_expert = (pl.col("expert") >= 0) & (pl.col("layer") >= 0)
    products = (
        nodes_where(is_of_expert & pl.col("flops").is_not_null() & pl.col("phase").ne_missing("backward"))
        .select("node", "inputs", *_PASS)
        .collect()
    )
    rows = {text: _rows(text) for text in products["inputs"].drop_nulls().unique().to_list()}
    first = products.sort("node").group_by(_PASS).agg(pl.col("inputs").first())
    counted = first.with_columns(tokens=pl.col("inputs").replace_strict(rows, default=None, return_dtype=pl.Int64))
    shared = ranks.filter(pl.col("etp") > 0).select("rank")
    tokens = (
        counted.join(shared, on="rank", how="anti").group_by("layer", "expert").agg(pl.col("tokens").sum()).drop_nulls()
    )
    if tokens.is_empty():
        return []
    known = nodes_where(is_of_expert).select("layer", "expert").unique().collect()
    every = known.join(tokens, on=["layer", "expert"], how="left").sort("layer", "expert")
    loads = []
    for (layer,), part in every.partition_by("layer", as_dict=True, maintain_order=True).items():
        told = dict(part.select("expert", pl.col("tokens").fill_null(0)).iter_rows())
        total, most = sum(told.values()), max(told.values())
        loads.append(
            ExpertLoad(
                layer=layer,
                tokens=told,
                imbalance=most * len(told) / total if total else None,
                busiest=max(told, key=lambda expert: told[expert]),
                num_idle=sum(not count for count in told.values()),
            )
        )
    return loads


def _rows(inputs: str) -> int | None:
    """Return how many rows the left of a product has; a bias comes before it."""
    tensors = read_tensors(inputs)
    return None if len(tensors) < 2 else math.prod(tensors[-2][1][:-1])
