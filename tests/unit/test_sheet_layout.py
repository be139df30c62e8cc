"""Where boxes of a sheet stand, with graphviz and without, and how wide their letters are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from truedag.tracer.views.engine import Problem, by_depth, lay_out_layers, take_answers
from truedag.tracer.views.fitting import border
from truedag.tracer.views.font_metrics import text_width
from truedag.tracer.views.fonts import FAMILY, write_fontconfig


def test_a_layout_by_depth_overlaps_nothing_and_leads_down():
    problem = Problem(sizes=((30, 10), (20, 20), (40, 10), (30, 30)), lines=((0, 1), (0, 2), (1, 3), (2, 3), (0, 3)))
    layout = by_depth(problem)
    for src, dst in problem.lines:
        assert layout.middles[src][1] < layout.middles[dst][1]
    frames = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
              for (x, y), (w, h) in zip(layout.middles, problem.sizes, strict=True)]  # fmt: skip
    for i, a in enumerate(frames):
        assert a[0] >= -1e-9
        assert a[2] <= layout.width + 1e-9
        for b in frames[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_graphviz_lays_out_several_graphs_at_once():
    problem = Problem(sizes=((30, 10), (20, 20), (40, 10)), lines=((0, 1), (0, 2)), orders=((1, 2),))
    layouts, why = lay_out_layers([problem, problem])
    assert why == ["", ""]
    assert layouts[0] == layouts[1]
    assert layouts[0].splines
    assert layouts[0].middles[1][1] < layouts[0].middles[2][1], "the order without a line holds"


def test_what_graphviz_had_done_when_it_was_late_is_kept():
    problem = Problem(sizes=((30, 10), (20, 20)), lines=((0, 1),))
    done = subprocess.run(
        [sys.executable, "-m", "truedag.tracer.views.engine"], input=json.dumps([asdict(problem)] * 2),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    layouts, why = take_answers([problem] * 3, done[:-9], "late")
    assert why == ["", "late", "late"]
    assert [one.splines for one in layouts] == [True, False, False]
    assert take_answers([problem] * 2, done, "late")[1] == ["", ""]


@pytest.mark.parametrize("shape", ["ellipse", "parallelogram"])
def test_lines_end_on_the_border_of_the_shape(shape):
    problem = Problem(sizes=((80, 40),) * 3, lines=((0, 2), (1, 2)), shapes=(shape,) * 3)
    (layout,), _ = lay_out_layers([problem])
    for (src, dst), way in zip(problem.lines, layout.ways, strict=True):
        for box, (x, y) in ((src, way[0]), (dst, way[-1])):
            off = (x - layout.middles[box][0], y - layout.middles[box][1])
            if shape == "ellipse":
                assert 0.85 < (off[0] / 40) ** 2 + (off[1] / 20) ** 2 < 1.15
            else:
                left, right = (border(shape, 80, 40, off[1], sign) for sign in (-1, 1))
                assert left - 1.5 <= off[0] <= right + 1.5
                assert min(abs(off[0] - left), abs(off[0] - right), abs(abs(off[1]) - 20)) < 1.5


def test_letters_are_as_wide_as_graphviz_draws_them(tmp_path):
    texts = ["f32[32,1,512] → [64,768]", "all-to-all ep", "GPUs 0-7,1024-1031", "WWWWWiiiii"]
    code = (
        "import sys, pygraphviz\n"
        "graph = pygraphviz.AGraph()\n"
        f"graph.node_attr.update(fontname={FAMILY!r}, fontsize='20', margin='0', width='0', height='0', shape='box')\n"
        "for text in sys.argv[1:]: graph.add_node(text)\n"
        "graph.layout('dot')\n"
        "print(*(node.attr['width'] for node in graph.nodes()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *texts], capture_output=True, text=True, check=True,
        env={"FONTCONFIG_FILE": str(write_fontconfig(tmp_path))},
    )  # fmt: skip
    for text, inches in zip(texts, done.stdout.split(), strict=True):
        assert text_width(text, 20) == pytest.approx(float(inches) * 72, rel=0.04)
