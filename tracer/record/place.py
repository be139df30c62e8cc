"""What a trace says of the process that recorded it: which rank it is, which ranks its groups have, and its clock."""

from __future__ import annotations

import os
import platform
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from truedag.tracer.annotate import REGISTRY, Axis

_AXES = frozenset(get_args(Axis))

# A process of which nobody knows that it is one rank of several: `placed` tells it from the rank 0 that there may be.
_UNPLACED: dict[str, Any] = {"rank": 0, "world_size": 1, "placed": False}


def describe_process(recorder: str) -> dict[str, Any]:
    """Return what the trace says of this process at its beginning, which rank it is not included."""
    return _UNPLACED | {
        "device": _device(),
        "host": platform.node(),
        "boot_id": name_clock(),
        "pid": os.getpid(),
        "torch": torch.__version__,
        "recorder": recorder,
        "coordinates": dict(REGISTRY.coordinates),
        "clock_begin": sample_clock(),
    }


def find_place(*, is_rank_told: bool) -> dict[str, Any]:
    """Say which rank this is; {} where nobody said it.

    Args:
        is_rank_told: whether, before there is a process group, RANK and WORLD_SIZE mean this process. They do for those
            that torchrun starts, and do not for the children of these, which inherit them.
    """
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
        if not is_rank_told or not all(number.isdecimal() for number in numbers):
            return {}
        rank, world_size = map(int, numbers)
    # A program that is recorded from its first line on says only later where it stands on each axis.
    told = dict(REGISTRY.coordinates)
    return {"rank": rank, "world_size": world_size, "placed": True, "device": _device(), "coordinates": told}


class GroupNews:
    """Which process groups there are that one recording does not know of yet."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[dist.ProcessGroup], str | None]] = {}

    def take_news(self) -> list[dict[str, Any]]:
        """Return the ranks of each new group, and which axis it is, as far as the program told; once for each."""
        if not (dist.is_available() and dist.is_initialized()):
            return []
        news = []
        for group, members in dist.distributed_c10d._world.pg_group_ranks.items():
            if not isinstance(group, dist.ProcessGroup):
                continue  # the mark for groups that this rank is not in
            axis = REGISTRY.axes.get(group.group_name) or _described_axis(group)
            known, told_axis = self._known.get(id(group), (None, None))
            if known is not None and known() is group and axis == told_axis:
                continue
            self._known[id(group)] = (weakref.ref(group), axis)
            ranks = [rank for rank, _ in sorted(members.items(), key=lambda item: item[1])]
            news.append({"name": group.group_name, "ranks": ranks or list(range(dist.get_world_size())), "axis": axis})
        return news


def _described_axis(group: dist.ProcessGroup) -> str | None:
    """The axis that a group's description names: a DeviceMesh calls the group of its dimension `tp` so."""
    name = str(group.group_desc).removeprefix("mesh_").lower()
    return name if name in _AXES else None


def sample_clock() -> dict[str, int]:
    """Read the clock of the records and the time of day together; `spread_ns` is how far apart they can be."""
    before = time.monotonic_ns()
    realtime = time.time_ns()
    return {"monotonic_ns": before, "realtime_ns": realtime, "spread_ns": time.monotonic_ns() - before}


def _device() -> str:
    return "cuda" if torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]


def name_clock() -> str:
    """Name the running kernel, and the time namespace if it is not the first: processes of one name share a clock.

    Source: time_namespaces(7): offsets from the first namespace's clocks, in seconds and ns.
    """
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        with suppress(OSError):  # a kernel without time namespaces
            rows = [line.split() for line in Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines()]
            offsets = ["+".join(row[1:]) for row in rows if row[0] == "monotonic" and row[1:] != ["0", "0"]]
            return "+".join([boot_id, *offsets])
        return boot_id
    return f"{platform.node()}-{time.time_ns() - time.monotonic_ns():d}"[:-9]
