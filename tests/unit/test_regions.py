"""Byte runs of strided tensors against the addresses that PyTorch computes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.merge import regions
from truedag.tracer.merge.regions import extent, num_bytes, runs
from truedag.tracer.record.trace import Layout


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    ndim = draw(st.integers(0, 4))
    sizes = tuple(draw(st.lists(st.integers(0, 4), min_size=ndim, max_size=ndim)))
    strides = tuple(draw(st.lists(st.integers(0, 9), min_size=ndim, max_size=ndim)))
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    offset = draw(st.integers(0, 5)) * itemsize
    return Layout(dtype="x", device="cpu", itemsize=itemsize, sizes=sizes, strides=strides), offset


@given(layouts())
def test_runs_hold_exactly_the_bytes_of_the_elements(case: tuple[Layout, int]) -> None:
    layout, offset = case
    touched = set()
    indices = torch.cartesian_prod(*[torch.arange(size) for size in layout.sizes]) if layout.sizes else None
    if indices is None:
        elements = [0]
    else:
        stride = torch.tensor(layout.strides)
        elements = (indices.reshape(-1, len(layout.sizes)) * stride).sum(1).tolist()
    for element in elements:
        begin = offset + element * layout.itemsize
        touched |= set(range(begin, begin + layout.itemsize))
    region = runs(layout, offset).tolist()
    assert {byte for begin, end in region for byte in range(begin, end)} == touched
    assert num_bytes(runs(layout, offset)) == len(touched)
    assert region == sorted(region)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(region))
    where = extent(layout)
    assert where.num_bytes == len(touched)
    assert where.is_dense == (len(region) == 1)
    assert not touched or (offset + where.low, offset + where.high) == (min(touched), max(touched) + 1)


def test_a_large_strided_tensor_is_measured_without_listing_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "runs", None)
    layout = Layout(dtype="x", device="cpu", itemsize=4, sizes=(1 << 20, 1 << 20), strides=(1 << 21, 2))
    where = extent(layout)
    assert (where.low, where.num_bytes, where.is_dense) == (0, 4 << 40, False)
    assert where.high == 4 * (((1 << 20) - 1) * ((1 << 21) + 2) + 1)
