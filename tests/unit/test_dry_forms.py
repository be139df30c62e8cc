"""Sizes as forms of told numbers: what is said of a rank is right, or not said."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.dry.forms import evaluate_forms
from truedag.tracer.dry.tensor_texts import TensorText

NUMBERS = np.array([[3, 10, 7], [4, 20, 7], [9, 15, 7]])


def test_a_size_is_a_multiple_of_a_number_and_a_constant() -> None:
    found = evaluate_forms(np.array([[32, 42, 92], [5, 5, 5], [10, 20, 15]]), NUMBERS, np.array([[6, 40, 7]]))
    assert found.values.tolist() == [[62], [5], [40]]
    assert found.has_form.all()
    assert found.is_known.all()


def test_a_size_that_goes_with_no_number_has_no_form() -> None:
    found = evaluate_forms(np.array([[1, 2, 4], [10, 20, 15]]), NUMBERS, np.array([[6, 40, 7]]))
    assert found.has_form.tolist() == [False, True]


def test_what_falls_as_a_number_rises_is_no_form_of_it() -> None:
    assert not evaluate_forms(np.array([[20, 10, 15]]), NUMBERS, np.array([[6, 40, 7]])).has_form.any()


def test_where_two_numbers_fit_a_rank_of_which_they_say_different_things_is_not_known() -> None:
    numbers = np.array([[3, 3], [4, 4], [9, 9]])
    found = evaluate_forms(np.array([[3, 4, 9]]), numbers, np.array([[5, 5], [5, 6]]))
    assert found.is_known.tolist() == [True, False]


def test_a_rank_with_a_number_that_was_never_seen_to_change_is_not_known() -> None:
    found = evaluate_forms(np.array([[3, 4, 9]]), NUMBERS, np.array([[5, 30, 7], [5, 30, 8]]))
    assert found.is_known.tolist() == [True, False]


@given(data=st.data(), num_executed=st.integers(1, 6), num_asked=st.integers(1, 8), num_numbers=st.integers(1, 10))
def test_what_is_known_is_right(data: st.DataObject, num_executed: int, num_asked: int, num_numbers: int) -> None:
    few = st.integers(0, 5)
    rows = st.lists(few, min_size=num_numbers, max_size=num_numbers)
    told = np.array([data.draw(rows) for _ in range(num_executed + num_asked)])
    truth = np.array([
        data.draw(st.integers(0, 4)) * told[:, data.draw(st.integers(0, num_numbers - 1))] + data.draw(few)
        for _ in range(5)
    ])  # fmt: skip
    found = evaluate_forms(truth[:, :num_executed], told[:num_executed], told[num_executed:])
    assert found.has_form.all(), "each of them is one"
    assert (found.values[:, found.is_known] == truth[:, num_executed:][:, found.is_known]).all()


def test_the_dimensions_of_tensors_in_words() -> None:
    text, dimensions = TensorText.read("bfloat16[2,64] int64[64] bool[] float32[0,3]")
    assert dimensions == [2, 64, 64, 0, 3]
    assert str(text) == "bfloat16[n,n] int64[n] bool[] float32[n,n]"
    assert text.write([5, 64, 7, 1, 3]) == "bfloat16[5,64] int64[7] bool[] float32[1,3]"
    assert text.weigh(np.array([[2, 5], [64, 64], [64, 7], [0, 1], [3, 3]])).tolist() == [
        2 * 64 * 2 + 64 * 8 + 1,
        5 * 64 * 2 + 7 * 8 + 1 + 12,
    ]
