"""Where stages stand on a page by layers: in as many bands as make it about as wide as high."""

from __future__ import annotations

import itertools

import pytest

from truedag.tracer.views.boxes import Box
from truedag.tracer.views.layout import lay_out
from truedag.tracer.views.routes import find_routes
from truedag.tracer.views.ties import Tie


def stages(num_stages: int, *, num_columns: int, num_rows: int, falls: bool = False) -> list[Box]:
    return [
        Box(
            fold=(stage * num_columns + column) * num_rows + row, shape="box", role="computation", stage=stage,
            panel="forward", column=(1, column), falls=falls, text=("linear", "float32[2,4]"), ranks=(stage,),
            experts="", level=row, time_ns=None, num_nodes=1,
        )
        for stage in range(num_stages)
        for column in range(num_columns)
        for row in range(num_rows)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_columns", "num_rows", "num_bands"),
    [pytest.param(3, 90, 2, id="tall stages"), pytest.param(20, 3, 8, id="wide stages")],
)
def test_stages_are_broken_into_bands_as_the_page_needs(num_columns: int, num_rows: int, num_bands: int) -> None:
    boxes = stages(8, num_columns=num_columns, num_rows=num_rows)
    page = lay_out(boxes, {box.fold: 0 for box in boxes}, top=100.0)
    tops = {round(place.top) for place in page.stages.values()}
    assert len(tops) == num_bands
    assert min(tops) == 100
    assert max(page.width, page.height) < 1.6 * min(page.width, page.height)


@pytest.mark.parametrize("falls", [False, True])
def test_a_column_that_is_too_long_goes_on_beside_itself(falls: bool) -> None:
    boxes = stages(1, num_columns=1, num_rows=40, falls=falls)
    page = lay_out(boxes, {box.fold: 0 for box in boxes}, top=0.0)
    assert max(page.width, page.height) < 1.6 * min(page.width, page.height)
    places = [page.boxes[box.fold] for box in boxes]
    read = sorted(range(40), key=lambda i: (-places[i].x if falls else places[i].x, places[i].y))
    assert read == list(range(40))
    slots = [page.slots[box.fold] for box in boxes]
    assert len(set(slots)) > 1
    assert slots == sorted(slots, reverse=falls)
    (group,) = page.groups.values()
    assert all(group.left < place.left and place.right < group.right for place in places)
    spots = {(place.x, place.y) for place in places}
    assert len(spots) == 40


def test_lines_of_a_broken_column_cross_no_box() -> None:
    boxes = stages(1, num_columns=2, num_rows=30)
    page = lay_out(boxes, {box.fold: 0 for box in boxes}, top=0.0)
    pairs = [(i, i + 1) for i in range(59)] + [(0, 5), (2, 14), (3, 29), (10, 40), (30, 57)]
    ties = [Tie(src=src, dst=dst, kind="data", num_edges=1, num_bytes=4) for src, dst in pairs]
    for route in find_routes(ties, boxes, page):
        for box in boxes:
            if box.fold in (route.tie.src, route.tie.dst):
                continue
            place = page.boxes[box.fold]
            for a, b in itertools.pairwise(route.points):
                is_beside = max(a[0], b[0]) <= place.left or min(a[0], b[0]) >= place.right
                is_above = max(a[1], b[1]) <= place.top or min(a[1], b[1]) >= place.bottom
                assert is_beside or is_above, (route.tie, box.fold)


def test_bands_are_read_in_the_order_of_the_pipeline() -> None:
    boxes = stages(6, num_columns=4, num_rows=4)
    page = lay_out(boxes, {box.fold: 0 for box in boxes}, top=0.0)
    read = sorted(page.stages, key=lambda stage: (round(page.stages[stage].top), page.stages[stage].left))
    assert read == list(range(6))
    assert all(place.width > 0 and place.bottom <= page.height for place in page.stages.values())
