"""What process groups a program makes, those too that this rank is not in: all ranks make all of them, in one order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed import distributed_c10d


@dataclass(frozen=True, slots=True)
class MadeGroup:
    """A process group of the world."""

    name: str
    """As torch knows it."""

    description: str
    """As its maker described it; `undefined` where it said nothing."""

    ranks: tuple[int, ...]
    """In group order."""


@contextmanager
def note_groups() -> Iterator[list[MadeGroup]]:
    """Note each group that is made inside the block, in a list that grows. Local."""
    module: Any = distributed_c10d
    make = module._new_process_group_helper
    made: list[MadeGroup] = []

    def noting(group_size: int, group_rank: int, ranks: Any, *args: Any, **options: Any) -> Any:
        name = options["group_name"] if "group_name" in options else args[2]
        members = tuple(ranks) or tuple(range(group_size))
        made.append(MadeGroup(str(name), str(options.get("group_desc") or "undefined"), members))
        return make(group_size, group_rank, ranks, *args, **options)

    module._new_process_group_helper = noting
    try:
        yield made
    finally:
        module._new_process_group_helper = make
