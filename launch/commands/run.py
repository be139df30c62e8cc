"""Run a deployment on this machine, record one step on every rank, and build its DAG.

DEPLOYMENT is the name of one that ships (truedag deployments lists them) or the path of a YAML file. Any of its values
can be overridden: truedag run moe-10b-tp2-ep2-pp2-cpu workload.sequence_length=32
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_report, print_result, shorten


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("deployment", metavar="DEPLOYMENT", help="a name, or the path of a YAML file")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values to override")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: truedag-out/NAME)")
    parser.add_argument("--force", action="store_true", help="replace the folder of an earlier run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--recorder",
        choices=("native", "python", "off"),
        help="what records: native (compiled), python (slower, no compiler), off (no DAG); the same as trace.recorder=",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.run import run_deployment

    overrides: list[str] = list(arguments.overrides)
    if arguments.recorder is not None:
        overrides.append(f"trace.recorder='{arguments.recorder}'")
    with Progress() as progress:
        result = run_deployment(
            arguments.deployment,
            overrides,
            out=arguments.out,
            replace=arguments.force,
            command=sys.argv,
            progress=progress,
        )
    if arguments.json:
        from pydantic import TypeAdapter

        from truedag.launch.run import RunResult

        print_json(TypeAdapter(RunResult).dump_python(result, mode="json"))
        return 0
    if result.dag is not None:
        print_report(result.dag)
    else:
        print_result(f"{result.deployment} · {result.strategy}")
    for step in result.steps:
        print_result(
            f"  step {step.step}  loss {step.loss:.6f}  gradient norm {step.gradient_norm:.6f}  "
            f"{step.wall_ns / 1e9:.2f} s{'  recorded' if step.recorded else ''}"
        )
    if result.dag is None or result.views is None:
        print_result(f"  {result.seconds:.0f} s in all; nothing was to be recorded, so there is no DAG")
        traced = shlex.quote(f"{shorten(result.out)}-traced")
        print_result(f"next: truedag run {shlex.quote(arguments.deployment)} --out {traced}")
        return 0
    if result.not_drawn:
        print_result(f"Nothing was drawn: {result.not_drawn}")
    places = f"The DAG is in {shorten(result.dag)}, its pictures in {shorten(result.views)}."
    print_result(f"{result.seconds:.0f} s in all. {places}")
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    picture = result.pictures[0] if result.pictures else result.out / "report.md"
    print_result(f"next: {opener} {shlex.quote(str(shorten(picture)))}")
    return 0
