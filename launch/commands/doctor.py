"""Say what truedag finds on this machine and what it misses."""

from __future__ import annotations

import argparse

from truedag.launch.console import print_json, print_result


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.checkup import examine

    findings = examine()
    well = all(finding.well for finding in findings)
    if arguments.json:
        print_json({"well": well, "findings": [{"name": f.name, "well": f.well, "found": f.found} for f in findings]})
        return 0 if well else 1
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print_result(f"{'ok  ' if finding.well else 'FAIL'}  {finding.name:<{width}}  {finding.found}")
    print_result("next: truedag deployments" if well else "next: truedag doctor, after mending what is marked FAIL")
    return 0 if well else 1
