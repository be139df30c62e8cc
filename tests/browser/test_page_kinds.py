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

from truedag.tracer.analysis.quantities import write_runs
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
        for metric in ("time", "waiting", "imbalance", "path"):
            go(browser, f"#view=overview&metric={metric}")
            amounts = browser.evaluate(f"""[truedag.model.amount(0, {metric!r}),
                ...Array.from(truedag.app.views.overview.grid).filter((cell) => cell >= 0).map(
                    (cell) => truedag.app.views.overview.amount(cell))]""")
            known = [one["isEstimated"] for one in amounts if one["value"] is not None]
            assert set(known) == {timing == "estimated"}, metric
            assert len(known) > 2, metric
        go(browser, "#view=graph")
        browser.click(*box_of(browser, "forward · stage 0"))
        told = facts(browser)
        assert told["Waiting on a rank, mean"].startswith("≈") == (timing == "estimated")
        assert told["Time on a rank, mean"].startswith("≈") == (timing == "estimated")
        assert ("estimated" in told["Times are"]) == (timing == "estimated")
        go(browser, "#view=path")
        assert ("≈" in browser.evaluate("document.querySelector('#view-path').textContent")) == (timing == "estimated")
        views = "truedag.app.views"
        for said in (f"{views}.overview.map.tell(0)", f"{views}.path.tell(0)", f"{views}.time.hover(200, 40)"):
            assert ("≈" in browser.evaluate(said)) == (timing == "estimated"), said
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
    told = facts(browser)
    assert told["Time"] == "none was measured"
    assert "Measured" not in told
    off = "[...document.querySelectorAll('#view-overview select option')].filter((one) => one.disabled)"
    unknown = browser.evaluate(f"{off}.map((one) => one.textContent)")
    assert unknown == [f"{name} (unknown)" for name in ("time", "waiting", "imbalance", "critical path")]
    go(browser, "#select=rank.0")
    assert facts(browser)["Its time"] == "unknown"
    go(browser, "#view=graph")
    browser.click(*box_of(browser, "forward · stage 0"))
    assert facts(browser)["Time on a rank, mean"] == "unknown"
    go(browser, "#view=time")
    assert "not time" in browser.evaluate("document.querySelector('#view-time .note').textContent")
    assert number_of_colours(browser, "#view-time canvas") > 4
    for key in ("+", "-", "t", "ArrowLeft", "n", "0"):
        browser.press(key)
    go(browser, "#view=path")
    why = browser.evaluate("document.querySelector('#view-path').textContent")
    assert why == "No critical path: no operator and no communication has a time."
    go(browser, "#view=time&select=node.2")
    x, y = browser.evaluate("""(() => {
      const { app, model } = truedag, sight = app.views.time.sight(), place = app.views.time.board.canvas;
      const box = place.getBoundingClientRect(), at = app.orderedLeaves().indexOf(model.tree.low[2]) + 0.5;
      return [box.left + sight.left + (at / app.orderedLeaves().length) * sight.width, box.top + sight.top + 5];
    })()""")
    browser.click(x, y, times=2)
    found = state(browser)
    assert found["view"] == "graph"
    assert found["selection"] == {
        "kind": "node",
        "id": browser.evaluate("truedag.model.nodeOfLeaf(truedag.model.tree.low[2])"),
    }


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


def crowd(num_ranks: int) -> SmallDag:
    """Ranks in groups of two, every eighth apart, of which the last comes late; parts of a model but no layers."""
    dag = SmallDag(num_ranks=num_ranks)
    half = num_ranks // 2
    groups = [dag.group("dp", [rank, rank + half]) for rank in range(half)]
    dag.group("tp", list(range(0, num_ranks, 8)))
    dag.group("ep", [rank for rank in range(num_ranks) if rank % 8 in (0, 1, 4)])
    for rank in range(half):
        ends = []
        for one, spent in ((rank, 500), (rank + half, 900 + 100 * rank)):
            first = dag.node(rank=one, time=(0, 100), module="GPT.body.wte", label="embedding")
            ends.append(dag.node(rank=one, after=[first], time=(100, spent), module="GPT.body.h.3.mlp", label="mm"))
        meeting = dag.node("collective", -1, ends, time=(500, 3000 + 100 * rank), label="all-reduce dp")
        for one, arrive in ((rank, 500), (rank + half, 900 + 100 * rank)):
            dag.meet(meeting, groups[rank], one, (arrive, 900 + 100 * rank, 3000 + 100 * rank))
    return dag


def test_what_is_far_down_is_brought_into_sight_and_ranks_can_be_left_alone(browser: Chromium, tmp_path: Path) -> None:
    open_page(browser, crowd(64), tmp_path)
    late = browser.evaluate("truedag.model.stragglers.rank[0]")
    assert late == 63
    browser.evaluate("truedag.app.goTo({ kind: 'straggler', id: 0 }, 'time')")
    browser.settle()
    row, sight = browser.evaluate("""(() => {
      const { time } = truedag.app.views;
      return [time.timeline.rows.find(({ lane }) => lane.rank === 63), time.sight()];
    })()""")
    assert sight["top"] <= row["y"] <= sight["top"] + sight["height"] - 20
    assert state(browser)["top"] > 0
    begin, end = browser.evaluate("[truedag.model.stragglers.start_ns[0], truedag.model.stragglers.end_ns[0]]")
    assert [begin, end] == [500, 6100]
    assert state(browser)["window"] == [0, 6100]  # no less than there is
    browser.evaluate("[...document.querySelectorAll('#detail .groups button')][0].click()")
    browser.settle()
    assert browser.evaluate("[...truedag.app.marks.ranks]") == [31, 63]
    buttons = "[...document.querySelectorAll('#detail .places button')]"
    assert "Show in time" not in browser.evaluate(f"{buttons}.map((one) => one.textContent)")
    browser.evaluate(f"{buttons}.find((one) => one.textContent === 'Only its 2 ranks').click()")
    browser.settle()
    assert state(browser)["filters"]["rank"] == "31,63"
    assert browser.evaluate("truedag.app.views.time.ranks()") == [31, 63]
    go(browser, "#view=overview&select=group.32")
    assert facts(browser)["Ranks"] == "0-56 step 8"
    assert "Show in time" in browser.evaluate(f"{buttons}.map((one) => one.textContent)")
    browser.evaluate(f"{buttons}.find((one) => one.textContent === 'Only its 8 ranks').click()")
    browser.settle()
    assert browser.evaluate("truedag.app.views.time.ranks()") == list(range(0, 64, 8))
    go(browser, "#view=time&select=group.33")
    ranks = [rank for rank in range(64) if rank % 8 in (0, 1, 4)]
    assert facts(browser)["Ranks"] == write_runs(ranks) == "0-1 to 56-57 step 8,4-60 step 8"
    browser.evaluate(f"{buttons}.find((one) => one.textContent === 'Only its 24 ranks').click()")
    browser.settle()
    assert browser.evaluate("truedag.app.views.time.ranks()") == ranks
    assert browser.evaluate("document.getElementById('filter-rank').getAttribute('aria-invalid')") == "false"


def test_where_no_layer_was_told_the_matrix_has_the_parts_of_the_model(browser: Chromium, tmp_path: Path) -> None:
    open_page(browser, crowd(4), tmp_path)
    columns = browser.evaluate("truedag.app.views.overview.columns.map((one) => one.part)")
    assert columns == ["", "wte", "h 3"]
    assert "parts of the model" in browser.evaluate("document.querySelector('#view-overview .matrix h2').textContent")
    cell = browser.evaluate(
        "truedag.app.views.overview.grid.find((one) => truedag.model.word(truedag.model.cells.part, one) === 'h 3')"
    )
    go(browser, f"#view=overview&select=cell.{cell}")
    leaves = browser.evaluate(
        "truedag.app.marks.leaves.map(([leaf]) => truedag.model.word(truedag.model.leaves.label, leaf))"
    )
    assert leaves == ["mm"]
    phases = "[...document.querySelectorAll('#filter-phase option')].map((one) => one.textContent)"
    assert browser.evaluate(phases) == ["all", "no phase"]
    for phase, shown in (("-", 10), ("forward", 0)):
        go(browser, f"#view=graph&f.phase={phase}")
        assert browser.evaluate("truedag.app.views.graph.shown") == shown


def test_a_node_is_found_by_its_number(browser: Chromium, tmp_path: Path) -> None:
    open_page(browser, crowd(4), tmp_path)
    browser.press("/")
    browser.press("7")
    assert browser.evaluate("document.getElementById('results').firstChild.textContent").startswith("node 7: embedding")
    browser.press("Enter")
    found = state(browser)
    assert (found["view"], found["selection"]["kind"]) == ("time", "slice")
    assert facts(browser)["Node"] == "7"


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
    for text, is_invalid in (("0-1", "false"), ("x", "true"), ("0-3 to 8-11 step 2", "true"), ("", "false")):
        go(browser, f"#view=graph&f.rank={text}")
        assert browser.evaluate("document.getElementById('filter-rank').getAttribute('aria-invalid')") == is_invalid
    for text, ranks in (("0-16 step 8", [0, 8, 16]), ("0-1 to 16-17 step 8,3", [0, 1, 8, 9, 16, 17, 3])):
        go(browser, f"#view=graph&f.rank={text}")
        assert browser.evaluate("[...truedag.app.filter.ranks]") == ranks, "as the page and the audit write them"


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


def test_what_follows_from_a_finding_is_said_to_and_not_counted(browser: Chromium, tmp_path: Path) -> None:
    other = FINDING | {"title": "A norm is missing", "follows": 1}
    open_page(browser, pipeline(), tmp_path, audit=AUDIT | {"findings": [FINDING, other]})
    assert browser.evaluate("document.querySelector('#tab-findings .count').textContent") == "1", "as the verdict says"
    browser.press("6")
    assert browser.evaluate("[...document.querySelectorAll('.finding.follows h3')].length") == 1
    go(browser, "#view=findings&select=finding.1")
    assert facts(browser)["Follows from"] == FINDING["title"]


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
    own = table.filter(pl.col("rank") == 1)
    go(browser, f"#view=time&lanes=1&select=slice.{table['rank'].to_list().index(1) + 3}")
    browser.evaluate("truedag.app.change((state) => { state.filters.rank = '1'; })")
    browser.wait_for("truedag.model.slices.lanes.every((lane) => lane.rank === 1)")
    browser.settle()
    assert browser.evaluate("truedag.model.slices.length") == len(own)
    assert state(browser)["selection"] == {"kind": "slice", "id": 3}  # the same one, in its new place
    assert facts(browser)["Node"] == str(own["node"][3])


def test_from_disk_the_page_says_where_its_slices_are(browser: Chromium, served) -> None:
    _, page, _ = served
    browser.open(page.html.as_uri() + "#view=time&lanes=1")
    assert "truedag view RUN --serve" in browser.evaluate("document.querySelector('#view-time .note').textContent")
    assert number_of_colours(browser, "#view-time canvas") > 4  # the heat map is in the page
