"""The example notebook runs from its first cell to its last, and what it shows shows itself."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell as a notebook does; returns what its last expression comes to."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs_and_its_objects_show_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            value = run_cell("".join(cell["source"]), names)
            shown[type(value).__name__] = value
    assert "2 ranks" in shown["Report"]._repr_markdown_()
    for name, text in (("Graph", "nodes"), ("Report", "bubble"), ("CriticalPath", "mm")):
        html = shown[name]._repr_html_()
        assert text in html
        assert html.count("<table") == html.count("</table>")
    assert shown["Drawing"]._repr_svg_().lstrip().startswith("<?xml")
    assert shown["Drawing"]._repr_png_() is None
    assert shown["tuple"][0] is True
    report = shown["Report"]
    assert list(report.steps_ns) == [0, 1, 2]
    assert [one.stage for one in report.ranks] == [0, 1]
    (messages,) = [one for one in report.communications if one.kind == "message"]
    assert (messages.axis, messages.num) == ("pp", 3 * 8)
    assert sum(shown["CriticalPath"].total("rank", "phase")["total_ns"]) == report.steps_ns[1]
    assert "timeline.perfetto-trace" in capsys.readouterr().out
