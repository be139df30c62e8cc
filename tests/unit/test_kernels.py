"""Kernels from Kineto's file: read exactly, tied to the operators that launched them, put in order.

The operators are recorded for real; the file beside them is written here, as Kineto writes it (libkineto/src/
output_json.cpp), with launches laid inside operators of choice, so that whose each kernel is is known.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.errors import TraceError
from truedag.tracer.graph import Graph
from truedag.tracer.merge.kernels import DeviceTrace, read_kernels
from truedag.tracer.merge.launches import innermost, tie_kernels
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.nodes import RankNodes, extract_nodes
from truedag.tracer.record.kernels_file import kernels_path
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

BASE_NS = 1711964646000000000
CLOCKS = {"clock_begin": {"realtime_ns": BASE_NS, "monotonic_ns": 1_000, "spread_ns": 0}}


class KinetoFile:
    """A file of Kineto's; times are given in ns of CLOCK_MONOTONIC, `meta` has the clock samples."""

    def __init__(self, meta: dict[str, Any], thread: int = 77) -> None:
        samples = [meta[name] for name in ("clock_begin", "clock_end") if name in meta]
        self._monotonic = [sample["monotonic_ns"] + sample["spread_ns"] // 2 for sample in samples]
        self._apart = [
            sample["realtime_ns"] - at - BASE_NS for sample, at in zip(samples, self._monotonic, strict=True)
        ]
        self._drift = np.array(self._apart) - self._apart[0]
        self._thread = thread
        self._correlation = 100
        self.events: list[str] = []

    def call(self, name: str, start: int, end: int) -> int:
        """Add an API call and return its correlation."""
        self._correlation += 1
        args = {"cbid": 211, "correlation": self._correlation}
        self._event("cuda_runtime", name, 4242, self._thread, start, end, args)
        return self._correlation

    def kernel(self, correlation: int, start: int, end: int, **other: Any) -> None:
        """Add a kernel, or by `cat` a copy."""
        name, cat = other.pop("name", "void at::native::add<float>(int)"), other.pop("cat", "kernel")
        args = {"device": 0, "context": 1, "stream": 7, "correlation": correlation, "occupancy": 1.185185} | other
        self._event(cat, name, args["device"], args["stream"], start, end, args)

    def launch(self, at: int, start: int, end: int, **other: Any) -> int:
        """Add a call of 1 µs at a time, and its kernel."""
        correlation = self.call(other.pop("call", "cudaLaunchKernel"), at, at + 1000)
        self.kernel(correlation, start, end, **other)
        return correlation

    def sync(self, kind: str, correlation: int, start: int, end: int, **other: Any) -> None:
        """Add what CUPTI tells of a synchronisation."""
        args = {"cuda_sync_kind": kind, "stream": -1, "correlation": correlation, "device": 0, "context": 1} | other
        self._event("cuda_sync", kind, 0, args["stream"], start, end, args)

    def write(self, path: Path) -> None:
        text = (
            '{"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}], "displayTimeUnit": "ms",\n'
            '"traceEvents": [{"ph": "M", "name": "process_name", "ts": 0.000, "pid": 0, "tid": 0, "args": {}},\n'
            + ",\n".join([*self.events, '{"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "ts": 1.000}'])
            + f'], "baseTimeNanoseconds": {BASE_NS}, "traceName": "kernels" }}'
        )
        path.write_bytes(gzip.compress(text.encode(), 1))

    def _event(self, cat: str, name: str, pid: int, tid: int, start: int, end: int, args: dict[str, Any]) -> None:
        drift = np.interp(start - self._monotonic[0], np.array(self._monotonic) - self._monotonic[0], self._drift)
        at = start + self._apart[0] + round(float(drift))
        self.events.append(
            f'{{"ph": "X", "cat": "{cat}", "name": "{name}", "pid": {pid}, "tid": {tid}, '
            f'"ts": {at // 1000}.{at % 1000:03}, "dur": {(end - start) // 1000}.{(end - start) % 1000:03}, '
            f'"args": {json.dumps(args)}}}'
        )


def recorded(folder: Path, program: Callable[[], object]) -> tuple[Path, RankNodes, KinetoFile]:
    """Record a program on the CPU; return the trace, its operators, and an empty file for its kernels."""
    path = folder / "rank-00000.trace"
    with record(path, synchronize=False):
        program()
    trace = read_trace(path)
    return path, extract_nodes(trace), KinetoFile(trace.meta, trace.threads[0].os_thread)


def five_operators() -> None:
    x = torch.ones(300, 300)
    for _ in range(4):
        x = x @ x  # long enough for a launch of 1 µs to lie inside


def merged(path: Path) -> Graph:
    merge_traces(path.parent, path.parent / "dag")
    return Graph.open(path.parent / "dag")


def rows(frame: pl.LazyFrame, **wanted: object) -> list[dict[str, Any]]:
    return frame.filter(*(pl.col(name) == value for name, value in wanted.items())).collect().to_dicts()


def near(time_ns: int) -> Any:
    """A time that has gone to Unix time and back."""
    return pytest.approx(time_ns, abs=2, rel=0)


def order_edges(graph: Graph) -> set[tuple[int, int]]:
    return {(row["src"], row["dst"]) for row in rows(graph.edges, kind="order")}


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    file = KinetoFile(CLOCKS)
    start = 7_888_999_123_456_789  # as far from the base as Kineto lets it be: more digits than a double has
    file.launch(start, start + 1001, start + 3005, bytes=1 << 40)
    file.write(tmp_path / "x.kernels.json.gz")
    found = read_kernels(tmp_path / "x.kernels.json.gz", CLOCKS)
    assert found is not None
    assert found.kernels["start_ns"].tolist() == [start + 1001]
    assert found.kernels["end_ns"].tolist() == [start + 3005]
    assert found.calls["start_ns"].tolist() == [start]
    assert found.kernels["bytes"].tolist() == [1 << 40]


def test_older_files_have_whole_microseconds_of_unix_time(tmp_path: Path) -> None:
    event = {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "pid": 0, "tid": 7, "ts": BASE_NS // 1000 + 5}
    args = {"stream": 4294967295, "device": 0, "correlation": 3, "bytes": 16}
    path = tmp_path / "x.kernels.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [event | {"dur": 2, "args": args}]}).encode()))
    found = read_kernels(path, CLOCKS)
    assert found is not None
    assert found.kernels[["start_ns", "end_ns", "stream", "kind"]].tolist() == [(6_000, 8_000, -1, 1)]


def test_the_wall_clock_may_be_set_during_the_recording(tmp_path: Path) -> None:
    end = {"realtime_ns": BASE_NS + 10_000_200, "monotonic_ns": 10_001_000, "spread_ns": 0}
    file = KinetoFile(CLOCKS)
    for at in (1_000, 5_001_100, 10_001_200):
        file.kernel(1, at, at + 10)
    file.write(tmp_path / "x.kernels.json.gz")
    found = read_kernels(tmp_path / "x.kernels.json.gz", CLOCKS | {"clock_end": end})
    assert found is not None
    assert found.kernels["start_ns"].tolist() == [1_000, 5_001_000, 10_001_000]


def test_no_file_is_no_kernels(tmp_path: Path) -> None:
    assert read_kernels(tmp_path / "x.kernels.json.gz", CLOCKS) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "'{' is due"),
        ('{"traceEvents": [{"ph": "X"}', "its end is missing"),
        ('{"traceEvents": [3]}', "event 1 is no JSON object"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": true, "dur": 1}]}', "event 1 has ts"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": NaN, "dur": 1}]}', "event 1 has ts"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": -1}]}', "lasts -1000 ns"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "dur": 1}]}', "event 1 has no name"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "args": {"stream": []}}]}', "has stream"),
        ('{"baseTimeNanoseconds": "now"}', "baseTimeNanoseconds"),
        ('{"traceEvents": ' + "[" * 100_000, "is no JSON"),
    ],
)
def test_a_broken_file_is_named_with_the_place(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.kernels.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(TraceError, match=why) as raised:
        read_kernels(path, CLOCKS)
    assert str(path) in str(raised.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = KinetoFile(CLOCKS)
    file.sync("Stream Wait Event", file.launch(10, 20, 30), 40, 50, wait_on_stream=7)
    path = tmp_path_factory.getbasetemp() / "mutated.kernels.json.gz"
    file.write(path)
    text = bytearray(gzip.decompress(path.read_bytes()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    packed = gzip.compress(bytes(text), 1)
    path.write_bytes(packed[: data.draw(st.integers(len(packed) - 3, len(packed)))])
    with suppress(TraceError):
        read_kernels(path, CLOCKS)


def test_an_operator_ran_when_its_kernels_ran(tmp_path: Path) -> None:
    path, nodes, file = recorded(tmp_path, five_operators)
    first, second = (int(nodes.start_ns[i]) for i in (1, 2))
    later = int(nodes.end_ns[-1])
    file.launch(first + 100, later, later + 500)
    file.launch(first + 2000, later + 900, later + 1500, cat="gpu_memcpy", name="Memcpy DtoD", bytes=64)
    file.launch(second + 100, later + 1500, later + 4000, stream=20)
    file.write(kernels_path(path))
    graph = merged(path)
    products = rows(graph.nodes, op="aten::mm")
    origin = graph.meta["clock_origin_ns"]
    times = [(row["start_ns"] + origin, row["end_ns"] + origin, row["stream"], row["timing"]) for row in products]
    assert times[0] == (near(later), near(later + 1500), 7, "measured")
    assert times[1] == (near(later + 1500), near(later + 4000), 20, "measured")
    assert times[2] == (int(nodes.start_ns[3]), int(nodes.end_ns[3]), -1, "measured")
    assert products[0]["host_start_ns"] + origin == first
    assert products[0]["host_end_ns"] + origin == int(nodes.end_ns[1])
    kernels = graph.kernels.collect()
    assert kernels["node"].to_list() == [products[0]["node"], products[0]["node"], products[1]["node"]]
    assert kernels["kind"].to_list() == ["kernel", "memcpy", "kernel"]
    assert kernels["bytes"].to_list() == [0, 64, 0]
    assert kernels["stream"].to_list() == [7, 7, 20]
    assert graph.meta["opaque"] == []
    assert graph.meta["num_kernels"] == 3


def test_without_kernels_everything_is_as_it_was(tmp_path: Path) -> None:
    path, nodes, _ = recorded(tmp_path, five_operators)
    graph = merged(path)
    products = rows(graph.nodes, op="aten::mm")
    assert len(graph.kernels.collect()) == 0
    assert [row["stream"] for row in products] == [-1] * 4
    assert all((row["start_ns"], row["end_ns"]) == (row["host_start_ns"], row["host_end_ns"]) for row in products)
    assert rows(graph.ranks)[0]["gpu_clock_error_ns"] is None
    assert len(nodes.op) >= 5


def test_what_no_operator_launched_is_a_node_of_its_own_and_opaque(tmp_path: Path) -> None:
    path, nodes, file = recorded(tmp_path, five_operators)
    end = int(nodes.end_ns[-1])
    file.launch(int(nodes.start_ns[1]) + 100, end, end + 100)
    file.launch(end + 5_000, end + 7_000, end + 8_000, name="triton_poi_fused_add_0", call="cuLaunchKernel")
    graph_launch = file.call("cudaGraphLaunch", end + 20_000, end + 22_000)
    for i in range(3):
        at = end + 30_000 + 1000 * i
        file.kernel(graph_launch, at, at + 500, **{"graph id": 5, "graph node id": i})
    file.kernel(3, end + 90_000, end + 90_100, stream=9, name="Memset (Device)", cat="gpu_memset")  # launched before
    file.write(kernels_path(path))
    graph = merged(path)
    alone = {row["op"]: row for row in rows(graph.nodes.filter(pl.col("op").str.starts_with("cuda::")))}
    assert {op: row["label"] for op, row in alone.items()} == {
        "cuda::kernel": "triton_poi_fused_add_0",
        "cuda::graph": "CUDA graph of 3 kernels",
        "cuda::memset": "Memset",
    }
    origin = graph.meta["clock_origin_ns"]
    assert alone["cuda::graph"]["start_ns"] + origin == near(end + 30_000)
    assert alone["cuda::graph"]["end_ns"] + origin == near(end + 32_500)
    assert alone["cuda::memset"]["host_start_ns"] is None
    assert graph.kernels.collect()["node"].n_unique() == 4
    assert [(one["what"], one["nodes"], one["tensors_known"]) for one in graph.meta["opaque"]] == [
        ("CUDA graph", 1, False),
        ("kernel launched by no operator", 1, False),
        ("memset launched by no operator", 1, False),
    ]
    (product,) = (row["node"] for row in rows(graph.nodes, op="aten::mm", stream=7))
    stream = [product, alone["cuda::kernel"]["node"], alone["cuda::graph"]["node"]]
    assert set(pairwise(stream)) <= order_edges(graph)


def test_a_wait_for_an_event_orders_two_streams_and_one_of_the_host_its_next_operator(tmp_path: Path) -> None:
    path, nodes, file = recorded(tmp_path, five_operators)
    starts, end = nodes.start_ns.tolist(), int(nodes.end_ns[-1])
    file.launch(starts[1] + 100, end, end + 100, stream=7)
    event = file.call("cudaEventRecord", starts[1] + 2_000, starts[1] + 2_500)
    file.launch(starts[1] + 3_000, end + 100, end + 900, stream=7)  # after the event: not waited for
    wait = file.call("cudaStreamWaitEvent", starts[1] + 5_000, starts[1] + 5_500)
    on_event = {"wait_on_stream": 7, "wait_on_cuda_event_record_corr_id": event, "wait_on_cuda_event_id": 1}
    file.sync("Stream Wait Event", wait, starts[1] + 5_000, starts[1] + 5_500, stream=20, **on_event)
    file.launch(starts[3] + 100, end + 200, end + 300, stream=20)
    host = file.call("cudaStreamSynchronize", end + 1, end + 400)
    file.sync("Stream Sync", host, end + 1, end + 400, stream=20)
    file.write(kernels_path(path))
    graph = merged(path)
    first, second, third, _ = (row["node"] for row in rows(graph.nodes, op="aten::mm"))
    found = order_edges(graph)
    assert (first, third) in found
    assert (first, second) in found  # the thread's own order
    assert graph.kernels.collect()["start_ns"].is_sorted()

    trace = read_kernels(kernels_path(path), nodes.trace.meta)
    assert trace is not None
    tied = tie_kernels(trace, nodes)
    syncs, kernels = tied.waits
    assert dict(zip(trace.syncs["correlation"][syncs].tolist(), kernels.tolist(), strict=True)) == {wait: 0, host: 2}


def test_the_host_goes_on_after_what_it_waited_for(tmp_path: Path) -> None:
    path, nodes, file = recorded(tmp_path, five_operators)
    starts, ends = nodes.start_ns.tolist(), nodes.end_ns.tolist()
    file.launch(starts[0] + 10, starts[0] + 2_000, starts[0] + 2_500)
    host = file.call("cudaDeviceSynchronize", ends[2] + 1, ends[2] + 2)
    file.sync("Context Sync", host, ends[2] + 1, ends[2] + 2)
    file.write(kernels_path(path))
    graph = merged(path)
    made = rows(graph.nodes.filter(pl.col("host_start_ns") == starts[0] - graph.meta["clock_origin_ns"]))[0]["node"]
    assert (made, rows(graph.nodes, op="aten::mm")[2]["node"]) in order_edges(graph)


def test_threads_are_known_by_either_of_the_numbers_that_kineto_gives(tmp_path: Path) -> None:
    path, nodes, _ = recorded(tmp_path, five_operators)
    for pthread in (0x7F25_1234_5678, 0x7F25_F234_5678):
        (thread,) = nodes.trace.threads
        trace = replace(nodes.trace, threads=[replace(thread, os_thread=0, pthread=pthread)])
        signed = (pthread & 0xFFFFFFFF) - ((pthread & 0x80000000) << 1)
        file = KinetoFile(trace.meta, abs(signed))
        file.launch(int(nodes.start_ns[2]) + 10, int(nodes.end_ns[2]), int(nodes.end_ns[2]) + 5)
        file.write(kernels_path(path))
        found = read_kernels(kernels_path(path), trace.meta)
        assert found is not None
        assert tie_kernels(found, replace(nodes, trace=trace)).node.tolist() == [2]


def nested(data: st.DataObject) -> list[tuple[int, int, int]]:
    """Intervals (thread, start, end), of a thread apart or one inside the other, by start."""
    found = []
    for thread in range(data.draw(st.integers(1, 3))):
        position, open_ends = 0, []
        for step in data.draw(st.lists(st.integers(-3, 20), max_size=30)):
            position += abs(step) + 1
            if step >= 0:
                open_ends.append(position)
            elif open_ends:
                found.append((thread, open_ends.pop(), position))
    return sorted(found, key=lambda one: (one[1], -one[2]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_moment_belongs_to_the_innermost_interval_around_it(data: st.DataObject) -> None:
    intervals = nested(data)
    moments = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(-5, 400)), max_size=50))
    columns = np.array(intervals, np.int64).reshape(-1, 3)
    asked = np.array(moments, np.int64).reshape(-1, 2)
    found = innermost(asked[:, 1], asked[:, 0], columns[:, 0], columns[:, 1], columns[:, 2])
    for (thread, moment), got in zip(moments, found.tolist(), strict=True):
        around = [
            (end - start, i) for i, (of, start, end) in enumerate(intervals) if of == thread and start <= moment <= end
        ]
        lengths = {length for length, _ in around}
        assert (got == -1) == (not around)
        assert got == -1 or intervals[got][2] - intervals[got][1] == min(lengths)


def device_trace(file: KinetoFile, folder: Path) -> DeviceTrace:
    file.write(folder / "x.kernels.json.gz")
    found = read_kernels(folder / "x.kernels.json.gz", CLOCKS)
    assert found is not None
    return found


@pytest.mark.parametrize(("wrong_by", "drift"), [(0, 0), (-40_000, 0), (-40_000, -60_000), (35_000, 0)])
def test_a_wrong_gpu_clock_is_corrected_within_what_it_says(wrong_by: int, drift: int, tmp_path: Path) -> None:
    path, nodes, _ = recorded(tmp_path, five_operators)
    file = KinetoFile(CLOCKS)
    count, truth = 3000, []
    for i in range(count):
        at = 1_000_000 + 20_000 * i
        wrong = wrong_by + drift * i // count
        truth.append(at + 3_000 + 500 * (i % 3))
        correlation = file.launch(at, truth[-1] + wrong, truth[-1] + wrong + 2_000)
        if i % 10 == 9:
            file.sync(
                "Stream Sync", file.call("cudaStreamSynchronize", at + 7_000, at + 9_000), at, at + 9_000, stream=7
            )
        assert correlation
    tied = tie_kernels(device_trace(file, path.parent), nodes)
    found, clock = tied.trace.kernels, tied.clock
    assert (found["start_ns"] >= 1_000_000 + 20_000 * np.arange(count)).all()
    assert clock.error_ns is not None
    assert np.abs(found["start_ns"] - np.array(truth)).max() <= clock.error_ns <= 15_000
    if not wrong_by:
        assert (clock.correction_ns, clock.drift_ns) == (0, 0)
    else:
        assert abs(clock.correction_ns + wrong_by) <= clock.error_ns
        assert abs(clock.drift_ns + drift) <= 2 * clock.error_ns


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduce_three() -> None:
    x = torch.ones(8)
    dist.all_reduce(x)
    works = [dist.all_reduce(x, async_op=True) for _ in range(2)]
    for work in works:
        work.wait()


@pytest.mark.usefixtures("gloo")
def test_kernels_of_nccl_say_when_a_communication_ran(tmp_path: Path) -> None:
    path, nodes, file = recorded(tmp_path, reduce_three)
    places = [record.node for record in nodes.comms]
    at, after = int(nodes.start_ns[places[0]]), int(nodes.end_ns[-1]) + 10
    name = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    file.launch(at + 10, after + 5_000, after + 6_000, name=name, stream=35)
    group = file.launch(after, after + 7_000, after + 9_000, name=name, stream=35)
    file.write(kernels_path(path))
    graph = merged(path)
    origin = graph.meta["clock_origin_ns"]
    parts = [(row["arrive_ns"] + origin, row["end_ns"] + origin) for row in rows(graph.participants)]
    wanted = [(after + 5_000, after + 6_000)] + [(after + 7_000, after + 9_000)] * 2
    assert parts == [(near(start), near(end)) for start, end in wanted]
    last = rows(graph.nodes, kind="collective")[-1]["node"]
    assert rows(graph.kernels, correlation=group)[0]["node"] == last
    assert graph.meta["opaque"] == []
