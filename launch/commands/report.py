"""Say what a run was and how it spent its time.

RUN is a run's folder, or a dataset that truedag merge wrote. Every figure is computed from the dataset, and --explain
says how: no RUN is needed for that.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result, shorten
from truedag.launch.errors import UsageError

_PREFIXES = {"": 1.0, "G": 1e9, "T": 1e12, "P": 1e15}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?", help="a run's folder, or a dataset")
    parser.add_argument(
        "--explain",
        metavar="FIGURE",
        help="say how a figure is computed: shares, mfu, or the head of a column (an unknown name lists them)",
    )
    parser.add_argument(
        "--peak-flops", type=_flops, metavar="989T", help="what one rank's device can do in a second, for MFU"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw it into DIR (needs matplotlib)")
    parser.add_argument("--plot-format", choices=("svg", "png"), default="svg", help="of the plots (default: svg)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--markdown", action="store_true", help="print the report as Markdown")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    if arguments.explain is not None:
        from truedag.tracer.analysis.figures import FIGURES, explain, find_figure

        figure = find_figure(arguments.explain)
        if figure is None:
            raise UsageError(
                f"there is no figure {arguments.explain!r}: name one of {', '.join(FIGURES)}, or the head of a column"
            )
        print_result(explain(figure))
        return 0
    if arguments.run is None:
        raise UsageError("name a RUN: a run's folder, or a dataset that truedag merge wrote")

    from truedag.tracer.analysis.report import make_report
    from truedag.tracer.graph import Graph

    graph = Graph.open(arguments.run)
    with Progress() as progress:
        progress.show("reading the graph")
        report = make_report(graph, peak_flops_per_s=arguments.peak_flops)
        plots = []
        if arguments.plots is not None:
            from truedag.tracer.analysis.report_plots import plot_report

            progress.show("drawing")
            plots = plot_report(report, arguments.plots, to=arguments.plot_format)
    if arguments.json or arguments.markdown:
        for plot in plots:
            progress.say(f"drawn: {shorten(plot.absolute())}")
    if arguments.json:
        from dataclasses import asdict

        print_json(asdict(report))
        return 0
    if arguments.markdown:
        from truedag.tracer.analysis.report_text import write_markdown

        print_result(write_markdown(report))
        return 0
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(report.render())
    for plot in plots:
        print_result(f"drawn: {shorten(plot.absolute())}")
    print_result(f"next: truedag view {shlex.quote(str(arguments.run))}")
    return 0


def _flops(text: str) -> float:
    """Read 989T."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([GTP]?)", text.strip())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of FLOP/s: write it like 989T or 989e12")
    return float(found[1]) * _PREFIXES[found[2]]
