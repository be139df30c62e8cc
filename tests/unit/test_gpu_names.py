"""GPUs are named in few signs, and none is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.audit.drawing.numbers import read_numbers
from truedag.tracer.views.gpus import write_gpus


@pytest.mark.parametrize(
    ("ranks", "written"),
    [
        ([3], "GPU 3"),
        (range(1024), "GPUs 0-1023"),
        (range(0, 1024, 8), "GPUs 0-1016 step 8"),
        ([i for i in range(1024) if i % 8], "GPUs 1-7 to 1017-1023 step 8"),
        ([i for i in range(1024) if i % 8 in (0, 1, 4)], "GPUs 0-1 to 1016-1017 step 8,4-1020 step 8"),
        ([40, 41, 552, 553], "GPUs 40,41,552,553"),
    ],
)
def test_gpus_are_named_in_few_signs(ranks, written):
    assert write_gpus(ranks) == written


@given(
    base=st.sets(st.integers(0, 40), min_size=1, max_size=12),
    distance=st.integers(1, 300),
    times=st.integers(1, 40),
)
def test_no_gpu_is_left_out_of_a_name(base, distance, times):
    ranks = {rank + distance * k for rank in base for k in range(times)}
    assert set(read_numbers(write_gpus(ranks))) == ranks
