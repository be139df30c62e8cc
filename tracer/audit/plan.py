"""An expectation as columns, so that the checks join instead of looping; made once for any number of subjects."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from truedag.tracer.audit.expectation import Communication, Expectation
from truedag.tracer.audit.subject import write_members

KEY = ("purpose", "kind", "layer", "phase", "microbatch", "decode_step", "members")
_KEY_TYPES = {
    "purpose": pl.String, "kind": pl.String, "layer": pl.Int32, "phase": pl.String, "microbatch": pl.Int32,
    "decode_step": pl.Int32, "members": pl.String,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the checks join a subject with."""

    expectation: Expectation

    exact: pl.DataFrame
    """`KEY`, num, send_bytes, recv_bytes, axis: communications that are counted one by one."""

    totals: pl.DataFrame
    """`KEY`, num, least, most, axis: those that may be cut into buckets. Untold places are -1."""

    operators: pl.DataFrame
    """role, layer, phase, expert, rank: where each operator runs."""

    num_places: pl.DataFrame
    """phase, num_places: how many passes each phase has."""

    layers: pl.DataFrame
    """layer, rank."""

    experts: pl.DataFrame
    """layer, expert, rank."""


def plan(expectation: Expectation) -> Plan:
    """Return an expectation as columns."""
    layers = [
        (layer, rank) for layer in range(len(expectation.stage_of_layer)) for rank in expectation.ranks_of_layer(layer)
    ]
    experts = [
        (layer, expert, rank)
        for layer in expectation.expert_layers
        for expert in range(expectation.num_experts)
        for rank in expectation.ranks_of_expert[expectation.stage_of_layer[layer]][expert]
    ]
    phases = [phase for phase, _, _ in expectation.places]
    counted = [(phase, phases.count(phase)) for phase in dict.fromkeys(phases)]
    return Plan(
        expectation=expectation,
        exact=_exact([row for row in expectation.communications if row.total_bytes is None]),
        totals=_totals([row for row in expectation.communications if row.total_bytes is not None]),
        operators=_operators(expectation),
        num_places=pl.DataFrame(counted, schema={"phase": pl.String, "num_places": pl.UInt32}, orient="row"),
        layers=pl.DataFrame(layers, schema={"layer": pl.Int32, "rank": pl.Int32}, orient="row"),
        experts=pl.DataFrame(experts, schema={"layer": pl.Int32, "expert": pl.Int32, "rank": pl.Int32}, orient="row"),
    )


def _write_group(row: Communication, group: tuple[int, ...]) -> str:
    return ">".join(map(str, group)) if row.kind == "message" else write_members(group)


def _exact(rows: list[Communication]) -> pl.DataFrame:
    records = [
        (
            row.purpose, row.kind, row.layer, *place, _write_group(row, group), row.axis, row.num,
            None if row.send_bytes is None else row.send_bytes[index],
            None if row.recv_bytes is None else row.recv_bytes[index],
        )
        for row in rows
        for index, place in enumerate(row.places)
        for group in row.groups
    ]  # fmt: skip
    schema = _KEY_TYPES | {"axis": pl.String, "num": pl.Float64, "send_bytes": pl.Int64, "recv_bytes": pl.Int64}
    frame = pl.DataFrame(records, schema=schema, orient="row")
    # What is made for two reasons is counted together; its sizes are told only where they are the same.
    alike = pl.struct("send_bytes", "recv_bytes").n_unique() == 1
    return frame.group_by(KEY, maintain_order=True).agg(
        pl.col("axis").first(),
        pl.col("num").sum(),
        send_bytes=pl.when(alike).then(pl.col("send_bytes").first()),
        recv_bytes=pl.when(alike).then(pl.col("recv_bytes").first()),
    )


def _totals(rows: list[Communication]) -> pl.DataFrame:
    records = [
        (
            row.purpose,
            row.kind,
            row.layer,
            *place,
            _write_group(row, group),
            row.axis,
            row.num,
            *(row.total_bytes or ()),
        )
        for row in rows
        for place in row.places
        for group in row.groups
    ]
    schema = _KEY_TYPES | {"axis": pl.String, "num": pl.Float64, "least": pl.Int64, "most": pl.Int64}
    return pl.DataFrame(records, schema=schema, orient="row")


def _operators(expectation: Expectation) -> pl.DataFrame:
    records = []
    for row in expectation.operators:
        for layer in row.layers:
            stage = row.stage if row.stage is not None else expectation.stage_of_layer[layer]
            everywhere = expectation.ranks_of_stage(stage) if not row.per_expert else ()
            for phase in row.phases:
                records += [(row.role, layer, phase, -1, rank) for rank in everywhere]
                if row.per_expert:
                    records += [
                        (row.role, layer, phase, expert, rank)
                        for expert, ranks in enumerate(expectation.ranks_of_expert[stage])
                        for rank in ranks
                    ]
    schema = {"role": pl.String, "layer": pl.Int32, "phase": pl.String, "expert": pl.Int32, "rank": pl.Int32}
    return pl.DataFrame(records, schema=schema, orient="row")
