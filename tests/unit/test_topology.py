"""Numbering nodes topologically, and showing a cycle where there is one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.topology import number_nodes


@given(st.integers(1, 30), st.randoms(use_true_random=False), st.booleans())
def test_every_edge_leads_upwards_whatever_the_times_say(count: int, random, times_lie: bool) -> None:  # type: ignore[no-untyped-def]
    hidden = list(range(count))
    random.shuffle(hidden)
    pairs = [(hidden[a], hidden[b]) for a in range(count) for b in range(a + 1, count) if random.random() < 0.2]
    src = np.array([a for a, _ in pairs], np.int64)
    dst = np.array([b for _, b in pairs], np.int64)
    time = np.array([random.randrange(100) for _ in range(count)]) if times_lie else np.argsort(np.array(hidden))
    number, cycle = number_nodes(time.astype(np.int64), src, dst)
    assert cycle == []
    assert sorted(number.tolist()) == list(range(count))
    assert (number[src] < number[dst]).all()


def test_a_cycle_is_returned_as_its_path() -> None:
    src, dst = np.array([0, 1, 2, 3, 1]), np.array([1, 2, 3, 1, 4])
    _, cycle = number_nodes(np.arange(5), src, dst)
    edges = set(zip(src.tolist(), dst.tolist(), strict=True))
    assert set(cycle) == {1, 2, 3}
    assert all(pair in edges for pair in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
