"""What a rank has in memory while it runs: each storage from when it is made until it is given back.

Theory of operation. An event tells at which memory its tensors' storages lie, and the recorder tells when memory is
given back. So each piece of memory has lives, divided by its frees: one begins at the end of the operator that returned
it first, or before the recording where an operator took it first. On device meta a storage stands for its memory; its
life is seen in the same way, and its size is known.

Not seen, and not in it: what operators and communications take and give back inside, the rounding of allocators, and
memory that no operator was given. Memory that PyTorch's allocator for the host did not give out (of Python's buffers,
shared) is never given back here. No recorder sees the frees of GPU memory, and the Python recorder sees none at all.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.labels import Label
from truedag.tracer.merge.nodes import RankNodes
from truedag.tracer.merge.places import find_memory
from truedag.tracer.record.format import FREE, SCRATCH_ARG
from truedag.tracer.record.trace import Trace

ROLES = ("parameter", "gradient", "state")
_BEFORE = -1  # of a life that began before the recording
_NEVER = np.iinfo(np.int64).max
_NUM_SHOWN = 24
_LAYER = re.compile(r"\.\d+(?=\.|$)")

LifeName: TypeAlias = tuple[str, str | None, int | None]  # what, the operator that made it, its layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """The lives of memory, in columns. Times in ns on the rank's clock."""

    num_bytes: NDArray[np.int64]
    begin_ns: NDArray[np.int64]  # `_BEFORE`: it was there
    end_ns: NDArray[np.int64]  # `_NEVER`: it stayed
    made_ns: NDArray[np.int64]  # when the operator began that made it
    role: NDArray[np.int64]  # in ROLES, -1: none


def measure_memory(nodes: RankNodes) -> dict[str, Any] | None:
    """Return what a rank has in memory; None where frees are not recorded (GPUs, the Python recorder).

    - `parameter_bytes`, `gradient_bytes`, `state_bytes`: the tensors that the program named so, each place once.
    - `activation_bytes`: most of what was made while recording, and was not yet given back.
    - `peak_bytes`: most of all together, `peak_node` the operator (local) at whose end that was, -1 none, and
      `peak_op`, `peak_module`, `peak_phase`, `peak_microbatch` what it is.
    - `alive`: what was there then: `what` (a role, before for other memory that was there, or the module that made it,
      `*` for its layer), `op` that made it and in which `layers`, `num` storages, `bytes`; the largest first, the rest
      as one.
    """
    trace = nodes.trace
    if trace.meta["recorder"] != "native" or trace.meta.get("device") not in ("cpu", "meta"):
        return None
    return sum_up(nodes, find_lives(trace), weigh_named(trace), functools.partial(name_life, nodes))


def sum_up(
    nodes: RankNodes, lives: Lives, named: Mapping[str, int], name: Callable[[Lives, int], LifeName]
) -> dict[str, Any]:
    """Return what `measure_memory` does, of these lives.

    Args:
        nodes: of the rank.
        lives: of its memory; what holds no byte is left out.
        named: `weigh_named` of its trace.
        name: `name_life` of these nodes, or what remembers its answers.
    """
    kept = {f"{role}_bytes": size for role, size in named.items()}
    held = lives.num_bytes > 0
    peak_ns, peak_bytes = find_peak(lives, held)
    activations = find_peak(lives, held & (lives.begin_ns != _BEFORE))[1]
    node = int(np.searchsorted(nodes.start_ns, peak_ns, side="left")) - 1
    label = nodes.belonging.label(node) if node >= 0 else Label()
    alive = np.flatnonzero(held & (lives.begin_ns <= peak_ns) & (lives.end_ns >= peak_ns)).tolist()
    return {
        **kept,
        "activation_bytes": activations,
        "peak_bytes": peak_bytes,
        "peak_node": node,
        "peak_op": str(nodes.trace.ops[int(nodes.op_number[node])]["name"]) if node >= 0 else None,
        "peak_module": label.module,
        "peak_phase": label.phase,
        "peak_microbatch": label.microbatch,
        "alive": _list_alive([(name(lives, one), int(lives.num_bytes[one])) for one in alive]),
    }


def number_peak(
    memory: Mapping[str, Any], numbers: NDArray[np.int64], collectives: NDArray[np.int64], joined: Mapping[int, int]
) -> dict[str, Any]:
    """Return what a rank has in memory with its `peak_node` as the graph numbers it.

    Args:
        memory: what `measure_memory` returned.
        numbers: of the rank's nodes, in the graph.
        collectives: numbers of the collectives.
        joined: which collective took a node's place.
    """
    node = int(memory["peak_node"])
    if node >= 0:
        node = int(collectives[joined[node]] if node in joined else numbers[node])
    return {**memory, "peak_node": node}


def find_lives(trace: Trace) -> Lives:
    """Return the lives of all memory that a rank's operators were given or returned."""
    seen = _find_seen(trace)
    if not len(seen):
        none = np.zeros(0, np.int64)
        return Lives(num_bytes=none, begin_ns=none, end_ns=none, made_ns=none, role=none)
    freed = np.concatenate([np.empty(0, FREE), *(thread.frees for thread in trace.threads)])
    key = np.concatenate([seen["key"], freed["address"].astype(np.int64)])
    time = np.concatenate([seen["time_ns"], freed["time_ns"]])
    is_free = np.repeat([False, True], [len(seen), len(freed)])
    order = np.lexsort((is_free, time, key))
    key, time, is_free = key[order], time[order], is_free[order]
    first_of_key = np.diff(key, prepend=-1) != 0
    # A life goes up to a free, which is its last row.
    life = np.cumsum(first_of_key | np.append(False, is_free[:-1])) - 1
    count = int(life[-1]) + 1
    first = np.flatnonzero(np.diff(life, prepend=-1))
    last = np.append(first[1:], len(life)) - 1
    row = np.minimum(order[first], len(seen) - 1)
    is_known = ~is_free[first]  # memory that no operator was given is only freed
    num_bytes = np.zeros(count, np.int64)
    role = np.full(count, -1)
    chosen = np.flatnonzero(~is_free)
    np.maximum.at(num_bytes, life[chosen], seen["bytes"][order[chosen]])
    np.maximum.at(role, life[chosen], seen["role"][order[chosen]])
    was_there = first_of_key[first] & ~seen["is_made"][row]
    lives = Lives(
        num_bytes=num_bytes,
        begin_ns=np.where(was_there, _BEFORE, time[first]),
        end_ns=np.where(is_free[last], time[last], _NEVER),
        made_ns=seen["start_ns"][row],
        role=role,
    )
    # What a communication made for its own use is not in the sum, whichever operator inside it takes it then.
    kept = is_known & ~seen["is_inside"][row]
    return Lives(**{name: getattr(lives, name)[kept] for name in Lives.__slots__})


_SEEN = np.dtype(
    [
        ("key", "<i8"), ("bytes", "<i8"), ("time_ns", "<i8"), ("start_ns", "<i8"), ("is_made", "?"),
        ("is_inside", "?"), ("role", "<i8"),
    ]
)  # fmt: skip


def _find_seen(trace: Trace) -> NDArray[np.void]:
    """Return when operators had which memory: results at the operator's end, arguments at its beginning."""
    device = trace.meta["device"]
    is_here = np.zeros(max(trace.layouts, default=0) + 1, bool)
    is_here[[number for number, one in trace.layouts.items() if one.device == device]] = True
    tables = [_find_named(trace)]
    for thread in trace.threads:
        events = thread.events
        refs = np.flatnonzero(is_here[thread.refs["layout"]])
        event = np.searchsorted(events["first_ref"], refs, side="right") - 1
        # Events without tensors begin where the next one does.
        is_made = refs - events["first_ref"][event] >= events["num_inputs"][event]
        table = np.zeros(len(refs), _SEEN)
        address, table["bytes"] = find_memory(trace, thread, refs, event)
        table["key"] = address if device == "cpu" else _keys_of(trace, thread.refs["storage"][refs])
        table["start_ns"] = events["start_ns"][event]
        table["time_ns"] = np.where(is_made, events["end_ns"][event], events["start_ns"][event])
        table["is_made"], table["role"] = is_made, -1
        table["is_inside"] = thread.refs["arg"][refs] == SCRATCH_ARG
        tables.append(table)
    found = np.concatenate(tables)
    return found[found["key"] > 0]


def _keys_of(trace: Trace, storages: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return by what frees name storages without memory."""
    impl: NDArray[np.int64] = np.concatenate([np.zeros(1, np.uint64), trace.storage_records["impl"]])[storages].astype(
        np.int64
    )
    return impl + 1


def _find_named(trace: Trace) -> NDArray[np.void]:
    """Return the memory of what the program named: it is there, used or not."""
    told = [one for one in trace.named_tensors if one["role"] in ROLES and not one.get("final")]
    storages = np.array([one["storage"] for one in told], np.uint32)
    records = trace.storage_records[storages.astype(np.int64) - 1]
    table = np.zeros(len(told), _SEEN)
    table["key"] = records["address"] if trace.meta["device"] == "cpu" else _keys_of(trace, storages)
    table["bytes"] = records["bytes"]
    table["time_ns"] = table["start_ns"] = [one["time_ns"] for one in told]
    table["role"] = [ROLES.index(one["role"]) for one in told]
    return table


def find_peak(lives: Lives, chosen: NDArray[np.bool_]) -> tuple[int, int]:
    """Return when the chosen lives are most together, and how many bytes; the first time of several."""
    if not chosen.any():
        return 0, 0
    time = np.concatenate([lives.begin_ns[chosen], lives.end_ns[chosen]])
    change = np.concatenate([lives.num_bytes[chosen], -lives.num_bytes[chosen]])
    # What an operator makes is there before what is given back at the same time.
    order = np.lexsort((change < 0, time))
    live = np.cumsum(change[order])
    at = int(np.argmax(live))
    return int(time[order][at]), int(live[at])


def name_life(nodes: RankNodes, lives: Lives, one: int) -> LifeName:
    """Return what a life is told as, the operator that made it, and its layer."""
    role = int(lives.role[one])
    if role >= 0:
        return ROLES[role], None, None
    if lives.begin_ns[one] == _BEFORE:
        return "before", None, None
    maker = int(np.searchsorted(nodes.start_ns, lives.made_ns[one], side="right")) - 1
    label = nodes.belonging.label(maker) if maker >= 0 else Label()
    op = str(nodes.trace.ops[int(nodes.op_number[maker])]["name"]) if maker >= 0 else None
    return _LAYER.sub(".*", label.module) if label.module else "no module", op, label.layer


def _list_alive(alive: Sequence[tuple[LifeName, int]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str | None], _Pieces] = defaultdict(_Pieces)
    for (what, op, layer), num_bytes in alive:
        found[what, op].add(num_bytes, layer)
    rows = sorted(found.items(), key=lambda item: (-item[1].num_bytes, item[0][0], item[0][1] or ""))
    rest = _Pieces()
    for _, pieces in rows[_NUM_SHOWN:]:
        rest.join(pieces)
    told = [pieces.tell(what, op) for (what, op), pieces in rows[:_NUM_SHOWN]]
    return [*told, *([rest.tell(f"{len(rows) - _NUM_SHOWN} more", None)] if rest.num else [])]


@dataclass(slots=True)
class _Pieces:
    """Storages that are told of together."""

    num: int = 0
    num_bytes: int = 0
    layers: set[int] = field(default_factory=set)

    def add(self, num_bytes: int, layer: int | None) -> None:
        self.num, self.num_bytes = self.num + 1, self.num_bytes + num_bytes
        if layer is not None:
            self.layers.add(layer)

    def join(self, other: _Pieces) -> None:
        self.num, self.num_bytes = self.num + other.num, self.num_bytes + other.num_bytes
        self.layers |= other.layers

    def tell(self, what: str, op: str | None) -> dict[str, Any]:
        return {"what": what, "op": op, "layers": sorted(self.layers), "num": self.num, "bytes": self.num_bytes}


def weigh_named(trace: Trace) -> dict[str, int]:
    """Return the bytes of all tensors that a rank's program named, by role; each place in memory counts once."""
    places: dict[str, dict[tuple[int, int], int]] = {role: {} for role in ROLES}
    for told in trace.named_tensors:
        if told["role"] in places and not told.get("final"):
            place = told["storage"], told["offset_bytes"]
            known = places[told["role"]]
            known[place] = max(known.get(place, 0), trace.layouts[told["layout"]].num_bytes)
    return {role: sum(sizes.values()) for role, sizes in places.items()}
