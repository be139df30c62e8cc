"""How fast the exports are written: slices or nodes a second, and bytes, on a graph of any size.

    bench_exports.py [RUN] [--slices N] [--rounds N]

Without RUN a dataset is made up: ranks of one thread, each with operators back to back and an all-reduce after every
hundred. An export reads the dataset from disk; `its writing` encodes slices that are made already. The least of the
rounds counts; CPU seconds are of all threads, for machines that others use too. Where it is installed, a peer writes
the same slices in the same run: Perfetto's own Python builder (`perfetto`), names and times alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from truedag.tracer.export.exporting import FORMATS, export
from truedag.tracer.export.perfetto import write_timelines
from truedag.tracer.export.timeline import Timeline, list_timelines
from truedag.tracer.graph import FORMAT_VERSION, Graph
from truedag.tracer.merge.tables import EDGE_SCHEMA, NODE_SCHEMA

NUM_RANKS = 8
_EVERY = 100  # operators between collectives
_NARROW = {"rank": pl.Int32, "group": pl.Int32}
_KERNELS = {
    "node": pl.Int64, "rank": pl.Int32, "device": pl.Int32, "stream": pl.Int32, "name": pl.String, "kind": pl.String,
    "start_ns": pl.Int64, "end_ns": pl.Int64,
}  # fmt: skip


def make_up(num_slices: int, folder: Path) -> Graph:
    """Write a dataset with about so many slices, as the merge lays out a small graph."""
    # A collective is three slices on each rank but for the last to arrive, which does not wait.
    blocks = max(1, num_slices // (NUM_RANKS * (_EVERY + 3)))
    steps = pl.DataFrame({"block": range(blocks)})
    operators = (
        steps.join(pl.DataFrame({"place": range(_EVERY)}), how="cross")
        .join(pl.DataFrame({"rank": range(NUM_RANKS)}), how="cross")
        .with_columns(
            start_ns=pl.col("block") * 200_000 + pl.col("place") * 1000,
            layer=pl.col("place") // 10,
            kind=pl.lit("compute"),
        )
    )
    told = operators.select(
        "block", "rank", "kind", "layer", "start_ns",
        end_ns=pl.col("start_ns") + 900,
        op=pl.format("aten::op_{}", pl.col("place") % 40), label=pl.format("op_{}", pl.col("place") % 40),
        module=pl.format("decoder.layers.{}.mlp", "layer"), outputs=pl.format("float32[{},512]", pl.col("place")),
    )  # fmt: skip
    meetings = steps.select(
        "block", rank=pl.lit(-1, pl.Int64), kind=pl.lit("collective"), layer=pl.lit(-1, pl.Int64),
        start_ns=pl.col("block") * 200_000 + 110_000, end_ns=pl.col("block") * 200_000 + 150_000,
        op=pl.lit("c10d::allreduce_"), label=pl.lit("all-reduce dp"), module=pl.lit(None, pl.String),
        outputs=pl.lit("float32[512]"),
    )  # fmt: skip
    both = pl.concat([told.select(meetings.columns), meetings]).sort("start_ns", "rank")
    nodes = both.with_row_index("node").with_columns(
        category=pl.lit("computation"), stage=pl.lit(-1), microbatch=pl.lit(0), expert=pl.lit(-1),
        phase=pl.lit("forward"), step=pl.lit(0), decode_step=pl.lit(-1), thread=pl.lit(0), stream=pl.lit(-1),
        timing=pl.lit("measured"), flops=pl.lit(1000), bytes_read=pl.lit(64), bytes_written=pl.lit(64),
        inputs=pl.col("outputs"), gradient=pl.lit(None, pl.String), host_start_ns=pl.lit(None, pl.Int64),
        host_end_ns=pl.lit(None, pl.Int64),
    )  # fmt: skip
    met = nodes.filter(pl.col("kind") == "collective").select("node", "start_ns", "end_ns")
    parts = met.join(pl.DataFrame({"rank": range(NUM_RANKS)}), how="cross").with_columns(
        group=pl.lit(0), seq=pl.col("node"), arrive_ns=pl.col("start_ns") - 1000 * (7 - pl.col("rank")),
        send_bytes=pl.lit(2048), recv_bytes=pl.lit(2048), waited_ns=pl.lit(None, pl.Int64),
    )  # fmt: skip
    later = nodes.filter(pl.col("kind") == "compute").sort("rank", "node")
    edges = later.select(src=pl.col("node").shift().over("rank"), dst="node", kind=pl.lit("data"), bytes=pl.lit(64))
    tables = {
        "nodes": (nodes, NODE_SCHEMA),
        "edges": (
            edges.drop_nulls().with_columns(dtype=pl.lit("float32"), shape=pl.lit([16], pl.List(pl.Int64))),
            EDGE_SCHEMA,
        ),
        "participants": (parts, _NARROW),
        "groups": (pl.DataFrame({"group": [0], "axis": ["dp"], "ranks": [list(range(NUM_RANKS))]}), _NARROW),
        "ranks": (pl.DataFrame({"rank": range(NUM_RANKS), "host": ["host"] * NUM_RANKS}), _NARROW),
        "kernels": (pl.DataFrame(schema=_KERNELS), _KERNELS),
    }
    for name, (table, schema) in tables.items():
        known = {column: dtype for column, dtype in schema.items() if column in table.columns}
        table.cast(known).write_parquet(folder / f"{name}.parquet")
    (folder / "meta.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "deployment": "made up"}))
    return Graph.open(folder)


def least(rounds: int, work: Callable[[], None]) -> tuple[float, float]:
    """Return the shortest time of some rounds, and the least CPU time, in seconds."""
    times, spent = [], []
    for _ in range(rounds):
        begin, used = time.perf_counter(), time.process_time()
        work()
        times.append(time.perf_counter() - begin)
        spent.append(time.process_time() - used)
    return min(times), min(spent)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all in a folder."""
    return sum(one.stat().st_size for one in path.rglob("*")) if path.is_dir() else path.stat().st_size


def peer(graph: Graph, folder: Path) -> tuple[int, float, float] | None:
    """Write the same beginnings and ends with Perfetto's builder; how many slices, seconds, and CPU seconds."""
    try:
        builder = importlib.import_module("perfetto.trace_builder.proto_builder")
        messages = importlib.import_module("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    except ImportError:
        return None
    rows = [make().slices.select("start_ns", "end_ns", "name").rows() for make in list_timelines(graph)]
    begin, used = time.perf_counter(), time.process_time()
    trace = builder.TraceProtoBuilder()
    first, last = messages.TrackEvent.TYPE_SLICE_BEGIN, messages.TrackEvent.TYPE_SLICE_END
    for track, slices in enumerate(rows, start=1):
        for start, end, name in slices:
            for when, kind in ((start, first), (end, last)):
                packet = trace.add_packet()
                packet.timestamp, packet.trusted_packet_sequence_id = when, track
                packet.track_event.type, packet.track_event.track_uuid = kind, track
                if kind == first:
                    packet.track_event.name = name
    (folder / "peer").write_bytes(trace.serialize())
    return sum(map(len, rows)), time.perf_counter() - begin, time.process_time() - used


def _give(timeline: Timeline) -> Timeline:
    return timeline


def print_row(name: str, number: int, seconds: float, spent: float, size: int) -> None:
    """Print one line of the table."""
    print(f"{name:15} {number:12,} {seconds:8.2f} {spent:8.2f} {number / seconds:12,.0f} {size / 1e6:8.1f}")


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--slices", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS], default=[*FORMATS])
    arguments = parser.parse_args()
    print(f"{'format':15} {'what':>12} {'s':>8} {'CPU s':>8} {'a second':>12} {'MB':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph = make_up(arguments.slices, folder) if arguments.run is None else Graph.open(arguments.run)
        for name in arguments.formats:
            to, path = FORMATS[name], folder / FORMATS[name].file
            counts: dict[str, int] = {}

            def work(to: Any = to, path: Path = path, counts: dict[str, int] = counts) -> None:
                done = export(graph, to, path, most=1 << 40, replace=True, show=lambda _: None)
                counts.update(done.counts)

            seconds, spent = least(arguments.rounds, work)
            number = counts.get("num_slices") or counts["num_nodes"]
            print_row(name, number, seconds, spent, size_of(path))
        if "perfetto" in arguments.formats:
            timelines = [make() for make in list_timelines(graph)]
            number = sum(len(one.slices) for one in timelines)
            made = [partial(_give, one) for one in timelines]
            with (folder / "alone").open("wb") as file:

                def write(file: BinaryIO = file) -> None:
                    file.seek(0)
                    write_timelines(made, file, lambda _: None)

                seconds, spent = least(arguments.rounds, write)
            print_row("its writing", number, seconds, spent, size_of(folder / "alone"))
        found = peer(graph, folder) if "perfetto" in arguments.formats else None
        if found is None:
            print("perfetto's own builder is not installed: pip install perfetto")
        else:
            number, seconds, spent = found
            print_row("(peer) builder", number, seconds, spent, size_of(folder / "peer"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
