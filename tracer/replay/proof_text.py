"""A proof in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from truedag.tracer.replay.proof import Proof


def describe_proof(proof: Proof) -> str:
    """Return it as lines for a terminal."""
    return "\n".join(_lines(proof))


def _lines(proof: Proof) -> Iterator[str]:
    yield (
        f"{proof.num_nodes:,} operators, executed from {proof.num_sources:,} sources and the data edges alone in "
        f"{_count(proof.num_orders, 'random order')}, {proof.num_different_orders:,} of them different:"
    )
    if proof.first_failure:
        yield f"  NOT AS RECORDED: {proof.first_failure}"
    else:
        names = Counter(proof.results)
        yield f"  every result of every operator was bitwise what was recorded{', among them' if names else ''}"
        if names:
            yield f"  {_some([name if count == 1 else f'{name} ({count} times)' for name, count in names.items()])}"
    if proof.unspecified:
        yield f"  not compared, since the operators do not give it twice: results of {_tally(proof.unspecified)}"
    noticed = [one for one in proof.removals if one.is_noticed]
    empty = [one for one in proof.removals if one.reason == "no bytes"]
    idle = [one for one in proof.removals if one.reason == "no effect"]
    yield f"{_count(len(proof.removals), 'edge')} taken away, one at a time:"
    if noticed:
        reaching = sum(one.reaches_results for one in noticed)
        yield f"  {len(noticed):,} were missed: results came out different, or a node could not run;"
        yield f"    the difference reached a named result {reaching:,} times"
    if empty:
        yield f"  {len(empty):,} carry no bytes: their nodes are given the same without them"
    if idle:
        ops = Counter(one.dst_op for one in idle)
        yield f"  {len(idle):,} bring what their operator does not use, whatever stands in its place: {_tally(ops)}"
    for one in proof.unexplained:
        yield f"  NOT MISSED: {one.num_bytes:,} bytes from node {one.src} to node {one.dst} ({one.dst_op})"
    yield "edges as order:"
    yield (
        f"  {proof.num_data_edges:,} data edges carry bytes; {_count(proof.num_implied, 'pair')} of nodes among theirs "
        "are in order by a longer path as well"
    )
    for count, implied, turned, what in (
        (proof.num_empty_edges, proof.num_empty_implied, proof.num_empty_reversed, "data edges without bytes"),
        (proof.num_order_edges, proof.num_order_implied, proof.num_order_reversed, "edges of program order"),
        (
            proof.num_overwrites,
            proof.num_overwrites_implied,
            proof.num_overwrites_reversed,
            "overwrites of values that were read",
        ),
    ):
        if count:
            yield f"  {count:,} {what}: {implied:,} implied by data edges, {turned:,} turned round in some order"
    if proof.num_unfed:
        yield f"arguments that no edge fills (poison in every order): {_tally(proof.num_unfed)}"
    if proof.num_unsaid:
        yield f"arguments that changed though their operator's schema does not say so: {_tally(proof.num_unsaid)}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _tally(counts: Counter[str]) -> str:
    return _some([f"{name.removesuffix('.default')} {count:,}" for name, count in counts.most_common()])


def _some(names: list[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
