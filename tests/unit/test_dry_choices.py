"""Which choices of a class are executed: where few tokens change a program, no rank is taken for one of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from truedag.launch.dry_choices import Choices
from truedag.parallel.token_numbers import ROLES, TokenNumbers

Numbers = NDArray[np.int32]
EXPERT = ROLES.index("expert")


@pytest.fixture(autouse=True)
def _sizes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is asked for can be derived: traces play no part here."""

    def derive(self: Choices, alike: Sequence[int], asked: Sequence[int], trace_of: Callable[[int], Path]) -> list[int]:
        del alike, trace_of
        self.derived = {self.ranks[place]: at for at, place in enumerate(asked)}
        return []

    monkeypatch.setattr(Choices, "_derive", derive)


def settle(values: Numbers, program_of: Callable[[Numbers], str]) -> tuple[Choices, list[int]]:
    """Execute what is to be executed until all is known; return which ranks that were."""
    told = TokenNumbers(values=values, roles=np.full(values.shape[1], EXPERT, np.int8), branches=[""] * len(values))
    choices = Choices(range(len(values)), told, range(len(values)))
    programs: dict[int, str] = {}
    while not choices.is_settled:
        wanted = choices.choose(programs, Path)
        assert not set(wanted) & set(programs), "none is executed twice"
        programs |= {rank: program_of(values[rank]) for rank in wanted}
    assert set(programs) | set(choices.derived) == set(range(len(values)))
    return choices, sorted(programs)


def _numbers(num_choices: int, num_numbers: int) -> Numbers:
    return np.random.default_rng(0).integers(2, 99, (num_choices, num_numbers)).astype(np.int32)


def test_few_of_many_choices_are_executed() -> None:
    choices, executed = settle(_numbers(60, 8), lambda _: "one")
    assert len(executed) == 5
    assert len(choices.derived) == 55


@pytest.mark.parametrize("few", [0, 1])
def test_choices_with_few_tokens_are_executed_where_these_change_the_program(few: int) -> None:
    values = _numbers(60, 8)
    values[56:, 3] = few
    choices, executed = settle(values, lambda row: "other" if (row == few).any() else "one")
    assert {56, 57, 58, 59} <= set(executed)
    assert len(choices.derived) > 40
    assert choices.program == "one"


def test_choices_without_few_tokens_are_executed_where_nearly_all_have_some() -> None:
    values = _numbers(60, 8)
    values[np.arange(57), np.arange(57) % 8] = 0
    choices, executed = settle(values, lambda row: "other" if (row == 0).any() else "one")
    assert {57, 58, 59} <= set(executed)
    assert choices.program == "other"


@settings(max_examples=50, deadline=None)
@given(data=st.data(), num_choices=st.integers(1, 40), num_numbers=st.integers(1, 4))
def test_no_choice_is_taken_for_one_of_another_program(data: st.DataObject, num_choices: int, num_numbers: int) -> None:
    row = st.lists(st.sampled_from([0, 1, 2, 3, 9]), min_size=num_numbers, max_size=num_numbers)
    values = np.array([data.draw(row) for _ in range(num_choices)], np.int32)
    matters = data.draw(st.sampled_from([0, 1]))

    def program_of(row: Numbers) -> str:
        return str(bool((row == matters).any()))

    choices, _ = settle(values, program_of)
    assert {program_of(values[rank]) for rank in choices.derived} <= {choices.program}
