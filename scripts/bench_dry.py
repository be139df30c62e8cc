"""What the shipped deployments are at full size, and what it costs to find out: time, memory, classes, communications.

    python scripts/bench_dry.py [DEPLOYMENT ...] [--expand] [--gpus-per-node N] [--out DIR]

Each is executed by `truedag dry`, one rank of each class, at its full world size; memory is the most that one of its
processes had. `--expand` also writes all nodes and edges of all ranks. A deployment may carry overrides, as in
`moe-30b-ep64-tp8-pp2-dp2,strategy=EP64-TP8-PP2-DP32,workload.global_batch_size=2048`: the largest one on 32,768 ranks.

Bytes are what all participants give; inside means that all ranks of the group are in one node, across that they are
not. Kept in memory are parameters, gradients, and the optimizer's state or the cache: what operators make in a step
comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

DEPLOYMENTS = (
    "moe-30b-ep64-tp8-pp2-dp2",
    "moe-10b-tp2-ep2-pp2",
    "llama3-70b-tp2-pp4",
    "moe-30b-ep64-tp2-pp8",
    "moe-30b-ep8-tp4-pp2-dp4",
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployments", nargs="*", metavar="DEPLOYMENT")
    parser.add_argument("--expand", action="store_true")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep what was made there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-dry-") as scratch:
        for told in arguments.deployments or DEPLOYMENTS:
            name, *overrides = told.split(",")
            run(name, overrides, (arguments.out or Path(scratch)) / name, arguments.expand, arguments.gpus_per_node)
    return 0


def run(name: str, overrides: list[str], out: Path, expand: bool, gpus_per_node: int) -> None:
    """Execute a deployment without memory, and print what there is to know."""
    options = ["--expand"] if expand else []
    command = [sys.executable, "-m", "truedag.launch.cli", "dry", name, *overrides, *options]
    began = time.monotonic()
    peak, text = watch([*command, "--force", "--json", "--out", str(out)])
    seconds = time.monotonic() - began
    result = json.loads(text)
    counts = result["merge"]
    print(f"\n{name} {' '.join(overrides)}\n  {result['strategy']}")
    print(f"  {seconds:.1f} s, {peak / 2**20:,.0f} MiB in the largest process, on {os.cpu_count()} cores")
    print(f"  {len(result['classes'])} rank classes of {result['world_size']:,} ranks")
    print(
        f"  class graph {counts['num_class_nodes']:,} nodes, {counts['num_class_edges']:,} edges; "
        f"{'written' if expand else 'stands for'} {counts['num_nodes']:,} nodes, {counts['num_edges']:,} edges"
    )
    classes = out / ("classes" if expand else "dag")
    meta = json.loads((classes / "meta.json").read_text())
    for one in meta["memory"]:
        kept = ", ".join(
            f"{role} {one[f'{role}_bytes'] / 2**30:.2f} GiB" for role in ("parameter", "gradient", "state")
        )
        print(
            f"  each rank of class {one['rank_class']}: {kept}, made {one['activation_bytes'] / 2**30:.2f} GiB, "
            f"at most {one['peak_bytes'] / 2**30:.2f} GiB together (at {one['peak_op']} in {one['peak_module']})"
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
    teams = tables["groups"].group_by("team").agg(pl.col("axis").first(), groups=pl.len(), is_across=spread.any())
    sizes = tables["ranks"].group_by("rank_class").agg(ranks=pl.len())
    parts = tables["participants"].join(sizes, on="rank_class")
    # A class may be in some groups of a team at several places: its ranks all are in one group of it each.
    sent = parts.group_by("node").agg(pl.col("team").first(), bytes=(pl.col("send_bytes") * pl.col("ranks")).sum())
    nodes = tables["nodes"].filter(pl.col("kind").is_in(["collective", "send"]))
    found = nodes.select("node", "num", "label").join(sent, on="node").join(teams, on="team")
    what = pl.col("label").str.split(" ").list.first()
    link = pl.when("is_across").then(pl.lit("across")).otherwise(pl.lit("inside"))
    keys = ["axis", "what", "link"]
    counted = (
        found.with_columns(what=what, link=link)
        .group_by(*keys)
        .agg(pl.col("num").sum(), pl.col("bytes").sum(), used=pl.struct("team", "groups").unique())
    )
    groups = pl.col("used").list.eval(pl.element().struct.field("groups")).list.sum()
    return counted.with_columns(groups=groups).drop("used").sort("bytes", descending=True)


def watch(command: list[str]) -> tuple[int, str]:
    """Run a command; return the most memory that it or one of its children had, in bytes, and what it printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}")
    ranks = max((rank["peak_bytes"] for rank in json.loads(done.stdout)["ranks"]), default=0)
    return max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, ranks), done.stdout


if __name__ == "__main__":
    sys.exit(main())
