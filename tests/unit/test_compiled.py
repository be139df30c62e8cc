"""What torch.compile has compiled is one opaque node a call, whatever runs outside of the dispatcher inside it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.rank_graph import RankGraph, build_rank_graph
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

COMPILED = "inductor::compiled_graph"
Step = Callable[[], torch.Tensor]

# PyTorch's own, of importing Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):  # other tests of this process switch the compiler off
        yield
    torch._dynamo.reset()


def training() -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.BatchNorm1d(32), nn.Linear(32, 4))
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(8, 16)

    def step() -> torch.Tensor:
        loss = compiled(data).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, step


def recorded(path: Path, step: Step, watch: nn.Module | None = None) -> RankGraph:
    with record(path, synchronize=False, watch=[] if watch is None else [("model", watch)]) as recording:
        step()
        step()
    assert not recording.switched_off
    return build_rank_graph(read_trace(path))


def producers(graph: RankGraph, node: int) -> list[str]:
    """What made each of the things that a node reads, 'outside' for what was there before."""
    into = graph.flow.src[(graph.flow.dst == node) & (graph.flow.num_bytes > 0)].tolist()
    return sorted(graph.nodes.op[src] if src >= 0 else "outside" for src in into)


def test_a_compiled_model_is_two_nodes_a_step_with_all_its_data_edges(tmp_path: Path) -> None:
    _, step = training()
    step()  # compiled before
    graph = recorded(tmp_path / "trace", step)
    nodes = graph.nodes
    forward, backward, forward_2, _ = (i for i, op in enumerate(nodes.op) if op == COMPILED)
    assert [bool(nodes.in_backward[i]) for i in (forward, backward, forward_2)] == [False, True, False]
    assert not {"aten::addmm", "aten::mm", "aten::empty_strided"} & set(nodes.op)
    assert producers(graph, nodes.op.index("aten::pow")) == [COMPILED]
    assert COMPILED in producers(graph, backward)  # what the forward pass saved
    assert "aten::mul" in producers(graph, backward)  # the gradient of its result
    additions = [i for i, op in enumerate(nodes.op) if op == "aten::add_" and i < forward_2]
    gradients, updates = additions[:6], additions[6:]  # of 6 parameters
    assert all(producers(graph, i) == [COMPILED, "outside"] for i in gradients)
    assert [producers(graph, i) for i in updates] == [["aten::add_", "outside"]] * 6
    # Running statistics are written by the first step and read by the second; parameters are not written by a graph.
    assert producers(graph, forward_2).count(COMPILED) == 3
    assert producers(graph, forward_2).count("aten::add_") == 6


def test_recording_changes_no_result_and_takes_itself_away(tmp_path: Path) -> None:
    import torch._inductor.output_code as inductor

    original = inductor.CompiledFxGraph.__call__
    _, step = training()
    losses = [step() for _ in range(3)]
    torch._dynamo.reset()
    _, step = training()
    losses_2 = [step()]
    before = list(sys.meta_path)
    with record(tmp_path / "trace", synchronize=False):
        losses_2 += [step(), step()]
    assert inductor.CompiledFxGraph.__call__ is original
    assert sys.meta_path == before
    assert torch.equal(torch.stack(losses), torch.stack(losses_2))


def test_watching_modules_does_not_break_a_graph_in_two(tmp_path: Path) -> None:
    model, step = training()
    graph = recorded(tmp_path / "trace", step, watch=model)  # compiled while it is watched
    assert graph.nodes.op.count(COMPILED) == 4


def test_inductor_may_be_imported_during_the_recording(tmp_path: Path) -> None:
    text = """
import sys, torch
from pathlib import Path
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace
from truedag.tracer.merge.rank_graph import build_rank_graph
assert "torch._inductor.output_code" not in sys.modules
with record(Path("trace"), synchronize=False):
    compiled = torch.compile(lambda x: (x.sin() + 1).relu())
    for _ in range(2): compiled(torch.ones(5))
print(build_rank_graph(read_trace(Path("trace"))).nodes.op.count("inductor::compiled_graph"))
"""
    command = [sys.executable, "-c", text]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "2\n"


def test_a_graph_that_fails_has_written_nothing_and_the_recording_goes_on(tmp_path: Path) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    library = torch.library.Library("truedag_test", "DEF")
    library.define("fail(Tensor x) -> Tensor")
    library.impl("fail", fail, "CPU")
    library.impl("fail", torch.empty_like, "Meta")

    def program(x: torch.Tensor) -> torch.Tensor:
        failed: torch.Tensor = torch.ops.truedag_test.fail(x.sin())
        return failed + 1

    compiled = torch.compile(program)
    x = torch.ones(5)

    def step() -> torch.Tensor:
        with pytest.raises(ValueError, match="no"):
            compiled(x)
        return x.cos()

    graph = recorded(tmp_path / "trace", step)
    assert graph.nodes.op.count(COMPILED) == 2
    assert [graph.nodes.outputs[i] for i, op in enumerate(graph.nodes.op) if op == COMPILED] == [(), ()]
    assert producers(graph, len(graph.nodes.op) - 1) == ["outside"]


def test_the_graph_says_what_is_opaque(tmp_path: Path) -> None:
    _, step = training()
    step()
    recorded(tmp_path / "rank-00000.trace", step)
    merge_traces(tmp_path, tmp_path / "dag")
    (forward,) = Graph.open(tmp_path / "dag").meta["opaque"]
    assert forward == {
        "rank": 0,
        "what": "compiled graph",
        "label": "compiled_graph",
        "nodes": 4,
        "tensors_known": True,
    }


def test_recording_makes_nothing_compile_anew(tmp_path: Path) -> None:
    def fresh() -> Callable[[], torch.Tensor]:
        compiled = torch.compile(nn.Linear(3, 3), backend="eager")
        return lambda: compiled(torch.ones(2, 3)).sum()

    compiled_before, compiled_within = fresh(), fresh()
    compiled_before()

    def num_compiled() -> int:
        return int(torch._dynamo.utils.counters["frames"]["ok"])

    assert num_compiled() > 0
    for name, run in (("before", compiled_before), ("within", compiled_within)):
        if name == "within":
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
        with record(tmp_path / name, synchronize=False):
            torch.ones(1)
            run()
            begun = num_compiled()
            assert begun > 0
            run()
        run()
        assert num_compiled() == begun
