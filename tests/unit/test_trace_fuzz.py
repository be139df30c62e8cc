"""Any bytes are read or refused: nothing but TraceError comes out, and memory stays in bounds."""

import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from trace_mutations import mutate

from truedag.tracer import annotate
from truedag.tracer.errors import EmptyTraceError, TraceError
from truedag.tracer.record.columns import TableName, table
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

# What reading may allocate: so much for any file, and so many times its length.
ROOM, RATIO = 4 << 20, 12


def record_something(path: Path, recorder: RecorderName) -> bytes:
    """A little of everything: modules, contexts, a backward pass, communications, memory without a name, a failure."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with record(path, recorder=recorder, watch=[("model", model)]):
            with annotate.scope(step=1, phase="forward"):
                loss = model(torch.ones(2, 4)).sum()
            loss.backward()
            annotate.tensor(loss, "loss", role="output")
            dist.all_reduce(loss.detach())
            dist.broadcast(torch.ones(3), 0)
            torch._foreach_add([torch.ones(2), torch.ones(3)], 1.0)
            torch.eye(3).to_sparse()
            with pytest.raises(RuntimeError):
                torch.mm(torch.ones(2, 3), torch.ones(2, 3))
    finally:
        dist.destroy_process_group()
    return path.read_bytes()


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("whole")
    recorders: list[RecorderName] = ["native", "python"]
    return [record_something(folder / recorder, recorder) for recorder in recorders]


def read_or_refuse(path: Path, *, with_tables: bool) -> str:
    """Read a file and say what became of it."""
    try:
        trace = read_trace(path)
    except EmptyTraceError:
        return "empty"
    except TraceError:
        return "refused"
    if with_tables:
        for name in get_args(TableName):
            table(trace, name)
    return "truncated" if trace.truncated else "read"


def fuzz(traces: list[bytes], path: Path, *, seed: int, count: int) -> Counter[str]:
    """Read so many mutated files; hold every fourth to its memory, and make the tables of every eighth."""
    chance = random.Random(seed)
    became: Counter[str] = Counter()
    for number in range(count):
        content = mutate(chance, traces)
        path.write_bytes(content)
        is_measured = number % 4 == 1 and content[:2] != b"\x1f\x8b"
        if is_measured:
            tracemalloc.start()
        try:
            became[read_or_refuse(path, with_tables=number % 8 == 0)] += 1
            if is_measured:
                _, peak = tracemalloc.get_traced_memory()
                assert peak < ROOM + RATIO * len(content)
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {number} of {len(content)} bytes") from error
        finally:
            tracemalloc.stop()
    return became


def test_mutated_traces_are_read_or_refused(traces: list[bytes], tmp_path: Path) -> None:
    became = fuzz(traces, tmp_path / "rank.trace", seed=4, count=1_200)
    assert min(became["read"], became["truncated"], became["refused"]) > 100


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(1, 5))
def test_very_many_mutated_traces_are_read_or_refused(traces: list[bytes], tmp_path: Path, seed: int) -> None:
    became = fuzz(traces, tmp_path / "rank.trace", seed=1000 + seed, count=30_000)
    print(dict(became))
    assert min(became["read"], became["truncated"], became["refused"]) > 1_000
