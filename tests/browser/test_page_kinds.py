"""Pages of graphs that are made for it: estimates, unknown times, names that look like HTML, findings, data beside."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
from chromium import Chromium
from page_probe import box_of, facts, go, number_of_colours, state

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_classes import write_classes
from small_dag import SmallDag, pipeline

from truedag.tracer.graph import Graph
from truedag.tracer.views.page import write_page
from truedag.tracer.views.page.clock import occupy
from truedag.tracer.views.page.leaves import find_leaves
from truedag.tracer.views.page.server import PageServer
from truedag.tracer.views.page.slices import cut_slices
from truedag.tracer.views.page.tree import build_tree

HOSTILE = '</script><img src=x onerror="document.title=1"><b>&amp;'
FINDING = {
    "check": "strategy.layers", "severity": "error", "title": f"A layer is missing {HOSTILE}", "expected": "2 layers",
    "found": "1 layer", "fix": "draw it", "num_nodes": 1, "nodes": ["3 (send pp)"], "ranks": [1], "layers": [1],
}  # fmt: skip
AUDIT = {
    "verdict": "Wrong: 1 error in 1 of 9 checks.", "against": "small", "findings": [FINDING],
    "passed": [{"check": "structure.acyclic", "what": "40 edges"}], "unchecked": [],
}  # fmt: skip


def open_page(browser: Chromium, dag: SmallDag, folder: Path, **options: object) -> Path:
    page = write_page(Graph.open(dag.write(folder / "dag")), folder / "views", **options)
    browser.open(page.html.as_uri())
    return page.html


def timed(dag: SmallDag, timing: str) -> SmallDag:
    for node in dag.nodes:
        if node["timing"] == "measured":
            node["timing"] = timing
    return dag


def test_estimates_look_different_in_every_view(browser: Chromium, tmp_path: Path) -> None:
    pictures = {}
    for timing in ("measured", "estimated"):
        open_page(browser, timed(pipeline(), timing), tmp_path / timing)
        for view in ("overview", "graph", "time", "time&lanes=1", "path"):
            go(browser, f"#view={view}")
            canvas = f"document.querySelector('#view-{view.split('&')[0]} canvas').toDataURL()"
            pictures[timing, view] = browser.evaluate(canvas)
        go(browser, "#view=graph")
        browser.click(*box_of(browser, "forward · stage 0"))
        told = facts(browser)
        assert told["Time on a rank, mean"].startswith("≈") == (timing == "estimated")
        assert ("estimated" in told["Times are"]) == (timing == "estimated")
        go(browser, "#view=path")
        assert ("≈" in browser.evaluate("document.querySelector('#view-path').textContent")) == (timing == "estimated")
    for view in ("overview", "graph", "time", "time&lanes=1", "path"):
        assert pictures["measured", view] != pictures["estimated", view], view


@pytest.mark.parametrize(("most_slices", "link", "ranks"), [(24, "", (0, 1, 2, 3)), (12, "&f.rank=1,3", (1, 3))])
def test_slices_of_ranks_that_are_alike_are_made_when_they_are_shown(
    browser: Chromium, tmp_path: Path, most_slices: int, link: str, ranks: tuple[int, ...]
) -> None:
    graph = Graph.open(write_classes(tmp_path / "dag"))
    page = write_page(graph, tmp_path / "views", most_slices=most_slices)
    assert page.slices is None, "those of one rank of each class are in the page"
    browser.open(page.html.as_uri())
    assert browser.evaluate("truedag.model.slices !== null") == (not link)
    go(browser, f"#view=time&lanes=1{link}")
    assert f"{6 * len(ranks)} of 24 slices" in browser.evaluate(
        "document.querySelector('#view-time .note').textContent"
    )
    names = ("rank", "lane", "node", "leaf", "start", "span", "wait", "isEstimated")
    columns = browser.evaluate(f"{list(names)}.map((name) => [...truedag.model.slices[name]])")
    leaves = find_leaves(graph)
    spent = occupy(graph, leaves)
    assert spent is not None
    table = cut_slices(leaves, build_tree(leaves), spent.start_ns, spent.end_ns).spread()
    told = table.filter(pl.col("rank").is_in(ranks)).rename({"is_estimated": "isEstimated"})
    assert columns == [told[name].to_list() for name in names]
    said = facts(browser)
    assert said["Estimated for"] == "h100, 8 a node"
    assert said["MFU"].startswith("≈ 25")
    assert "links are free; nothing is computed." in browser.evaluate("document.querySelector('#detail').textContent")


def test_without_times_ranks_stand_over_the_order_and_nothing_is_claimed(browser: Chromium, tmp_path: Path) -> None:
    dag = timed(pipeline(), "none")
    for row in (*dag.nodes, *dag.participants):
        row.update({name: None for name in ("start_ns", "end_ns", "arrive_ns") if name in row})
    open_page(browser, dag, tmp_path)
    assert facts(browser)["Time"] == "none was measured"
    go(browser, "#view=graph")
    browser.click(*box_of(browser, "forward · stage 0"))
    assert facts(browser)["Time on a rank, mean"] == "unknown"
    go(browser, "#view=time")
    assert "not time" in browser.evaluate("document.querySelector('#view-time .note').textContent")
    assert number_of_colours(browser, "#view-time canvas") > 4
    for key in ("+", "-", "t", "ArrowLeft", "n", "0"):
        browser.press(key)
    go(browser, "#view=path")
    assert "No critical path" in browser.evaluate("document.querySelector('#view-path').textContent")


def test_names_are_text_whatever_they_hold(browser: Chromium, tmp_path: Path) -> None:
    dag = pipeline()
    for node in dag.nodes:
        node["label"] = HOSTILE
        node["module"] = HOSTILE
    path = dag.write(tmp_path / "dag")
    meta = json.loads((path / "meta.json").read_text()) | {"deployment": f"modèle {HOSTILE}"}
    (path / "meta.json").write_text(json.dumps(meta))
    html = write_page(Graph.open(path), tmp_path / "views", audit=AUDIT, note=HOSTILE).html
    browser.open(html.as_uri())
    assert browser.evaluate("document.getElementById('title').textContent") == f"modèle {HOSTILE}"
    assert browser.evaluate("document.title") == f"modèle {HOSTILE} · truedag"
    for view in ("overview", "graph", "time", "traffic", "path", "findings"):
        go(browser, f"#view={view}&select=finding.0")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert HOSTILE not in html.read_text()
    assert HOSTILE in browser.evaluate("document.querySelector('.finding h3').textContent")


def meetings(num: int, *, is_missing: bool = False) -> SmallDag:
    """Two ranks that meet again and again, each time of another name; rank 1 is always late, or left no trace."""
    dag = SmallDag(num_ranks=2)
    group = dag.group("dp", [0, 1])
    last: dict[int, int] = {}
    for number in range(num):
        begin = 1000 * number
        for rank, spent in ((0, 100), (1, 300)):
            after = [last[rank]] if rank in last else []
            last[rank] = dag.node(rank=rank, after=after, time=(begin, begin + spent), label=f"work {number}")
        meeting = dag.node(
            "collective", -1, list(last.values()), time=(begin + 100, begin + 400), label=f"all-reduce-{number % 2} dp"
        )
        for rank, arrive in ((0, begin + 100), (1, begin + 300)):
            if not (is_missing and rank):
                dag.meet(meeting, group, rank, (arrive, begin + 300, begin + 400))
            last[rank] = meeting
    return dag


def test_what_a_list_leaves_out_is_counted(browser: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truedag.tracer.views.page.verdicts._MOST_STRAGGLERS", 210)
    open_page(browser, meetings(215), tmp_path)
    go(browser, "#view=path")
    rows = "[...document.querySelectorAll('#view-path .panel:first-child tr')].map((row) => row.textContent)"
    totals = browser.evaluate(rows)
    assert len(totals) == 1 + 40 + 1
    assert "others" in totals[-1]
    shares = browser.evaluate(f"{rows.replace('row.textContent', 'row.lastChild.textContent')}.slice(1)")
    assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=3)
    late = "document.querySelectorAll('tr[data-straggler]').length"
    assert browser.evaluate(late) == 200
    assert "5 others" in browser.evaluate("document.querySelector('#view-path .panel:last-child .scale').textContent")
    browser.evaluate("document.querySelector('#view-path .panel:last-child .scroll > button').click()")
    browser.settle()
    assert browser.evaluate(late) == 210
    browser.evaluate("document.getElementById('search').focus()")
    for letter in "work":
        browser.press(letter)
    assert "the first 40" in browser.evaluate("document.getElementById('results').lastChild.textContent")


def test_collectives_of_a_group_are_counted_though_a_rank_is_missing(browser: Chromium, tmp_path: Path) -> None:
    for is_missing in (False, True):
        open_page(browser, meetings(5, is_missing=is_missing), tmp_path / str(is_missing))
        go(browser, "#select=group.0")
        assert facts(browser)["Collectives"] == "5"


def test_a_filter_that_cannot_be_read_says_so(browser: Chromium, tmp_path: Path) -> None:
    open_page(browser, pipeline(), tmp_path)
    for text, is_invalid in (("0-1", "false"), ("x", "true"), ("", "false")):
        go(browser, f"#view=graph&f.rank={text}")
        assert browser.evaluate("document.getElementById('filter-rank').getAttribute('aria-invalid')") == is_invalid


def test_a_finding_leads_to_its_place(browser: Chromium, tmp_path: Path) -> None:
    open_page(browser, pipeline(), tmp_path, audit=AUDIT)
    browser.press("6")
    browser.press("ArrowDown")
    assert state(browser)["selection"] == {"kind": "finding", "id": 0}
    assert browser.evaluate("[...truedag.app.marks.ranks]") == [1]
    browser.press("Enter")
    told = state(browser)
    assert (told["view"], told["selection"]["kind"]) == ("graph", "finding")
    marked = browser.evaluate("[...truedag.app.views.graph.markedBoxes()].length")
    assert marked > 0
    opened = told["open"]
    browser.open((tmp_path / "views" / "index.html").as_uri() + "#view=graph&select=finding.0")  # as drawings lead here
    browser.settle()
    told = state(browser)
    assert (told["selection"], told["view"]) == ({"kind": "finding", "id": 0}, "graph")
    assert told["open"] == opened != []


@pytest.fixture
def served(tmp_path: Path):
    dag = pipeline(num_microbatches=9)
    graph = Graph.open(dag.write(tmp_path / "dag"))
    page = write_page(graph, tmp_path / "views", most_slices=10)
    assert page.slices is not None
    with PageServer(tmp_path / "views") as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server, page, graph
        finally:
            server.stop()
            thread.join()


def test_slices_beside_the_page_are_read_by_byte_ranges(browser: Chromium, served) -> None:
    import polars as pl

    server, page, _ = served
    browser.open(server.address + "#view=time&lanes=1")
    browser.wait_for("truedag.model.slices")
    browser.settle()
    columns = ("rank", "lane", "node", "leaf", "microbatch", "start", "span", "wait")
    table = pl.read_parquet(page.slices)
    assert browser.evaluate("truedag.model.slices.length") == len(table) > 100
    for name in columns:
        assert browser.evaluate(f"Array.from(truedag.model.slices.{name})") == table[name].to_list(), name
    assert number_of_colours(browser, "#view-time canvas") > 4
    assert {one.rsplit("/", 1)[1].split("#")[0] for one in browser.requests} == {"index.html", "slices.parquet"}
    go(browser, "#view=time&lanes=1&f.rank=1")
    browser.wait_for("truedag.model.slices.lanes.every((lane) => lane.rank === 1)")
    assert browser.evaluate("truedag.model.slices.length") == len(table.filter(pl.col("rank") == 1))


def test_from_disk_the_page_says_where_its_slices_are(browser: Chromium, served) -> None:
    _, page, _ = served
    browser.open(page.html.as_uri() + "#view=time&lanes=1")
    assert "truedag view RUN --serve" in browser.evaluate("document.querySelector('#view-time .note').textContent")
    assert number_of_colours(browser, "#view-time canvas") > 4  # the heat map is in the page
