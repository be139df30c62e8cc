"""Give a graph without times estimated ones, and say what they come to.

A class graph is simulated with one GPU of each class, a graph of all ranks with all of them. Where ranks of a class
have sizes of their own, the one that is simulated takes as long as the largest of them.
"""

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
from truedag.tracer.estimate.tables import Tables, read_tables, write_times

Floats = NDArray[np.float64]
_COMMUNICATIONS = ("collective", "send", "recv")
_FORWARD = pl.col("phase").ne_missing("backward") & pl.col("phase").ne_missing("optimizer")
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
    """Of the step: what the counted products would take at the peaks of their types, each time they are done."""

    model_flops_utilization: float
    """MFU: the same of the forward pass, three times where there is a backward pass: what is done again is left out."""

    compute_share: float
    """Of the step, mean over GPUs: an operator runs."""

    exposed_communication_share: float
    """A communication runs and no operator."""

    idle_share: float
    """Neither: waiting for others."""

    bubble_share: float
    """Of these, the part in which a GPU waits for another pipeline stage, or has not begun or has already ended."""

    tokens_per_s: float
    memory_bytes: int
    """Of each GPU, as its device file says."""

    assumptions: tuple[str, ...]


def estimate(folder: Path, device: Device, *, gpus_per_node: int, num_tokens: int) -> Estimate:
    """Write estimated times into a graph's tables, marked as such, and return what they come to.

    Args:
        folder: the graph's: of classes, or of all ranks.
        device: what each rank runs on.
        gpus_per_node: how many ranks are in a node.
        num_tokens: that a step trains on, or that a generation makes.

    Raises:
        GraphError: the device file lacks what is needed.
    """
    tables = read_tables(folder)
    takes = _durations(device, tables.nodes, tables.parts, _placements(tables.groups, gpus_per_node))
    found = simulate(tables.nodes, tables.edges, tables.parts, takes)
    write_times(folder, tables, found)
    summary = _summarize(device, gpus_per_node, num_tokens, tables, found)
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


def _summarize(
    device: Device,
    gpus_per_node: int,
    num_tokens: int,
    tables: Tables,
    found: Simulated,
) -> Estimate:
    nodes, parts, sizes = tables.nodes, tables.parts, tables.num_ranks
    step_ns = float(found.end_ns.max(initial=0.0)) or 1.0
    world = sum(sizes.values())
    own, kind = nodes["rank_class"].to_numpy(), nodes["kind"].to_numpy()
    computing = idle = bubble = 0.0
    rows = np.searchsorted(nodes["node"].to_numpy(), parts["node"].to_numpy())
    part_class, is_across = parts["rank_class"].to_numpy(), _meets_stages(tables)
    is_staged = bool(is_across.any())
    for rank_class, size in sizes.items():
        ran = np.flatnonzero((own == rank_class) & (kind == "compute"))
        mine = np.flatnonzero(part_class == rank_class)
        met = rows[mine]
        busy = _spans(found, ran), _spans(found, met)
        computing += size * _covered(*busy[:1])
        idle += size * (step_ns - _covered(*busy))
        if is_staged:
            near = mine[~is_across[mine]]
            arrived = [found.arrive_ns.get((row, rank_class), 0.0) for row in rows[near].tolist()]
            waits = np.stack((np.array(arrived, np.float64), found.start_ns[rows[near]]), axis=1)
            bubble += size * (step_ns - _covered(*busy, waits))
    phases = nodes["phase"].to_numpy()
    at_peak_s, forward_s = _at_peaks(device, nodes), _at_peaks(device, nodes.filter(_FORWARD))
    model_s = 3 * forward_s if (phases == "backward").any() else forward_s
    prefill = found.end_ns[phases == "prefill"]
    return Estimate(
        device=device.name,
        gpus_per_node=gpus_per_node,
        step_ns=round(step_ns),
        prefill_ns=round(float(prefill.max())) if len(prefill) else None,
        flops=int(nodes.filter(pl.col("flops") > 0)["flops_of_all"].sum()),
        flops_utilization=at_peak_s / (step_ns / 1e9 * world),
        model_flops_utilization=model_s / (step_ns / 1e9 * world),
        compute_share=computing / world / step_ns,
        exposed_communication_share=1 - (computing + idle) / world / step_ns,
        idle_share=idle / world / step_ns,
        bubble_share=bubble / world / step_ns,
        tokens_per_s=num_tokens / (step_ns / 1e9),
        memory_bytes=int(device.memory_bytes),
        assumptions=ASSUMPTIONS,
    )


def _at_peaks(device: Device, nodes: pl.DataFrame) -> float:
    """Return how many seconds of one GPU the counted products would take at the peaks of their types."""
    counted = nodes.filter(pl.col("flops") > 0).select("flops_of_all", peak=_DTYPE)
    peaks = counted["peak"].replace_strict(dict(device.peak_flops), return_dtype=pl.Float64)
    return float((counted["flops_of_all"] / peaks).sum())


def _meets_stages(tables: Tables) -> NDArray[np.bool_]:
    """Return which participants meet ranks of another stage: [participants]. Of a message, its group's others."""
    stage = dict(tables.ranks.select("rank", pl.col("pp").fill_null(-1)).iter_rows())
    across = {
        team: len({stage[rank] for rank in members} - {-1}) > 1
        for team, members in tables.groups.group_by("team").agg(pl.col("ranks").first()).iter_rows()
    }
    return tables.parts["team"].replace_strict(across, return_dtype=pl.Boolean).to_numpy()


def _spans(found: Simulated, rows: NDArray[np.int64]) -> Floats:
    return np.stack((found.start_ns[rows], found.end_ns[rows]), axis=1)


def _covered(*spans: Floats) -> float:
    """Return how much of the time at least one of some spans, [spans, 2], holds."""
    whole = np.concatenate(spans)
    if not len(whole):
        return 0.0
    start, end = whole[np.argsort(whole[:, 0], kind="stable")].T
    latest = np.maximum.accumulate(end)
    before = np.append(start[0], latest[:-1])
    return float(np.maximum(latest - np.maximum(start, before), 0.0).sum())
