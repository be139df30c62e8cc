"""Estimates: formulas by hand, and a pipeline whose bubble comes out of the simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from truedag.launch.device_file import device_names, load_device
from truedag.launch.errors import LaunchError
from truedag.tracer.errors import GraphError
from truedag.tracer.estimate.costs import Placement, communication_ns, operator_ns
from truedag.tracer.estimate.device import Device
from truedag.tracer.estimate.estimate import estimate
from truedag.tracer.estimate.simulation import simulate
from truedag.tracer.graph.class_dataset import FORM
from truedag.tracer.graph.source import FORMAT_VERSION

# Bytes and operations a nanosecond, so that times are round.
DEVICE = Device(
    name="round", peak_flops={"bfloat16": 100e9}, product_fraction=0.5, memory_bytes=1e9, memory_bandwidth=10e9,
    memory_fraction=1.0, kernel_ns=7, inside_bandwidth=4e9, across_bandwidth=1e9, link_fraction=1.0, base_ns=100,
    inside_ns=10, overhead_ns=20, across_ns=50, exposed_ns=70,
)  # fmt: skip
NODE, TWO_NODES, APART = (Placement(size=4, num_nodes=nodes) for nodes in (1, 2, 4))


def test_an_operator_takes_the_longer_of_computing_and_moving() -> None:
    assert operator_ns(DEVICE, "aten::mm", 5_000, (100, 100), "bfloat16") == 100, "5,000 at half of 100 a ns"
    assert operator_ns(DEVICE, "aten::mm", 5_000, (3_000, 0), "bfloat16") == 300
    assert operator_ns(DEVICE, "aten::add", None, (600, 400), "bfloat16") == 100
    assert operator_ns(DEVICE, "aten::add", None, (4, 4), "bfloat16") == 7, "no kernel is shorter"
    assert operator_ns(DEVICE, "aten::empty", None, (0, 4_000), "bfloat16") == 0, "memory without content"
    assert operator_ns(DEVICE, "aten::embedding", None, (10**9, 500), "bfloat16") == 100, "reads the rows that it picks"
    with pytest.raises(GraphError, match="round lacks peak_flops for float64"):
        operator_ns(DEVICE, "aten::mm", 1, (8, 8), "float64")


@pytest.mark.parametrize(
    ("op", "sent", "received", "placement", "expected"),
    [
        # Three hops; three of four parts at 4 bytes a ns.
        ("_allgather_base_", 1_000, 4_000, NODE, 100 + 3 * 10 + 3_000 / 4),
        ("_reduce_scatter_base_", 4_000, 1_000, NODE, 100 + 3 * 10 + 3_000 / 4),
        # Two ranks in each node leave it by two network links: 2 bytes a ns; a hop inside is one of a ring over nodes.
        ("_allgather_base_", 1_000, 4_000, TWO_NODES, 100 + 2 * 20 + 50 + 3_000 / 2),
        # Alone in its node a rank hides no hop of the ring.
        ("_allgather_base_", 1_000, 4_000, APART, 100 + 3 * 70 + 3_000 / 1),
        # A long one goes around twice; a short one climbs a tree, to the other rank and the other node, and comes down.
        ("allreduce_", 400_000, 400_000, NODE, 100 + 2 * 30 + 2 * 300_000 / 4),
        ("allreduce_", 400_000, 400_000, TWO_NODES, 100 + 2 * 90 + 2 * 300_000 / 2),
        ("allreduce_", 4, 4, TWO_NODES, 100 + 2 * 80 + 2 * 4 / 2),
        # All pairs at once: a quarter of the bytes to the other rank in the node, half of them to the other node.
        ("alltoall_base_", 4_000, 4_000, TWO_NODES, 100 + 70 + 2_000 / 1),
        ("alltoall_base_", 4_000, 4_000, NODE, 100 + 10 + 3_000 / 4),
        ("send", 4_000, 0, Placement(size=2, num_nodes=2), 100 + 70 + 4_000 / 1),
        ("broadcast_", 4_000, 0, NODE, 100 + 3 * 10 + 4_000 / 4),
        ("allreduce_", 4_000, 4_000, Placement(size=1, num_nodes=1), 7),
    ],
)
def test_a_communication_takes_its_base_its_hops_and_its_bytes(
    op: str, sent: int, received: int, placement: Placement, expected: float
) -> None:
    assert communication_ns(DEVICE, f"c10d::{op}", sent, received, placement) == pytest.approx(expected)


def pipeline(num_microbatches: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Two stages, forward passes only: stage 0 sends each result to stage 1."""
    nodes: list[tuple[int, str]] = []
    edges: list[tuple[int, int, str, int]] = []
    parts: list[tuple[int, int, int]] = []
    last: dict[int, int] = {}

    def add(rank_class: int, kind: str, *after: int) -> int:
        number = len(nodes)
        nodes.append((rank_class, kind))
        edges.extend((one, number, "data", rank_class) for one in after)
        if kind == "compute" and rank_class in last:
            edges.append((last[rank_class], number, "order", rank_class))
        if kind == "compute":
            last[rank_class] = number
        else:
            parts.append((number, rank_class, 0))
        return number

    for _ in range(num_microbatches):
        send = add(0, "send", add(0, "compute"))
        receive = add(1, "recv")
        edges.append((send, receive, "p2p", 0))
        add(1, "compute", receive)
    return (
        pl.DataFrame(nodes, schema=["rank_class", "kind"], orient="row")
        .with_row_index("node")
        .cast({"node": pl.Int64}),
        pl.DataFrame(edges, schema=["src", "dst", "kind", "rank_class"], orient="row"),
        pl.DataFrame(parts, schema=["node", "rank_class", "team"], orient="row"),
    )


def test_a_pipelines_bubble_comes_out_of_its_dependencies() -> None:
    nodes, edges, parts = pipeline(5)
    takes = np.where(nodes["kind"].to_numpy() == "compute", 100.0, 10.0)
    found = simulate(nodes, edges, parts, takes)
    # Stage 1 begins after one pass and its message, and then works without a break.
    assert found.end_ns.max() == 100 + 10 + 5 * 100
    second = nodes.filter((pl.col("rank_class") == 1) & (pl.col("kind") == "compute"))["node"].to_numpy()
    assert found.start_ns[second].tolist() == [110, 210, 310, 410, 510]
    takes[second] = 30.0
    found = simulate(nodes, edges, parts, takes)
    assert found.start_ns[second].tolist() == [110, 210, 310, 410, 510], "it waits for each message"
    assert found.end_ns.max() == 540


def test_a_collective_begins_when_the_last_class_has_come() -> None:
    nodes = pl.DataFrame({"node": [0, 1, 2, 3], "rank_class": [0, 1, -1, 0],
                          "kind": ["compute", "compute", "collective", "compute"]})  # fmt: skip
    edges = pl.DataFrame({"src": [0, 1, 2], "dst": [2, 2, 3], "kind": ["data"] * 3, "rank_class": [0, 1, 0]})
    parts = pl.DataFrame({"node": [2, 2], "rank_class": [0, 1], "team": [0, 0]})
    found = simulate(nodes, edges, parts, np.array([10.0, 25.0, 5.0, 1.0]))
    assert (found.start_ns.tolist(), found.end_ns.tolist()) == ([0, 0, 25, 30], [10, 25, 30, 31])
    assert found.arrive_ns == {(2, 0): 10.0, (2, 1): 25.0}


def test_products_of_each_type_are_held_against_its_own_peak(tmp_path: Path) -> None:
    nodes = pl.DataFrame(
        {"node": [0, 1, 2], "kind": ["compute"] * 3, "op": ["aten::mm"] * 3, "flops": [5_000, 5_000, None],
         "bytes_read": [0] * 3, "bytes_written": [0] * 3, "inputs": ["int64[2]"] * 3,
         "outputs": ["bfloat16[2]", "float32[2]", "int64[2]"], "phase": ["forward"] * 3, "rank_class": [0] * 3,
         "team": [-1] * 3, "num": [4] * 3, "timing": ["none"] * 3}
    )  # fmt: skip
    none = {"node": pl.Int64, "rank_class": pl.Int32, "team": pl.Int32, "send_bytes": pl.Int64, "recv_bytes": pl.Int64}
    tables = {
        "nodes": nodes,
        "edges": pl.DataFrame(schema={"src": pl.Int64, "dst": pl.Int64, "kind": pl.String, "rank_class": pl.Int32}),
        "participants": pl.DataFrame(schema=none),
        "groups": pl.DataFrame(schema={"team": pl.Int32, "ranks": pl.List(pl.Int64)}),
        "ranks": pl.DataFrame({"rank": [0, 1, 2, 3], "pp": [0] * 4, "rank_class": [0] * 4}),
    }
    for name, table in tables.items():
        table.write_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "meta.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "form": FORM}))
    device = replace(DEVICE, peak_flops={"bfloat16": 100e9, "float32": 10e9})
    found = estimate(tmp_path, device, gpus_per_node=8, num_tokens=1)
    # At half of the peak 100 and 1,000 ns, and 7 of the smallest kernel; at the peak 50 and 500 ns.
    assert (found.step_ns, found.flops) == (1_107, 40_000)
    assert found.flops_utilization == pytest.approx(550 / 1_107)
    assert found.model_flops_utilization == found.flops_utilization, "there is no backward pass"
    assert (found.compute_share, found.idle_share, found.bubble_share) == (1, 0, 0)
    assert found.memory_bytes == 10**9
    written = pl.read_parquet(tmp_path / "nodes.parquet")
    assert written["end_ns"].to_list() == [100, 1_100, 1_107]
    assert written["timing"].to_list() == ["estimated"] * 3


def test_shipped_devices_name_the_source_of_each_number() -> None:
    assert device_names() == ["a100", "h100", "h200"]
    for name in device_names():
        device = load_device(name).device()
        assert device.name == name
        assert device.peak_flops["bfloat16"] > device.peak_flops["float32"] > 1e12
        assert 0 < device.product_fraction <= 1


def test_a_device_file_without_a_source_is_refused(tmp_path: Path) -> None:
    shipped = load_device("h100").model_dump()
    shipped["memory_bytes"].pop("source")
    path = tmp_path / "mine.yaml"
    path.write_text(str(shipped))
    with pytest.raises(LaunchError, match=r"(?s)is no device file.*memory_bytes\.source"):
        load_device(str(path))
    with pytest.raises(LaunchError, match="none of a100, h100, h200"):
        load_device("h300")
