"""Lay graphs out in layers: graphviz's dot in a child process with a time limit, and a way that needs no engine.

A graph here is boxes of given sizes, numbered in a topological order, and lines between them; what comes back is where
the boxes stand and which way the lines take, in points, y downwards from the top left corner.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Point = tuple[float, float]
NODE_GAP = 10.0
RANK_GAP = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A graph to lay out.

    Attributes:
        sizes: width and height of each box.
        lines: from box to box.
        orders: from a box to one that shall stand below it, without a line.
        shapes: of each box, as graphviz calls it, where lines end on its border; none: all are boxes.
    """

    sizes: tuple[Point, ...]
    lines: tuple[tuple[int, int], ...]
    orders: tuple[tuple[int, int], ...] = ()
    shapes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Middles of the boxes, corners of each line (its ends on the boxes' borders), and how large all is.

    `splines` says that a line's points are those of a cubic B-spline, 3n + 1 of them, and not corners.
    """

    middles: tuple[Point, ...]
    ways: tuple[tuple[Point, ...], ...]
    width: float
    height: float
    splines: bool


def lay_out_layers(problems: Sequence[Problem], *, timeout_s: float = 120.0) -> tuple[list[Layout], list[str]]:
    """Lay each graph out, all of them in one child; those that it has done when it dies or is late are kept.

    Returns:
        the layouts, and for each why graphviz did not make it: '' if it did.
    """
    command = [sys.executable, "-m", "truedag.tracer.views.engine"]
    given = json.dumps([asdict(problem) for problem in problems])
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout_s, check=False)
        text = done.stdout
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        why = f"graphviz failed: {said[0]}"
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        why = f"graphviz took longer than {timeout_s:g} s"
    return take_answers(problems, text, why)


def take_answers(problems: Sequence[Problem], text: str, why: str) -> tuple[list[Layout], list[str]]:
    """Read what the child wrote, a line for each graph; those it did not come to are laid out by depth, and say why."""
    made = [_read(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    late = problems[len(made) :]
    return [*made, *(by_depth(problem) for problem in late)], [""] * len(made) + [why] * len(late)


def by_depth(problem: Problem) -> Layout:
    """Lay a graph out without an engine: a row is a depth, in it the boxes in their order."""
    depth = _depths(len(problem.sizes), [*problem.lines, *problem.orders])
    rows: dict[int, list[int]] = {}
    for number, level in enumerate(depth):
        rows.setdefault(level, []).append(number)
    middles: list[Point] = [(0.0, 0.0)] * len(depth)
    spans = [sum(problem.sizes[i][0] + NODE_GAP for i in row) - NODE_GAP for row in rows.values()]
    width, y = max(spans, default=0.0), 0.0
    for level in sorted(rows):
        x = (width - (sum(problem.sizes[i][0] + NODE_GAP for i in rows[level]) - NODE_GAP)) / 2
        tall = max(problem.sizes[i][1] for i in rows[level])
        for i in rows[level]:
            middles[i] = (x + problem.sizes[i][0] / 2, y + tall / 2)
            x += problem.sizes[i][0] + NODE_GAP
        y += tall + RANK_GAP
    ways = []
    for src, dst in problem.lines:
        below, above = problem.sizes[src][1] / 2, problem.sizes[dst][1] / 2
        ways.append(
            ((middles[src][0], middles[src][1] + below), (middles[dst][0], middles[dst][1] - above)),
        )
    return Layout(middles=tuple(middles), ways=tuple(ways), width=width, height=max(0.0, y - RANK_GAP), splines=False)


def _depths(num: int, lines: Sequence[tuple[int, int]]) -> list[int]:
    """Count the lines on the longest way to each box; lines that lead back are not counted."""
    after: list[list[int]] = [[] for _ in range(num)]
    waiting = [0] * num
    for src, dst in lines:
        after[src].append(dst)
        waiting[dst] += 1
    depth = [0] * num
    ready = [box for box in range(num) if waiting[box] == 0]
    for box in ready:
        for dst in after[box]:
            depth[dst] = max(depth[dst], depth[box] + 1)
            waiting[dst] -= 1
            if waiting[dst] == 0:
                ready.append(dst)
    return depth


def _read(found: dict[str, list[list[float]] | list[list[list[float]]] | float]) -> Layout:
    return Layout(
        middles=tuple((x, y) for x, y in found["middles"]),  # type: ignore[union-attr, misc]
        ways=tuple(tuple((x, y) for x, y in way) for way in found["ways"]),  # type: ignore[union-attr, misc]
        width=found["width"],  # type: ignore[arg-type]
        height=found["height"],  # type: ignore[arg-type]
        splines=True,
    )


def _lay_out(problem: dict[str, list[list[float]]]) -> dict[str, object]:
    import pygraphviz

    graph = pygraphviz.AGraph(directed=True, strict=False)
    graph.graph_attr.update(
        ranksep=f"{RANK_GAP / 72:.4f}", nodesep=f"{NODE_GAP / 72:.4f}", nslimit="1", nslimit1="1", mclimit="0.3"
    )
    graph.node_attr.update(shape="box", fixedsize="true", label="")
    for i, (width, height) in enumerate(problem["sizes"]):
        shape = problem["shapes"][i] if problem["shapes"] else "box"
        graph.add_node(i, width=f"{width / 72:.4f}", height=f"{height / 72:.4f}", shape=shape)
    for i, (src, dst) in enumerate(problem["lines"]):
        graph.add_edge(int(src), int(dst), key=i, arrowhead="none")
    for src, dst in problem["orders"]:
        graph.add_edge(int(src), int(dst), key=f"order {src} {dst}", style="invis")
    graph.layout(prog="dot")
    _, _, width, height = (float(part) for part in graph.graph_attr["bb"].split(","))
    middles = []
    for i in range(len(problem["sizes"])):
        x, y = (float(part) for part in graph.get_node(i).attr["pos"].split(","))
        middles.append((x, height - y))
    ways: list[list[Point]] = [[] for _ in problem["lines"]]
    for i, (src, dst) in enumerate(problem["lines"]):
        told = [point.split(",") for point in graph.get_edge(int(src), int(dst), i).attr["pos"].split(" ")]
        ways[i] = [(float(x), height - float(y)) for x, y in told]
    return {"middles": middles, "ways": ways, "width": width, "height": height}


if __name__ == "__main__":
    for one in json.load(sys.stdin):
        sys.stdout.write(json.dumps(_lay_out(one)) + "\n")
        sys.stdout.flush()
