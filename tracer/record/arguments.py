"""What operators were given and gave, kept beside a trace so that they can be called again (`truedag.tracer.replay`).

A trace says which tensors an operator had; here is what was in them, and what else it was called with. It is kept by
the Python recorder when it is asked to, on the CPU, in a folder beside the trace, `rank-00000.arguments`:

- `calls.jsonl`: a line for each event of the trace, in their order;
- `tensors.jsonl`: a line for each named tensor of the trace, in their order;
- `works.jsonl`: a line for each communication whose end the backend told, in the order of their ends: its place among
  the calls and what its arguments then were, `{"call": n, "after": [value]}`;
- `values.bin`: bytes, each different value once. A value is [offset, length] in it: a tensor's elements in order.

A call is `{"arguments": {name: argument}, "inputs": [value], "after": [value], "results": [value], "returned": [...],
"random": value or null, "threads": n, "grad": bool, "input_storages": [n], "result_storages": [n]}`. `inputs` are the
tensors that go in, as the event has them, before the call, `after` the same ones after it (null: of a communication,
which may not be over by then), `results` those that come out, `returned` what came out and is no tensor, `random` the
state of the generator it drew from. Kernels may go by the number of threads, and by whether gradients are wanted
(`grad`). A storage has a number of its own, whatever was at its address before: what `merge` finds out from addresses
is held against that. `result_storages` go on with those of the tensors that a communication made for its own use. An
argument that is no plain number, text, list or null is an object of one key that says what it is.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import torch

CALLS, TENSORS, WORKS, VALUES = "calls.jsonl", "tensors.jsonl", "works.jsonl", "values.bin"

Value: TypeAlias = tuple[int, int]  # offset and length in values.bin


def arguments_path(trace: Path) -> Path:
    """Where the arguments of a trace are kept."""
    return trace.with_name(f"{trace.name.removesuffix('.trace')}.arguments")


@dataclass(slots=True)
class KeptCall:
    """A call while it runs."""

    told: dict[str, Any]
    tensors: list[torch.Tensor]
    number: int = -1  # among the calls, when it has been written


class ArgumentsFile:
    """Writes the folder. Its caller keeps two threads from writing at once."""

    def __init__(self, trace: Path) -> None:
        """Make the folder. Raises OSError."""
        folder = arguments_path(trace)
        folder.mkdir()
        # Without buffers: a forked child would write them once more.
        self._calls, self._tensors, self._works, self._values = (
            (folder / name).open("wb", buffering=0) for name in (CALLS, TENSORS, WORKS, VALUES)
        )
        self._process = os.getpid()
        self._known: dict[bytes, Value] = {}
        self._num_bytes = 0
        self._num_storages = 0
        self._num_calls = 0
        self._last_named: torch.Tensor | None = None

    def begin(self, func: Any, given: dict[str, Any]) -> KeptCall:
        """Keep what an operator is given, by the name of the argument, in the schema's order.

        Raises:
            TypeError: an argument is of a kind that cannot be kept.
        """
        tensors: list[torch.Tensor] = []
        arguments = {name: self._encode(value, tensors) for name, value in given.items()}
        told = {
            "arguments": arguments,
            "inputs": [self._keep(tensor) for tensor in tensors],
            "input_storages": [self._number(tensor) for tensor in tensors],
            "random": self._random_state(func, given),
            "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(),
        }
        return KeptCall(told, tensors)

    def finish(self, call: KeptCall, result: Any, made: Sequence[torch.Tensor], *, is_over: bool) -> None:
        """Keep what the operator gave, and what became of its arguments if it is over; write the call.

        `made` are tensors that a communication made for its own use.
        """
        outputs = result if isinstance(result, tuple) else (result,)
        results = list(flatten_tensors(outputs))
        after = [self._keep(tensor) if is_over else None for tensor in call.tensors]
        kept = [self._keep(tensor) if is_over else None for tensor in results]
        plain = [value for value in outputs if isinstance(value, bool | int | float)]
        numbers = [self._number(tensor) for tensor in (*results, *made)]
        told = call.told | {"after": after, "results": kept, "result_storages": numbers, "returned": plain}
        self._write(self._calls, _line(told))
        call.number = self._num_calls
        self._num_calls += 1

    def end(self, call: KeptCall) -> None:
        """Keep what became of a communication's arguments: it is over, and nobody has been told yet."""
        if not self._works.closed:
            after = [self._keep(tensor) for tensor in call.tensors]
            self._write(self._works, _line({"call": call.number, "after": after}))

    def see(self, tensor: torch.Tensor) -> None:
        """Hear of a tensor that is about to be named."""
        self._last_named = tensor

    def name(self) -> None:
        """Keep the tensor that was seen last: it was given a name."""
        if self._last_named is not None:
            told = {"value": self._keep(self._last_named), "storage": self._number(self._last_named)}
            self._write(self._tensors, _line(told))
        self._last_named = None

    def close(self) -> None:
        """Close the files."""
        for file in (self._calls, self._tensors, self._works, self._values):
            file.close()

    def _write(self, file: FileIO, content: bytes) -> None:
        """Write, unless this is a forked child: the recording is its parent's."""
        left = memoryview(content)
        while len(left) and os.getpid() == self._process:
            left = left[file.write(left) :]

    def _encode(self, value: Any, tensors: list[torch.Tensor]) -> Any:
        """Write an argument: what JSON has as it is, anything else as an object of one key that says what it is."""
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1, "conj": value.is_conj(), "neg": value.is_neg()}
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, list | tuple):
            return [self._encode(item, tensors) for item in value]
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.Generator):
            return {"generator": str(value.device)}  # its state is the call's `random`
        if isinstance(value, torch.UntypedStorage):
            return {"object": "storage"}  # set_ takes it, which moves nothing
        if isinstance(value, torch.ScriptObject):
            return {"object": value._type().qualified_name()}
        raise TypeError(f"an argument of type {type(value).__name__} cannot be kept")

    def _random_state(self, func: Any, given: dict[str, Any]) -> Value | None:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        generators = [value for value in given.values() if isinstance(value, torch.Generator)]
        return self._keep((generators or [torch.default_generator])[0].get_state())

    def _number(self, tensor: torch.Tensor) -> int:
        """Number a tensor's storage. No two ever have the same number, at whatever address they were."""
        storage: Any = tensor.untyped_storage()  # the same object as long as there is the storage
        mark = getattr(storage, "_truedag_number", None)
        if mark is None or mark[0] is not self:
            self._num_storages += 1
            mark = storage._truedag_number = (self, self._num_storages)
        return int(mark[1])

    def _keep(self, tensor: torch.Tensor) -> Value | None:
        """Put a tensor's elements among the values; None: it is on device meta and has none."""
        if tensor.is_meta:
            return None
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"a tensor of layout {tensor.layout} on {tensor.device} cannot be kept")
        tensor = tensor.detach()
        tensor = tensor.conj() if tensor.is_conj() else tensor  # as it lies in memory
        elements = (torch._neg_view(tensor) if tensor.is_neg() else tensor).contiguous()
        content = ctypes.string_at(elements.data_ptr(), elements.nbytes)  # numpy() would make its storage unresizable
        digest = blake2b(content, digest_size=16).digest()
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = (self._num_bytes, len(content))
            self._write(self._values, content)
            self._num_bytes += len(content)
        return known


def _line(told: dict[str, Any]) -> bytes:
    return json.dumps(told).encode() + b"\n"


def flatten_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from flatten_tensors(item)
