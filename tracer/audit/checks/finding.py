"""A finding of a check, with what the catalogue says of it."""

from __future__ import annotations

from collections.abc import Sequence

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import Finding


def finding_of(
    check: str, title: str, expected: str, found: str, *, ranks: Sequence[int] = (), layers: Sequence[int] = (),
    nodes: tuple[str, ...] = (), num_nodes: int = 0, fix: str | None = None,
) -> Finding:  # fmt: skip
    """Return a finding of the severity, and with the fix if none is given, that its check has."""
    return Finding(
        check=check, title=title[:1].upper() + title[1:], expected=expected, found=found, fix=fix or CHECKS[check].fix,
        severity=CHECKS[check].severity, ranks=tuple(ranks), layers=tuple(layers), nodes=nodes, num_nodes=num_nodes,
    )  # fmt: skip
