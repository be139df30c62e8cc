"""The flow of the interactive page: what an audit of the run found goes into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from truedag.launch.audit import Request, audit_subject
from truedag.launch.run_audit import is_audited_unasked, read_audit
from truedag.tracer.audit.report import to_json
from truedag.tracer.errors import TruedagError
from truedag.tracer.graph import Graph
from truedag.tracer.views.page import Page, write_page


def make_page(run: Path, views: Path, *, progress: Callable[[str], None]) -> Page:
    """Write the page of a run's folder or a dataset into `views`; what was not and cannot be audited is shown without.

    Raises:
        TruedagError: there is no graph, or the page cannot be written.
    """
    graph = Graph.open(run)
    audit = read_audit(graph.path)
    why_not = ""
    if audit is None and not is_audited_unasked(graph):
        why_not = (
            f"a graph of {int(graph.meta['num_nodes']):,} nodes is audited when asked: truedag audit RUN --out RUN"
        )
    elif audit is None:
        request = Request(subject=run, deployment=None, overrides=(), against=None, mark=None, fix=None)
        try:
            audit = to_json(audit_subject(request, progress=progress))
        except TruedagError as error:
            why_not = str(error)
    return write_page(graph, views, audit=audit, why_no_audit=why_not, progress=progress)
