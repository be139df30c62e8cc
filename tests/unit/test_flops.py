"""Counted operations are those of torch's own counter, which runs the operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv_transpose2d, grouped_mm, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record


def counted(program: Callable[[], object], folder: Path) -> int:
    """Record a program, and add up what its nodes count."""
    (folder / "traces").mkdir()
    with record(folder / "traces" / "rank-00000.trace"):
        program()
    merge_traces(folder / "traces", folder / "dag")
    return int(Graph.open(folder).nodes.collect()["flops"].sum())


def products() -> Tensor:
    batch = torch.ones(3, 4, 5) @ torch.ones(3, 5, 6)
    return torch.addmm(torch.ones(6), batch[0], torch.ones(6, 6)) @ torch.ones(6)


def attention(*, is_causal: bool) -> None:
    query = torch.ones(2, 4, 8, 16, requires_grad=True)
    key, value = torch.ones(2, 4, 12, 16, requires_grad=True), torch.ones(2, 4, 12, 16, requires_grad=True)
    scaled_dot_product_attention(query, key, value, is_causal=is_causal).sum().backward()


def test_products_count_as_torch_counts_them(tmp_path: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        products()
    # Of a matrix and a vector torch's counter knows nothing: 2 x 4 x 6.
    assert counted(products, tmp_path) == counter.get_total_flops() + 2 * 4 * 6


def convolutions() -> None:
    pixels = torch.ones(2, 4, 9, 11, requires_grad=True)
    filters = torch.ones(6, 4, 3, 2, requires_grad=True)
    conv2d(pixels, filters, torch.ones(6, requires_grad=True), stride=2, padding=3).sum().backward()
    conv1d(torch.ones(3, 4, 10), torch.ones(4, 4, 3, requires_grad=True)).sum().backward()
    smaller = torch.ones(4, 8, 3, 3, requires_grad=True)
    conv_transpose2d(torch.ones(2, 4, 5, 5, requires_grad=True), smaller, stride=2).sum().backward()


def test_convolutions_count_as_torch_counts_them(tmp_path: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        convolutions()
    assert counted(convolutions, tmp_path) == counter.get_total_flops()


def test_groups_of_a_convolution_count_alone_forward_and_backward(tmp_path: Path) -> None:
    def run() -> None:
        filters = torch.ones(8, 2, 3, requires_grad=True)
        conv1d(torch.ones(2, 4, 10, requires_grad=True), filters, groups=2).sum().backward()

    assert counted(run, tmp_path) == 3 * (2 * 2 * 8 * 8 * 2 * 3)


@pytest.mark.parametrize("is_causal", [False, True])
def test_fused_attention_counts_all_pairs_of_positions_causal_or_not(is_causal: bool, tmp_path: Path) -> None:
    pairs = 2 * 2 * 4 * 8 * 12 * 16
    assert counted(lambda: attention(is_causal=is_causal), tmp_path) == (2 + 5) * pairs


def test_fused_attention_counts_as_torch_counts_unfused_attention(tmp_path: Path) -> None:
    query = torch.ones(2, 4, 8, 16)
    with FlopCounterMode(display=False) as counter:
        torch.softmax(query @ query.mT, -1) @ query
    assert counted(lambda: scaled_dot_product_attention(query, query, query), tmp_path) == counter.get_total_flops()


def test_grouped_products_count_each_groups_product(tmp_path: Path) -> None:
    rows, weights = torch.ones(10, 16), torch.ones(3, 16, 8)
    ends = torch.tensor([2, 7, 10], dtype=torch.int32)
    forward = sum(2 * count * 16 * 8 for count in (2, 5, 3))

    def run() -> None:
        left, right = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        grouped_mm(left, right, offs=ends).backward(torch.ones(10, 8))

    assert counted(run, tmp_path) == 3 * forward, "the gradients of both are as much again, each"
