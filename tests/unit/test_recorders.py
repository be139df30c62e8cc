"""The native recorder and its oracle find the same operators and the same data edges in one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recorder_comparison import assert_same_graph
from torch import nn

from truedag.tracer import annotate
from truedag.tracer.dry.recording import record_dry
from truedag.tracer.merge.rank_graph import RankGraph, build_rank_graph
from truedag.tracer.record import recording as recording_module
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

Program = Callable[[], None]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something was compiled the recorder observes, and sees what `torch.tensor` allocates within."""
    monkeypatch.setattr(recording_module, "has_compiled", lambda: False)


def trace_of(path: Path, program: Program, recorder: RecorderName, watch: nn.Module | None = None) -> RankGraph:
    torch.manual_seed(0)
    with record(path, recorder=recorder, watch=[("model", watch)] if watch is not None else [], synchronize=False):
        program()
    return build_rank_graph(read_trace(path))


def in_place() -> None:
    buffer = torch.zeros(6, 4)
    buffer[:3].copy_(torch.ones(3, 4))
    buffer[3:].add_(2)
    left, right = buffer.split(2, dim=1)
    left.mul_(right)
    torch.cat([left, right], out=torch.empty(12, 2))
    torch.stack([buffer.t(), buffer.t()]).sum()


def foreach() -> None:
    tensors = [torch.ones(3), torch.ones(2, 2)]
    torch._foreach_add_(tensors, 1.0)
    torch._foreach_mul(tensors, 2.0)
    torch._foreach_copy_(tensors, [torch.zeros(3), torch.zeros(2, 2)])


def optional_and_lists() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    values.index_put_((torch.tensor([0, 2]), torch.tensor([1, 1])), torch.tensor([5.0, 6.0]))
    torch.nn.functional.layer_norm(values, (4,), None, None)
    torch.meshgrid(values[0], values[1], indexing="ij")


def composite_elsewhere() -> None:
    """Operators with a kernel of their own on the CPU, which are composite on other devices."""
    x = torch.ones(2, 4, 3, requires_grad=True)
    loss = torch.nn.functional.silu(x).sum() + torch.nn.functional.mish(x).sum()
    loss.backward()
    torch.native_channel_shuffle(x.detach()[None].permute(0, 2, 1, 3).contiguous(), 2)


_SCRIPTED = torch.jit.CompilationUnit("""
def run(a, b):
    return torch.add(torch.sin(a), torch.cos(b)).mul_(torch.exp(a))
""")


def boxed() -> None:
    """Calls out of an interpreter's stack, on which more lies than their own arguments."""
    _SCRIPTED.run(torch.ones(3), torch.zeros(3))
    torch.func.grad(lambda x: x.sin().sum())(torch.ones(2))
    torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))


def train_block() -> tuple[nn.Module, Program]:
    torch.manual_seed(1)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    optimizer = torch.optim.AdamW(block.parameters(), foreach=True)
    for parameter_name, parameter in block.named_parameters():
        annotate.tensor(parameter, parameter_name, role="parameter")
    data = torch.randn(2, 5, 16)

    def program() -> None:
        with annotate.scope(step=0, microbatch=3, phase="forward"):
            loss = block(data).square().mean()
        loss.backward()
        with annotate.scope(step=0, phase="optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return block, program


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("program", [in_place, foreach, optional_and_lists, composite_elsewhere, boxed])
def test_both_recorders_see_the_same(program: Program, tmp_path: Path) -> None:
    native = trace_of(tmp_path / "native", program, "native")
    python = trace_of(tmp_path / "python", program, "python")
    assert_same_graph(native, python)
    assert len(native.flow.src) >= 5


def test_a_kernel_of_its_own_makes_an_operator(tmp_path: Path) -> None:
    ops = trace_of(tmp_path / "native", composite_elsewhere, "native").nodes.op
    assert {"aten::silu_backward", "aten::mish_backward", "aten::native_channel_shuffle"} <= set(ops)


def test_without_memory_it_is_an_operator_as_well(tmp_path: Path) -> None:
    with torch.device("meta"), record_dry(tmp_path / "dry"):
        torch.nn.functional.silu(torch.ones(2, 3, requires_grad=True)).sum().backward()
    trace = read_trace(tmp_path / "dry")
    assert "aten::silu_backward" in {trace.ops[int(event["op"])]["name"] for event in trace.threads[0].events}


def test_a_training_step_has_the_same_operators_edges_and_labels(tmp_path: Path) -> None:
    block, program = train_block()
    native = trace_of(tmp_path / "native", program, "native", block)
    block, program = train_block()
    python = trace_of(tmp_path / "python", program, "python", block)
    assert_same_graph(native, python)
    backward = [label for label in native.nodes.labels if label.phase == "backward"]
    assert len(backward) > 20
    assert {label.module for label in backward} >= {"model.linear1", "model.self_attn", "model.norm2"}
    assert {label.microbatch for label in backward if label.module} == {3}


def test_the_results_are_bitwise_the_same_with_and_without_recording(tmp_path: Path) -> None:
    states = []
    for recorder in (None, "native"):
        block, program = train_block()
        if recorder is None:
            program()
        else:
            trace_of(tmp_path / "trace", program, "native", block)
        states.append(block.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_failing_operator_leaves_the_recording_whole(tmp_path: Path) -> None:
    def program() -> None:
        with pytest.raises(RuntimeError):
            torch.mm(torch.ones(2, 3), torch.ones(2, 3))
        torch.ones(2).add(1)

    graph = trace_of(tmp_path / "trace", program, "native")
    assert graph.nodes.op == ["aten::ones", "aten::ones", "aten::mm", "aten::ones", "aten::add"]


def test_what_the_engine_calls_at_its_end_is_of_the_backward_pass(tmp_path: Path) -> None:
    def program() -> None:
        engine = torch.autograd.Variable._execution_engine
        doubled = torch.ones(2, requires_grad=True) * 2
        doubled.register_hook(lambda _: engine.queue_callback(lambda: torch.full((7,), 1.0)))
        doubled.sum().backward()

    python = trace_of(tmp_path / "python", program, "python")
    assert [label.phase for label in python.nodes.labels][-1] == "backward"
    assert_same_graph(trace_of(tmp_path / "native", program, "native"), python)
