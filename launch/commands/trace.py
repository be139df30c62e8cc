"""Record any torch program as it is, and build its DAG.

truedag trace [torchrun options] [options] SCRIPT [arguments]: with torchrun's options (--nproc-per-node and so on) its
ranks are started by torchrun, without them SCRIPT runs as under python, and whatever ranks it starts are recorded. What
stands after SCRIPT belongs to it. Nothing in the program has to be changed; what it can tell the recorder is in
truedag.tracer (trace, step, annotate).

The exit code is 0 when all went well and 1 when the program failed, whatever its own was; what it was is said.

With a launcher of one's own: torchrun ... -m truedag.tracer.attach SCRIPT, which --print-command prints.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from truedag.launch.console import Progress, print_audited, print_json, print_result, shorten
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import UsageError
from truedag.launch.stall import list_ranks
from truedag.launch.trace import Program, TraceResult, WindowResult, trace_program, write_command
from truedag.tracer.errors import RecordError
from truedag.tracer.record.options import add_record_options, read_options

_TORCHRUN = (
    "--nnodes", "--nproc-per-node", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf",
    "--master-addr", "--master-port", "--local-addr", "--max-restarts", "--monitor-interval", "--start-method",
    "--role", "--log-dir", "--redirects", "--tee", "--local-ranks-filter", "--logs-specs", "--numa-binding",
    "--signals-to-handle", "--shutdown-timeout", "--event-log-handler",
)  # fmt: skip
_TORCHRUN_FLAGS = ("--standalone", "--virtual-local-rank")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_record_options(parser, default_out="truedag-out/SCRIPT")
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    parser.add_argument("--deployment", metavar="D", help="what the audit compares it with: a name, or a YAML file")
    parser.add_argument("--no-merge", action="store_true", help="leave the traces as they are")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and the program's on stderr")
    parser.add_argument("--print-command", action="store_true", help="print what to start on a cluster, start nothing")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="the program and its arguments")
    torchrun = parser.add_argument_group("torchrun", f"passed to it: {', '.join((*_TORCHRUN, *_TORCHRUN_FLAGS))}")
    for name in _TORCHRUN:
        torchrun.add_argument(name, *_other_spelling(name), action=_Pass, metavar="X", help=argparse.SUPPRESS)
    for name in _TORCHRUN_FLAGS:
        torchrun.add_argument(name, *_other_spelling(name), action=_Pass, nargs=0, help=argparse.SUPPRESS)
    parser.set_defaults(torchrun=())


def _other_spelling(name: str) -> list[str]:
    other = "--" + name[2:].replace("-", "_")
    return [other] if other != name else []


class _Pass(argparse.Action):
    """Keeps an option for torchrun."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: str | None = None) -> None:
        name = self.option_strings[0]
        namespace.torchrun = (*namespace.torchrun, name if self.nargs == 0 else f"{name}={values}")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    words: list[str] = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not words:
        raise UsageError("which program? Name its script: truedag trace SCRIPT, or a module: truedag trace -m MODULE")
    program = Program(arguments=tuple(words), is_module=arguments.module, torchrun=arguments.torchrun)
    try:
        options = read_options(arguments, os.environ, default_out=Path("truedag-out") / program.name)
    except RecordError as error:
        raise UsageError(str(error)) from error
    if arguments.print_command:
        sys.stdout.write(write_command(program, options))
        return 0
    deployment = None if arguments.deployment is None else load_deployment(arguments.deployment, ())[1]
    with Progress() as progress:
        result = trace_program(
            program,
            options,
            deployment=deployment,
            merges=not arguments.no_merge,
            prints_json=arguments.json,
            command=sys.argv,
            progress=progress,
        )
    if arguments.json:
        from dataclasses import asdict

        print_json(asdict(result))
    else:
        _print_result(result)
    return 0


def _print_result(result: TraceResult) -> None:
    out = shlex.quote(str(shorten(result.out)))
    for window in result.windows:
        print_result(f"  {_describe(window)}")
        if window.dag is not None:
            print_audited(window.audit)
    print_result(f"{result.seconds:.0f} s in all. The recording of {result.program} is in {out}.")
    merged = [window for window in result.windows if window.dag is not None]
    if result.is_elsewhere:
        print_result("next: on the node of rank 0, where all traces are, the graph is made")
    elif not merged:
        first = result.windows[0] if result.windows else None
        traces = first.traces if first is not None else result.out / "traces"
        names = (shlex.quote(str(shorten(path))) for path in (traces, traces.parent / "dag"))
        print_result("next: truedag merge {} --out {}".format(*names))
    elif len(merged) == 1 and merged[0].first_step is None:
        print_result(f"next: truedag report {out}")
    else:
        print_result(f"next: truedag report {shlex.quote(str(shorten(merged[0].traces.parent)))}")


def _describe(window: WindowResult) -> str:
    what = "all that was recorded" if window.first_step is None else f"the steps from {window.first_step} on"
    if window.dag is None:
        return f"{what}: traces in {shorten(window.traces)}"
    found = window.merge
    missing = found["missing_ranks"]
    ranks = f"{found['num_ranks']} {'rank' if found['num_ranks'] == 1 else 'ranks'}"
    return (
        f"{what}: {found['num_nodes']:,} nodes, {found['num_edges']:,} edges, {ranks}, "
        f"{found['num_collectives']:,} collectives, {found['num_messages']:,} messages, "
        f"unmatched communications: {found['num_unmatched']}, "
        + (f"without {list_ranks(missing)}" if missing else "no rank missing")
        + f": {shorten(window.dag)}"
        + (f"; nothing was drawn: {window.not_drawn}" if window.not_drawn else "")
    )
