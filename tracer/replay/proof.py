"""Prove a graph by executing it: many random orders, and without one edge at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.replay.execution import Execution, Outcome
from truedag.tracer.replay.orders import Orders, find_overwrites, find_reversed
from truedag.tracer.replay.program import Program
from truedag.tracer.replay.redundancy import find_implied, find_ordered
from truedag.tracer.replay.removals import Removal, remove_edge

_TOLD_EVERY = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What executing a graph again has shown.

    The counts of edges are of rows of the graph's edges, those of overwrites of pairs of nodes. Whatever is `reversed`
    was so at least once in some order: it was not needed.
    """

    num_nodes: int
    num_sources: int
    results: tuple[str, ...]  # what the program named, and its updated parameters, each bitwise as recorded
    num_orders: int
    num_different_orders: int
    first_failure: str  # empty: in all orders every result of every node was bitwise what was recorded
    num_data_edges: int  # that carry bytes
    num_implied: int  # of them, pairs of nodes that a longer path joins as well
    num_empty_edges: int  # that carry none
    num_empty_implied: int
    num_empty_reversed: int
    num_order_edges: int
    num_order_implied: int
    num_order_reversed: int
    num_overwrites: int
    num_overwrites_reversed: int
    num_overwrites_implied: int
    num_unfed: Counter[str]  # arguments that no edge brings content, by operator
    num_unsaid: Counter[str]  # arguments that changed and their operator does not say so, by operator
    unspecified: Counter[str]  # results that operators do not give twice, by operator: not compared
    removals: tuple[Removal, ...]

    @property
    def is_proven(self) -> bool:
        """Whether every order gave what was recorded, and every edge that was not missed is shown to be redundant."""
        return not self.first_failure and not self.unexplained

    @property
    def unexplained(self) -> tuple[Removal, ...]:
        """Edges that made no difference although they should have."""
        return tuple(one for one in self.removals if not one.is_noticed and one.reason is None)


def prove(
    graph: Graph,
    traces: Path,
    *,
    num_orders: int = 200,
    num_removals: int = 300,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Proof:
    """Execute a graph again from its nodes and edges alone.

    Args:
        graph: merged from the traces.
        traces: their folder; recorded with arguments.
        num_orders: in how many random orders.
        num_removals: without how many edges, one at a time, drawn among those that are not program order.
        seed: of the orders and the draw.
        progress: hears what is being done.

    Raises:
        ReplayError: the graph cannot be executed: no arguments, or the edges of a node do not say what it is given.
    """
    say = progress or (lambda _: None)
    say("reading the recorded calls")
    program = Program(graph, traces)
    execution = Execution(program)
    recorded, kept = execution.run(sorted(program.steps), keep=True)
    failure = _describe(program, recorded)
    pairs = {
        "empty": _pairs(program.edges.filter(pl.col("bytes") == 0), program),
        "order": _pairs(graph.edges.filter(pl.col("kind") == "order").collect(), program),
        "overwrites": find_overwrites(program),
    }
    turned: dict[str, set[tuple[int, int]]] = {name: set() for name in pairs}
    orders = Orders(program, seed)
    seen = set()
    for number in range(num_orders):
        if number % _TOLD_EVERY == 0:
            say(f"executing in {num_orders} random orders: {number} done")
        order = orders.draw()
        seen.add(hash(tuple(order)))
        for name, some in pairs.items():
            turned[name] |= find_reversed(order, some)
        outcome, _ = execution.run(order)
        failure = failure or _describe(program, outcome)
    rows = program.edges["row"].to_list()
    drawn = random.Random(seed).sample(rows, min(num_removals, len(rows)))  # noqa: S311
    removals = []
    for number, row in enumerate(sorted(drawn)):
        if number % _TOLD_EVERY == 0:
            say(f"executing without one of {len(drawn)} edges: {number} done")
        removals.append(remove_edge(program, execution, kept, row))
    return Proof(
        num_nodes=sum(1 for step in program.steps.values() if step.calls),
        num_sources=len(program.sources),
        results=tuple(step.result.name for _, step in sorted(program.steps.items()) if step.result is not None),
        num_orders=num_orders,
        num_different_orders=len(seen),
        first_failure=failure,
        num_data_edges=int((program.edges["bytes"] > 0).sum()),
        num_implied=len(find_implied(program.feeds, program.feeds)),
        num_empty_edges=int((program.edges["bytes"] == 0).sum()),
        num_empty_implied=len(find_ordered(pairs["empty"], program.feeds)),
        num_empty_reversed=len(turned["empty"]),
        num_order_edges=program.num_order_edges,
        num_order_implied=len(find_ordered(pairs["order"], program.feeds)),
        num_order_reversed=len(turned["order"]),
        num_overwrites=len(pairs["overwrites"]),
        num_overwrites_reversed=len(turned["overwrites"]),
        num_overwrites_implied=len(find_ordered(pairs["overwrites"], program.feeds)),
        num_unfed=program.unfed(),
        num_unsaid=program.unsaid(),
        unspecified=Counter(program.steps[node].calls[0].op for node in execution.unspecified),
        removals=tuple(removals),
    )


def _pairs(edges: pl.DataFrame, program: Program) -> list[tuple[int, int]]:
    return sorted({(src, dst) for src, dst in edges.select("src", "dst").rows() if src in program.steps})


def _describe(program: Program, outcome: Outcome) -> str:
    for node, why in outcome.failed.items():
        return f"{program.steps[node].title} cannot be run: {why}"
    for node in outcome.different:
        return f"{program.steps[node].title} gave something else than was recorded"
    return ""
