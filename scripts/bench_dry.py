"""What the shipped deployments are at full size, and what it costs to find out: time, memory, classes, communications.

    python scripts/bench_dry.py [DEPLOYMENT ...] [--expand] [--routing HOW] [--no-views] [--gpus-per-node N] [--out DIR]

Each is executed by `truedag dry`, one rank of each class, at its full world size. Times are from the command's start;
memory is the most that one of its processes had: up to the class graph, and with its audit, drawings and page.
`--expand` also writes all nodes and edges of all ranks. A deployment may carry overrides, as in
`moe-30b-ep64-tp8-pp2-dp2,strategy=EP64-TP8-PP2-DP32,workload.global_batch_size=2048`: the largest one on 32,768 ranks.

Bytes are what all participants give; inside means that all ranks of the group are in one node, across that they are
not, alone that there is but one, so that nothing moves. Memory is by storage lifetime, without allocators' rounding and
communications' buffers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from truedag.tracer.analysis.held_memory import read_memory
from truedag.tracer.analysis.quantities import write_runs

DEPLOYMENTS = (
    "moe-30b-ep64-tp8-pp2-dp2",
    "moe-10b-tp2-ep2-pp2",
    "llama3-70b-tp2-pp4",
    "moe-30b-ep64-tp2-pp8",
    "moe-30b-ep8-tp4-pp2-dp4",
)

_SUBREAPER = 36  # of prctl: who outlives its parent becomes a child of this process
_SHOWN = 16
_STATES = {
    "graph": "class graph", "expanded": "whole graph", "audited": "audited", "drawn": "drawn", "page": "page"
}  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployments", nargs="*", metavar="DEPLOYMENT")
    parser.add_argument("--expand", action="store_true")
    parser.add_argument("--routing", default="balanced", metavar="HOW")
    parser.add_argument("--no-views", action="store_true")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep what was made there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-dry-") as scratch:
        for told in arguments.deployments or DEPLOYMENTS:
            name, *overrides = told.split(",")
            options = ["--routing", arguments.routing, *(["--no-views"] if arguments.no_views else [])]
            out = (arguments.out or Path(scratch)) / name
            run(name, overrides, options, out, expand=arguments.expand, gpus_per_node=arguments.gpus_per_node)
    return 0


def run(name: str, overrides: list[str], options: list[str], out: Path, *, expand: bool, gpus_per_node: int) -> None:
    """Execute a deployment without memory, and print what there is to know."""
    options = [*options, *(["--expand"] if expand else [])]
    command = [sys.executable, "-m", "truedag.launch.cli", "dry", name, *overrides, *options]
    cost, text = watch([*command, "--force", "--json", "--out", str(out)])
    result = json.loads(text)
    counts = result["merge"]
    print(f"\n{name} {' '.join(overrides)}\n  {result['strategy']}")
    outside = cost.seconds - result["seconds"]  # the interpreter's start and end
    said = [f"{_STATES[name]} after {outside + seconds:.1f} s" for name, seconds in result["reached"].items()]
    print(f"  {', '.join(said)}; on {os.cpu_count()} cores, {cost.user_s:.1f} s of user time in all processes")
    print(
        f"  {result['graph_peak_bytes'] / 2**20:,.0f} MiB in the largest process up to the class graph, "
        f"{cost.peak_bytes / 2**20:,.0f} MiB up to the end"
    )
    derived = f", sizes of {result['num_derived']:,} derived" if result["num_derived"] else ""
    print(
        f"  {len(result['classes']):,} rank classes of {result['world_size']:,} ranks, {len(result['ranks']):,} "
        f"executed{derived}"
    )
    print(
        f"  class graph {counts['num_class_nodes']:,} nodes, {counts['num_class_edges']:,} edges; "
        f"{'written' if expand else 'stands for'} {counts['num_nodes']:,} nodes, {counts['num_edges']:,} edges"
    )
    classes = out / ("classes" if expand else "dag")
    meta = json.loads((classes / "meta.json").read_text())
    for one in read_memory(meta, pl.read_parquet(classes / "ranks.parquet"))[:_SHOWN]:
        kept = (one.parameter_bytes, one.gradient_bytes, one.state_bytes, one.activation_bytes, one.peak_bytes)
        parameters, gradients, state, made, peak = (f"{size / 2**30:.2f} GiB" for size in kept)
        print(
            f"  each of ranks {write_runs(one.ranks)}: parameters {parameters}, gradients {gradients}, state {state}, "
            f"made {made}, at most {peak} together (at {one.peak_op} in {one.peak_module})"
        )
    for row in communications(classes, gpus_per_node).iter_rows(named=True):
        print(
            f"  {row['axis'] or 'unsaid':<12} {row['what']:<15} {row['num']:>9,} in {row['groups']:>6,} groups, "
            f"{row['bytes'] / 2**30:>10,.3f} GiB {row['link']}"
        )


def communications(classes: Path, gpus_per_node: int) -> pl.DataFrame:
    """Count the communications of a class graph by axis, kind and link: axis, what, link, num, groups, bytes."""
    names = ("nodes", "participants", "groups", "ranks")
    tables = {name: pl.read_parquet(classes / f"{name}.parquet") for name in names}
    spread = pl.col("ranks").list.eval(pl.element() // gpus_per_node).list.n_unique() > 1
    teams = (
        tables["groups"]
        .group_by("team")
        .agg(pl.col("axis").first(), groups=pl.len(), is_across=spread.any(), size=pl.col("ranks").list.len().first())
    )
    sizes = tables["ranks"].group_by("rank_class").agg(ranks=pl.len())
    parts = tables["participants"].with_row_index("row").join(sizes, on="rank_class", maintain_order="left")
    parts = parts.with_columns(pl.col("row").cast(pl.Int64), bytes=pl.col("send_bytes") * pl.col("ranks"))
    own = classes / "participant_sizes.parquet"
    if own.exists():
        more = pl.read_parquet(own).join(parts.select("row", first="send_bytes"), on="row")
        more = more.group_by("row").agg(more=(pl.col("send_bytes") - pl.col("first")).sum())
        parts = parts.join(more, on="row", how="left").with_columns(pl.col("bytes") + pl.col("more").fill_null(0))
    # A class may be in some groups of a team at several places: its ranks all are in one group of it each.
    sent = parts.group_by("node").agg(pl.col("team").first(), pl.col("bytes").sum())
    nodes = tables["nodes"].filter(pl.col("kind").is_in(["collective", "send"]))
    found = nodes.select("node", "num", "label").join(sent, on="node").join(teams, on="team")
    what = pl.col("label").str.split(" ").list.first()
    link = pl.when("is_across").then(pl.lit("across")).otherwise(pl.lit("inside"))
    link = pl.when(pl.col("size") == 1).then(pl.lit("alone")).otherwise(link)
    keys = ["axis", "what", "link"]
    counted = (
        found.with_columns(what=what, link=link)
        .group_by(*keys)
        .agg(pl.col("num").sum(), pl.col("bytes").sum(), used=pl.struct("team", "groups").unique())
    )
    groups = pl.col("used").list.eval(pl.element().struct.field("groups")).list.sum()
    return counted.with_columns(groups=groups).drop("used").sort("bytes", descending=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a command and all its processes took."""

    seconds: float
    user_s: float
    peak_bytes: int
    """Of the largest process."""


def watch(command: list[str]) -> tuple[Cost, str]:
    """Run a command; return what it and its processes took, also those that outlive it, and what it printed."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed)
        ended = {}
        while process.pid not in ended:
            ended |= dict([_wait()])
        seconds = time.monotonic() - began
        with suppress(ChildProcessError):
            while True:
                ended |= dict([_wait()])
        printed.seek(0)
        text = printed.read()
    process.returncode, _ = ended[process.pid]
    if process.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    used = [usage for _, usage in ended.values()]
    peak = max(usage.ru_maxrss for usage in used) * 1024
    return Cost(seconds=seconds, user_s=sum(usage.ru_utime for usage in used), peak_bytes=peak), text


def _wait() -> tuple[int, tuple[int, resource.struct_rusage]]:
    pid, status, usage = os.wait4(-1, 0)
    return pid, (os.waitstatus_to_exitcode(status), usage)


if __name__ == "__main__":
    sys.exit(main())
