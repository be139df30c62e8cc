"""The report as people read it: sections explained, in a terminal, in a notebook, as plots."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_examples import gpipe, overlapping, prompts, report_of, three_steps
from rich.console import Console
from small_dag import SmallDag

from truedag.tracer.analysis.figures import FIGURES, explain, find_figure
from truedag.tracer.analysis.quantities import write_digits, write_rate, write_shares
from truedag.tracer.analysis.report_plots import plot_report
from truedag.tracer.analysis.report_sections import list_sections
from truedag.tracer.analysis.report_text import write_html
from truedag.tracer.errors import GraphError


def test_every_section_is_explained_and_every_explanation_is_one() -> None:
    names = {
        section.name for dag in (prompts(), three_steps(), overlapping()) for section in list_sections(report_of(dag))
    }
    assert names <= set(FIGURES)
    texts = {figure: explain(figure) for figure in FIGURES}
    assert all(len(text) > 200 for text in texts.values())
    assert "2(n-1)/n" in texts["bandwidth"]
    assert "appendix B" in texts["mfu"]
    assert "add up to the step" in texts["shares"]


def test_what_stands_above_a_column_is_explained() -> None:
    places = {"", "rank", "ranks", "layer", "step", "value", "share", "time"}
    for dag in (prompts(), three_steps(), overlapping()):
        for section in list_sections(report_of(dag)):
            heads = {head for head in section.columns if head not in places}
            assert {head for head in heads if find_figure(head) is None} == set(), section.title
    told = {"Bubble": "shares", "TTFT": "generation", "bus bw": "bandwidth", "MFU": "mfu", "nonsense": None}
    assert {name: find_figure(name) for name in told} == told


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_shows_whole_lines_of_every_section(width: int) -> None:
    for dag in (prompts(), three_steps(), overlapping(), gpipe(2, 2, 10)):
        out = io.StringIO()
        Console(file=out, width=width).print(report_of(dag).render())
        assert max(map(len, out.getvalue().splitlines())) <= width
        for section in list_sections(report_of(dag)):
            assert section.title in out.getvalue()


def test_a_notebook_shows_it_with_names_escaped() -> None:
    dag = overlapping()
    for node in dag.nodes:
        node["op"] = "aten::<mm>"
    html = write_html(report_of(dag))
    assert "&lt;mm&gt;" in html
    assert "<mm>" not in html
    assert html.count("<table>") == html.count("</table>") == len(list_sections(report_of(dag)))
    assert report_of(dag)._repr_html_() == html
    assert report_of(dag)._repr_markdown_().startswith("# small")


@pytest.mark.parametrize("form", ["svg", "png"])
def test_plots_are_pictures_and_the_same_each_time(tmp_path: Path, form: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = report_of(three_steps())
    written = plot_report(report, tmp_path / "one", to=form)
    assert [path.name for path in written] == [f"report-shares.{form}", f"report-steps.{form}"]
    again = plot_report(report, tmp_path / "two", to=form)
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    head = written[0].read_bytes()[:100]
    if form == "svg":
        assert "Time of each rank · small · 2 ranks" in written[0].read_text()
    assert head.startswith(b"<?xml" if form == "svg" else b"\x89PNG")


def test_plots_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphError, match="cannot write plots"):
        plot_report(report_of(three_steps()), tmp_path / "file")


def test_rates_are_written_in_decimal_units() -> None:
    assert [write_rate(rate) for rate in (None, 12.0, 1234.0, 5.6e6, 2.345e11)] == [
        "unknown", "12 B/s", "1.23 kB/s", "5.6 MB/s", "234 GB/s",
    ]  # fmt: skip


def test_no_number_is_written_with_an_exponent() -> None:
    assert [write_rate(rate) for rate in (999.7, 999.7e3, 999.7e6, 999.7e9, 12.5e12)] == [
        "1 kB/s", "1 MB/s", "1 GB/s", "1,000 GB/s", "12,500 GB/s",
    ]  # fmt: skip
    assert [write_digits(number) for number in (0.00439, 3.14159, 99.96, 999.4, 999.6, 12345.6)] == [
        "0.00439", "3.14", "100", "999", "1,000", "12,346",
    ]  # fmt: skip
    dag = SmallDag()
    dag.node("parameter", outputs="float32[10]")
    (memory,) = [one for one in list_sections(report_of(dag)) if one.name == "memory"]
    assert memory.rows[0][2] == "100 %"


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6).filter(any))
def test_written_shares_add_up_to_all(times: list[int]) -> None:
    parts = [time / sum(times) for time in times]
    written = [float(text.removesuffix(" %")) for text in write_shares(parts)]
    assert round(sum(written), 1) == 100
    assert all(abs(100 * part - told) <= 0.1 + 1e-9 for part, told in zip(parts, written, strict=True))


def test_a_table_of_very_many_ranks_says_which_it_shows() -> None:
    dag = SmallDag(num_ranks=100)
    for rank in range(100):
        dag.node(rank=rank, time=(0, 200 - rank))
        dag.node("parameter", rank, outputs="float32[10]")
    shares, *_, memory = [one for one in list_sections(report_of(dag)) if one.name in ("shares", "memory")]
    assert [row[0] for row in shares.rows] == [str(rank) for rank in range(99, 35, -1)]
    assert "The 64 of 100 ranks with the least compute; report.json has all." in shares.note
    assert [list(row) for row in memory.rows] == [["0-99", "40 B", "1 %", "0 B", "0 B", "- (no phase)"]]
    dag.nodes[0]["timing"] = "none"
    dag.nodes[0]["end_ns"] = None
    shares = list_sections(report_of(dag))[0]
    assert list(shares.rows[-1]) == ["0", "", *["unknown"] * 6]
