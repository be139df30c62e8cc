"""The page of a run that really happened, in a real browser, offline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl
import pytest
from chromium import Chromium
from page_probe import VIEWS, box_of, facts, go, number_of_colours, state

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from command_line import Ran

from truedag.tracer.analysis.quantities import write_shares
from truedag.tracer.analysis.report import make_report
from truedag.tracer.graph import Graph


@pytest.fixture(scope="module")
def run(small_run: Ran) -> Path:
    assert "index.html" in small_run.said
    return small_run.out


@pytest.fixture(scope="module")
def graph(run: Path) -> Graph:
    return Graph.open(run)


@pytest.fixture
def page(run: Path, browser: Chromium) -> Chromium:
    """The page, opened from disk as if for the first time."""
    browser.open((run / "views" / "index.html").as_uri())
    return browser


def test_it_asks_for_nothing_but_itself(page: Chromium, run: Path) -> None:
    for view in VIEWS:
        go(page, f"#view={view}")
    assert set(page.requests) == {(run / "views" / "index.html").as_uri()}


def test_counts_on_screen_are_those_of_the_dataset(page: Chromium, graph: Graph) -> None:
    told = facts(page)
    nodes = dict(graph.nodes.group_by("kind").len().collect().iter_rows())
    edges = dict(graph.edges.group_by("kind").len().collect().iter_rows())
    assert told["Nodes"] == f"{sum(nodes.values()):,}"
    assert told["Edges"] == f"{sum(edges.values()):,}"
    for kind, count in (nodes | edges).items():
        assert told[kind] == f"{count:,}"
    measured = graph.nodes.filter(pl.col("timing") == "measured").collect()
    assert told["Measured"] == f"{len(measured):,} nodes"
    go(page, "#view=graph")
    ends = sum(nodes[kind] for kind in ("parameter", "input", "output"))
    assert f"stand for {sum(nodes.values()) - ends:,} of {sum(nodes.values()):,} nodes" in note(page, "graph")
    go(page, "#view=graph&ends=1")
    assert f"stand for {sum(nodes.values()):,} of {sum(nodes.values()):,} nodes" in note(page, "graph")


def note(page: Chromium, view: str) -> str:
    text: str = page.evaluate(f"document.querySelector('#view-{view} .note').textContent")
    return text


def test_every_view_draws(page: Chromium) -> None:
    for view in ("overview", "graph", "time", "traffic", "path"):
        for theme in ("light", "dark"):
            go(page, f"#view={view}&theme={theme}")
            assert number_of_colours(page, f"#view-{view} canvas") > 4, view
    go(page, "#view=time&lanes=1")
    assert number_of_colours(page, "#view-time canvas") > 4
    go(page, "#view=findings")
    assert "checks passed" in page.evaluate("document.querySelector('#view-findings').textContent")


def test_boxes_open_from_stage_to_operator_and_still_stand_for_every_node(page: Chromium, graph: Graph) -> None:
    go(page, "#view=graph")
    whole = page.evaluate("truedag.app.views.graph.shown")
    for name in ("forward · stage 0", "layer 0", "mlp", "router", "experts"):
        page.press("0")  # all of it is in sight
        page.click(*box_of(page, name), times=2)
        assert page.evaluate("truedag.app.views.graph.shown") == whole, name
    for name in ("router", "experts"):
        inside = f"""truedag.model.children[truedag.app.views.graph.layout.boxes.find(
            ({{ node }}) => truedag.model.title(node) === {name!r} && truedag.app.state.open.has(node)).node]"""
        boxes = page.evaluate(f"{inside}.map((node) => truedag.model.title(node))")
        module = f"decoder.layers.0.mlp.{name}"
        own = (pl.col("phase") == "forward") & pl.col("module").str.starts_with(module)
        ran = graph.nodes.filter(own).select("module", "label").unique().collect()
        # A module that ran one operator is one box with it.
        assert {*boxes} == {" / ".join((*at[len(module) + 1 :].split("."), op)).lstrip(" /") for at, op in ran.rows()}
        assert {"router": "topk", "experts": "linear_fc1 / _grouped_mm"}[name] in boxes
    assert facts(page)["Stands for"].endswith("on 1 rank")


def test_a_module_stands_for_its_nodes_with_their_times(page: Chromium, graph: Graph) -> None:
    go(page, "#view=graph")
    page.click(*box_of(page, "forward · stage 1"))
    own = (pl.col("phase") == "forward") & (pl.col("stage") == 1)
    nodes = graph.nodes.filter(own & ~pl.col("kind").is_in(["parameter", "input", "output"])).collect()
    told = facts(page)
    assert told["Stands for"] == f"{len(nodes):,} nodes on 1 rank"
    compute = nodes.filter(pl.col("kind") == "compute")
    met = graph.participants.join(nodes.lazy().select("node"), on="node").collect()
    spent = sum((frame["end_ns"] - frame["start_ns"]).sum() for frame in (compute, met))
    value, unit = told["Time on a rank, mean"].split()
    assert float(value) * {"µs": 1e3, "ms": 1e6, "s": 1e9}[unit] == pytest.approx(spent, rel=0.006)
    assert told["maximum"].endswith("(rank 1)")


def test_a_link_brings_back_what_was_on_screen(page: Chromium, run: Path) -> None:
    go(page, "#view=graph")
    page.click(*box_of(page, "forward · stage 0"), times=2)
    page.click(*box_of(page, "layer 0"), times=2)
    page.press("+")
    page.press("d")
    before = state(page), page.evaluate("document.querySelector('#view-graph canvas').toDataURL()")
    link = page.evaluate("location.hash")
    page.open((run / "views" / "index.html").as_uri() + link)
    page.settle()
    after = state(page), page.evaluate("document.querySelector('#view-graph canvas').toDataURL()")
    for name in ("view", "selection", "theme"):
        assert after[0][name] == before[0][name]
    assert sorted(after[0]["open"]) == sorted(before[0]["open"])
    assert after[0]["camera"] == pytest.approx(before[0]["camera"], abs=1e-3)
    assert page.evaluate("location.hash") == link
    assert before[0]["open"]


@pytest.mark.parametrize(
    "link",
    [
        "#view=time&lanes=1&f.rank=1&select=slice.20", "#view=overview&metric=bytes&select=rank.1&theme=dark",
        "#view=traffic&traffic=messages", "#view=path&select=piece.3", "#view=graph&f.phase=backward&metric=waiting",
    ],
)  # fmt: skip
def test_links_are_stable(page: Chromium, run: Path, link: str) -> None:
    go(page, link)
    canvas = f"document.querySelector('#view-{state(page)['view']} canvas').toDataURL()"
    first, kept = page.evaluate(canvas), page.evaluate("location.hash")
    page.open((run / "views" / "index.html").as_uri() + kept)
    page.settle()
    assert page.evaluate("location.hash") == kept
    assert page.evaluate(canvas) == first


def test_broken_links_do_no_harm(page: Chromium) -> None:
    for link in ("#view=nothing", "#view=graph&open=999999.5&select=node.9999999&camera=a_b_c", "#select=rank.77&top=x",
                 "#view=time&window=5&select=slice.999999999&lanes=1", "#f.rank=,,-&f.layer=9999999999-1"):  # fmt: skip
        go(page, link)
    assert page.errors == []


def test_the_keyboard_is_enough(page: Chromium) -> None:
    page.press("2")
    assert state(page)["view"] == "graph"
    page.press("ArrowDown")
    first = state(page)["selection"]
    assert first["kind"] == "node"
    page.press("ArrowDown")
    assert state(page)["selection"] != first
    page.press("Enter")
    opened = state(page)
    assert opened["selection"]["id"] in opened["open"]
    page.press("Backspace")
    assert state(page)["open"] == []
    page.press("Escape")
    assert state(page)["selection"] is None
    page.press("3")
    page.press("t")
    page.press("+")
    page.press("n")
    told = state(page)
    assert told["lanes"]
    assert told["window"] is not None
    assert told["selection"]["kind"] == "slice"
    page.press("1")
    page.press("Escape")
    page.evaluate("document.querySelector('#view-overview .matrix canvas').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    cell = state(page)["selection"]
    assert cell == {"kind": "cell", "id": page.evaluate("truedag.app.views.overview.grid[1]")}
    page.press("Enter")
    assert (state(page)["view"], state(page)["selection"]) == ("graph", cell)
    page.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    for letter in "router":
        page.press(letter)
    page.press("Enter")
    found = state(page)
    assert found["view"] == "graph"
    assert "router" in page.evaluate(f"truedag.model.path({found['selection']['id']}).join('/')")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.press("?")
    assert page.evaluate("document.getElementById('keys').open")
    page.press("Escape")
    assert not page.evaluate("document.getElementById('keys').open")


def test_filters_leave_what_passes_and_count_it(page: Chromium, graph: Graph) -> None:
    go(page, "#view=graph&f.phase=forward&f.layer=0")
    nodes = graph.nodes.filter((pl.col("phase") == "forward") & (pl.col("layer") == 0)).collect()
    assert f"stand for {len(nodes):,} of" in note(page, "graph")
    go(page, "#view=graph&f.rank=1")
    ends = ["parameter", "input", "output"]
    own = graph.nodes.filter((pl.col("rank") == 1) & ~pl.col("kind").is_in(ends)).select("node").collect()["node"]
    met = graph.participants.filter(pl.col("rank") == 1).select("node").collect()["node"]
    assert f"stand for {len({*own, *met}):,} of" in note(page, "graph")
    assert "forward · stage 0" not in page.evaluate(
        "truedag.app.views.graph.layout.boxes.map((box) => truedag.app.views.graph.nameOf(box.node)).join()"
    )
    go(page, "#view=graph&f.rank=55")
    assert "0 boxes stand for 0 of" in note(page, "graph")
    go(page, "#view=traffic&f.rank=0&f.layer=0")
    sent = graph.participants.filter(pl.col("rank") == 0).join(
        graph.nodes.filter(pl.col("kind") == "collective").select("node"), on="node"
    )
    number = sent.select(pl.col("send_bytes").sum()).collect().item()
    kinds = "truedag.app.views.traffic.kinds.filter((one) => !one.isMessage)"
    assert page.evaluate(f"{kinds}.reduce((sum, one) => sum + one.bytes, 0)") == number > 0
    assert note(page, "traffic").endswith("given by these ranks · only ranks are filtered here")
    go(page, "#view=time&lanes=1&f.microbatch=0")
    slices = graph.nodes.filter((pl.col("microbatch") == 0) & (pl.col("timing") == "measured")).select("node")
    compute = slices.join(graph.nodes.filter(pl.col("kind") == "compute"), on="node").collect()
    met = slices.join(graph.participants, on="node").collect()
    assert note(page, "time").startswith(f"{len(compute) + len(met):,} of")


def test_a_communication_shows_all_its_parts(page: Chromium, graph: Graph) -> None:
    node = graph.nodes.filter(pl.col("kind") == "recv").select("node").collect()["node"][0]
    slice_ = page.evaluate(f"truedag.model.slices.ofNode({node})[0]")
    go(page, f"#view=time&lanes=1&select=slice.{slice_}")
    parts = page.evaluate(
        f"truedag.model.slices.partners({slice_}).map((part) => [truedag.model.slices.rank[part], "
        "truedag.model.slices.node[part]])"
    )
    sender = graph.edges.filter((pl.col("kind") == "p2p") & (pl.col("dst") == node)).collect()["src"][0]
    ranks = dict(graph.nodes.filter(pl.col("node").is_in([node, sender])).select("node", "rank").collect().iter_rows())
    assert sorted(parts) == sorted([[ranks[node], node], [ranks[sender], sender]])
    assert facts(page)["Participants"] == "2 ranks"


def test_what_is_selected_is_marked_in_every_view(page: Chromium) -> None:
    page.press("5")
    page.press("n")
    page.press("n")
    piece = state(page)["selection"]
    assert piece["kind"] == "piece"
    marks = page.evaluate("({ ranks: [...truedag.app.marks.ranks], leaves: truedag.app.marks.leaves })")
    assert len(marks["ranks"]) == 1
    assert marks["leaves"]
    for view in ("overview", "time", "graph"):
        go(page, f"#view={view}")
        plain = page.evaluate(f"document.querySelector('#view-{view} canvas').toDataURL()")
        go(page, f"#view={view}&select=piece.{piece['id']}")
        assert page.evaluate(f"document.querySelector('#view-{view} canvas').toDataURL()") != plain, view


def test_time_on_the_critical_path_is_a_colour_that_adds_up_to_the_steps(page: Chromium) -> None:
    go(page, "#view=overview&metric=path")
    assert number_of_colours(page, "#view-overview .matrix canvas") > 4
    spans = page.evaluate("truedag.model.steps.map((step) => step.end_ns - step.start_ns)")
    boxes = "truedag.model.children[truedag.model.numNodes].map((node) => truedag.model.amount(node, 'path').value)"
    for amounts in (boxes, "[...truedag.model.pathOfRank]", "[...truedag.model.pathOfCell]"):
        assert sum(page.evaluate(amounts)) == pytest.approx(sum(spans)), amounts


def test_shares_of_a_rank_are_written_as_in_the_report(page: Chromium, graph: Graph) -> None:
    names = ("Compute", "Transfer, exposed", "Waiting for others", "Pipeline bubble", "Host")
    for share in make_report(graph).ranks:
        go(page, f"#select=rank.{share.rank}")
        told = facts(page)
        assert share.fractions is not None
        assert [told[name].rpartition(" · ")[2] for name in names] == write_shares(share.fractions)


def test_the_strip_of_the_path_shows_the_time_that_the_view_of_time_shows(page: Chromium) -> None:
    go(page, "#view=path")
    whole = page.evaluate("[truedag.app.views.path.sight().from, truedag.app.views.path.sight().to]")
    page.press("+")
    window = state(page)["window"]
    assert whole[0] < window[0] < window[1] < whole[1]
    assert page.evaluate("[truedag.app.views.time.sight().from, truedag.app.views.time.sight().to]") == window
    page.press("n")
    piece = state(page)["selection"]["id"]
    begin, end = page.evaluate(f"[truedag.model.pieces.start_ns[{piece}], truedag.model.pieces.end_ns[{piece}]]")
    low, high = state(page)["window"]
    assert begin <= high
    assert end >= low
    page.press("0")
    assert state(page)["window"] is None


def test_a_piece_of_the_path_leads_to_its_time(page: Chromium) -> None:
    go(page, "#view=path")
    page.evaluate("document.querySelector('tr[data-piece]').click()")
    page.settle()
    assert state(page)["selection"]["kind"] == "piece"
    buttons = "[...document.querySelectorAll('#detail .places button')]"
    page.evaluate(f"{buttons}.find((one) => one.textContent.includes('time')).click()")
    page.settle()
    told = state(page)
    assert (told["view"], told["lanes"]) == ("time", True)
    piece = told["selection"]["id"]
    begin, end = page.evaluate(f"[truedag.model.pieces.start_ns[{piece}], truedag.model.pieces.end_ns[{piece}]]")
    assert told["window"][0] <= begin <= end <= told["window"][1]


def test_the_page_says_its_link_and_what_it_is(page: Chromium, run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert page.evaluate("document.getElementById('title').textContent") == record["deployment"]["name"]
    assert record["strategy"] in page.evaluate("document.getElementById('subtitle').textContent")
