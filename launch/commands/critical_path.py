"""Say what a step's time was spent on, one thing after the other, across all ranks.

RUN is a run's folder, or a dataset that truedag merge wrote. The critical path leads back from the last end of the
step, and over to another rank wherever one waited for it, so its length is the time of the step, and nothing that is
not on it made the step longer. Then: which rank came last to the communications, and what it came late for. Of a dry
run with --device it is that of the estimated times, and each rank stands for all that run as it does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from truedag.launch.console import print_json
from truedag.launch.typed_numbers import positive


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a dataset")
    parser.add_argument("--step", type=int, metavar="N", help="which recorded step (default: the first)")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="rows of each table (default: 10)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, times in ns")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from rich.console import Console

    from truedag.tracer.analysis.critical_path import find_critical_path
    from truedag.tracer.analysis.critical_path_text import render_critical_path, summarise
    from truedag.tracer.graph import Graph

    graph = Graph.open(arguments.run)
    path = find_critical_path(graph, arguments.step)
    if arguments.json:
        print_json(summarise(path, top=arguments.top))
        return 0
    title = str(graph.meta.get("deployment") or "recorded program")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(render_critical_path(path, title=title, top=arguments.top))
    return 0
