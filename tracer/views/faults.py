"""What an audit found wrong, marked in the drawings: which boxes hold it, how they look, where they lead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import polars as pl

RED = "#c8102e"
TOLD = "Red frames hold what the audit found"
_NUMBER = re.compile(r"^(\d+)\b")
_MOST_LETTERS = 60
_MOST_TOLD = 12  # in the head of a sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A finding of an audit.

    Attributes:
        number: its place among the findings, from 0.
        title: what is wrong.
        nodes: the graph's nodes that it is about; none: all of `ranks` and `layers`.
        ranks, layers: where it is; none: anywhere.
    """

    number: int
    title: str
    nodes: tuple[int, ...]
    ranks: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Faults:
    """All findings of an audit."""

    told: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, audit: Mapping[str, Any] | None) -> Faults:
        """Take them from an audit as `audit.report.to_json` has it; None: there was none."""
        findings = [] if audit is None else audit["findings"]
        return cls(
            tuple(
                Fault(
                    number=number,
                    title=str(finding["title"]),
                    nodes=tuple(int(found[1]) for name in finding["nodes"] if (found := _NUMBER.match(str(name)))),
                    ranks=tuple(finding["ranks"]),
                    layers=tuple(finding["layers"]),
                )
                for number, finding in enumerate(findings)
            )
        )

    def on(self, members: pl.DataFrame) -> dict[int, list[Fault]]:
        """Return which of them each box holds.

        Args:
            members: node, rank, layer, and the box that each is in.
        """
        found: dict[int, list[Fault]] = {}
        for fault in self.told:
            if fault.nodes:
                held = members.filter(pl.col("node").is_in(fault.nodes))
            elif fault.layers:
                here = pl.col("rank").is_in([*fault.ranks, -1]) if fault.ranks else pl.lit(value=True)
                held = members.filter(pl.col("layer").is_in(fault.layers) & here)
            else:
                continue
            for box in held["box"].unique().sort().to_list():
                found.setdefault(box, []).append(fault)
        return found

    def on_ranks(self, ranks: Collection[int]) -> dict[int, list[Fault]]:
        """Return which of them each rank holds: those that are about some of these ranks, and not about all."""
        found: dict[int, list[Fault]] = {}
        for fault in self.told:
            here = set(fault.ranks).intersection(ranks)
            if len(here) < len(ranks):
                for rank in sorted(here):
                    found.setdefault(rank, []).append(fault)
        return found

    def on_nodes(self, members: pl.DataFrame) -> dict[int, list[Fault]]:
        """Return which of them each box holds, as `on` does, of those alone that name nodes."""
        return Faults(tuple(fault for fault in self.told if fault.nodes)).on(members)

    def tell(self, marked: Iterable[Sequence[Fault]]) -> list[str]:
        """Say in a sheet's head what is marked on it, and what was found that has no place there."""
        shown = {fault.number for found in marked for fault in found}
        said = [f"{TOLD}; a click on one leads to its place on the page."] if shown else []
        rest = [f"{fault.number + 1}. {_shorten(fault.title)}" for fault in self.told if fault.number not in shown]
        if rest:
            more = f"; and {len(rest) - _MOST_TOLD} more, on the page" if len(rest) > _MOST_TOLD else ""
            also = "also " if shown else ""
            said.append(f"The audit {also}found, with no place of its own here: {'; '.join(rest[:_MOST_TOLD])}{more}.")
        return said


def _shorten(title: str) -> str:
    return title if len(title) <= _MOST_LETTERS else f"{title[: _MOST_LETTERS - 1].rstrip()}…"


def write_faults(faults: Sequence[Fault]) -> list[str]:
    """Return what a box says of the findings that it holds: the first, and how many more."""
    if not faults:
        return []
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return [f"finding {faults[0].number + 1}: {_shorten(faults[0].title)}{more}"]


def mark_faults(sheet: str, faults: Sequence[Fault]) -> dict[str, object]:
    """Return the DOT attributes of a box that holds findings: red, and a way to the first on the page."""
    if not faults:
        return {}
    up = "../" * (len(PurePosixPath(sheet).parts) - 1)
    return {
        "color": RED,
        "penwidth": 2.6,
        "URL": f"{up}index.html#view=graph&select=finding.{faults[0].number}",
        "tooltip": "; ".join(fault.title for fault in faults),
    }
