"""The server of a page: byte ranges, one folder, this machine alone."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from truedag.tracer.errors import GraphError
from truedag.tracer.views.page.server import PageServer

CONTENT = bytes(range(256)) * 16


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    views = tmp_path / "views"
    views.mkdir()
    (views / "index.html").write_text("<p>page</p>")
    (views / "slices.parquet").write_bytes(CONTENT)
    (tmp_path / "run.json").write_text("{}")
    (views / "secret.txt").write_text("no")
    with PageServer(views) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def get(server: PageServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    address = server.address.removeprefix("http://").split("/")[0]
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("bytes=0-3", 0, 4), ("bytes=100-", 100, 4096), ("bytes=-8", 4088, 4096), ("bytes=4000-9999", 4000, 4096)],
)
def test_a_range_is_answered_with_its_bytes(server: PageServer, asked: str, begin: int, end: int) -> None:
    status, headers, body = get(server, "/slices.parquet", Range=asked)
    assert status == 206
    assert body == CONTENT[begin:end]
    assert headers["Content-Range"] == f"bytes {begin}-{end - 1}/4096"


@pytest.mark.parametrize("asked", ["bytes=4096-", "bytes=9-3", "bytes=-0", "bytes=-", "lines=1-2", "bytes=0-1,3-4"])
def test_a_range_that_is_none_is_refused(server: PageServer, asked: str) -> None:
    status, headers, _ = get(server, "/slices.parquet", Range=asked)
    assert status == 416
    assert headers["Content-Range"] == "bytes */4096"


def test_the_whole_file_and_the_page_come_too(server: PageServer) -> None:
    assert get(server, "/slices.parquet")[2] == CONTENT
    assert get(server, "/")[2] == b"<p>page</p>"


@pytest.mark.parametrize(
    "path", ["/../run.json", "/%2e%2e/run.json", "/..%2frun.json", "/secret.txt", "/nothing.html", "/a/index.html"]
)
def test_nothing_else_is_served(server: PageServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_another_name_for_this_machine_is_refused(server: PageServer) -> None:
    # A page from elsewhere whose name is made to lead here could read the data otherwise.
    assert get(server, "/index.html", Host="example.org")[0] == 403


def test_it_listens_on_loopback_and_says_when_it_cannot(server: PageServer, tmp_path: Path) -> None:
    port = int(server.address.split(":")[2].split("/")[0])
    with pytest.raises(GraphError, match="choose another with --port"):
        PageServer(tmp_path, port=port)
