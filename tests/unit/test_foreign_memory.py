"""Memory that no operator allocated holds what came from outside, whatever lay there or in its place before."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace


@pytest.mark.parametrize("make", [torch.ones, torch.empty], ids=["filled", "empty"])
@pytest.mark.parametrize("recorder", ["native", "python"])
def test_a_buffer_of_pythons_is_no_result_of_an_operator(
    recorder: RecorderName, make: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "rank.trace"
    with record(path, recorder=recorder, synchronize=False):
        for size in range(40, 80):  # a StorageImpl is freed, and its address given to the buffer's
            result = make(size, dtype=torch.uint8)
            del result
            buffer = torch.ByteStorage._from_buffer(b"x" * (size + 1))
            torch.ByteTensor(buffer).clone()
            del buffer
    graph = build_rank_graph(read_trace(path))
    op = graph.nodes.op
    into_clones = [
        (src, size)
        for src, dst, size in zip(graph.flow.src, graph.flow.dst, graph.flow.num_bytes, strict=True)
        if op[dst] == "aten::clone"
    ]
    assert len(into_clones) == 40
    assert all(src < 0 and size > 40 for src, size in into_clones)


@pytest.mark.parametrize("recorder", ["native", "python"])
def test_a_storage_that_an_operator_filled_keeps_its_writer(recorder: RecorderName, tmp_path: Path) -> None:
    path = tmp_path / "rank.trace"
    with record(path, recorder=recorder, synchronize=False):
        filled = torch.full((4,), 2.0)
        other = torch.empty(0).set_(filled.untyped_storage(), 0, (4,), (1,))
        other.add(1)
    graph = build_rank_graph(read_trace(path))
    full, add = graph.nodes.op.index("aten::full"), graph.nodes.op.index("aten::add")
    assert (full, add, 16) in set(
        zip(graph.flow.src.tolist(), graph.flow.dst.tolist(), graph.flow.num_bytes.tolist(), strict=True)
    )
