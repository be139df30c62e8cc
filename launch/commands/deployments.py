"""List the deployments that ship with truedag."""

from __future__ import annotations

import argparse

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
        print_result(f"{name}\n  {deployment.description.strip()}\n  {deployment.strategy.describe()}\n  {path}")
    print_result(f"next: truedag run {next(iter(loaded))}")
    return 0
