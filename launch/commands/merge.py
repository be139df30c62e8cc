"""Build the DAG from recorded traces.

TRACES is a folder of rank-*.trace files, such as the traces/ of a run whose ranks did not all end well.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("traces", metavar="TRACES", type=Path, help="the folder of the traces")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the dataset goes")
    parser.add_argument("--force", action="store_true", help="replace a dataset that is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.merge import merge_into

    with Progress() as progress:
        summary = merge_into(arguments.traces, arguments.out, replace=arguments.force, show=progress.show)
    if arguments.json:
        print_json(summary)
        return 0
    for name, value in summary.items():
        print_result(f"  {name.replace('_', ' ')}: {value}")
    print_result(f"next: truedag report {shlex.quote(str(arguments.out))}")
    return 0
