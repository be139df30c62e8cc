"""Write a run's interactive page, index.html: one file that opens from disk, without a network, and shows all of it.

RUN is a run's folder, or a dataset that truedag merge wrote. A graph with more than some hundred thousand timed
operators leaves these in a Parquet file beside the page: --serve gives both to a browser on this machine, and to nobody
else.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result, shorten


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a dataset")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes (default: views beside the dataset)")
    parser.add_argument("--serve", action="store_true", help="write the page and serve it until interrupted")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of --serve (default: a free one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from dataclasses import asdict

    from truedag.launch.page import make_page
    from truedag.tracer.graph import Graph

    dag = Graph.open(arguments.run).path
    views = arguments.out if arguments.out is not None else dag.absolute().parent / "views"
    with Progress() as progress:
        page = make_page(arguments.run, views, progress=progress.show)
    if arguments.json:
        print_json(asdict(page))
    else:
        print_result(
            f"page: {shorten(page.html.absolute())}, {page.num_bytes / 1e6:.1f} MB, {page.num_nodes:,} nodes folded "
            f"to {page.num_shown:,} operators"
        )
    if arguments.serve:
        return _serve(views, arguments.port)
    if not arguments.json:
        _print_next(arguments, page.html, is_apart=page.slices is not None)
    return 0


def _print_next(arguments: argparse.Namespace, html: Path, *, is_apart: bool) -> None:
    if is_apart:
        out = "" if arguments.out is None else f" --out {shlex.quote(str(arguments.out))}"
        print_result(f"next: truedag view {shlex.quote(str(arguments.run))}{out} --serve")
        return
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    print_result(f"next: {opener} {shlex.quote(str(shorten(html.absolute())))}")


def _serve(views: Path, port: int) -> int:
    from truedag.tracer.views.page.server import PageServer

    with PageServer(views, port=port) as server:
        print_result(f"next: open {server.address} in a browser here; Ctrl+C ends it")
        sys.stdout.flush()
        try:
            server.serve()
        except KeyboardInterrupt:
            return 0
    return 0
