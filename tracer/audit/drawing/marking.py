"""A drawing with its faulty parts marked: red frames, and the numbers of the findings beside them."""

from __future__ import annotations

from collections.abc import Mapping

from truedag.tracer.audit.drawing.reading import DrawnSubject
from truedag.tracer.audit.findings import Audit, Finding

_COLORS = {"error": "#c62828", "warning": "#ef6c00", "note": "#1565c0"}


def mark_drawing(drawn: DrawnSubject, audit: Audit) -> str:
    """Return the drawing as DOT: as it was, with marks; findings without a node are listed beside it."""
    marks: dict[str, list[int]] = {}
    grave: dict[str, Finding] = {}
    loose = []
    for number, finding in enumerate(audit.findings, 1):
        if not finding.nodes:
            loose.append(f"{number}. {finding.title}")
        for name in finding.nodes:
            marks.setdefault(name, []).append(number)
            grave.setdefault(name, finding)
    # A filled node without a colour of its own would be filled with its frame's.
    fills = {
        node.id: f", fillcolor={quote(node.color or 'lightgray')}"
        for node in drawn.document.nodes
        if "filled" in node.style
    }
    lines = [
        f"  {quote(name)} [color={quote(_COLORS[grave[name].severity])}, penwidth=4{fills.get(name, '')}, "
        f"xlabel={quote('finding ' + ', '.join(map(str, numbers)))}];"
        for name, numbers in marks.items()
    ]
    if loose:
        text = "\\l".join(quote(one)[1:-1] for one in loose)
        lines.append(f'  truedag_findings [shape=note, color="#c62828", fillcolor="#ffffff", label="{text}\\l"];')
    source = _source(drawn)
    head, _, tail = source.rpartition("}")
    return head + "\n".join(["", *lines, "}"]) + tail


def _source(drawn: DrawnSubject) -> str:
    """Return the drawing's own DOT, or what its nodes and edges are in DOT."""
    document = drawn.document
    if document.form == "dot":
        return document.path.read_text(encoding="utf-8", errors="replace")
    lines = ["digraph drawing {"]
    for node in document.nodes:
        told: Mapping[str, str] = {"label": node.label, "shape": node.shape, "style": node.style}
        attributes = ", ".join(f"{key}={quote(value)}" for key, value in told.items() if value)
        lines.append(f"  {quote(node.id)} [{attributes}];")
    lines += [f"  {quote(edge.source)} -> {quote(edge.target)};" for edge in document.edges]
    return "\n".join([*lines, "}"])


def quote(text: str) -> str:
    """Return a text as a quoted DOT string."""
    flat = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{"".join(char for char in flat if char.isprintable())}"'
