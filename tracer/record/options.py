"""What is to be recorded of a program from outside, as options of a command line and as environment variables.

The variables are how it reaches the processes that the program starts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from truedag.tracer.errors import RecordError
from truedag.tracer.record.schedule import Schedule, parse_ranks, parse_schedule

_PREFIX = "TRUEDAG_"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """What is to be recorded, and where it goes; the texts as a person wrote them, checked."""

    out: Path
    steps: str = ""
    """Empty: everything."""

    ranks: str = ""
    """Empty: all."""

    recorder: Literal["native", "python"] = "native"
    max_bytes: int = 0
    """Of each rank's traces together; 0: no bound."""

    collect: bool = False
    force: bool = False
    """Whether an earlier recording in the folder gives way."""

    @property
    def schedule(self) -> Schedule | None:
        """The steps as a schedule; None: everything."""
        return parse_schedule(self.steps) if self.steps else None

    @property
    def wanted_ranks(self) -> frozenset[int] | None:
        """The ranks that record; None: all."""
        return parse_ranks(self.ranks) if self.ranks else None

    def environment(self) -> dict[str, str]:
        """Return the variables that say the same."""
        told = {
            "OUT": str(self.out.absolute()),
            "STEPS": self.steps,
            "RANKS": self.ranks,
            "RECORDER": self.recorder,
            "MAX_BYTES": str(self.max_bytes),
            "COLLECT": "1" if self.collect else "0",
        }
        return {_PREFIX + name: value for name, value in told.items()}

    def arguments(self) -> list[str]:
        """Return the options that say the same."""
        told = [f"--out={self.out}"]
        told += [f"--steps={self.steps}"] if self.steps else []
        told += [f"--ranks={self.ranks}"] if self.ranks else []
        told += [f"--recorder={self.recorder}"] if self.recorder != "native" else []
        told += [f"--max-bytes={self.max_bytes}"] if self.max_bytes else []
        told += ["--collect"] if self.collect else []
        return told


def add_record_options(parser: argparse.ArgumentParser, *, default_out: str) -> None:
    """Declare the options; what is not given is None."""
    parser.add_argument("--out", metavar="DIR", help=f"where the recording goes (default: {default_out})")
    parser.add_argument("--force", action="store_true", help="replace an earlier recording that is there")
    parser.add_argument(
        "--steps",
        metavar="STEPS",
        help="which steps, from 0: 3, or 0,5-7,100-, or skip_first=2,wait=97,active=3,repeat=5; "
        "a step ends with its optimizer's step (default: everything)",
    )
    parser.add_argument("--ranks", metavar="RANKS", help="which ranks: 0, or 0,8-15 (default: all)")
    parser.add_argument(
        "--recorder", choices=("native", "python"), help="native (compiled, default) or python (slow, no compiler)"
    )
    parser.add_argument(
        "--max-bytes",
        metavar="N",
        help="what each rank's traces may take on disk, such as 500M; then it stops recording",
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        default=None,
        help="bring the traces to rank 0: for ranks without a shared disk",
    )


def read_options(given: argparse.Namespace, environment: Mapping[str, str], *, default_out: Path) -> RecordOptions:
    """Return what the options say, and where they say nothing, the environment.

    Raises:
        RecordError: one of them makes no sense.
    """

    def told(name: str) -> str:
        value = getattr(given, name.lower(), None)
        return environment.get(_PREFIX + name, "") if value is None else str(value)

    recorder = told("RECORDER") or "native"
    if recorder not in ("native", "python"):
        raise RecordError(f"{_PREFIX}RECORDER={recorder}: native or python")
    options = RecordOptions(
        out=Path(told("OUT") or default_out),
        steps=told("STEPS"),
        ranks=told("RANKS"),
        recorder=cast("Literal['native', 'python']", recorder),
        max_bytes=parse_bytes(told("MAX_BYTES") or "0"),
        collect=told("COLLECT") not in ("", "0", "False"),
        force=bool(given.force),
    )
    _ = options.schedule, options.wanted_ranks  # each raises if it makes no sense
    return options


def inherited_options(environment: Mapping[str, str] = os.environ) -> RecordOptions | None:
    """Return what the environment says; None: nothing is to be recorded."""
    if not environment.get(_PREFIX + "OUT"):
        return None
    return read_options(argparse.Namespace(force=False), environment, default_out=Path())


def parse_bytes(text: str) -> int:
    """Read a number of bytes: `1000`, `500M`, `2G`.

    Raises:
        RecordError: it is none.
    """
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    if unit not in _UNITS or not number.removesuffix(unit).isdecimal():
        raise RecordError(f"max_bytes {text!r}: write a number of bytes, such as 1000000, 500M or 2G")
    return int(number.removesuffix(unit)) * _UNITS[unit]
