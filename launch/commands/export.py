"""Write a run's graph in the format of another program.

RUN is a run's folder, or a dataset that truedag merge wrote. A part of it is chosen with --ranks, --steps and --window;
graph formats can be folded as well. Without --out it goes into views/ beside the dataset.

formats:
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import get_args

from truedag.launch.console import Progress, print_json, print_result, shorten
from truedag.launch.typed_numbers import positive

_UNITS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_HOW_TO_OPEN = {
    "perfetto": "open {path} at https://ui.perfetto.dev (it stays on your machine)",
    "chrome": "open {path} at chrome://tracing",
    "chakra": "chakra_jsonizer --input_filename {path}/trace.0.et --output_filename trace.0.json",
    "node-link": "python -c 'import json, networkx as nx; "
    'print(nx.node_link_graph(json.load(open("{path}")), edges="links"))\'',
    "graphml": "python -c 'import networkx as nx; print(nx.read_graphml(\"{path}\", force_multigraph=True))'",
    "model-explorer": "model-explorer {path}",
}

_SAID = {
    "num_order_dependencies": "dependencies of program order",
    "num_unnamed_collectives": "collectives of kinds that Chakra has no name for, as operators",
    "num_open_messages": "sends and receives whose other end is not in it, without a tag",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from truedag.tracer.export.exporting import FORMATS
    from truedag.tracer.graph.levels import Level

    lines = [f"  {one.name:15} {one.summary}{_bound(one.most)}" for one in FORMATS.values()]
    parser.description = f"{(parser.description or '').rstrip()}\n" + "\n".join(lines)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a dataset")
    parser.add_argument("--to", required=True, choices=[*FORMATS], metavar="NAME", help="the format")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the file, or the folder where it is several")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--ranks", type=_numbers, metavar="0-3,8", help="only these ranks")
    parser.add_argument("--steps", type=_numbers, metavar="0,1", help="only these steps")
    parser.add_argument("--window", type=_window, metavar="10ms-25ms", help="only what ran then, since the first start")
    parser.add_argument("--fold", choices=get_args(Level), metavar="LEVEL", help=", ".join(get_args(Level)))
    parser.add_argument("--order", action="store_true", help="keep edges of program order in graph formats")
    parser.add_argument("--max", type=positive, metavar="N", help="how many slices or nodes are not too many")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    import polars as pl

    from truedag.tracer.export.exporting import FORMATS, export
    from truedag.tracer.graph import Graph

    whole = Graph.open(arguments.run)
    to = FORMATS[arguments.to]
    path = arguments.out if arguments.out is not None else whole.path.absolute().parent / "views" / to.file
    window = arguments.window
    if window is not None:
        begin = int(whole.nodes.select(pl.col("start_ns").min()).collect().item() or 0)
        window = (begin + window[0], begin + window[1])
    part = whole
    if (arguments.ranks, arguments.steps, window) != (None, None, None):
        part = whole.subgraph(ranks=arguments.ranks, steps=arguments.steps, time_ns=window)
    with Progress() as progress:
        done = export(
            part,
            to,
            path,
            fold=arguments.fold,
            order=arguments.order,
            most=arguments.max,
            replace=arguments.force,
            show=progress.show,
        )
    if arguments.json:
        told = {"num_untimed": done.num_untimed, "num_estimated": done.num_estimated}
        print_json({"path": str(path), **told, **done.counts})
        return 0
    counts = ", ".join(
        f"{count:,} {_SAID.get(name) or name.removeprefix('num_').replace('_', ' ')}"
        for name, count in done.counts.items()
        if count
    )
    print_result(f"{shorten(path.absolute())}: {counts or 'nothing'}")
    if done.num_estimated:
        print_result(f"ESTIMATED: the times of {done.num_estimated:,} nodes are estimates, not measurements")
    if done.num_untimed:
        print_result(f"{done.num_untimed:,} operators or parts in communications have no time, and are not in it")
    if to.name in _HOW_TO_OPEN:
        print_result("next: " + _HOW_TO_OPEN[to.name].format(path=shlex.quote(str(shorten(path.absolute())))))
    return 0


def _bound(most: int | None) -> str:
    return "" if most is None else f" (up to {most:,})"


def _numbers(text: str) -> list[int]:
    """Read 0-3,8."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise argparse.ArgumentTypeError(f"{text!r} names no numbers: write them like 0-3,8")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def _window(text: str) -> tuple[int, int]:
    """Read 10ms-25ms as ns."""
    found = re.fullmatch(r"([\d.]+)(ns|us|µs|ms|s)-([\d.]+)(ns|us|µs|ms|s)", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no stretch of time: write it like 10ms-25ms")
    begin, end = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    if end < begin:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins")
    return int(begin), int(end)
