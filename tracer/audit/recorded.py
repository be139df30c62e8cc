"""A dataset as a subject: what each operator does and what each communication is for, by the modules they ran in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from truedag.tracer.audit.roles import KIND_OF_OP, purpose_of, role_of, split_module
from truedag.tracer.audit.subject import COMMUNICATIONS, COVERS, NODES, Subject

if TYPE_CHECKING:
    from truedag.tracer.graph import Graph

_PLACE = ("layer", "phase", "microbatch", "decode_step")
_FORWARD = ("forward", "prefill", "decode")
_GRADIENTS = {**dict.fromkeys(("dp", "cp", "dp+cp"), "dense gradients"), "edp": "expert gradients"}
_PARAMETERS = {**dict.fromkeys(("dp", "cp", "dp+cp"), "dense parameters"), "edp": "expert parameters"}
_LATE = {
    "tp": "sequence gradients",
    "pp": "embedding gradients",
    "tp+dp": "score corrections",
    "tp+dp+cp": "score corrections",
}
_OF_BUFFERS = ("dense gradients", "expert gradients", "dense parameters", "expert parameters")


NODE_COLUMNS = (
    "node", "kind", "rank", "op", "label", "module", "layer", "stage", "microbatch", "expert", "phase", "decode_step",
    "inputs", "outputs",
)  # fmt: skip
"""What the audit reads of nodes."""

TYPE = pl.col("dtype") + "[" + pl.col("shape").cast(pl.List(pl.String)).list.join(",") + "]"
"""What an edge carries, as in float32[64,512]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A dataset's tables in memory."""

    nodes: pl.DataFrame
    edges: pl.DataFrame
    participants: pl.DataFrame
    groups: pl.DataFrame
    ranks: pl.DataFrame
    meta: Mapping[str, Any]


def read_tables(graph: Graph) -> Tables:
    """Read what the audit needs of a dataset; program order stays on disk."""
    return Tables(
        nodes=graph.nodes.select(NODE_COLUMNS).collect(),
        edges=graph.edges.filter(pl.col("kind") != "order").collect(),
        participants=graph.participants.select("node", "rank", "group", "send_bytes", "recv_bytes").collect(),
        groups=graph.groups.select("group", "axis", "ranks").collect(),
        ranks=graph.ranks.select("rank", "tp", "ep", "etp", "pp", "dp", "edp", "cp").collect(),
        meta=graph.meta,
    )


def subject_of(tables: Tables, *, name: str) -> Subject:
    """Return a dataset's tables as a subject."""
    nodes = with_roles(tables.nodes)
    edges = tables.edges.select("src", "dst", "kind", "bytes", type=TYPE)
    met = tables.participants.select("node", pl.col("rank").cast(pl.Int32))
    own = nodes.filter(pl.col("rank") >= 0).select("node", "rank")
    return Subject(
        name=name,
        form="dataset",
        nodes=nodes.select(list(NODES)),
        covers=nodes.filter(pl.col("role").is_not_null()).select(list(COVERS)),
        where=pl.concat([own, met.join(own, on="node", how="anti")]),
        communications=pl.concat(
            [collectives(tables, nodes, members_of(tables.participants)), told_messages(nodes, edges)]
        ),
        parts=tables.participants.select("node", pl.col("rank").cast(pl.Int32), "send_bytes", "recv_bytes"),
        edges=edges,
        groups=told_groups(tables.groups),
        ranks=tables.ranks,
        unmatched=tuple(map(str, tables.meta.get("unmatched", ()))),
    )


def told_groups(groups: pl.DataFrame) -> pl.DataFrame:
    """Return `GROUPS` of a dataset's groups."""
    return groups.select(
        "axis",
        members=pl.col("ranks").list.sort().cast(pl.List(pl.String)).list.join(","),
        size=pl.col("ranks").list.len().cast(pl.Int32),
    )


def members_of(participants: pl.DataFrame) -> pl.DataFrame:
    """Return node, members, size, group of each collective."""
    return (
        participants.sort("node", "rank")
        .group_by("node", maintain_order=True)
        .agg(members=pl.col("rank").cast(pl.String).str.join(","), size=pl.len(), group=pl.col("group").first())
    )


def with_roles(nodes: pl.DataFrame) -> pl.DataFrame:
    """Add tail, inside and role to a dataset's nodes: where in a layer or outside, and what they do."""
    modules = nodes["module"].drop_nulls().unique().to_list()
    split = [split_module(module) for module in modules]
    tails = pl.DataFrame(
        {"module": modules, "tail": [tail for _, tail in split], "inside": [layer >= 0 for layer, _ in split]},
        schema={"module": pl.String, "tail": pl.String, "inside": pl.Boolean},
    )
    nodes = nodes.join(tails, on="module", how="left", maintain_order="left")
    pairs = nodes.filter(pl.col("kind") == "compute").select("tail", "inside", "op").drop_nulls().unique()
    roles = pairs.with_columns(
        role=pl.Series(
            [role_of(tail, 0 if inside else -1, op) for tail, inside, op in pairs.iter_rows()], dtype=pl.String
        )
    ).drop_nulls()
    nodes = nodes.join(roles, on=["tail", "inside", "op"], how="left", maintain_order="left")
    nodes = nodes.with_columns(
        role=pl.when((pl.col("kind") == "compute") & pl.col("phase").is_in([*_FORWARD, "backward"])).then("role"),
        phase=pl.col("phase"),
    )
    return _tell_residuals(nodes)


def _tell_residuals(nodes: pl.DataFrame) -> pl.DataFrame:
    """Tell the two residual additions of a layer apart: one is before the feed-forward's norm, one after it."""
    norms = (
        nodes.filter(pl.col("role") == "feed-forward norm")
        .group_by("rank", *_PLACE)
        .agg(norm=pl.col("node").min())
        .with_columns(pl.col("rank").cast(pl.Int32))
    )
    nodes = nodes.join(norms, on=["rank", *_PLACE], how="left", nulls_equal=True, maintain_order="left")
    residual = pl.col("role") == "residual"
    after = pl.when(pl.col("norm").is_null() | (pl.col("node") < pl.col("norm")))
    told = after.then(pl.lit("attention residual")).otherwise(pl.lit("feed-forward residual"))
    return nodes.with_columns(
        role=pl.when(residual & (pl.col("phase") == "backward")).then(None).when(residual).then(told).otherwise("role")
    ).drop("norm")


def collectives(tables: Tables, nodes: pl.DataFrame, met: pl.DataFrame) -> pl.DataFrame:
    """Return `COMMUNICATIONS` of a dataset's collectives; `met`: their members."""
    axes = tables.groups.select(pl.col("group"), "axis")
    rows = (
        nodes.filter(pl.col("kind") == "collective")
        .join(met, on="node", how="left")
        .join(axes.with_columns(pl.col("group").cast(pl.Int32)), on="group", how="left")
        .with_columns(
            comm=pl.col("op").replace_strict(KIND_OF_OP, default=pl.col("op")),
            flat=~pl.col("inputs").str.split(" ").list.first().fill_null("").str.contains(",", literal=True),
        )
    )
    rows = rows.join(_votes(rows, tables.participants, nodes), on="node", how="left")
    plain = rows.select("tail", "inside").drop_nulls().unique()
    purposes = plain.with_columns(
        plain_purpose=pl.Series(
            [purpose_of(tail, 0 if inside else -1) for tail, inside in plain.iter_rows()], dtype=pl.String
        )
    )
    rows = rows.join(purposes, on=["tail", "inside"], how="left")
    in_parts = pl.col("comm").is_in(["broadcast", "reduce"])
    on_experts = (pl.col("tail") == "mlp") & pl.col("inside")
    gathers = pl.col("comm") == "all-gather"
    told = rows.select(
        "node",
        purpose=pl.when(pl.col("plain_purpose") == "keys and values")
        .then("plain_purpose")
        .when(on_experts & (pl.col("comm") == "all-to-all"))
        .then(_exchange())
        .when(on_experts & gathers & pl.col("inputs").str.starts_with("int64"))
        .then(pl.lit("token counts"))
        .when(on_experts & (pl.col("axis") == "etp"))
        .then(_spread())
        .when(gathers & pl.col("axis").is_in(list(_PARAMETERS)))
        .then(pl.col("axis").replace_strict(_PARAMETERS, default=None))
        .when(pl.col("phase") == "optimizer")
        .then(pl.lit("optimizer"))
        .when((pl.col("phase") == "backward") & pl.col("axis").is_in(list(_GRADIENTS)))
        .then(pl.col("axis").replace_strict(_GRADIENTS, default=None))
        .when((pl.col("phase") == "backward") & pl.col("module").is_null())
        .then(pl.col("axis").replace_strict(_LATE, default=None))
        .otherwise("plain_purpose"),
        kind=pl.when(on_experts & (pl.col("comm") == "broadcast"))
        .then(pl.lit("all-gather"))
        .when(on_experts & (pl.col("comm") == "reduce"))
        .then(pl.lit("reduce-scatter"))
        .otherwise("comm"),
        axis="axis",
        layer="layer",
        phase="phase",
        microbatch="microbatch",
        decode_step="decode_step",
        members="members",
        weight=pl.when(on_experts & in_parts).then(1 / pl.col("size")).otherwise(1.0),
    ).cast(COMMUNICATIONS)  # type: ignore[arg-type]
    # A buffer belongs to no layer, whatever layer ran when it was sent.
    of_buffers = pl.col("purpose").is_in(_OF_BUFFERS)
    return told.with_columns(layer=pl.when(of_buffers).then(pl.lit(-1, pl.Int32)).otherwise("layer"))


def _votes(rows: pl.DataFrame, participants: pl.DataFrame, nodes: pl.DataFrame) -> pl.DataFrame:
    """Return on which side of the experts a communication is: that of the participant whose experts are nearest.

    `enters`: it brings tokens to the experts, or in the backward pass takes their gradients back.
    """
    # An activation in the backward pass is the forward pass computed again.
    again = pl.col("role") == "expert activation"
    products = pl.col("role").is_in(["expert first layer", "expert second layer"])
    begins = (
        nodes.filter(again | products)
        .group_by("rank", *_PLACE)
        .agg(
            begin=pl.col("node").min(),
            end=pl.col("node").filter(products).max(),
            is_repeated=(again & (pl.col("phase") == "backward")).any(),
        )
    )
    on_experts = rows.filter((pl.col("tail") == "mlp") & pl.col("inside")).select("node", *_PLACE)
    met = on_experts.join(participants.select("node", pl.col("rank").cast(pl.Int32)), on="node")
    early, late = pl.col("node") < pl.col("begin"), pl.col("node") > pl.col("end")
    enters = pl.when("is_repeated").then(early | late).when(pl.col("phase") == "backward").then(~early).otherwise(early)
    return (
        met.join(begins, on=["rank", *_PLACE])
        .with_columns(
            distance=pl.min_horizontal(
                (pl.col("node") - pl.col("begin")).abs(), (pl.col("node") - pl.col("end")).abs()
            ),
            enters=enters,
        )
        .sort("distance")
        .group_by("node")
        .agg(pl.col("enters").first())
    )


def _exchange() -> pl.Expr:
    """Tokens are dispatched to the experts, and what comes out is combined."""
    return (
        pl.when("flat")
        .then(pl.lit("dispatch of weights"))
        .when(pl.col("enters").fill_null(True))
        .then(pl.lit("dispatch"))
        .otherwise(pl.lit("combine"))
    )


def _spread() -> pl.Expr:
    """Tokens are gathered over the tensor-parallel ranks of an expert, and what comes out is summed and scattered."""
    gathers = pl.col("comm").is_in(["all-gather", "broadcast"])
    backward = pl.col("phase") == "backward"
    return (
        pl.when("flat")
        .then(pl.lit("expert input of weights"))
        .when(pl.col("enters").fill_null(gathers ^ backward))
        .then(pl.lit("expert input"))
        .otherwise(pl.lit("expert output"))
    )


def told_messages(nodes: pl.DataFrame, edges: pl.DataFrame) -> pl.DataFrame:
    """Return `COMMUNICATIONS` of a dataset's messages, each at its send."""
    sends = nodes.filter(pl.col("kind") == "send")
    receives = nodes.filter(pl.col("kind") == "recv").select(dst="node", to="rank")
    met = edges.filter(pl.col("kind") == "p2p").join(receives, on="dst").select(node="src", to="to").unique("node")
    return (
        sends.join(met, on="node", how="left")
        .select(
            "node",
            purpose=pl.when(pl.col("phase") == "backward")
            .then(pl.lit("activation gradients"))
            .when(pl.col("inputs").str.starts_with("int64"))
            .then(pl.lit("sampled tokens"))
            .otherwise(pl.lit("activations")),
            kind=pl.lit("message"),
            axis=pl.lit("pp"),
            layer=pl.lit(-1),
            phase="phase",
            microbatch="microbatch",
            decode_step="decode_step",
            members=pl.col("rank").cast(pl.String) + ">" + pl.col("to").cast(pl.String),
            weight=pl.lit(1.0),
        )
        .cast(COMMUNICATIONS)  # type: ignore[arg-type]
    )
