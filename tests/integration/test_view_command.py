"""`truedag view`: the page is written beside the graph, with its audit, and served on loopback until told to stop."""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from argparse import Namespace
from pathlib import Path

import pytest
from command_line import start_truedag, truedag

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_dag import pipeline

from truedag.launch.commands import view
from truedag.launch.page import make_page
from truedag.launch.run_audit import write_review
from truedag.tracer.audit.findings import Audit, Passed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    pipeline().write(tmp_path / "run" / "dag")
    return tmp_path / "run"


def test_the_page_is_written_beside_the_graph(run: Path) -> None:
    done = truedag("view", "run", "--json", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    page = json.loads(done.stdout)
    html = run / "views" / "index.html"
    assert page["html"] == str(html.resolve())
    assert page["num_bytes"] == html.stat().st_size
    assert page["slices"] is None
    said = truedag("view", "run", "--out", "elsewhere", cwd=run.parent).stdout.splitlines()
    assert said[-1].split()[-1] == "elsewhere/index.html"
    assert (run.parent / "elsewhere" / "index.html").is_file()


def test_an_audit_is_shown_with_the_very_graph_that_it_is_of(run: Path) -> None:
    audit = Audit(subject="run", against="x", passed=[Passed(check="structure.cycle", what="told before")])

    def is_shown(name: str) -> bool:
        page = make_page(run, run / name, progress=lambda _: None)
        return b"told before" in payload(page.html)

    write_review(audit, run, dag=run / "dag")
    assert is_shown("its own")
    write_review(audit, run, dag=None)
    assert not is_shown("a drawing's")
    write_review(audit, run, dag=run / "dag")
    pipeline(num_microbatches=3).write(run / "dag")
    assert not is_shown("recorded again")


def test_the_next_command_serves_the_folder_that_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    for out, told in (
        (None, "truedag view run --serve"),
        (Path("my pages"), "truedag view run --out 'my pages' --serve"),
    ):
        view._print_next(Namespace(run=Path("run"), out=out), Path("index.html"), is_apart=True)
        assert capsys.readouterr().out.strip() == f"next: {told}"


def payload(html: Path) -> bytes:
    """What the page carries, unpacked."""
    import base64
    import zlib

    text = html.read_text().partition('id="payload">')[2].partition("</script>")[0]
    return zlib.decompress(base64.b64decode(text))


def test_a_graph_that_is_none_is_said(tmp_path: Path) -> None:
    done = truedag("view", "nothing", cwd=tmp_path)
    assert done.returncode == 1
    assert "holds no dataset" in done.stderr


def test_it_is_served_until_interrupted(run: Path) -> None:
    server = start_truedag("view", "run", "--serve", cwd=run.parent)
    assert server.stdout is not None
    try:
        lines = iter(server.stdout.readline, "")
        address = next(line for line in lines if line.startswith("next: ")).split()[2]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b'id="payload"' in answer.read()
    finally:
        server.send_signal(signal.SIGINT)
        _, stderr = server.communicate(timeout=60)
    assert server.returncode == 0, stderr
    assert "Traceback" not in stderr
