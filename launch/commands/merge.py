"""Build the DAG from recorded traces.

TRACES is a folder of rank-*.trace files, such as the traces/ of a run whose ranks did not all end well. The dataset is
the same, byte for byte, however many processes make it.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result
from truedag.launch.typed_numbers import positive


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("traces", metavar="TRACES", type=Path, help="the folder of the traces")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the dataset goes")
    parser.add_argument("--force", action="store_true", help="replace a dataset that is there")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="how many processes work on it (one for each core)"
    )
    parser.add_argument(
        "--memory", type=_bytes, metavar="SIZE", help="what they may take together, such as 8GiB (no bound)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.merge import merge_into

    with Progress() as progress:
        summary = merge_into(
            arguments.traces,
            arguments.out,
            replace=arguments.force,
            show=progress.show,
            processes=arguments.processes,
            memory_bytes=arguments.memory,
        )
    if arguments.json:
        print_json(summary)
        return 0
    for name, value in summary.items():
        print_result(f"  {name.replace('_', ' ')}: {value}")
    print_result(f"next: truedag report {shlex.quote(str(arguments.out))}")
    return 0


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def _bytes(text: str) -> int:
    number = text.rstrip("BKMGTibkmgt ")
    unit = text[len(number) :].strip().upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it like 8GiB or 500MB") from None
