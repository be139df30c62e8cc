"""How fast the exports are written: slices or nodes a second, and bytes, on a graph of any size.

    bench_exports.py [RUN] [--slices N] [--rounds N]

Without RUN a graph is made up: ranks of one thread, each with operators back to back and an all-reduce after every
hundred. The least of the rounds counts; CPU seconds are of all threads, for machines that others use too. Where it is
installed, a peer writes the same slices in the same run: Perfetto's own Python builder (`perfetto`), names and times
alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import polars as pl

from truedag.tracer.export.exporting import FORMATS, export
from truedag.tracer.export.timeline import list_timelines
from truedag.tracer.graph import Graph

NUM_RANKS = 8
_EVERY = 100  # operators between collectives


class MadeUp:
    """A graph in memory with about so many slices."""

    def __init__(self, num_slices: int) -> None:
        self.path = Path("made-up")
        self.meta: Mapping[str, Any] = {"deployment": "made up"}
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
            pl.col("node").cast(pl.Int64), category=pl.lit("computation"), stage=pl.lit(-1), microbatch=pl.lit(0),
            expert=pl.lit(-1), phase=pl.lit("forward"), step=pl.lit(0), decode_step=pl.lit(-1), thread=pl.lit(0),
            stream=pl.lit(-1), timing=pl.lit("measured"), flops=pl.lit(1000), bytes_read=pl.lit(64),
            bytes_written=pl.lit(64), inputs=pl.col("outputs"),
        )  # fmt: skip
        met = nodes.filter(pl.col("kind") == "collective").select("node", "start_ns", "end_ns")
        parts = met.join(pl.DataFrame({"rank": range(NUM_RANKS)}), how="cross").with_columns(
            group=pl.lit(0), seq=pl.col("node"), arrive_ns=pl.col("start_ns") - 1000 * (7 - pl.col("rank")),
            send_bytes=pl.lit(2048), recv_bytes=pl.lit(2048),
        )  # fmt: skip
        later = nodes.filter(pl.col("kind") == "compute").sort("rank", "node")
        edges = later.select(
            src=pl.col("node").shift().over("rank"), dst="node", kind=pl.lit("data"), bytes=pl.lit(64)
        ).drop_nulls()
        self._tables = {
            "nodes": nodes.drop("block"),
            "edges": edges.with_columns(dtype=pl.lit("float32"), shape=pl.lit([16], pl.List(pl.Int64))),
            "participants": parts,
            "groups": pl.DataFrame({"group": [0], "axis": ["dp"], "ranks": [list(range(NUM_RANKS))]}),
            "ranks": pl.DataFrame({"rank": range(NUM_RANKS), "host": ["host"] * NUM_RANKS}),
            "kernels": pl.DataFrame(
                schema={"node": pl.Int64, "rank": pl.Int64, "stream": pl.Int64, "name": pl.String, "kind": pl.String,
                        "start_ns": pl.Int64, "end_ns": pl.Int64}
            ),
        }  # fmt: skip

    def scan(self, table: str, ranks: AbstractSet[int] | None = None) -> pl.LazyFrame:
        """Return a table."""
        del ranks
        return self._tables[table].lazy()


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


def peer(graph: Graph, folder: Path) -> tuple[int, float] | None:
    """Write the same beginnings and ends with Perfetto's builder; how many slices, and the seconds."""
    try:
        builder = importlib.import_module("perfetto.trace_builder.proto_builder")
        messages = importlib.import_module("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    except ImportError:
        return None
    rows = [timeline.slices.select("start_ns", "end_ns", "name").rows() for timeline in list_timelines(graph)]
    begin = time.process_time()  # one thread, no waiting
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
    return sum(map(len, rows)), time.process_time() - begin


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
    graph = Graph(MadeUp(arguments.slices)) if arguments.run is None else Graph.open(arguments.run)
    print(f"{'format':15} {'what':>12} {'s':>8} {'CPU s':>8} {'a second':>12} {'MB':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in arguments.formats:
            to, path = FORMATS[name], folder / FORMATS[name].file
            counts: dict[str, int] = {}

            def work(to: Any = to, path: Path = path, counts: dict[str, int] = counts) -> None:
                done = export(graph, to, path, most=1 << 40, replace=True, show=lambda _: None)
                counts.update(done.counts)

            seconds, spent = least(arguments.rounds, work)
            number = counts.get("num_slices") or counts["num_nodes"]
            print_row(name, number, seconds, spent, size_of(path))
        found = peer(graph, folder) if "perfetto" in arguments.formats else None
        if found is None:
            print("perfetto's own builder is not installed: pip install perfetto")
        else:
            number, seconds = found
            print_row("(peer) builder", number, seconds, seconds, size_of(folder / "peer"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
