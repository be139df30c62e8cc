"""Give a class graph estimated times, and say what they come to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.estimate.costs import ASSUMPTIONS, Placement, communication_ns, operator_ns
from truedag.tracer.estimate.device import Device
from truedag.tracer.estimate.simulation import Simulated, simulate

Floats = NDArray[np.float64]
_COMMUNICATIONS = ("collective", "send", "recv")
# What an operator computes in: the type of its first result, else of its first argument.
_DTYPE = pl.coalesce(pl.col("outputs", "inputs").replace("", None)).fill_null("").str.split("[").list.first()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step, or a generation, is estimated to take. All of it is an estimate."""

    device: str
    gpus_per_node: int
    step_ns: int
    prefill_ns: int | None
    """Until the first token of all prompts is there; None: nothing is generated."""

    flops: int
    """Counted products of all ranks."""

    flops_utilization: float
    """Of the step: what the counted products would take at the peaks of their types; MFU where none is done twice."""

    compute_share: float
    """Of the step, mean over GPUs: an operator runs."""

    exposed_communication_share: float
    """A communication runs and no operator."""

    idle_share: float
    """Neither: waiting for others, the pipeline's bubble for the most part."""

    tokens_per_s: float
    assumptions: tuple[str, ...]


def estimate(folder: Path, device: Device, *, gpus_per_node: int, num_tokens: int) -> Estimate:
    """Write estimated times into a class graph's tables, marked as such, and return what they come to.

    Args:
        folder: the class graph's.
        device: what each rank runs on.
        gpus_per_node: how many ranks are in a node.
        num_tokens: that a step trains on, or that a generation makes.

    Raises:
        GraphError: the device file lacks what is needed.
    """
    tables = {
        name: pl.read_parquet(folder / f"{name}.parquet") for name in ("nodes", "edges", "participants", "groups")
    }
    nodes, parts = tables["nodes"], tables["participants"]
    takes = _durations(device, nodes, parts, _placements(tables["groups"], gpus_per_node))
    found = simulate(nodes, tables["edges"], parts, takes)
    _write(folder, nodes, parts, found)
    sizes = dict(pl.read_parquet(folder / "ranks.parquet")["rank_class"].value_counts().iter_rows())
    summary = _summarize(device, gpus_per_node, num_tokens, nodes, parts, found, sizes)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["estimate"] = asdict(summary)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return summary


def _placements(groups: pl.DataFrame, gpus_per_node: int) -> dict[int, Placement]:
    """By team."""
    told = groups.with_columns(spread=(pl.col("ranks").list.eval(pl.element() // gpus_per_node)).list.n_unique())
    told = told.group_by("team").agg(size=pl.col("ranks").list.len().first(), spread=pl.col("spread").max())
    return {team: Placement(size=size, num_nodes=spread) for team, size, spread in told.iter_rows()}


def _durations(device: Device, nodes: pl.DataFrame, parts: pl.DataFrame, placements: dict[int, Placement]) -> Floats:
    most = parts.group_by("node").agg(pl.col("team").first(), pl.col("send_bytes").max(), pl.col("recv_bytes").max())
    moved = {node: (team, sent, received) for node, team, sent, received in most.iter_rows()}
    takes = np.zeros(len(nodes))
    columns = nodes.select("node", "kind", "op", "flops", "bytes_read", "bytes_written", dtype=_DTYPE)
    for row, (node, kind, op, flops, read, written, dtype) in enumerate(columns.iter_rows()):
        if kind == "compute":
            takes[row] = operator_ns(device, op, flops, (read or 0, written or 0), dtype)
        elif kind in _COMMUNICATIONS:
            team, sent, received = moved[node]
            placement = placements[team]
            if kind != "collective":
                placement = Placement(size=2, num_nodes=min(2, placement.num_nodes))
            takes[row] = communication_ns(device, op, sent, received, placement)
    return takes


def _write(folder: Path, nodes: pl.DataFrame, parts: pl.DataFrame, found: Simulated) -> None:
    runs = nodes["kind"].is_in(["compute", *_COMMUNICATIONS])
    times = {"start_ns": found.start_ns, "end_ns": found.end_ns}
    timed = nodes.with_columns(
        *(
            pl.when(runs).then(pl.Series(np.rint(values).astype(np.int64))).alias(name)
            for name, values in times.items()
        ),
        timing=pl.when(runs).then(pl.lit("estimated")).otherwise(pl.lit("none")),
    )
    timed.write_parquet(folder / "nodes.parquet", compression="zstd", compression_level=1)
    rows = np.searchsorted(nodes["node"].to_numpy(), parts["node"].to_numpy())
    arrived = [
        round(found.arrive_ns.get((row, rank_class), 0.0))
        for row, rank_class in zip(rows.tolist(), parts["rank_class"].to_list(), strict=True)
    ]
    parts.with_columns(
        pl.Series("arrive_ns", arrived, dtype=pl.Int64),
        *(pl.Series(name, np.rint(values[rows]).astype(np.int64)) for name, values in times.items()),
    ).write_parquet(folder / "participants.parquet", compression="zstd", compression_level=1)


def _summarize(
    device: Device,
    gpus_per_node: int,
    num_tokens: int,
    nodes: pl.DataFrame,
    parts: pl.DataFrame,
    found: Simulated,
    sizes: dict[int, int],
) -> Estimate:
    step_ns = float(found.end_ns.max(initial=0.0)) or 1.0
    world = sum(sizes.values())
    own, kind = nodes["rank_class"].to_numpy(), nodes["kind"].to_numpy()
    computing = idle = 0.0
    rows = np.searchsorted(nodes["node"].to_numpy(), parts["node"].to_numpy())
    part_class = parts["rank_class"].to_numpy()
    for rank_class, size in sizes.items():
        ran = np.flatnonzero((own == rank_class) & (kind == "compute"))
        met = rows[part_class == rank_class]
        compute_ns = _covered(found, ran)
        computing += size * compute_ns
        idle += size * (step_ns - _covered(found, np.concatenate((ran, met))))
    flops = int((nodes["flops"].fill_null(0) * nodes["num"]).sum())
    counted = nodes.filter(pl.col("flops") > 0).select(pl.col("num") * pl.col("flops"), peak=_DTYPE)
    peaks = counted["peak"].replace_strict(dict(device.peak_flops), return_dtype=pl.Float64)
    at_peak_s = float((counted["num"] / peaks).sum())
    phases = nodes["phase"].to_numpy()
    prefill = found.end_ns[phases == "prefill"]
    return Estimate(
        device=device.name,
        gpus_per_node=gpus_per_node,
        step_ns=round(step_ns),
        prefill_ns=round(float(prefill.max())) if len(prefill) else None,
        flops=flops,
        flops_utilization=at_peak_s / (step_ns / 1e9 * world),
        compute_share=computing / world / step_ns,
        exposed_communication_share=1 - (computing + idle) / world / step_ns,
        idle_share=idle / world / step_ns,
        tokens_per_s=num_tokens / (step_ns / 1e9),
        assumptions=ASSUMPTIONS,
    )


def _covered(found: Simulated, rows: NDArray[np.int64]) -> float:
    """Return how much of the time at least one of some nodes runs."""
    if not len(rows):
        return 0.0
    order = rows[np.argsort(found.start_ns[rows], kind="stable")]
    start, end = found.start_ns[order], found.end_ns[order]
    latest = np.maximum.accumulate(end)
    before = np.append(start[0], latest[:-1])
    return float(np.maximum(latest - np.maximum(start, before), 0.0).sum())
