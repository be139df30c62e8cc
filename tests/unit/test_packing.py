"""Panels on a sheet: nothing overlaps, their order is kept, and the sheet is about one of paper."""

from __future__ import annotations

import itertools

import pytest

from truedag.tracer.views.packing import Packing, pack


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(
            [(1430.0, 1610.0), (900.0, 1560.0), (930.0, 1560.0), (1200.0, 770.0), (3380.0, 1690.0)], id="a layer"
        ),
        pytest.param([(100.0, 100.0)] * 24, id="alike"),
        pytest.param([(3000.0, 50.0)] * 9, id="flat"),
        pytest.param([(50.0, 3000.0)] * 9, id="tall"),
        pytest.param([(10.0, 20.0)], id="one"),
    ],
)
def test_panels_fill_a_sheet(sizes: list[tuple[float, float]]) -> None:
    packing = pack(sizes, (8.0, 6.0))
    spans = [(x, y, x + wide, y + high) for (x, y), (wide, high) in zip(packing.corners, sizes, strict=True)]
    for a, b in itertools.combinations(spans, 2):
        assert a[2] + 8 <= b[0] + 1e-6 or b[2] + 8 <= a[0] + 1e-6 or a[3] + 6 <= b[1] + 1e-6 or b[3] + 6 <= a[1] + 1e-6
    assert max(span[2] for span in spans) == pytest.approx(packing.width)
    assert max(span[3] for span in spans) == pytest.approx(packing.height)
    assert sorted(spans, key=lambda one: (one[1], one[0])) == spans or sorted(spans) == spans, "read in their order"
    row = sum(wide + 8 for wide, _ in sizes) - 8, max(high for _, high in sizes)
    column = max(wide for wide, _ in sizes), sum(high + 6 for _, high in sizes) - 6
    assert packing.side <= min(Packing(corners=(), width=wide, height=high).side for wide, high in (row, column))


def test_many_alike_make_a_sheet_of_papers_shape() -> None:
    packing = pack([(100.0, 100.0)] * 24, (8.0, 6.0))
    assert max(packing.width, packing.height) < 1.6 * min(packing.width, packing.height)
