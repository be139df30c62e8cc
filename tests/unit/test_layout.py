"""Where stages stand on a page by layers: in as many bands as make it about as wide as high."""

from __future__ import annotations

import pytest

from truedag.tracer.views.boxes import Box
from truedag.tracer.views.layout import lay_out


def stages(num_stages: int, *, num_columns: int, num_rows: int) -> list[Box]:
    return [
        Box(
            fold=(stage * num_columns + column) * num_rows + row, shape="box", role="computation", stage=stage,
            panel="forward", column=(1, column), text=("linear", "float32[2,4]"), ranks=(stage,), experts="", level=row,
            time_ns=None, num_nodes=1,
        )
        for stage in range(num_stages)
        for column in range(num_columns)
        for row in range(num_rows)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_columns", "num_rows", "num_bands"),
    [pytest.param(3, 90, 1, id="tall stages"), pytest.param(20, 3, 8, id="wide stages")],
)
def test_stages_are_broken_into_bands_as_the_page_needs(num_columns: int, num_rows: int, num_bands: int) -> None:
    boxes = stages(8, num_columns=num_columns, num_rows=num_rows)
    page = lay_out(boxes, {box.fold: 0 for box in boxes}, top=100.0)
    tops = {round(place.top) for place in page.stages.values()}
    assert len(tops) == num_bands
    assert min(tops) == 100
    assert max(page.width, page.height) < 1.6 * min(page.width, page.height)


def test_bands_are_read_in_the_order_of_the_pipeline() -> None:
    boxes = stages(6, num_columns=4, num_rows=4)
    page = lay_out(boxes, {box.fold: 0 for box in boxes}, top=0.0)
    read = sorted(page.stages, key=lambda stage: (round(page.stages[stage].top), page.stages[stage].left))
    assert read == list(range(6))
    assert all(place.width > 0 and place.bottom <= page.height for place in page.stages.values())
