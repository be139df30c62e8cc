"""Tracing on ranks that record when they like, and traces that are brought together over the process group."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import pytest
import torch
from megatron_ranks import run_ranks

from truedag.tracer import trace
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.collection import collect_traces
from truedag.tracer.record.trace_folder import find_trace_folders


def reduce_for(out: Path, num_steps: int, **options: object) -> None:
    from torch import distributed

    with trace(out, **options) as tracer:  # type: ignore[arg-type]
        for number in range(num_steps):
            distributed.all_reduce(torch.full((2,), float(number)))
            tracer.step()


def record_some_ranks(out: Path) -> None:
    reduce_for(out, 6, schedule="1-2,4", ranks=[1])


def test_nobody_waits_for_a_rank_that_does_not_record(tmp_path: Path) -> None:
    run_ranks(2, record_some_ranks, tmp_path, timeout_s=60)
    for folder, count in zip(find_trace_folders(tmp_path), (2, 1), strict=True):
        summary = merge_traces(folder, folder.parent / "dag")
        assert summary.missing_ranks == (0,)
        assert (summary.num_collectives, summary.num_unmatched) == (0, count)


def record_at_different_steps(out: Path) -> None:
    from torch import distributed

    rank = distributed.get_rank()
    distributed.all_reduce(torch.ones(1))
    reduce_for(out, 6, schedule="0-3" if rank == 0 else "2-4")


def test_ranks_that_begin_at_different_steps_are_joined_where_both_recorded(tmp_path: Path) -> None:
    run_ranks(2, record_at_different_steps, tmp_path, timeout_s=60)
    summary = merge_traces(tmp_path / "traces", tmp_path / "dag")
    assert summary.missing_ranks == ()
    assert (summary.num_collectives, summary.num_unmatched) == (2, 3)


def reduce_in_a_mesh(out: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    with trace(out) as tracer:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("rows", "tp"))
        other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("columns", "pp"))
        for group in (mesh.get_group("tp"), other.get_group("columns")):
            distributed.all_reduce(torch.ones(1), group=group)
        tracer.step()


def test_a_mesh_names_the_axes_of_its_groups(tmp_path: Path) -> None:
    run_ranks(2, reduce_in_a_mesh, tmp_path, timeout_s=60)
    summary = merge_traces(tmp_path / "traces", tmp_path / "dag")
    assert (summary.num_collectives, summary.num_unmatched) == (4, 0)
    groups = Graph.open(tmp_path).groups.collect()
    assert groups["axis"].drop_nulls().to_list() == ["tp", "tp"]
    assert len(groups) > 2


def record_and_collect(folder: Path, shared: bool) -> None:
    from torch import distributed

    rank = distributed.get_rank()
    reduce_for(folder if shared else folder / f"disk{rank}", 4, schedule="0,2-", collect=True)


def test_traces_are_brought_to_rank_0_compressed(tmp_path: Path) -> None:
    run_ranks(2, record_and_collect, tmp_path, False, timeout_s=60)
    for folder in find_trace_folders(tmp_path / "disk1"):
        there = tmp_path / "disk0" / folder.relative_to(tmp_path / "disk1")
        assert sorted(path.name for path in there.iterdir()) == ["rank-00000.trace", "rank-00001.trace.gz"]
        packed = there / "rank-00001.trace.gz"
        whole = (folder / "rank-00001.trace").read_bytes()
        assert gzip.decompress(packed.read_bytes()) == whole
        assert packed.stat().st_size < len(whole) / 2
    assert len(find_trace_folders(tmp_path / "disk0")) == 2
    assert [path.name for path in (tmp_path / "disk0").iterdir()] == ["windows"]


def test_ranks_that_share_a_disk_send_nothing(tmp_path: Path) -> None:
    run_ranks(2, record_and_collect, tmp_path, True, timeout_s=60)
    names = [sorted(path.name for path in folder.iterdir()) for folder in find_trace_folders(tmp_path)]
    assert names == [["rank-00000.trace", "rank-00001.trace"]] * 2


def collect_without_rank_1(out: Path) -> tuple[str, float]:
    from torch import distributed

    begin = time.monotonic()
    why = collect_traces([], out, timeout_s=2.0) if distributed.get_rank() == 0 else "did not come"
    return why, time.monotonic() - begin


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    (why, seconds), _ = run_ranks(2, collect_without_rank_1, tmp_path, timeout_s=60)
    assert why != ""
    assert seconds < 30


def test_without_a_process_group_the_traces_stay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with trace(tmp_path / "alone", collect=True):
        torch.ones(1)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with trace(tmp_path, collect=True):
        torch.ones(1)
    assert (tmp_path / "traces" / "rank-00001.trace").exists()
    (warning,) = capfd.readouterr().err.splitlines()
    assert "were not collected" in warning
    assert "no process group" in warning
