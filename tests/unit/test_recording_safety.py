"""A recording must not change, stop or crash the program, whatever its threads and children do."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from truedag.tracer import annotate
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace


def operators(path: Path) -> list[str]:
    return build_rank_graph(read_trace(path)).nodes.op


def run_script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_starting_and_stopping_while_other_threads_run_operators(tmp_path: Path) -> None:
    text = """
import threading, time, torch
from pathlib import Path
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace
running = True
def work():
    tensors = [torch.ones(4) for _ in range(30)]
    while running:
        torch._foreach_add(tensors, 1.0)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for i in range(60):
    with record(Path(f"{i}.trace"), synchronize=False):
        time.sleep(0.005)
running = False
for thread in threads: thread.join()
print(sum(len(thread.events) for i in range(60) for thread in read_trace(Path(f"{i}.trace")).threads))
"""
    ended = run_script(text, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 100


def test_a_forked_child_leaves_the_recording_alone_and_can_make_its_own(tmp_path: Path) -> None:
    text = """
import os, sys, torch
from pathlib import Path
from truedag.tracer import annotate
from truedag.tracer.record.recording import record
with record(Path("parent.trace"), synchronize=False):
    torch.ones(2)
    child = os.fork()
    if child == 0:
        with annotate.scope(step=7):
            torch.zeros(3).add(1)
        sys.exit(0)
    for _ in range(30_000):
        torch.ones(2)
    assert os.waitpid(child, 0)[1] == 0
child = os.fork()
if child == 0:
    with record(Path("child.trace"), synchronize=False):
        torch.zeros(3)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    ended = run_script(text, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert operators(tmp_path / "parent.trace") == ["aten::ones"] * 30_001
    assert operators(tmp_path / "child.trace") == ["aten::zeros"]


def test_the_process_group_may_come_and_go_inside_the_block(tmp_path: Path) -> None:
    from torch import distributed

    path = tmp_path / "rank.trace"
    with record(path):
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        distributed.all_reduce(torch.ones(2))
        distributed.destroy_process_group()
    assert operators(path) == ["aten::ones", "c10d::allreduce_"]


def test_an_exception_in_the_block_reaches_the_program_and_ends_the_recording(tmp_path: Path) -> None:
    def fail() -> None:
        with record(tmp_path / "a.trace", synchronize=False):
            torch.ones(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with record(tmp_path / "b.trace", synchronize=False):
        torch.zeros(1)
    assert operators(tmp_path / "a.trace") == ["aten::ones"]
    assert operators(tmp_path / "b.trace") == ["aten::zeros"]
    assert annotate.REGISTRY.listener is None


def test_what_was_said_to_one_recording_is_not_believed_by_the_next(tmp_path: Path) -> None:
    go, done = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def work() -> None:
        with annotate.scope(microbatch=1):
            for begin, end in zip(go, done, strict=True):
                begin.wait(20)
                torch.full((1,), 1.0)
                end.set()

    thread = threading.Thread(target=work)
    for i in range(2):
        with record(tmp_path / f"{i}.trace", synchronize=False), annotate.scope(microbatch=77):
            if i == 0:
                thread.start()
            go[i].set()
            assert done[i].wait(20)
    thread.join()
    for i in range(2):
        nodes = build_rank_graph(read_trace(tmp_path / f"{i}.trace")).nodes
        assert {nodes.labels[k].microbatch for k, op in enumerate(nodes.op) if op == "aten::full"} <= {1, None}


class _Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor, depth: int) -> torch.Tensor:
        return _Deep.apply(x, depth - 1) if depth else x.add(1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def test_a_deep_stack_of_functions_does_not_silence_the_thread(tmp_path: Path) -> None:
    path = tmp_path / "deep.trace"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        with record(path, synchronize=False):
            _Deep.apply(torch.ones(1, requires_grad=True), 1_100)
            torch.zeros(1)
    finally:
        sys.setrecursionlimit(limit)
    assert operators(path)[-1] == "aten::zeros"


def test_operators_of_a_library_that_is_made_anew_keep_their_names(tmp_path: Path) -> None:
    path = tmp_path / "library.trace"
    with record(path, synchronize=False):
        for name in ("first", "other", "third"):
            with torch.library._scoped_library("truedag_test", "FRAGMENT") as library:
                library.define(f"{name}(Tensor x) -> Tensor")
                library.impl(name, lambda x: x.clone(), "CPU")
                getattr(torch.ops.truedag_test, name)(torch.ones(2))
    assert [op for op in operators(path) if op.startswith("truedag_test")] == [
        "truedag_test::first",
        "truedag_test::other",
        "truedag_test::third",
    ]


def test_functorch_transforms_are_seen_through(tmp_path: Path) -> None:
    path = tmp_path / "vmap.trace"
    weight, data = torch.ones(3, 2), torch.ones(4, 2)
    with record(path, synchronize=False):
        torch.vmap(lambda row: (weight @ row).sin())(data).sum()
    graph = build_rank_graph(read_trace(path))
    assert graph.nodes.op == ["aten::mm", "aten::sin", "aten::sum"]
    assert {(0, 1), (1, 2)} <= set(zip(graph.flow.src.tolist(), graph.flow.dst.tolist(), strict=True))


def test_recomputation_belongs_to_the_module_and_microbatch_that_it_recomputes(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    path = tmp_path / "checkpoint.trace"
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    with record(path, watch=[("model", model)], synchronize=False):
        with annotate.scope(microbatch=4, phase="forward"):
            out = checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=True)
        out.sum().backward()
    nodes = build_rank_graph(read_trace(path)).nodes
    gradients = [i for i, op in enumerate(nodes.op) if op in ("aten::tanh_backward", "aten::mm")]
    assert len(gradients) >= 3
    assert {nodes.labels[i].microbatch for i in gradients} == {4}
    assert {nodes.labels[i].module for i in gradients} == {"model.0", "model.1"}


def test_memory_of_foreign_tensors_is_not_mistaken_for_what_lay_there_before(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = tmp_path / "numpy.trace"
    with record(path, synchronize=False):
        for i in range(4):
            batch = torch.from_numpy(np.full(3, float(i)))
            batch.mul_(2)
            del batch
    graph = build_rank_graph(read_trace(path))
    assert graph.nodes.op == ["aten::mul_"] * 4
    assert (graph.flow.src < 0).all()
    assert len(set(graph.flow.src.tolist())) == 4


def test_a_child_that_outlives_its_parents_recording_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "outlive.trace"
    with record(path, synchronize=False):
        child = os.fork()
        if child == 0:
            time.sleep(0.3)
            torch.ones(2)
            os._exit(0)
        torch.ones(1)
    assert os.waitpid(child, 0)[1] == 0
    assert operators(path) == ["aten::ones"]
