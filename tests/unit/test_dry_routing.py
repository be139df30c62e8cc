"""Where tokens go: every rank finds the same, all tokens go somewhere, and the numbers are what the choice says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truedag.parallel.errors import RoutingError
from truedag.parallel.routing import (
    Balanced,
    Drawn,
    Place,
    Recorded,
    Routing,
    parse_routing,
    read_routing,
    write_routing,
)

ROUTINGS: list[Routing] = [Balanced(), Drawn(seed=5), Drawn(alpha=1.2, seed=5)]


def at(layer: int = 0, number: int = 0, source: int = 0, num_tokens: int = 64) -> Place:
    return Place(layer=layer, number=number, source=source, num_tokens=num_tokens)


@given(
    routing=st.sampled_from(ROUTINGS),
    layer=st.integers(0, 90),
    number=st.integers(0, 100),
    source=st.integers(0, 40_000),
    num_tokens=st.integers(1, 70),
    num_experts=st.integers(1, 20),
    data=st.data(),
)
def test_each_token_goes_to_so_many_different_experts(
    routing: Routing, layer: int, number: int, source: int, num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    place = Place(layer=layer, number=number, source=source, num_tokens=num_tokens)
    experts = routing.experts(place, num_experts=num_experts, top_k=top_k)
    assert experts.shape == (num_tokens, top_k)
    assert all(len(set(token)) == top_k for token in experts.tolist())
    assert experts.min() >= 0
    assert experts.max() < num_experts
    counts = routing.counts(place, num_experts=num_experts, top_k=top_k)
    assert counts.tolist() == np.bincount(experts.ravel(), minlength=num_experts).tolist()


def test_balanced_is_balanced_over_sources_too() -> None:
    counts = [Balanced().counts(at(source=source, num_tokens=3), num_experts=8, top_k=2) for source in range(4)]
    assert sum(counts).tolist() == [3] * 8  # type: ignore[union-attr]


@pytest.mark.parametrize("routing", ROUTINGS[1:], ids=["uniform", "zipf"])
def test_what_is_drawn_depends_on_the_place_and_the_seed_and_on_nothing_else(routing: Drawn) -> None:
    own = routing.experts(at(), num_experts=16, top_k=2)
    assert (routing.experts(at(), num_experts=16, top_k=2) == own).all()
    others = [at(layer=1), at(number=1), at(source=1)]
    assert all((routing.experts(other, num_experts=16, top_k=2) != own).any() for other in others)
    reseeded = Drawn(alpha=routing.alpha, seed=routing.seed + 1)
    assert (reseeded.experts(at(), num_experts=16, top_k=2) != own).any()


def test_uniform_prefers_no_expert() -> None:
    counts = Drawn(seed=1).counts(at(num_tokens=40_000), num_experts=8, top_k=2)
    assert np.abs(counts / 10_000 - 1).max() < 0.05


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_popularity_follows_zipfs_law(alpha: float) -> None:
    counts = np.sort(Drawn(alpha=alpha, seed=1).counts(at(num_tokens=100_000), num_experts=8, top_k=1))[::-1]
    expected = np.arange(1.0, 9.0) ** -alpha
    assert np.abs(counts / counts.sum() / (expected / expected.sum()) - 1).max() < 0.05


def test_which_expert_is_popular_differs_between_layers() -> None:
    popular = {
        int(Drawn(alpha=2.0, seed=1).counts(at(layer=layer, num_tokens=2000), num_experts=8, top_k=1).argmax())
        for layer in range(10)
    }
    assert len(popular) > 1


def test_a_recorded_routing_is_read_as_it_was_written_and_dealt_to_tokens(tmp_path: Path) -> None:
    places = [(layer, number, rank) for layer in (0, 3) for number in (0, 1) for rank in (0, 7)]
    drawn = Drawn(alpha=1.5, seed=2)
    tokens = {
        key: drawn.counts(at(*key, num_tokens=32), num_experts=6, top_k=2)  # type: ignore[misc]
        for key in places
    }
    for rank in (0, 7):
        write_routing(tmp_path / f"rank-{rank}.jsonl", {key: row for key, row in tokens.items() if key[2] == rank})
    read = parse_routing(str(tmp_path))
    assert isinstance(read, Recorded)
    for key in places:
        place = at(*key, num_tokens=32)  # type: ignore[misc]
        assert read.counts(place, num_experts=6, top_k=2).tolist() == tokens[key].tolist()
        experts = read.experts(place, num_experts=6, top_k=2)
        assert np.bincount(experts.ravel(), minlength=6).tolist() == tokens[key].tolist()
        assert (experts[:, 0] != experts[:, 1]).all()


@pytest.mark.parametrize(
    ("place", "num_experts", "what"),
    [
        (at(layer=1, num_tokens=4), 4, "says nothing of layer 1, pass 0, rank 0"),
        (at(num_tokens=5), 4, "sent 8 tokens to 4 experts; here 5 tokens go to 2 of 4"),
        (at(num_tokens=4), 8, "here 4 tokens go to 2 of 8"),
    ],
    ids=["layer", "tokens", "experts"],
)
def test_the_routing_of_another_deployment_is_refused(place: Place, num_experts: int, what: str) -> None:
    recorded = Recorded(path=Path("there"), tokens={(0, 0, 0): np.array([2, 2, 2, 2])})
    with pytest.raises(RoutingError, match=what):
        recorded.counts(place, num_experts=num_experts, top_k=2)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("even", "none of balanced, uniform, zipf:ALPHA, and there is no such file"),
        ("zipf", "takes a positive exponent"),
        ("zipf:-1", "takes a positive exponent"),
        ("zipf:much", "takes a positive exponent"),
    ],
)
def test_what_is_no_routing_is_refused(text: str, what: str) -> None:
    with pytest.raises(RoutingError, match=what):
        parse_routing(text)


@pytest.mark.parametrize("content", ["", "{}\n", "nothing\n", '{"truedag_routing": 2}\n', '{"truedag_routing": 1}\n'])
def test_a_file_that_is_no_routing_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(content)
    with pytest.raises(RoutingError, match=r"file\.jsonl"):
        read_routing(tmp_path / "file.jsonl")
