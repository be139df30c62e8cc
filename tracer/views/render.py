"""Render DOT with positions to SVG and PNG, in child processes that may be slow or die without harm.

Graphviz is the one inside pygraphviz's wheel: there is no `dot` program to call, and a crash in it would take its
process along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from truedag.tracer.errors import DrawError
from truedag.tracer.views.fonts import embed_font, write_fontconfig

# Graphviz draws nodes and edges where the DOT says they are: nothing is laid out.
_AS_PLACED = "nop2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A DOT file, all positions given, what it is drawn into (.svg, .png), and dots per inch of bitmaps."""

    dot: Path
    outputs: tuple[Path, ...]
    dpi: float


def render(dot: Path, outputs: list[Path], *, dpi: float, timeout_s: float = 120.0) -> None:
    """Draw a DOT file, all positions given, into files whose suffixes say the format (.svg, .png).

    Args:
        dot: the DOT file.
        outputs: what to write; bitmaps have `dpi` dots per 72 points.
        dpi: dots per inch of bitmaps.
        timeout_s: after this the child is killed.

    Raises:
        DrawError: graphviz failed, or did not end in time; no output is left half-written.
    """
    render_all([Picture(dot=dot, outputs=tuple(outputs), dpi=dpi)], timeout_s=timeout_s, jobs=1)


def render_all(pictures: Sequence[Picture], *, timeout_s: float = 120.0, jobs: int | None = None) -> None:
    """Draw DOT files, several at a time.

    Args:
        pictures: what to draw.
        timeout_s: for each picture; a child that takes longer for its share is killed.
        jobs: children at a time; None: as many as there are cores.

    Raises:
        DrawError: as `render`.
    """
    num = min(jobs or os.cpu_count() or 1, len(pictures))
    with tempfile.TemporaryDirectory(prefix="truedag-draw-") as scratch:
        environment = {**os.environ, "FONTCONFIG_FILE": str(write_fontconfig(Path(scratch)))}
        shares = [pictures[i::num] for i in range(num)]
        with ThreadPoolExecutor(max(1, num)) as pool:
            for i in range(num):
                (Path(scratch) / str(i)).mkdir()
            done = [
                pool.submit(_render_share, share, Path(scratch) / str(i), environment, timeout_s)
                for i, share in enumerate(shares)
            ]
            for one in done:
                one.result()


def _render_share(share: Sequence[Picture], scratch: Path, environment: dict[str, str], timeout_s: float) -> None:
    drafts = [[scratch / f"{i}{output.suffix}" for output in picture.outputs] for i, picture in enumerate(share)]
    told = [
        {"dot": str(picture.dot), "dpi": f"{picture.dpi:.3f}", "drafts": [str(draft) for draft in into]}
        for picture, into in zip(share, drafts, strict=True)
    ]
    limit = timeout_s * len(share)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "truedag.tracer.views.render"],
            input=json.dumps(told),
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        first = next((one.dot for one, into in zip(share, drafts, strict=True) if not into[-1].exists()), share[-1].dot)
        raise DrawError(f"drawing {first} took longer than {limit:.0f} s: the graph is too large for it") from error
    for picture, into in zip(share, drafts, strict=True):
        if not all(draft.exists() for draft in into):
            said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise DrawError(f"graphviz could not draw {picture.dot}: {said[0]}")
        for draft, output in zip(into, picture.outputs, strict=True):
            drawn = draft.read_bytes()
            output.write_bytes(embed_font(drawn) if output.suffix == ".svg" else drawn)


def _draw(dot: str, dpi: str, outputs: Sequence[str]) -> None:
    import pygraphviz

    for output in outputs:
        graph = pygraphviz.AGraph(filename=dot)
        if output.endswith(".png"):
            graph.graph_attr["dpi"] = dpi
        # An open file: given its path, pygraphviz opens it in a way that Python 3.11.2 and its like refuse.
        with Path(output).open("wb") as file:
            graph.draw(file, format=Path(output).suffix[1:], prog=_AS_PLACED)
        graph.close()


if __name__ == "__main__":
    for one in json.load(sys.stdin):
        _draw(one["dot"], one["dpi"], one["drafts"])
