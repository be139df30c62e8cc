"""Draw a run's graph as DOT, SVG and PNG: simplified, comprehensive and detailed, linked to each other.

RUN is a run's folder, or a dataset that truedag merge wrote. `simplified` is the strategy in one look; `comprehensive`
has every GPU, and every layer of each stage; `detailed` every operator of the layers of one rank class of each stage.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result, shorten

_VIEWS = ("simplified", "comprehensive", "detailed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a dataset")
    parser.add_argument("--view", action="append", choices=_VIEWS, help="only this one (may be repeated)")
    parser.add_argument(
        "--layer", action="append", type=int, metavar="N",
        help="in detail this layer alone, not folded with those that are alike (may be repeated)",
    )  # fmt: skip
    parser.add_argument("--stage", action="append", type=int, metavar="N", help="only this stage (may be repeated)")
    parser.add_argument("--rank", type=int, metavar="N", help="in detail the class of this rank, for its stage")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the pictures go (default: views beside the dataset)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.run_audit import read_audit
    from truedag.tracer.graph import Graph
    from truedag.tracer.views.draw import VIEWS, Choice, draw

    dag = Graph.open(arguments.run).path
    views = arguments.out if arguments.out is not None else dag.absolute().parent / "views"
    choice = Choice(
        layers=tuple(arguments.layer) if arguments.layer is not None else None,
        stages=tuple(arguments.stage) if arguments.stage is not None else None,
        rank=arguments.rank,
    )
    wanted = arguments.view
    if wanted is None:
        wanted = ["detailed"] if arguments.layer is not None or arguments.rank is not None else VIEWS
    with Progress() as progress:
        drawings = draw(dag, views, views=wanted, choice=choice, audit=read_audit(dag), progress=progress.show)
    if arguments.json:
        from dataclasses import asdict

        print_json({drawing.view: asdict(drawing) for drawing in drawings})
        return 0
    for one in drawings:
        sheets = f"{len(one.sheets)} sheet{'' if len(one.sheets) == 1 else 's'}"
        print_result(
            f"{one.view}: {sheets}, {one.num_shown:,} nodes on the first, for {one.num_nodes:,} of {one.num_total:,}"
        )
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    print_result(f"next: {opener} {shlex.quote(str(shorten(drawings[0].svg.absolute())))}")
    return 0
