"""What becomes of an execution when one edge is taken away: which edges matter, and why the others do not.

Theory of operation. Without an edge, the node's other edges are shared out among its arguments again, as if the graph
had never had it; the bytes that nothing brings any more are poison, and the node and all that follows from it is
executed. An edge matters if any result of any node comes out different, or a node cannot be run at all.

An edge that does not matter is redundant for one of two reasons, and both are checked:

- it carries no bytes: the node is given the same without it, to the byte. It says that memory exists, or has a shape,
  which every node that works in memory of its own knows from its own call; the random orders do not keep it either;
- its bytes have no effect: with whatever stands in their place (`Poison`, all of it), the node's results are bitwise
  the recorded ones. Its operator reads them, and does not use what it read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from truedag.tracer.replay.calling import Value
from truedag.tracer.replay.execution import Execution, Poison
from truedag.tracer.replay.program import Program, Step
from truedag.tracer.replay.supply import Supply, deliver, totals

Reason = Literal["no bytes", "no effect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One edge taken away.

    `num_missing_bytes` are those that nothing brought then. `noticed_by` is the poison with which a
    result was different, None where none did. The edge is redundant then, for `reason`; that is None where it matters,
    or where nobody knows why it does not. `reaches_results`:
    whether a result that the program named was different, or an updated parameter.
    """

    row: int
    src: int
    dst: int
    dst_op: str
    num_bytes: int
    num_missing_bytes: int
    noticed_by: str | None
    reaches_results: bool
    reason: Reason | None

    @property
    def is_noticed(self) -> bool:
        """Whether execution showed that the edge is missing."""
        return self.noticed_by is not None


def remove_edge(program: Program, execution: Execution, kept: Mapping[int, Value], row: int) -> Removal:
    """Execute the program without one edge.

    Args:
        program: the program.
        execution: of the program.
        kept: what every node leaves when nothing is missing.
        row: the edge's, among the graph's edges.
    """
    src, dst, num_bytes = program.edge(row)
    step = program.steps[dst]
    supplies = supplies_without(program, step, row)
    is_message = step.message == src and program.is_message(row)
    missing = num_bytes if is_message else sum(int(one.missing.sum()) for one in supplies)
    noticed_by: Poison | None = None
    reaches = False
    for poison in Poison if missing else ():
        outcome = execution.run_without(dst, supplies, kept, program.later(dst), poison, no_message=is_message)
        if not outcome.is_same:
            noticed_by = poison
            reaches = any(program.steps[node].result is not None for node in (*outcome.different, *outcome.failed))
            break
    reason: Reason | None = None
    if num_bytes == 0 and not missing:
        reason = "no bytes"
    elif missing and noticed_by is None:
        reason = "no effect"
    return Removal(
        row=row,
        src=src,
        dst=dst,
        dst_op=step.calls[0].op if step.calls else "output",
        num_bytes=num_bytes,
        num_missing_bytes=missing,
        noticed_by=None if noticed_by is None else noticed_by.value,
        reaches_results=reaches,
        reason=reason,
    )


def supplies_without(program: Program, step: Step, row: int) -> list[Supply]:
    """Return what a step is given without one of its edges; the same as with it if that carries no bytes."""
    gone = [edge for edge in step.edges if edge.row == row]
    if not gone:
        return list(step.supplies)
    (edge,) = gone
    others = [one for one in step.supplies if one.need.type != edge.type]
    mine = [one.need for one in step.supplies if one.need.type == edge.type]
    edges = [one for one in step.edges if one.type == edge.type and one.row != row]
    return others + deliver(mine, totals(edges), program.written)
