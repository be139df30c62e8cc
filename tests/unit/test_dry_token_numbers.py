"""What ranks hear of the routing: the numbers that their dispatcher counts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from truedag.parallel.token_numbers import ROLES, Exchange, NumbersOfRanks

sizes = st.integers(1, 4)


@given(ep=sizes, etp=sizes, num_local=sizes, seed=st.integers(0, 1000))
def test_a_rank_hears_what_its_dispatcher_counts(ep: int, etp: int, num_local: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 9, (ep * etp, ep * num_local))
    exchange = Exchange(counts=counts, ep=ep, etp=etp)
    ranks = np.arange(ep * etp)
    numbers, roles = exchange.numbers(ranks)
    for rank in ranks.tolist():
        place, first = divmod(rank, etp)[1], rank // etp * num_local
        # [ranks of etp, ranks of ep, own experts], as the dispatcher of megatron-core has them
        own = counts.reshape(ep, etp, -1)[:, :, first : first + num_local].transpose(1, 0, 2)
        wanted = {
            "kept": [counts[rank].sum()],
            "own": [own[place].sum()],
            "part": own.sum(axis=(1, 2)).tolist(),
            "expert": own.sum(axis=(0, 1)).tolist(),
            "all": [own.sum()],
            "chunk": own.ravel().tolist() if num_local > 1 else [],
        }
        heard = {role: numbers[rank][np.array(roles) == at].tolist() for at, role in enumerate(ROLES)}
        assert heard == wanted


def test_ranks_that_hear_the_same_are_alike() -> None:
    counts = np.array([[4, 4], [4, 4], [1, 2], [1, 2]])
    heard = NumbersOfRanks([2, 3, 4, 5], moves_part_by_part=False)
    heard.begin_pass()
    heard.hear(Exchange(counts=counts[:2], ep=2, etp=1), 2, np.array([0, 1]))
    heard.hear(Exchange(counts=counts[2:], ep=2, etp=1), 4, np.array([2, 3]))
    assert heard.alike() == [(2, 3), (4,), (5,)]
    told = heard.tell([2, 4, 5])
    assert told is not None
    assert [ROLES[role] for role in told.roles] == ["kept", "own", "part", "expert", "all"]
    assert told.values.tolist() == [[8, 8, 8, 8, 8], [3, 2, 2, 2, 2], [3, 4, 4, 4, 4]]


def test_where_parts_are_moved_one_by_one_a_program_goes_by_the_place_of_a_rank_among_them() -> None:
    counts = np.array([[4, 1], [5, 1], [4, 2], [3, 2]])
    heard = NumbersOfRanks(range(4), moves_part_by_part=True)
    heard.begin_pass()
    heard.hear(Exchange(counts=counts, ep=2, etp=2), 0, np.arange(4))
    told = heard.tell(range(4))
    assert told is not None
    assert told.branches == ["even", "even", "even", "even"]
    counts[0, 1] = 7
    heard = NumbersOfRanks(range(4), moves_part_by_part=True)
    heard.begin_pass()
    heard.hear(Exchange(counts=counts, ep=2, etp=2), 0, np.arange(4))
    told = heard.tell(range(4))
    assert told is not None
    assert told.branches == ["even", "even", "place 0", "place 1"]
