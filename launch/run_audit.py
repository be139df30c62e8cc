"""The audit of what a run, a trace or a dry run recorded, written beside its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truedag.launch.errors import LaunchError
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.auditing import audit_dataset
from truedag.tracer.audit.class_subject import class_subject_of
from truedag.tracer.audit.plan import plan
from truedag.tracer.audit.recorded import read_tables, subject_of
from truedag.tracer.audit.report import to_json, verdict, write_markdown
from truedag.tracer.audit.sarif import to_sarif
from truedag.tracer.graph import Graph

if TYPE_CHECKING:
    from truedag.launch.deployment import Deployment
    from truedag.tracer.audit.findings import Audit
    from truedag.tracer.audit.subject import Subject


_READ_NODES = 1_000_000  # a graph of more takes minutes and gigabytes to read node by node


def is_audited_unasked(graph: Graph) -> bool:
    """Whether an audit takes seconds: the graph is small, or is read by its classes."""
    return int(graph.meta.get("num_nodes") or 0) <= _READ_NODES or graph.classes is not None


def audit_run(dag: Path, folder: Path, deployment: Deployment | None) -> dict[str, Any]:
    """Audit a dataset that was just made and write audit.md and audit.json; return what a run's result says of it.

    Args:
        dag: the dataset.
        folder: where the files go.
        deployment: what it should show; None: only what needs no deployment is checked.

    Raises:
        LaunchError: the files cannot be written.
        TruedagError: the dataset cannot be read.
    """
    audit = audit_graph(dag, deployment, name=folder.name)
    write_review(audit, folder, dag=dag)
    return {"verdict": verdict(audit), "num_faults": len(audit.faults), "file": str(folder / "audit.md")}


def audit_graph(folder: Path, deployment: Deployment | None, *, name: str) -> Audit:
    """Audit a dataset, or that of a run's folder."""
    return audit_dataset(read_subject(folder, name=name), None if deployment is None else plan(expect(deployment)))


def read_subject(folder: Path, *, name: str | None = None) -> Subject:
    """Read a dataset, or that of a run's folder, for an audit; of a class graph only its rows."""
    graph = Graph.open(folder)
    if (classes := graph.classes) is not None:
        return class_subject_of(graph, classes, name=name or str(folder))
    return subject_of(read_tables(graph), name=name or str(folder))


def read_audit(dag: Path) -> Mapping[str, Any] | None:
    """Return the audit that lies in the run's folder, if it says of itself that it is one of this very graph."""
    try:
        audit = json.loads((dag.parent / "audit.json").read_text(encoding="utf-8"))
        is_of_it = isinstance(audit, dict) and audit.get("graph") == _identify(dag)
    except (OSError, ValueError):
        return None
    return audit if is_of_it else None


def _identify(dag: Path) -> str:
    """Name a dataset by what it says of itself: clock, counts, ranks; a copy of it has the same name."""
    return "sha256:" + hashlib.sha256((dag / "meta.json").read_bytes()).hexdigest()


def write_review(audit: Audit, folder: Path, *, dag: Path | None) -> None:
    """Write audit.md and audit.json into a folder.

    Args:
        audit: what was found.
        folder: it is made.
        dag: the dataset that was audited, which the file names; None: a drawing or a claim was.

    Raises:
        LaunchError: they cannot be written.
    """
    graph = None if dag is None else _identify(dag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"cannot make {folder}: {error}") from error
    write_text(folder / "audit.md", write_markdown(audit))
    write_text(folder / "audit.json", json.dumps({"graph": graph, **to_json(audit)}, indent=2) + "\n")


def write_sarif(audit: Audit, folder: Path, *, uri: str) -> None:
    """Write audit.sarif into a folder that is there.

    Raises:
        LaunchError: it cannot be written.
    """
    write_text(folder / "audit.sarif", json.dumps(to_sarif(audit, uri=uri), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        LaunchError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"cannot write {path}: {error}") from error
