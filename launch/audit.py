"""The flow of `truedag audit`: find out what the subject is and what it should be, check it, write what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from pydantic import ValidationError

from truedag.launch.deployment import Deployment, RunRecord
from truedag.launch.deployment_file import load_deployment, shipped_deployments
from truedag.launch.dry import run_dry
from truedag.launch.errors import LaunchError
from truedag.launch.expected.expectation import expect
from truedag.launch.measured import measured_rates
from truedag.launch.run_audit import audit_graph, read_subject, write_review, write_sarif, write_text
from truedag.tracer.audit.auditing import audit_claim, audit_drawing
from truedag.tracer.audit.claim import Claim, read_claim
from truedag.tracer.audit.claim_text import claim_of_prose
from truedag.tracer.audit.drawing.document import is_drawing, read_document
from truedag.tracer.audit.drawing.marking import mark_drawing
from truedag.tracer.audit.drawing.reading import DrawnSubject, read_drawing
from truedag.tracer.audit.drawing.repair import draw_repaired
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import Plan, plan
from truedag.tracer.graph import Graph

_MOST_CLAIM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is audited, against what."""

    subject: Path
    deployment: str | None
    overrides: tuple[str, ...]
    against: Path | None
    mark: Path | None
    fix: Path | None


def audit_subject(request: Request, *, progress: Callable[[str], None]) -> Audit:
    """Audit what a person named.

    Raises:
        LaunchError: the subject is nothing that can be audited, or an option does not fit it.
        TruedagError: it cannot be read.
    """
    subject = request.subject
    if subject.is_dir():
        progress("reading and checking the graph")
        if request.mark is not None or request.fix is not None:
            raise LaunchError("--mark and --fix are for drawings; truedag draw draws a graph")
        deployment = _deployment_of(request) or _deployment_of_run(subject)
        return audit_graph(subject, deployment, name=str(subject))
    deployment = _deployment_of(request)
    if deployment is None and request.against is not None:
        deployment = _deployment_of_run(request.against)
    wanted = None if deployment is None else plan(expect(deployment))
    told = _read_claim(subject)
    if told is None and is_drawing(subject):
        return _audit_drawing(request, wanted, progress)
    if told is not None:
        if request.mark is not None or request.fix is not None:
            raise LaunchError("--mark and --fix are for drawings")
        measured = {} if request.against is None else measured_rates(request.against)
        return audit_claim(told, wanted, measured)
    raise LaunchError(
        f"{subject} is no run's folder, no drawing (.dot, .gv, .graphml, .xml, .json) and no claim (.yaml, .json, .md, "
        ".txt)" + ("" if subject.exists() else ": there is no such file")
    )


def _audit_drawing(request: Request, wanted: Plan | None, progress: Callable[[str], None]) -> Audit:
    progress("parsing the drawing")
    document = read_document(request.subject)
    drawn = read_drawing(document, None if wanted is None else wanted.expectation)
    progress("checking")
    audit = audit_drawing(drawn, wanted)
    if request.mark is not None:
        write_text(request.mark, mark_drawing(drawn, audit))
    if request.fix is not None:
        _mend(request, request.fix, drawn, progress)
    return audit


def _mend(request: Request, out: Path, drawn: DrawnSubject, progress: Callable[[str], None]) -> None:
    """Draw what a run of the deployment recorded; without one, what a dry run of it does."""
    if request.against is not None:
        progress("drawing the true DAG")
        write_text(out, draw_repaired(read_subject(request.against), drawn))
        return
    if request.deployment is None:
        raise LaunchError(
            "--fix draws what really runs: name the deployment with --deployment, or a run with --against"
        )
    with TemporaryDirectory(prefix="truedag-") as folder:
        dry = Path(folder) / "dry"
        run_dry(
            request.deployment,
            request.overrides,
            out=dry,
            views=False,
            command=("truedag", "audit"),
            show=progress,
        )
        progress("drawing the true DAG")
        write_text(out, draw_repaired(read_subject(dry), drawn))


def write_files(audit: Audit, folder: Path, *, subject: Path) -> None:
    """Write audit.md, audit.json and audit.sarif of what was audited into a folder.

    Raises:
        LaunchError: they cannot be written.
    """
    write_review(audit, folder, dag=Graph.open(subject).path if subject.is_dir() else None)
    write_sarif(audit, folder, uri=str(subject))


def _deployment_of(request: Request) -> Deployment | None:
    if request.deployment is None:
        if request.overrides:
            raise LaunchError(f"{request.overrides[0]}: overrides need --deployment")
        return None
    return load_deployment(request.deployment, request.overrides)[1]


def _deployment_of_run(folder: Path) -> Deployment | None:
    """Return what a run's folder says that it ran; else the deployment that ships under the name in its graph."""
    for record in (folder / "run.json", folder.parent / "run.json"):
        if record.is_file():
            try:
                return RunRecord.model_validate_json(record.read_text(encoding="utf-8")).deployment
            except (OSError, ValidationError):
                continue
    name = Graph.open(folder).meta.get("deployment")
    return load_deployment(str(name), ())[1] if name in shipped_deployments() else None


def _read_claim(path: Path) -> Claim | None:
    """Return the claim in a file: YAML, JSON that is no graph, or words; None: it is no claim."""
    form = path.suffix.lower()
    if not path.is_file() or form not in (".yaml", ".yml", ".json", ".md", ".txt"):
        return None
    if form in (".md", ".txt"):
        return claim_of_prose(_read_text(path), name=str(path))
    if form != ".json":
        return read_claim(_read_yaml(path), name=str(path))
    try:
        if path.stat().st_size > _MOST_CLAIM_BYTES:
            return None
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise LaunchError(f"{path}: it cannot be read: {error}") from error
    except (ValueError, RecursionError):
        return None  # what is wrong with it the reader of drawings says
    if not isinstance(told, dict) or {"nodes", "elements", "links", "edges", "children"} & set(told):
        return None
    return read_claim(told, name=str(path))


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_CLAIM_BYTES:
            raise LaunchError(f"{path}: a claim is no more than {_MOST_CLAIM_BYTES:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: it cannot be read as text: {error}") from error


def _read_yaml(path: Path) -> object:
    try:
        if path.stat().st_size > _MOST_CLAIM_BYTES:
            raise LaunchError(f"{path}: a claim is no more than {_MOST_CLAIM_BYTES:,} bytes")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # what is no date or number is a ValueError
        raise LaunchError(f"{path}: it cannot be read as YAML: {error}") from error
    except RecursionError as error:
        raise LaunchError(f"{path}: it is nested too deeply") from error
