"""Render DOT with positions to SVG and PNG, in a child process that may be slow or die without harm.

Graphviz is the one inside pygraphviz's wheel: there is no `dot` program to call, and a crash in it would take its
process along.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from truedag.tracer.errors import DrawError
from truedag.tracer.views.fonts import embed_font, write_fontconfig

# Graphviz draws nodes and edges where the DOT says they are: nothing is laid out.
_AS_PLACED = "nop2"


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
    with tempfile.TemporaryDirectory(prefix="truedag-draw-") as scratch:
        environment = {**os.environ, "FONTCONFIG_FILE": str(write_fontconfig(Path(scratch)))}
        drafts = [Path(scratch) / output.name for output in outputs]
        command = [sys.executable, "-m", "truedag.tracer.views.render", str(dot), f"{dpi:.3f}", *map(str, drafts)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DrawError(
                f"drawing {dot} took longer than {timeout_s:.0f} s: the graph is too large for it"
            ) from error
        missing = [draft.name for draft in drafts if not draft.exists()]
        if done.returncode != 0 or missing:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise DrawError(f"graphviz could not draw {dot}: {said[0]}")
        for draft, output in zip(drafts, outputs, strict=True):
            drawn = draft.read_bytes()
            output.write_bytes(embed_font(drawn) if output.suffix == ".svg" else drawn)


def _draw(dot: str, dpi: str, outputs: list[str]) -> None:
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
    _draw(sys.argv[1], sys.argv[2], sys.argv[3:])
