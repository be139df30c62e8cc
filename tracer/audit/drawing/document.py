"""A drawing as it was drawn: nodes, edges, clusters and their attributes, whatever format they came in."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truedag.tracer.errors import TruedagError

_TIME_S = 90
# Attributes of a node that say what others write into its label.
_TOLD = ("rank", "ranks", "gpu", "gpus", "device", "devices", "layer", "layers", "expert", "experts", "stage", "op",
         "type", "kind", "phase", "microbatch", "inputs", "outputs", "input", "output")  # fmt: skip
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_FORMS = {".dot": "dot", ".gv": "dot", ".graphml": "graphml", ".xml": "graphml", ".json": "json"}


class DrawingError(TruedagError):
    """A drawing could not be read; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnNode:
    """A node as it was drawn."""

    id: str
    label: str
    """Its text, without markup; its id where it has none."""

    shape: str
    style: str
    color: str
    clusters: tuple[str, ...]
    """Labels (or ids) of the clusters around it, from the outermost inwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnEdge:
    """An edge as it was drawn."""

    source: str
    target: str
    label: str
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A drawing."""

    path: Path
    form: str
    """dot, graphml or json."""

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]
    graph: dict[str, str]
    """Attributes of the whole: direction, splines, ..."""

    is_directed: bool = True


def read_document(path: Path) -> Document:
    """Read a drawing; it is parsed in a process of its own, under limits on time and memory.

    Raises:
        DrawingError: it is missing, too large, broken, or of no format that is read.
    """
    form = _form_of(path)
    command = [sys.executable, "-P", "-m", "truedag.tracer.audit.drawing.parser", form, str(path.absolute())]
    try:
        parsed = subprocess.run(command, capture_output=True, timeout=_TIME_S, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise DrawingError(f"{path}: it was not parsed within {_TIME_S} s") from error
    if parsed.returncode != 0:
        said = _said(parsed.stderr.decode("utf-8", "replace").strip())
        why = said if parsed.returncode == 1 and said and "Traceback" not in said else "its parser gave up on it"
        raise DrawingError(f"{path}: {why}")
    return document_of(json.loads(parsed.stdout), path, form)


def _said(text: str) -> str:
    """Return what the parser says, in one line; graphviz says where the error is in a line of its own."""
    lines = text.splitlines()
    if "out of memory" in text:
        return "it needs more memory than a drawing may have: subgraphs joined to subgraphs make an edge for each pair"
    first = next((line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")), None)
    return f"it is no DOT: {first}" if first is not None else text


def document_of(told: dict[str, Any], path: Path, form: str) -> Document:
    """Return what the parser wrote as a document."""
    clusters: dict[str, str] = told["clusters"]
    return Document(
        path=path,
        form=form,
        title=plain_label(told["graph"].get("label", "")),
        nodes=tuple(
            DrawnNode(
                id=name,
                label=plain_label(_label_of(name, attributes)),
                shape=attributes.get("shape", ""),
                style=attributes.get("style", ""),
                color=attributes.get("fillcolor", attributes.get("color", "")),
                clusters=tuple(plain_label(clusters.get(one, "")) or one for one in inside),
            )
            for name, attributes, inside in told["nodes"]
        ),
        edges=tuple(
            DrawnEdge(
                source=source,
                target=target,
                label=plain_label(attributes.get("label", "")),
                style=attributes.get("style", ""),
            )
            for source, target, attributes in told["edges"]
        ),
        graph=told["graph"],
        is_directed=told["directed"],
    )


def is_drawing(path: Path) -> bool:
    """Return whether a path looks like a drawing's."""
    return path.suffix.lower() in _FORMS


def _form_of(path: Path) -> str:
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise DrawingError(f"{path}: what a drawing is follows from its name: {', '.join(_FORMS)}")
    if not path.is_file():
        raise DrawingError(f"{path}: there is no such file")
    return form


def _label_of(name: str, attributes: dict[str, str]) -> str:
    label = attributes.get("label", "")
    if not label or label == "\\N":
        label = attributes.get("name", attributes.get("description", name))
    if attributes.get("shape", "").lower() in ("record", "mrecord"):
        label = _record_text(label)
    extra = [attributes[key] for key in ("xlabel", "tooltip") if attributes.get(key)]
    told = {key: value for key, value in attributes.items() if key in _TOLD}
    return "\n".join([label, *extra, *(f"{key}: {value}" for key, value in told.items())])


def _record_text(label: str) -> str:
    """Return the fields of a record, a line each, without ports."""
    parts, inside = [], False
    for char in label:
        if char == "<":
            inside = True
        elif char == ">" and inside:
            inside = False
        elif not inside:
            parts.append("\n" if char in "{}|" else char)
    return "".join(parts)


def plain_label(label: str) -> str:
    """Return a label's text: HTML tags and escapes taken off."""
    # graphviz's library gives an HTML label without the angle brackets around it.
    text = _without_tags(label) if _TAG.search(label) else label
    for escape in ("\\n", "\\l", "\\r", "\r"):
        text = text.replace(escape, "\n")
    text = text.replace("\\ ", " ")
    return html.unescape(text)


def _without_tags(text: str) -> str:
    parts, inside = [], False
    for char in text:
        if char == "<":
            inside = True
            parts.append("\n")
        elif char == ">":
            inside = False
        elif not inside:
            parts.append(char)
    return "".join(parts)
