"""List the deployments that ship with truedag.

Each runs as it stands where there are as many GPUs as it has ranks; those whose name ends in -cpu run on this machine.
"""

from __future__ import annotations

import argparse
import textwrap

from truedag.launch.console import print_json, print_result


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.deployment_file import load_deployment, shipped_deployments

    loaded = {name: load_deployment(name, []) for name in shipped_deployments()}
    if arguments.json:
        rows = {name: deployment.model_dump(mode="json") for name, (_, deployment) in loaded.items()}
        print_json({"deployments": rows})
        return 0
    for name, (path, deployment) in loaded.items():
        words = textwrap.wrap(deployment.description.strip(), width=100)
        place = f"{deployment.workload.kind}, {deployment.backend.name}: {deployment.strategy.describe()}"
        print_result("\n  ".join([name, *words, place, str(path)]))
    here = next(name for name, (_, deployment) in loaded.items() if deployment.backend.name == "gloo")
    print_result(f"next: truedag run {here}")
    return 0
