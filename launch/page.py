"""The flow of the interactive page: audit the run, and write the page with what the audit found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from truedag.launch.audit import Request, audit_subject
from truedag.tracer.audit.report import to_json
from truedag.tracer.errors import TruedagError
from truedag.tracer.graph import Graph
from truedag.tracer.views.page import Page, write_page


def make_page(run: Path, views: Path, *, progress: Callable[[str], None]) -> Page:
    """Write the page of a run's folder or a dataset into `views`; what cannot be audited is shown without.

    Raises:
        TruedagError: there is no graph, or the page cannot be written.
    """
    graph = Graph.open(run)
    request = Request(subject=run, deployment=None, overrides=(), against=None, mark=None, fix=None)
    try:
        audit, why_not = to_json(audit_subject(request, progress=progress)), ""
    except TruedagError as error:
        audit, why_not = None, str(error)
    return write_page(graph, views, audit=audit, why_no_audit=why_not, progress=progress)
