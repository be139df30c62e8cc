"""A class graph as a subject: its rows are checked, a few thousand of them, and told with all that they stand for.

What ranks exchange is compared group by group, so communications are made of all groups; they are few beside the
operators. The audit of the whole graph, made of the same rows, finds the same.
"""

from __future__ import annotations

import polars as pl

from truedag.tracer.audit.copies import Copies
from truedag.tracer.audit.recorded import (
    NODE_COLUMNS,
    TYPE,
    Tables,
    collectives,
    members_of,
    told_groups,
    told_messages,
    with_roles,
)
from truedag.tracer.audit.subject import COVERS, NODES, WHERE, Subject
from truedag.tracer.graph import Graph
from truedag.tracer.graph.class_dataset import ClassDataset

_OF_COPIES = ("rank_class", "team")


def class_subject_of(graph: Graph, classes: ClassDataset, *, name: str) -> Subject:
    """Read a class graph for an audit.

    Args:
        graph: the whole.
        classes: what it is made of.
        name: how its reader calls it.
    """
    rows = classes.scan_classes("nodes").select(*NODE_COLUMNS, *_OF_COPIES, "num").sort("node").collect()
    of_classes = classes.scan_classes("edges").filter(pl.col("kind") != "order")
    edges = of_classes.select("src", "dst", "kind", "bytes", *_OF_COPIES, "place", type=TYPE).collect()
    copies = Copies(
        nodes=rows.select("node", *_OF_COPIES, "num"),
        edges=edges.select("src", "dst", "kind", *_OF_COPIES, "place"),
        world=classes.world,
    )
    participants = graph.participants.select("node", "rank", "group", "send_bytes", "recv_bytes").collect()
    tables = Tables(
        nodes=rows.select(NODE_COLUMNS),
        edges=edges,
        participants=_of_classes(classes),
        groups=graph.groups.select("group", "axis", "ranks").collect(),
        ranks=graph.ranks.select("rank", "tp", "ep", "etp", "pp", "dp", "edp", "cp").collect(),
        meta=graph.meta,
    )
    nodes = with_roles(tables.nodes)
    messages = classes.messages()
    return Subject(
        name=name,
        form="dataset",
        nodes=nodes.select(list(NODES)),
        covers=nodes.filter(pl.col("role").is_not_null()).select(list(COVERS)),
        where=pl.DataFrame(schema=WHERE),
        communications=pl.concat(
            [_all_collectives(tables, nodes, copies, participants), _all_messages(nodes, edges, copies, messages)]
        ),
        parts=participants.select("node", pl.col("rank").cast(pl.Int32), "send_bytes", "recv_bytes"),
        edges=edges,
        groups=told_groups(tables.groups),
        ranks=tables.ranks,
        unmatched=tuple(map(str, graph.meta.get("unmatched", ()))),
        messages=messages,
        copies=copies,
    )


def _of_classes(classes: ClassDataset) -> pl.DataFrame:
    """Return node, rank of the participants of the rows: each class by the rank that stands for it."""
    lowest = pl.DataFrame({"rank": classes.world.lowest}, schema={"rank": pl.Int32}).with_row_index("rank_class")
    lowest = lowest.with_columns(pl.col("rank_class").cast(pl.Int32))
    rows = classes.scan_classes("participants").select("node", "rank_class").collect()
    return rows.join(lowest, on="rank_class").select("node", "rank")


def _all_collectives(tables: Tables, nodes: pl.DataFrame, copies: Copies, participants: pl.DataFrame) -> pl.DataFrame:
    """Say what each row is for, and of each group of its team that it makes it."""
    met = members_of(participants)
    told = collectives(tables, nodes, met)
    made = pl.DataFrame({"made": copies.expand(told["node"])})
    made = made.with_columns(node=copies.rows_of(made["made"])).join(
        met.select(made="node", all_members="members"), on="made", how="left", maintain_order="left"
    )
    whole = made.join(told, on="node", how="left", maintain_order="left")
    return whole.with_columns(node="made", members="all_members").select(told.columns)


def _all_messages(nodes: pl.DataFrame, edges: pl.DataFrame, copies: Copies, messages: pl.DataFrame) -> pl.DataFrame:
    """Say what each send is for, and of each rank of its class whom it goes to."""
    told = told_messages(nodes, edges)
    made = pl.DataFrame({"made": copies.expand(told["node"])})
    made = made.with_columns(row=copies.rows_of(made["made"]))
    ends = messages.unique("src", maintain_order=True)
    to = ends.join(copies.ranks_of(messages["dst"].unique()).rename({"node": "dst", "rank": "to"}), on="dst")
    whole = (
        made.join(copies.ranks_of(made["made"]).select(made="node", at="rank"), on="made", how="left")
        .join(to.select(made="src", to="to"), on="made", how="left")
        .join(told.rename({"node": "row"}), on="row", how="left")
    )
    members = pl.col("at").cast(pl.String) + ">" + pl.col("to").cast(pl.String)
    return whole.with_columns(node="made", members=members).select(told.columns)
