"""Say what a run was and how it spent its time.

RUN is a run's folder, or a dataset that truedag merge wrote. Every figure is computed from the dataset.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from truedag.launch.console import print_json, print_report, print_result


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a dataset")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.tracer.graph import Graph

    dag = Graph.open(arguments.run).path
    if arguments.json:
        from dataclasses import asdict

        from truedag.tracer.analysis.report import make_report

        print_json(asdict(make_report(dag)))
        return 0
    print_report(dag)
    print_result(f"next: truedag view {shlex.quote(str(arguments.run))}")
    return 0
