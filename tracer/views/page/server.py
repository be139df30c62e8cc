"""Serves a page and the data beside it to browsers on this machine: byte ranges, one folder, loopback alone."""

from __future__ import annotations

import http.server
import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from truedag.tracer.errors import GraphError

_LOOPBACK = "127.0.0.1"
_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8", ".parquet": "application/vnd.apache.parquet", ".svg": "image/svg+xml",
    ".png": "image/png",
}  # fmt: skip
_RANGE = re.compile(r"^bytes=(\d*)-(\d*)$")
_PIECE = 1 << 20


class PageServer:
    """A server of the files in one folder; it listens on loopback.

    Raises:
        GraphError: the port is taken.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        root = folder.resolve()

        class Handler(_Handler):
            folder = root

        try:
            self._server = http.server.ThreadingHTTPServer((_LOOPBACK, port), Handler)
        except OSError as error:
            raise GraphError(f"port {port} cannot be listened on: {error}; choose another with --port") from error
        Handler.hosts = tuple(f"{name}:{self._server.server_port}" for name in (_LOOPBACK, "localhost"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.server_close()

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{_LOOPBACK}:{self._server.server_port}/index.html"

    def serve(self) -> None:
        """Serve until `stop` is called, from another thread, or the program is interrupted."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `serve`."""
        self._server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD for files right in the folder."""

    protocol_version = "HTTP/1.1"
    folder: Path
    hosts: tuple[str, ...]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing of each request."""

    def _answer(self, *, with_body: bool) -> None:
        # Another name that leads here is a page from elsewhere that wants to read this one.
        if self.headers.get("Host") not in self.hosts:
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        name = unquote(urlsplit(self.path).path).removeprefix("/") or "index.html"
        path = self.folder / name
        if "/" in name or "\0" in name or path.suffix not in _TYPES or not path.is_file():
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        size = path.stat().st_size
        asked = self.headers.get("Range")
        span = (0, size) if asked is None else _read_range(asked, size)
        if span is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin, end = span
        self.send_response(HTTPStatus.OK if asked is None else HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", _TYPES[path.suffix])
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if asked is not None:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if with_body:
            self._send(path, begin, end)

    def _send(self, path: Path, begin: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                piece = file.read(min(_PIECE, end - begin))
                if not piece:
                    self.close_connection = True  # the file was shortened meanwhile
                    return
                self.wfile.write(piece)
                begin += len(piece)

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _read_range(asked: str, size: int) -> tuple[int, int] | None:
    """Return begin and end (excluded) of one range; None if it cannot be satisfied."""
    found = _RANGE.match(asked.strip())
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        length = int(found[2])
        return (max(0, size - length), size) if length else None
    begin = int(found[1])
    end = min(size, int(found[2]) + 1) if found[2] else size
    return (begin, end) if begin < end else None
