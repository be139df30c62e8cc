"""Module scopes: watched modules are what they were to everybody who looks at them, and are left as they were."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import weakref
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from truedag.tracer import trace
from truedag.tracer.merge.nodes import extract_nodes
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace


class Doubled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, *, times: float = 2.0) -> torch.Tensor:
        """Scale."""
        if times < 0:
            raise ValueError("negative")
        return self.inner(x).mul(times)


def labels(path: Path) -> list[tuple[str, str | None]]:
    nodes = extract_nodes(read_trace(path))
    return [(op, label.module) for op, label in zip(nodes.op, nodes.labels, strict=True)]


@pytest.mark.parametrize("recorder", ["native", "python"])
def test_a_module_is_left_as_it_was(recorder: RecorderName, tmp_path: Path) -> None:
    model = Doubled()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with record(tmp_path / "a.trace", recorder=recorder, watch=[("model", model)], synchronize=False):
        model(torch.ones(1, 2))
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert ("aten::addmm", "model.inner") in labels(tmp_path / "a.trace")
    assert ("aten::mul", "model") in labels(tmp_path / "a.trace")


def test_a_forward_of_the_modules_own_is_called_and_put_back(tmp_path: Path) -> None:
    model = Doubled()

    def other(x: torch.Tensor) -> torch.Tensor:
        return x.add(1)

    model.forward = other  # type: ignore[method-assign, assignment]
    with record(tmp_path / "a.trace", watch=[("model", model)], synchronize=False):
        model(torch.ones(1, 2))
        assert torch.equal(copy.deepcopy(model)(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    assert model.__dict__["forward"] is other
    assert ("aten::add", "model") in labels(tmp_path / "a.trace")


def test_a_forward_set_meanwhile_stays(tmp_path: Path) -> None:
    model = Doubled()

    def other(x: torch.Tensor) -> torch.Tensor:
        return x

    with record(tmp_path / "a.trace", watch=[("model", model)], synchronize=False):
        model.forward = other  # type: ignore[method-assign, assignment]
    assert model.__dict__["forward"] is other
    assert "forward" not in model.inner.__dict__


def test_a_watched_module_looks_like_itself(tmp_path: Path) -> None:
    model = Doubled()
    signature, state = inspect.signature(model.forward), list(model.state_dict())
    with record(tmp_path / "a.trace", watch=[("model", model)], synchronize=False):
        assert inspect.signature(model.forward) == signature
        assert model.forward.__doc__ == "Scale."
        assert model.forward.__self__ is model  # type: ignore[attr-defined]
        assert list(model.state_dict()) == state
        with pytest.raises(AttributeError, match="nothing"):
            model.forward.nothing  # type: ignore[attr-defined] # noqa: B018
        assert torch.equal(model(torch.ones(1, 2), times=3.0), model.inner(torch.ones(1, 2)) * 3)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        copies = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    for twin in copies:
        assert twin.forward.__self__ is twin
        assert torch.equal(twin(torch.ones(1, 2)), model(torch.ones(1, 2)))
        twin.inner.bias.data.add_(1)
        assert not torch.equal(twin(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_a_label_ends_with_an_exception(tmp_path: Path) -> None:
    model = Doubled()
    with record(tmp_path / "a.trace", watch=[("model", model)], synchronize=False):
        with pytest.raises(ValueError, match="negative"):
            model(torch.ones(1, 2), times=-1.0)
        torch.ones(3).neg()
    assert ("aten::neg", None) in labels(tmp_path / "a.trace")


def test_a_watched_module_can_go(tmp_path: Path) -> None:
    model = Doubled()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        with trace(tmp_path):  # watches what it finds
            model(torch.ones(1, 2))
            assert "forward" in model.inner.__dict__
            del model
            assert gone() is None
    finally:
        gc.enable()


def test_modules_that_were_found_are_labelled_and_left_as_they_were(tmp_path: Path) -> None:
    model, other = Doubled(), Doubled()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with trace(tmp_path):
        for _ in range(200):
            model(torch.ones(1, 2))
        assert not torch.nn.modules.module._global_forward_pre_hooks
        other(torch.ones(1, 2))
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    found = [module for op, module in labels(tmp_path / "traces" / "rank-00000.trace") if op == "aten::addmm"]
    assert found == ["Doubled.inner"] * 200 + [None]


class Unhashable(torch.nn.Module):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Equal(Unhashable):
    def __hash__(self) -> int:
        return 1


class Nameless(torch.nn.Module):
    def named_modules(self, *_: object, **__: object) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no names here")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_what_a_module_makes_of_itself_is_left_to_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with trace(tmp_path):
        for model in (Equal(), Equal(), Unhashable(), Nameless()):
            model(torch.ones(2))
    assert "Nameless have no names in the graph: RuntimeError: no names here" in capfd.readouterr().err
    found = [module for op, module in labels(tmp_path / "traces" / "rank-00000.trace") if op != "aten::ones"]
    assert found == ["Equal", "Equal-2", None, None]


def test_a_path_may_be_text(tmp_path: Path) -> None:
    with record(str(tmp_path / "a.trace"), synchronize=False):  # type: ignore[arg-type]
        torch.ones(1)
    assert read_trace(tmp_path / "a.trace").closed
