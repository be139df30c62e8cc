"""The command line `truedag`: finds the command, runs it, and alone turns errors into one message and an exit code.

Exit codes: 0 well, 1 the user's input or run is at fault, 2 usage, 3 the audit found faults.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from truedag.launch.errors import UsageError
from truedag.tracer.errors import TruedagError


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand: what it says of itself, what it takes, what it does."""

    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace], int]
    takes_program: bool = False
    """Whether the arguments end with a program and its own, which are none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of `truedag --help`, and how to get at the command without importing any other."""

    summary: str
    load: Callable[[], Command]


def _load_run() -> Command:
    from truedag.launch.commands import run

    return Command(description=run.__doc__ or "", configure=run.configure, execute=run.execute)


def _load_dry() -> Command:
    from truedag.launch.commands import dry

    return Command(description=dry.__doc__ or "", configure=dry.configure, execute=dry.execute)


def _load_trace() -> Command:
    from truedag.launch.commands import trace

    return Command(
        description=trace.__doc__ or "", configure=trace.configure, execute=trace.execute, takes_program=True
    )


def _load_merge() -> Command:
    from truedag.launch.commands import merge

    return Command(description=merge.__doc__ or "", configure=merge.configure, execute=merge.execute)


def _load_audit() -> Command:
    from truedag.launch.commands import audit

    return Command(description=audit.__doc__ or "", configure=audit.configure, execute=audit.execute)


def _load_report() -> Command:
    from truedag.launch.commands import report

    return Command(description=report.__doc__ or "", configure=report.configure, execute=report.execute)


def _load_critical_path() -> Command:
    from truedag.launch.commands import critical_path

    return Command(
        description=critical_path.__doc__ or "", configure=critical_path.configure, execute=critical_path.execute
    )


def _load_draw() -> Command:
    from truedag.launch.commands import draw

    return Command(description=draw.__doc__ or "", configure=draw.configure, execute=draw.execute)


def _load_view() -> Command:
    from truedag.launch.commands import view

    return Command(description=view.__doc__ or "", configure=view.configure, execute=view.execute)


def _load_export() -> Command:
    from truedag.launch.commands import export

    return Command(description=export.__doc__ or "", configure=export.configure, execute=export.execute)


def _load_prove() -> Command:
    from truedag.launch.commands import prove

    return Command(description=prove.__doc__ or "", configure=prove.configure, execute=prove.execute)


def _load_deployments() -> Command:
    from truedag.launch.commands import deployments

    return Command(description=deployments.__doc__ or "", configure=deployments.configure, execute=deployments.execute)


def _load_doctor() -> Command:
    from truedag.launch.commands import doctor

    return Command(description=doctor.__doc__ or "", configure=doctor.configure, execute=doctor.execute)


COMMANDS: Mapping[str, Entry] = {
    "run": Entry(summary="Run a deployment on this machine and build its DAG.", load=_load_run),
    "dry": Entry(summary="Execute a deployment of any size without its GPUs.", load=_load_dry),
    "trace": Entry(summary="Record any torch program as it is and build its DAG.", load=_load_trace),
    "merge": Entry(summary="Build the DAG from recorded traces.", load=_load_merge),
    "audit": Entry(summary="Say what a graph, a drawing or a claim shows of a strategy.", load=_load_audit),
    "report": Entry(summary="Say what a run was and how it spent its time.", load=_load_report),
    "critical-path": Entry(summary="Say what a step's time was spent on, across all ranks.", load=_load_critical_path),
    "draw": Entry(summary="Draw a run's graph: the strategy, every GPU, every operator.", load=_load_draw),
    "view": Entry(summary="Write a run's interactive page, and serve it if asked.", load=_load_view),
    "export": Entry(summary="Write a run's graph for Perfetto, Chakra, networkx and others.", load=_load_export),
    "prove": Entry(summary="Execute a recorded program again from its graph alone.", load=_load_prove),
    "deployments": Entry(summary="List the deployments that ship with truedag.", load=_load_deployments),
    "doctor": Entry(summary="Say what truedag finds on this machine and what it misses.", load=_load_doctor),
}


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def _top_parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:<{width}}  {entry.summary}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="truedag",
        description="The ground-truth DAG of a distributed LLM, recorded from running code.",
        epilog=f"commands:\n{commands}\n\nnext: truedag deployments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_debug(parser)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see truedag COMMAND --help")
    return parser


def _command_parser(name: str, command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"truedag {name}",
        description=command.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=not command.takes_program,  # a program's options may begin like one of ours
    )
    _add_debug(parser)
    command.configure(parser)
    return parser


def _raise_interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code. Usage errors leave by SystemExit(2), help by SystemExit(0)."""
    from truedag.launch.console import print_error

    top = _top_parser().parse_args(argv)
    command = COMMANDS[top.command].load()
    parser = _command_parser(top.command, command)
    # Intermixed: overrides may come before, between and after options.
    parse = parser.parse_args if command.takes_program else parser.parse_intermixed_args
    arguments = parse(top.arguments, argparse.Namespace(**vars(top)))
    debug = "debug" in arguments and bool(arguments.debug)
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        return command.execute(arguments)
    except TruedagError as error:
        if debug:
            traceback.print_exc()
        print_error(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print_error("interrupted")
    except BrokenPipeError:
        # The reader of stdout has gone (`truedag ... | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_error(f"a bug in truedag: {type(error).__name__}: {error}. The same with --debug shows where.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
