"""The native recorder intercepts operators below autograd, or observes them from outside: both see the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from recorder_comparison import assert_same_graph
from torch import nn
from torch.autograd import forward_ad

from truedag.tracer.merge.rank_graph import RankGraph, build_rank_graph
from truedag.tracer.record import recording as recording_module
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

# PyTorch's own, of importing its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Program = Callable[[], object]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ran before in this process may have compiled something; from then on the recorder only observes."""
    monkeypatch.setattr(recording_module, "has_compiled", lambda: False)


def graph_of(path: Path, program: Program, recorder: RecorderName = "native") -> RankGraph:
    torch.manual_seed(0)
    with record(path, recorder=recorder, synchronize=False) as recording:
        program()
    assert not recording.switched_off
    return build_rank_graph(read_trace(path))


def intercepted_keys() -> bool:
    return "Fake" in str(torch._C._dispatch_tls_local_include_set())


def training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    for _ in range(2):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def inference() -> None:
    with torch.inference_mode():
        nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).reshape(8).softmax(0)


def transformed() -> None:
    torch.func.vmap(torch.func.grad(lambda x: (x.sin() * x).sum()))(torch.ones(3, 2))


@pytest.mark.parametrize("program", [training, inference, transformed])
def test_what_is_intercepted_is_what_is_observed(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intercepted = graph_of(tmp_path / "intercepted", program)
    monkeypatch.setattr(recording_module, "has_compiled", lambda: True)
    observed = graph_of(tmp_path / "observed", program)
    assert len(observed.nodes.op) > 3
    assert_same_graph(intercepted, observed)
    assert intercepted.nodes.op == observed.nodes.op


def offloading() -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        x = torch.ones(4, requires_grad=True)
        (x.exp() * x).sum().backward()


def forward_mode() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.full((3,), 2.0))
        forward_ad.unpack_dual(dual.sin() * dual)


def recomputed() -> None:
    """The last operator of the recomputation ends in an exception, after it ran."""
    layer = nn.Linear(3, 3)
    torch.utils.checkpoint.checkpoint(lambda x: layer(x).tanh(), torch.ones(2, 3), use_reentrant=False).sum().backward()


@pytest.mark.parametrize(("program", "op"), [(offloading, "div"), (forward_mode, "sin"), (recomputed, "tanh")])
def test_what_autograds_own_kernels_call_is_seen(program: Program, op: str, tmp_path: Path) -> None:
    native = graph_of(tmp_path / "native", program)
    assert f"aten::{op}" in native.nodes.op
    assert_same_graph(native, graph_of(tmp_path / "python", program, "python"))


def test_threads_that_were_there_before_and_new_ones_are_recorded_from_their_first_operator_on(tmp_path: Path) -> None:
    def work(rows: int) -> None:
        for _ in range(3):
            torch.full((rows,), 1.0).add_(1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work, 2).result()
        for window in range(2):
            with record(tmp_path / f"{window}", synchronize=False):
                pool.submit(work, 3).result()
                fresh = threading.Thread(target=work, args=(4,))
                fresh.start()
                fresh.join()
                work(5)
            work(6)
            pool.submit(work, 6).result()
            trace = read_trace(tmp_path / f"{window}")
            for thread in trace.threads:
                names = [trace.ops[op]["name"] for op in thread.events["op"].tolist()]
                assert names == ["aten::full", "aten::add_"] * 3
            sizes = {trace.layouts[int(thread.refs["layout"][0])].sizes for thread in trace.threads}
            assert sizes == {(3,), (4,), (5,)}


def test_nothing_stays_behind(tmp_path: Path) -> None:
    before = str(torch._C._dispatch_tls_local_include_set())
    names = ("_run_on_profiler_start", "_run_on_profiler_stop", "_enable_profiler")
    functions = [getattr(torch.autograd.profiler, name) for name in names]
    with record(tmp_path / "a", synchronize=False):
        torch.ones(1)
        assert intercepted_keys()
    assert str(torch._C._dispatch_tls_local_include_set()) == before
    assert [getattr(torch.autograd.profiler, name) for name in names] == functions
    with torch.profiler.profile() as profiler:
        torch.ones(1)
    assert "aten::ones" in [event.name for event in profiler.events()]


def test_an_execution_trace_that_begins_meanwhile_has_every_operator(tmp_path: Path) -> None:
    def traced(path: Path) -> int:
        observer = torch.profiler.ExecutionTraceObserver()
        observer.register_callback(str(path))
        observer.start()
        nn.functional.layer_norm(torch.ones(2, 4), (4,))
        observer.stop()
        observer.unregister_callback()
        return path.read_text().count('"name": "aten::')

    alone = traced(tmp_path / "alone.json")
    with record(tmp_path / "a", synchronize=False):
        torch.ones(1)
        assert traced(tmp_path / "beside.json") == alone > 3


def test_an_operator_that_raises_leaves_its_thread_as_it_was(tmp_path: Path) -> None:
    def program() -> None:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                torch.mm(torch.ones(2, 3), torch.ones(2, 3))
        torch.ones(1)
        assert intercepted_keys()

    assert graph_of(tmp_path / "a", program).nodes.op == ["aten::ones", "aten::ones", "aten::mm"] * 3 + ["aten::ones"]


class Doubled(torch.autograd.Function):
    """A node of autograd that runs no operator in its forward pass."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class Ending(nn.Module):
    """A module whose last node of autograd is made by no operator that is recorded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(x.exp())  # type: ignore[no-any-return,no-untyped-call]


def test_a_node_of_autograd_belongs_to_the_module_that_made_it(tmp_path: Path) -> None:
    model = nn.Sequential(Ending(), nn.Tanh())
    with record(tmp_path / "a", synchronize=False, watch=[("model", model)]):
        model(torch.ones(3, requires_grad=True)).sum().backward()
    nodes = build_rank_graph(read_trace(tmp_path / "a")).nodes
    backward = [(op, label.module) for op, label in zip(nodes.op, nodes.labels, strict=True) if label.phase]
    assert backward == [("aten::tanh_backward", "model.1"), ("aten::mul", "model.0"), ("aten::mul", "model.0")]
