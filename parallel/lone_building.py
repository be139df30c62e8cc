"""Building one rank of a world that has no others: what it asks of them is answered at once.

Theory of operation. Building a rank makes every process group of the world, for all ranks must make all of them, in one
order. Of a group that a rank is not in, torch keeps nothing but that its name is taken; but it checks each one's ranks
one by one, and times and logs each call, which at tens of thousands of groups is most of what building takes. And what
ranks tell each other as objects goes through a tensor for each rank, where the fake backend hands back what this rank
said itself. Both are answered here with the same result. Only while building: nothing is recorded then, and a recorded
step must run the operators of a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

from torch import distributed
from torch.distributed import distributed_c10d

from truedag.parallel.cpu import replace

_USUAL = {"use_local_synchronization": False, "sort_ranks": True}  # options of `new_group`; None is of all others


@contextmanager
def built_alone() -> Iterator[None]:
    """Build a rank of a dry world inside the block. Local.

    The groups that are made, their names and their ranks are those that torch would make.
    """
    with ExitStack() as until:
        replace(
            until,
            [
                (distributed, "new_group", _new_group(distributed.new_group)),
                (distributed, "all_gather_object", _gather_own(distributed.all_gather_object)),
            ],
        )
        yield


def _new_group(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `new_group` that does no more than it must for groups that this rank is not in.

    Source: _new_group_with_tag in torch's distributed_c10d.py.
    """
    module: Any = distributed_c10d

    def new_group(ranks: Sequence[int] | None = None, timeout: Any = None, *args: Any, **options: Any) -> Any:
        default = module._get_default_group()
        if (
            ranks is None
            or not len(ranks)
            or timeout is None
            or args
            or default.rank() in ranks
            or _is_unusual(options)
        ):
            return make(ranks, timeout, *args, **options)
        members = sorted(ranks)
        if not 0 <= members[0] <= members[-1] < default.size() or len(set(members)) < len(members):
            return make(ranks, timeout, *args, **options)  # which says what is wrong
        backend, store = module._world.pg_map[default]
        name = module._process_group_name(members, use_hashed_name=False)
        told = {"timeout": timeout, "group_desc": options.get("group_desc")}
        return module._new_process_group_helper(len(members), None, members, backend, store, name, **told)[0]

    return new_group


def _is_unusual(options: dict[str, Any]) -> bool:
    return any(value != _USUAL.get(name) for name, value in options.items() if name != "group_desc")


def _gather_own(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Return `all_gather_object` that hands back what this rank says, the same copy for each rank of the group."""

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        if group is distributed.GroupMember.NON_GROUP_MEMBER:
            gather(object_list, obj, group=group)
            return
        size = distributed.get_world_size(group)
        object_list[:size] = [deepcopy(obj)] * size

    return all_gather_object
