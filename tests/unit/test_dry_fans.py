"""Parallel edges between two nodes are told by which of the reader's tensors they carry, whatever their order is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from truedag.tracer.dry.fans import Side, Spread, find_fans
from truedag.tracer.dry.tensor_texts import TensorText

_ITEM = 4  # bytes of a float32


def make_part(lengths: list[int], *, carries: bool = True) -> Any:
    """Vectors that flow from node 0 to node 1, in the order of their bytes; and a scalar from node 1 to node 2."""
    layouts = [[number, "float32", [length]] for number, length in enumerate(sorted(lengths), 1)]
    scalar = len(layouts) + 1
    edges = {
        "src": np.array([0] * len(lengths) + [1]),
        "dst": np.array([1] * len(lengths) + [2]),
        "kind": np.zeros(scalar, np.int8),
        "bytes": np.array([_ITEM * length * carries for length in sorted(lengths)] + [_ITEM]),
        "layout": np.arange(1, scalar + 1),
    }
    return SimpleNamespace(edges=edges, told={"layouts": [*layouts, [scalar, "float32", []]]})


def make_side(*samples: list[int]) -> Side:
    """The vectors that go into a node, in the order of its program."""
    text, _ = TensorText.read(" ".join(f"float32[{length}]" for length in samples[0]))
    seen = np.array(samples, np.int64).T
    return Side(text=text, seen=seen, dimensions=np.arange(len(seen)), num_bytes=_ITEM * seen.sum(axis=0))


OUTPUT = make_side([8], [9])


def test_a_fan_is_told_by_the_tensors_that_it_carries() -> None:
    samples = [3, 5], [6, 4]
    (fan,), alone = find_fans([make_part(one) for one in samples], lambda _: [make_side(*samples), OUTPUT])
    assert (fan.edges, fan.carries, alone.tolist()) == (slice(0, 2), True, [2])
    assert [(dtype, dimensions.tolist()) for dtype, dimensions in fan.tensors] == [("float32", [0]), ("float32", [1])]


def test_a_fan_may_carry_some_of_the_tensors() -> None:
    sides = [make_side([3, 7, 5], [6, 1, 4]), OUTPUT]
    (fan,), _ = find_fans([make_part([3, 5]), make_part([6, 4])], lambda _: sides)
    assert [dimensions.tolist() for _, dimensions in fan.tensors] == [[0], [2]]


def test_a_fan_may_lead_to_where_a_node_writes() -> None:
    sides = [OUTPUT, make_side([3, 5], [6, 4])]
    (fan,), _ = find_fans([make_part([3, 5], carries=False), make_part([6, 4], carries=False)], lambda _: sides)
    assert (len(fan.tensors), fan.carries) == (2, False)


def test_edges_that_carry_no_tensors_of_their_node_are_refused() -> None:
    with pytest.raises(ValueError, match="edges carry"):
        find_fans([make_part([3, 5]), make_part([6, 4])], lambda _: [make_side([3, 4], [6, 4]), OUTPUT])


def test_fans_that_are_the_same_on_all_ranks_are_none() -> None:
    fans, alone = find_fans([make_part([3, 5])] * 2, lambda _: [])
    assert (fans, alone.tolist()) == ([], [0, 1, 2])


def test_what_a_fan_carries_is_in_the_order_of_its_bytes() -> None:
    sizes = [np.array([[2, 9, 0]]), np.array([[7, 1, 4]])]
    spread = Spread(edges=slice(0, 2), carries=True, dtypes=["float32", "float32"], sizes=sizes)
    assert spread.is_full().tolist() == [True, True, False]
    assert spread.tell(0) == [(8, "float32", [2]), (28, "float32", [7])]
    assert spread.tell(1) == [(4, "float32", [1]), (36, "float32", [9])]
