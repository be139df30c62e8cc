"""How far a rank has come, told by itself on real gloo ranks."""

from __future__ import annotations

import threading
import time

import torch
from megatron_ranks import run_ranks
from torch import distributed

from truedag.launch.progress import GroupProgress, find_overdue, take_progress

MANY = 2100  # more than the flight recorder remembers


def progress_of(name: str) -> GroupProgress:
    return next(group for group in take_progress().groups if group.name == name)


def use_groups() -> tuple[int, int, int, int, tuple[int, ...]]:
    """Count what was begun on a group whose entries the recorder has forgotten, and on one that it remembers."""
    rare, often = distributed.new_group([0, 1]), distributed.new_group([0, 1])
    before = progress_of(often.group_name).begun
    distributed.all_reduce(torch.ones(1), group=rare)
    for _ in range(MANY):
        distributed.all_reduce(torch.ones(1), group=often)
    other = distributed.new_group([0])  # not seen: it has one rank
    assert all(group.name != getattr(other, "group_name", "") for group in take_progress().groups)
    while (told := progress_of(often.group_name)).ended < told.begun:
        time.sleep(0.01)  # a backend's thread writes down that it ended a moment after the caller goes on
    return progress_of(rare.group_name).begun, before, told.begun, told.ended, told.ranks


def test_each_group_is_counted_however_long_ago_it_was_used() -> None:
    for told in run_ranks(2, use_groups, timeout_s=60):
        assert told == (1, 0, MANY, MANY, (0, 1))


def meet_late() -> tuple[str, str, str, str | None, bool]:
    """Rank 1 comes late; rank 0 looks from another thread while it waits."""
    found: list[tuple[str, str, str, str | None, bool]] = []
    store = distributed.distributed_c10d._get_default_store()

    def look() -> None:
        if distributed.get_rank() == 0:
            while not find_overdue(0.5):
                time.sleep(0.01)
        else:
            store.wait(["rank 0 has waited"])
        told = take_progress()
        world = next(group for group in told.groups if len(group.ranks) == 2)
        call = told.call.name if told.call is not None else None
        found.append((find_overdue(0.5), find_overdue(1000.0), told.place, call, world.ended < world.begun))

        store.set("rank 0 has waited", "")

    watcher = threading.Thread(target=look)
    watcher.start()
    if distributed.get_rank() == 1:
        watcher.join()
    distributed.all_reduce(torch.ones(1))
    watcher.join()
    while find_overdue(0.0):
        time.sleep(0.01)
    return found[0]


def test_another_thread_sees_what_the_main_one_waits_in() -> None:
    waiting, late = run_ranks(2, meet_late, timeout_s=60)
    overdue, not_yet, place, call, is_open = waiting
    assert overdue.startswith("all_reduce of group ")
    assert not_yet == ""
    assert place.endswith(" meet_late")
    assert call == "all_reduce"
    assert is_open
    assert late[0] == ""
    assert late[3] is None
    assert not late[4]
