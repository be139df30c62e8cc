"""Say what a graph, a drawing or a claim shows of a strategy, and what is wrong with it.

SUBJECT is a run's folder or a dataset; a drawing (DOT, GraphML, node-link or Cytoscape JSON); or a claim: a YAML or
JSON file that states a strategy, GPUs, parameters, layers, ..., or the same in words (.md, .txt).
A run is compared with the deployment that it ran, the others with --deployment.
--explain says what a check means and how it decides; without a name it lists them all.

The exit code is 3 where faults were found.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result, shorten
from truedag.launch.errors import UsageError

FAULTS = 3
_LISTED = 90


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("subject", metavar="SUBJECT", type=Path, nargs="?", help="a run, a drawing or a claim")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values of the deployment to override")
    parser.add_argument("--deployment", metavar="D", help="what it should be: a name, or the path of a YAML file")
    parser.add_argument("--against", metavar="GRAPH", type=Path, help="a run of it: its deployment and measured times")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write audit.md, audit.json and audit.sarif there")
    parser.add_argument(
        "--mark", metavar="FILE", type=Path, help="write the drawing again, with the faulty parts marked"
    )
    parser.add_argument("--fix", metavar="FILE", type=Path, help="write the true DAG, as recorded or dry")
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")
    parser.add_argument("--sarif", action="store_true", help="print the audit as SARIF")
    parser.add_argument("--explain", metavar="CHECK", nargs="?", const="", help="say what a check means")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    if arguments.explain is not None:
        return _explain(arguments.explain)
    if arguments.subject is None:
        raise UsageError("truedag audit needs a SUBJECT: a run's folder, a drawing or a claim (or --explain)")
    from truedag.launch.audit import Request, audit_subject, write_files
    from truedag.tracer.audit.report import print_audit, to_json
    from truedag.tracer.audit.sarif import to_sarif

    request = Request(
        subject=arguments.subject,
        deployment=arguments.deployment,
        overrides=tuple(arguments.overrides),
        against=arguments.against,
        mark=arguments.mark,
        fix=arguments.fix,
    )
    with Progress() as progress:
        audit = audit_subject(request, progress=progress.show)
    if arguments.out is not None:
        write_files(audit, arguments.out, subject=arguments.subject)
    if arguments.json:
        print_json(to_json(audit))
    elif arguments.sarif:
        print_json(to_sarif(audit, uri=str(arguments.subject)))
    else:
        print_audit(audit, width=None if sys.stdout.isatty() else 110)
        _print_next(arguments, audit.findings[0].check if audit.findings else None)
    return FAULTS if audit.faults else 0


def _print_next(arguments: argparse.Namespace, check: str | None) -> None:
    for path in (arguments.mark, arguments.fix):
        if path is not None and path.exists():
            print_result(f"Written: {shorten(path.absolute())}")
    if check is not None:
        print_result(f"next: truedag audit --explain {check}")
    elif arguments.out is None:
        print_result(f"next: truedag audit {shlex.quote(str(arguments.subject))} --out DIR")


def _explain(name: str) -> int:
    from truedag.tracer.audit.catalogue import CHECKS, explain

    if not name:
        width = max(map(len, CHECKS))
        for check in CHECKS.values():
            print_result(f"{check.id:<{width}}  {check.title}"[:_LISTED])
        print_result("next: truedag audit --explain CHECK")
        return 0
    if name not in CHECKS:
        raise UsageError(f"there is no check {name!r}; truedag audit --explain lists them")
    print_result(explain(CHECKS[name]).rstrip())
    return 0
