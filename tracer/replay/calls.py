"""Calls that were recorded with their arguments, read back: local facts of a node, none of them about other nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from truedag.tracer.errors import ReplayError
from truedag.tracer.record.arguments import CALLS, TENSORS, VALUES, WORKS, arguments_path
from truedag.tracer.record.trace import ThreadTrace, Trace, read_trace
from truedag.tracer.replay.memory import Bytes, Ref

# Allocate memory and leave it as it is.
_CONTENTLESS = ("empty", "new_empty", "_empty_affine_quantized", "_empty_per_channel_affine_quantized")
# What communications write; their schemas do not say. Source: torch/csrc/distributed/c10d/Ops.cpp.
_WRITTEN = {
    "allreduce_": ("tensors",), "allreduce_coalesced_": ("tensors",), "broadcast_": ("tensors",),
    "reduce_": ("tensors",), "recv_": ("tensors",), "recv_any_source_": ("tensors",),
    "allgather_": ("output_tensors",), "_allgather_base_": ("output_tensor",), "gather_": ("output_tensors",),
    "scatter_": ("output_tensors",), "reduce_scatter_": ("output_tensors",),
    "allgather_coalesced_": ("output_lists",), "allgather_into_tensor_coalesced_": ("outputs",),
    "reduce_scatter_tensor_coalesced_": ("outputs",),
    "_reduce_scatter_base_": ("output_tensor",), "alltoall_": ("output_tensors",), "alltoall_base_": ("output",),
}  # fmt: skip
_PLAIN = {"float": float, "device": torch.device}


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor among a call's arguments: of its inputs, the one of this number."""

    number: int
    conj: bool
    neg: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comm:
    """A rank's part in a communication: ranks are places in the group, `peer` is the root's or the other's."""

    rank: int
    size: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operator's call.

    `before` and `after` are the elements of `inputs`, `results` those of `outputs`; None where they are not known.
    """

    rank: int
    op: str  # aten::add_.Tensor
    function: Any  # the OpOverload
    arguments: Mapping[str, Any]  # as given, with a Slot for each tensor and a Generator drawing from `random`
    inputs: tuple[Ref | None, ...]
    outputs: tuple[Ref | None, ...]
    scratch: tuple[Ref | None, ...]  # what a communication made for its own use
    declared: frozenset[int]  # numbers of the inputs that its schema says it writes
    written: frozenset[int]  # those, and others that were seen to change
    before: tuple[Bytes | None, ...]
    after: tuple[Bytes | None, ...]
    results: tuple[Bytes | None, ...]
    returned: tuple[Any, ...]  # results that are numbers
    random: Bytes | None
    num_threads: int
    is_grad_enabled: bool
    comm: Comm | None  # of a communication

    @property
    def is_contentless(self) -> bool:
        """Whether what is in its results is not its own doing."""
        name = self.op.removeprefix("aten::").partition(".")[0]
        return self.op.startswith("aten::") and name.startswith(_CONTENTLESS) and "out" not in self.arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedValue:
    """A tensor that the program named, and what was in it then."""

    name: str
    role: str
    is_final: bool
    ref: Ref
    elements: Bytes


class RankRecording:
    """One rank's trace with its arguments."""

    def __init__(self, path: Path) -> None:
        """Read them. Raises ReplayError: the arguments were not recorded, or not all of them."""
        self.trace: Trace = read_trace(path)
        folder = arguments_path(path)
        if not folder.is_dir():
            raise ReplayError(
                f"{path} was recorded without its arguments: record with record(..., recorder='python', arguments=True)"
            )
        self._values: Bytes = np.fromfile(folder / VALUES, np.uint8)
        self._calls = _read_lines(folder / CALLS)
        self._storages = self.trace.storages
        self._tensors = _read_lines(folder / TENSORS)
        self._works = {told["call"]: told["after"] for told in _read_lines(folder / WORKS)}
        num_events = sum(len(thread.events) for thread in self.trace.threads)
        if len(self._calls) != num_events or len(self._tensors) != len(self.trace.named_tensors):
            raise ReplayError(f"{folder} is incomplete: it has {len(self._calls)} of {num_events} calls; record again")

    @property
    def rank(self) -> int:
        """The rank."""
        return self.trace.rank

    @cached_property
    def starts(self) -> dict[int, int]:
        """Which event began when, on the rank's own clock."""
        times = [] if not self.trace.threads else self._thread.events["start_ns"].tolist()
        starts = {time: index for index, time in enumerate(times)}
        if len(starts) != len(times):
            raise ReplayError(f"{self.trace.path}: two operators began in the same nanosecond; record again")
        return starts

    @property
    def _thread(self) -> ThreadTrace:
        return self.trace.threads[0]  # the Python recorder writes one

    def call(self, index: int) -> Call:
        """Return the call of an event."""
        event, told = self._thread.events[index], self._calls[index]
        op = self.trace.ops[int(event["op"])]
        name = f"{op['name']}.{op['overload'] or 'default'}"
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.rpartition(".")
        try:
            function = getattr(getattr(getattr(torch.ops, namespace), base), overload)
        except AttributeError as error:
            raise ReplayError(f"the operator {name} is not known here: import the library that defines it") from error
        first, num_inputs = int(event["first_ref"]), int(event["num_inputs"])
        refs = self._thread.refs[first : first + num_inputs + int(event["num_outputs"])]
        numbers = [*told["input_storages"], *told["result_storages"]]
        rows = refs[["offset_bytes", "storage", "layout"]][
            : len(numbers)
        ].tolist()  # what a communication makes is beyond
        named = [self._ref(row, number) for row, number in zip(rows, numbers, strict=True)]
        left = self._works.get(index, told["after"])
        before, after, results = (tuple(map(self._elements, one)) for one in (told["inputs"], left, told["results"]))
        arguments = {key: _decode(value) for key, value in told["arguments"].items()}
        comm = self._comm(event)
        if comm is None:
            aliases = [argument.alias_info for argument in function._schema.arguments]
            declared = frozenset(
                number
                for number, argument in enumerate(refs["arg"][:num_inputs].tolist())
                if aliases[argument] is not None and aliases[argument].is_write
            )
        else:
            declared = frozenset(slot.number for slot in slots_of(written_by(op["name"], arguments, comm)))
        changed = frozenset(
            number
            for number, (old, new) in enumerate(zip(before, after, strict=True))
            if old is not None and new is not None and not np.array_equal(old, new)
        )
        return Call(
            rank=self.rank,
            op=name,
            function=function,
            arguments=arguments,
            inputs=tuple(named[:num_inputs]),
            outputs=tuple(named[num_inputs : num_inputs + len(results)]),
            scratch=tuple(named[num_inputs + len(results) :]),
            declared=declared,
            written=declared | changed,
            before=before,
            after=after,
            results=results,
            returned=tuple(told["returned"]),
            random=self._elements(told["random"]),
            num_threads=int(told["threads"]),
            is_grad_enabled=bool(told["grad"]),
            comm=comm,
        )

    def _comm(self, event: np.void) -> Comm | None:
        if not event["comm"]:
            return None
        row = self._thread.comms[int(event["comm"]) - 1]
        group = self.trace.groups[int(row["group"])]
        return Comm(rank=int(group["rank"]), size=int(group["size"]), peer=int(row["peer"]))

    def named_values(self) -> list[NamedValue]:
        """Return what the program named, in order."""
        found = []
        for told, value in zip(self.trace.named_tensors, self._tensors, strict=True):
            ref = self._ref((told["offset_bytes"], told["storage"], told["layout"]), value["storage"])
            elements = self._elements(value["value"])
            if ref is not None and elements is not None:
                found.append(
                    NamedValue(
                        name=told["name"],
                        role=told["role"],
                        is_final=bool(told.get("final")),
                        ref=ref,
                        elements=elements,
                    )
                )
        return found

    def _ref(self, row: tuple[int, int, int], number: int) -> Ref | None:
        offset, storage, layout = row
        if storage == 0:
            return None
        _, address, num_bytes = self._storages[storage]
        return Ref((self.rank, number), num_bytes, address, self.trace.layouts[layout], offset)

    def _elements(self, value: Sequence[int] | None) -> Bytes | None:
        return None if value is None else self._values[value[0] : value[0] + value[1]]


def written_by(op: str, arguments: Mapping[str, Any], comm: Comm) -> Any:
    """Return what of its arguments a communication writes on this rank."""
    name = op.removeprefix("c10d::")
    is_root = comm.rank == comm.peer
    if name == "broadcast_" and is_root:
        return []
    return [value for key, value in arguments.items() if key in _WRITTEN.get(name, ())]


def slots_of(value: Any) -> list[Slot]:
    """Return the tensors' places in an argument."""
    if isinstance(value, list):
        return [slot for item in value for slot in slots_of(item)]
    return [value] if isinstance(value, Slot) else []


def _read_lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return Slot(value["tensor"], value["conj"], value["neg"])
    ((kind, content),) = value.items()
    if kind == "torch":
        return getattr(torch, content)
    if kind == "complex":
        return complex(*content)
    if kind == "generator":
        return torch.Generator(content)
    if kind == "object":
        return None  # process groups and what they reduce by: communications are carried out here
    return _PLAIN[kind](content)
