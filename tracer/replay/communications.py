"""Carry out a communication on the values of all its participants, as one function.

Which reduction was asked for cannot be seen from Python: it is taken to be the one that gives every participant what
it was left with, a sum where several do. A sum is added up in the order of the ranks; of two ranks that is what any
backend does, of more a backend may add in another order and round otherwise (gloo's ring does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from truedag.tracer.errors import ReplayError
from truedag.tracer.replay.calling import Difference, Storages, Value, agrees
from truedag.tracer.replay.calls import Call, Slot, slots_of
from truedag.tracer.replay.memory import Bytes, bytes_of, memory_of, tensor_in, window

MESSAGE = (-1, 0)  # where a send leaves what it sends

_Tensors = list[torch.Tensor]
_REDUCTIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def communicate(calls: Sequence[Call], storages: Storages, message: Bytes | None) -> tuple[Value, set[Difference]]:
    """Carry out a communication; return what it left everywhere, and which participants' it differs from.

    Args:
        calls: the participants'.
        storages: memory for their arguments, filled; it is worked in.
        message: of a receive, what it is sent.

    Raises:
        ReplayError: this communication is not known here.
        RuntimeError: what it is given does not fit.
    """
    parts = sorted((_Part(call, storages) for call in calls), key=lambda part: part.rank)
    name = calls[0].op.removeprefix("c10d::").rpartition(".")[0]
    value: Value = {}
    if name == "send":
        ref = calls[0].inputs[0]
        assert ref is not None
        value[MESSAGE] = window(memory_of(storages[ref.key]), ref.layout, ref.offset).reshape(-1).copy()
        sent = calls[0].before[0]
        return value, set() if sent is None or bytes(value[MESSAGE]) == bytes(sent) else {("after", 0)}
    if name in ("recv_", "recv_any_source_"):
        ref = calls[0].inputs[0]
        if message is None or ref is None:
            raise RuntimeError("nothing is sent to it")
        place = window(memory_of(storages[ref.key]), ref.layout, ref.offset)
        place[...] = message.reshape(place.shape)
    elif name in _REDUCING:
        combine = _reduce(_REDUCING[name], parts)
        if name in _SCATTERED:
            value |= _leave_whole(parts, _SCATTERED[name], combine)
    elif name in _MOVING:
        for target, content in _MOVING[name](parts):
            target.copy_(content)
    elif name not in _IDLE:
        raise ReplayError(
            f"{calls[0].op} cannot be carried out here: it is not among the communications that are known"
        )
    for part in parts:
        for number in part.call.written:
            written = part.call.inputs[number]
            if written is not None:
                value[written.key] = bytes_of(storages[written.key])
    return value, {("after", i) for i, part in enumerate(parts) if not part.is_as_recorded()}


class _Part:
    """One participant: its arguments as tensors."""

    def __init__(self, call: Call, storages: Storages) -> None:
        assert call.comm is not None
        self.call = call
        self.rank = call.comm.rank
        self.root = call.comm.peer
        self._storages = storages
        self._tensors = [None if r is None else tensor_in(storages[r.key], r.layout, r.offset) for r in call.inputs]

    def __getitem__(self, name: str) -> _Tensors:
        """The tensors of an argument."""
        return [self._tensor(slot) for slot in slots_of(self.call.arguments.get(name))]

    def sizes(self, name: str) -> list[int]:
        """An argument that is a list of numbers."""
        return [int(size) for size in self.call.arguments.get(name) or ()]

    def is_as_recorded(self) -> bool:
        """Whether what it was to be given is what it was given, as far as that was kept."""
        for number in self.call.declared:
            ref, elements = self.call.inputs[number], self.call.after[number]
            if (
                ref is not None
                and elements is not None
                and not agrees(memory_of(self._storages[ref.key]), ref, elements)
            ):
                return False
        return True

    def _tensor(self, slot: Slot) -> torch.Tensor:
        tensor = self._tensors[slot.number]
        if tensor is None:
            raise ReplayError(f"{self.call.op} has a tensor that has no memory of its own")
        return tensor


_Moves = list[tuple[torch.Tensor, torch.Tensor]]  # what is to become what


def _broadcast(parts: Sequence[_Part]) -> _Moves:
    root = next(part for part in parts if part.rank == part.root)
    return [pair for part in parts if part is not root for pair in zip(part["tensors"], root["tensors"], strict=True)]


def _all_gather_base(parts: Sequence[_Part]) -> _Moves:
    whole = torch.cat([part["input_tensor"][0].reshape(-1) for part in parts])
    return [(part["output_tensor"][0], whole.reshape(part["output_tensor"][0].shape)) for part in parts]


def _all_gather(parts: Sequence[_Part]) -> _Moves:
    inputs = [part["input_tensors"][0] for part in parts]
    return [pair for part in parts for pair in zip(part["output_tensors"], inputs, strict=True)]


def _all_gather_coalesced(parts: Sequence[_Part]) -> _Moves:
    inputs = [tensor for part in parts for tensor in part["input_list"]]
    return [pair for part in parts for pair in zip(part["output_lists"], inputs, strict=True)]


def _all_gather_base_coalesced(parts: Sequence[_Part]) -> _Moves:
    columns = zip(*(part["inputs"] for part in parts), strict=True)
    wholes = [torch.cat([tensor.reshape(-1) for tensor in column]) for column in columns]
    return [
        (output, whole.reshape(output.shape))
        for part in parts
        for output, whole in zip(part["outputs"], wholes, strict=True)
    ]


def _gather(parts: Sequence[_Part]) -> _Moves:
    inputs = [part["input_tensors"][0] for part in parts]
    roots = [part for part in parts if part.rank == part.root]
    return [pair for root in roots for pair in zip(root["output_tensors"], inputs, strict=True)]


def _scatter(parts: Sequence[_Part]) -> _Moves:
    root = next(part for part in parts if part.rank == part.root)
    return list(zip([part["output_tensors"][0] for part in parts], root["input_tensors"], strict=True))


def _all_to_all_base(parts: Sequence[_Part]) -> _Moves:
    pieces = []
    for part in parts:
        tensor = part["input"][0]
        sizes = part.sizes("input_split_sizes") or [len(tensor) // len(parts)] * len(parts)
        pieces.append(torch.split(tensor, sizes))
    return [(part["output"][0], torch.cat([piece[i] for piece in pieces])) for i, part in enumerate(parts)]


def _all_to_all(parts: Sequence[_Part]) -> _Moves:
    inputs = [part["input_tensors"] for part in parts]
    return [
        pair
        for i, part in enumerate(parts)
        for pair in zip(part["output_tensors"], [one[i] for one in inputs], strict=True)
    ]


_MOVING: Mapping[str, Callable[[Sequence[_Part]], _Moves]] = {
    "broadcast_": _broadcast,
    "_allgather_base_": _all_gather_base,
    "allgather_": _all_gather,
    "allgather_coalesced_": _all_gather_coalesced,
    "allgather_into_tensor_coalesced_": _all_gather_base_coalesced,
    "gather_": _gather,
    "scatter_": _scatter,
    "alltoall_base_": _all_to_all_base,
    "alltoall_": _all_to_all,
}
_IDLE = ("barrier", "monitored_barrier_")

_Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _fold(tensors: Sequence[torch.Tensor], combine: _Combine) -> torch.Tensor:
    whole = tensors[0].clone()
    for other in tensors[1:]:
        whole = combine(whole, other)
    return whole


def _all_reduce(parts: Sequence[_Part], combine: _Combine) -> _Moves:
    columns = zip(*(part["tensors"] for part in parts), strict=True)
    return [(tensor, whole) for column in columns for whole in (_fold(column, combine),) for tensor in column]


def _reduce_to_root(parts: Sequence[_Part], combine: _Combine) -> _Moves:
    """Gloo works in the tensors of the others too, and of two ranks leaves the whole in both."""
    whole = _fold([part["tensors"][0] for part in parts], combine)
    return [(part["tensors"][0], whole) for part in parts]


def _reduce_scatter_base(parts: Sequence[_Part], combine: _Combine) -> _Moves:
    pieces = _fold([part["input_tensor"][0] for part in parts], combine).reshape(-1).chunk(len(parts))
    outputs = [part["output_tensor"][0] for part in parts]
    return [(output, piece.reshape(output.shape)) for output, piece in zip(outputs, pieces, strict=True)]


def _reduce_scatter_base_coalesced(parts: Sequence[_Part], combine: _Combine) -> _Moves:
    moves: _Moves = []
    columns = zip(*(part["inputs"] for part in parts), strict=True)
    outputs = zip(*(part["outputs"] for part in parts), strict=True)
    for column, targets in zip(columns, outputs, strict=True):
        pieces = _fold(column, combine).reshape(-1).chunk(len(parts))
        moves += [(target, piece.reshape(target.shape)) for target, piece in zip(targets, pieces, strict=True)]
    return moves


def _reduce_scatter(parts: Sequence[_Part], combine: _Combine) -> _Moves:
    return [
        (part["output_tensors"][0], _fold([one["input_tensors"][i] for one in parts], combine))
        for i, part in enumerate(parts)
    ]


_REDUCING: Mapping[str, Callable[[Sequence[_Part], _Combine], _Moves]] = {
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "reduce_": _reduce_to_root,
    "_reduce_scatter_base_": _reduce_scatter_base,
    "reduce_scatter_": _reduce_scatter,
    "reduce_scatter_tensor_coalesced_": _reduce_scatter_base_coalesced,
}


# Of a reduce-scatter, the inputs. A backend that has none (gloo) reduces a copy of them and cuts it up later, with
# operators of the program's own thread.
_SCATTERED = {
    "_reduce_scatter_base_": "input_tensor",
    "reduce_scatter_": "input_tensors",
    "reduce_scatter_tensor_coalesced_": "inputs",
}


def _leave_whole(parts: Sequence[_Part], argument: str, combine: _Combine) -> Value:
    """What reduce-scatters left in memory of their own: the whole reduction, where it has the size of an input."""
    value: Value = {}
    for place in range(len(parts[0][argument])):
        whole = _fold([part[argument][place] for part in parts], combine).contiguous()
        for part in parts:
            for ref in part.call.scratch:
                if ref is not None and ref.key not in value and ref.storage_bytes == whole.nbytes:
                    value[ref.key] = bytes_of(whole.clone().untyped_storage())
                    break
    return value


def _reduce(carry_out: Callable[[Sequence[_Part], _Combine], _Moves], parts: Sequence[_Part]) -> _Combine:
    """Reduce by what gives the participants what they were left with; return by what."""
    first: _Moves | None = None
    given = [(target, target.clone()) for target, _ in carry_out(parts, torch.add)]
    for combine in _REDUCTIONS.values():
        moves = carry_out(parts, combine)
        first = first or moves
        for target, content in moves:
            target.copy_(content)
        if all(part.is_as_recorded() for part in parts):
            return combine
        for target, before in given:
            target.copy_(before)
    for target, content in first or ():
        target.copy_(content)
    return torch.add
