"""Draw a run's graph at layer level, as DOT, SVG and PNG.

RUN is a run's folder, or a dataset that truedag merge wrote.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result, shorten


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a dataset")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the pictures go (default: views beside the dataset)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.tracer.graph import Graph
    from truedag.tracer.views.draw import draw

    dag = Graph.open(arguments.run).path
    views = arguments.out if arguments.out is not None else dag.absolute().parent / "views"
    with Progress() as progress:
        (drawing,) = draw(dag, views, views=["simplified"], progress=progress.show)
    if arguments.json:
        from dataclasses import asdict

        print_json(asdict(drawing))
        return 0
    print_result(f"{drawing.num_shown:,} nodes drawn, which stand for {drawing.num_nodes:,} of {drawing.num_total:,}")
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    print_result(f"next: {opener} {shlex.quote(str(shorten(drawing.svg.absolute())))}")
    return 0
