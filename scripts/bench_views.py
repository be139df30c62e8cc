"""How large pages are and how fast they open, from 8 to 2048 ranks, in a Chromium without a window.

    python scripts/bench_views.py [RUN ...] [--draw] [--invent-times] [--rounds 5]

RUN is a run's folder or a dataset; without one a deployment of 8 ranks is run and three of 256, 1024 and 2048 ranks are
executed dry, which takes some minutes. These dry runs have no times. --invent-times gives the largest graph some, so
that its heat map and its slices can be weighed as well: they are estimates of nothing, marked as estimates and as
synthetic. --draw also makes the three drawings of each. CPU seconds are of all threads, for machines that others use
too.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "browser"))
from chromium import Chromium, find_chromium

from truedag.tracer.graph import Graph, TableSource
from truedag.tracer.views.draw import draw
from truedag.tracer.views.page import Page, write_page
from truedag.tracer.views.page.server import PageServer

REAL = "moe-10b-tp2-ep2-pp2-cpu"
DRY = ("moe-30b-ep8-tp4-pp2-dp4", "moe-30b-ep64-tp2-pp8", "moe-30b-ep64-tp8-pp2-dp2")
# One after the other: a pass of a stage, a layer, a module, a module in it.
OPENED = """(() => {
  const view = truedag.app.views.graph, model = truedag.model, times = [];
  location.hash = "#view=graph";
  let inside = model.children[model.numNodes];
  for (const wanted of [/^(forward|prefill) . stage 0/, /^layer 0/, /^(mlp|self_attention)/, /./]) {
    const node = inside.find((one) => !model.isLeaf[one] && wanted.test(view.nameOf(one)));
    if (node === undefined) break;
    view.toggle(node);
    times.push(view.openingMs);
    inside = model.children[node];
  }
  return times;
})()"""


@dataclass(frozen=True)
class InventedTimes:
    """A graph with times that mean nothing: a node's number is when it began."""

    source: TableSource

    @property
    def path(self) -> Path:
        """Where the graph lies."""
        return self.source.path

    @property
    def meta(self) -> Mapping[str, Any]:
        """What it says of itself."""
        return self.source.meta

    def scan(self, table: str, ranks: AbstractSet[int] | None = None) -> pl.LazyFrame:
        """Return a table, with times."""
        frame = self.source.scan(table, ranks)
        begin = 1000 * pl.col("node")
        if table == "nodes":
            runs = pl.col("kind").is_in(["compute", "collective", "send", "recv"])
            return frame.with_columns(
                start_ns=pl.when(runs).then(begin),
                end_ns=pl.when(runs).then(begin + 200_000),
                timing=pl.when(runs).then(pl.lit("estimated")).otherwise(pl.lit("none")),
            )
        if table == "participants":
            arrive = begin - 1000 * (pl.col("rank") % 7)
            return frame.with_columns(arrive_ns=arrive, start_ns=begin, end_ns=begin + 100_000)
        return frame


def make_runs(folder: Path) -> list[Path]:
    """Run and execute the deployments."""
    made = []
    for name in (REAL, *DRY):
        command = "run" if name == REAL else "dry"
        out = folder / name
        subprocess.run(
            [sys.executable, "-m", "truedag.launch.cli", command, name, "--out", str(out)], check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        made.append(out)
    return made


def load(browser: Chromium, address: str, rounds: int) -> tuple[float, list[float]]:
    """The median time from the navigation to the first picture in ms, and the worst of each opening."""
    loads, openings = [], []
    for _ in range(rounds):
        browser.open(address)
        loads.append(float(browser.evaluate("truedag.openedMs")))
        openings.append(browser.evaluate(OPENED))
    return statistics.median(loads), [max(times) for times in zip(*openings, strict=True)]


def read_slices(browser: Chromium, page: Page, num_ranks: int) -> str:
    """How long it takes until the slices of some ranks are on screen."""
    with PageServer(page.html.parent) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            browser.open(server.address)
            begin = time.perf_counter()
            browser.evaluate(f"location.hash = '#view=time&lanes=1&f.rank=0-{num_ranks - 1}'")
            browser.wait_for("truedag.model.slices && !truedag.app.pending")
            spent = time.perf_counter() - begin
            count = browser.evaluate("truedag.model.slices.length")
            requests = browser.evaluate("truedag.app.remote.numRequests")
        finally:
            server.stop()
            thread.join()
    size = page.slices.stat().st_size / 1e6 if page.slices is not None else 0
    return (
        f"{count:,} slices of {num_ranks} ranks in {1000 * spent:,.0f} ms by {requests} ranges of a {size:,.0f} MB file"
    )


def children_s() -> float:
    """CPU seconds of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def print_drawings(graph: Graph, folder: Path) -> None:
    """Draw a graph and print how many sheets of how many bytes that made, and how long it took."""
    begin, used, others = time.perf_counter(), time.process_time(), children_s()
    drawings = draw(graph.path, folder)
    seconds, spent, graphviz = time.perf_counter() - begin, time.process_time() - used, children_s() - others
    sizes = {suffix: sum(path.stat().st_size for path in folder.rglob(f"*.{suffix}")) for suffix in ("svg", "png")}
    print(
        f"  drawn in {seconds:,.1f} s (CPU: {spent:,.1f} s, and {graphviz:,.1f} s in graphviz): "
        + ", ".join(f"{one.view} {len(one.sheets)} sheets, {one.num_shown:,} nodes" for one in drawings)
        + f"; SVG {sizes['svg'] / 1e6:,.1f} MB, PNG {sizes['png'] / 1e6:,.1f} MB",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--invent-times", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium: install one, or name it with CHROMIUM")
    with tempfile.TemporaryDirectory() as name, Chromium(program) as browser:
        folder = Path(name)
        runs = arguments.runs or make_runs(folder)
        graphs = [(Graph.open(run), "") for run in runs]
        if arguments.invent_times:
            graphs.append((Graph(InventedTimes(graphs[-1][0]._source)), "synthetic times"))
        print(
            f"{'deployment':<34}{'ranks':>6}{'nodes':>11}{'built, s':>10}{'CPU, s':>8}{'MB':>7}{'open, ms':>10}"
            "  opening, worst, ms"
        )
        for number, (graph, note) in enumerate(graphs):
            begin, used = time.perf_counter(), time.process_time()
            page = write_page(graph, folder / f"page-{number}", note=note)
            built, spent = time.perf_counter() - begin, time.process_time() - used
            opened, openings = load(browser, page.html.as_uri(), arguments.rounds)
            assert browser.errors == []
            title = f"{graph.meta.get('deployment')}{' *' if note else ''}"
            times = ", ".join(f"{one:.0f}" for one in openings)
            print(
                f"{title:<34}{graph.meta['world_size']:>6}{page.num_nodes:>11,}{built:>10.1f}{spent:>8.1f}"
                f"{page.num_bytes / 1e6:>7.2f}{opened:>10.0f}  {times}",
                flush=True,
            )
            if arguments.draw and not note:
                print_drawings(graph, folder / f"drawings-{number}")
            if page.slices is not None:
                print(f"  {read_slices(browser, page, 32)}")
        if arguments.invent_times:
            print("* synthetic times: estimates of nothing")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
