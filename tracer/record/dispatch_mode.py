"""The Python recorder: the records of `format.py`, written by a TorchDispatchMode.

It is the fallback where the native recorder cannot be compiled, and the oracle that tests hold it against. It is about
a hundred times slower, and differs from the native one in what a dispatch mode cannot help:

- the mode changes autograd: a gradient accumulates out of place (`add`) under it where it is in place (`add_`) without;
- forward operators of a node are found by autograd's counter after the operator, not before;
- which reduction a collective does cannot be unboxed in Python;
- a communication inside a library's operator is not seen;
- when a send or a receive really ended is unknown; of a collective, only when it was done;
- when memory was given back is not seen.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from truedag.tracer.record import format as layout
from truedag.tracer.record.arguments import ArgumentsFile, KeptCall
from truedag.tracer.record.counters import list_ranks
from truedag.tracer.record.format import ChunkKind, EventFlags, TableKind

_DTYPE_NUMBERS = {getattr(torch, name): number for number, name in layout.DTYPES.items() if hasattr(torch, name)}
_DEVICE_NUMBERS = {name: number for number, name in layout.DEVICES.items()}
_PEERS = frozenset({"root_rank", "src", "dst"})
_MARKS = frozenset({"profiler"})
_LONGEST_IN_NS = 0xFFFFFFFF
_TRANSPARENT = frozenset({"_c10d_functional", "c10d_functional"})  # what they call are the operators


@dataclass(slots=True)
class _Call:
    """An operator while it runs; `slots` are argument and element of each of its tensors."""

    refs: list[int] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    num_inputs: int = 0
    flags: int = 0
    sequence: int = layout.NO_SEQUENCE
    backward_sequence: int = layout.NO_SEQUENCE
    label: int = 0
    comm: tuple[int, ...] | None = None
    made: list[torch.Tensor] = field(default_factory=list)
    kept: KeptCall | None = None


class PythonRecorder:
    """Records the calling thread, and the threads autograd takes its state to, until stopped.

    With `arguments`, what every operator was given and gave is kept beside the trace (`arguments.py`).
    """

    def __init__(self, *, arguments: bool = False) -> None:
        self._keeps_arguments = arguments
        self._arguments: ArgumentsFile | None = None
        self._path: Path | None = None
        self._mode: _Mode | None = None
        self._tables: list[tuple[int, int, bytes]] = []
        self._records: dict[ChunkKind, list[tuple[Any, ...]]] = {}
        self._ops: dict[str, int] = {}
        self._layouts: dict[tuple[Any, ...], int] = {}
        self._storages: dict[tuple[int, int, int], int] = {}
        self._tensors: dict[tuple[int, int, int], int] = {}
        self._calls: dict[tuple[Any, ...], int] = {}
        self._num_comms = 0
        self._groups: dict[int, tuple[int, dist.ProcessGroup]] = {}  # kept: an address is given out again
        self._orders: dict[tuple[int, bool], int] = {}
        self._last_sequence = -1
        self._task_labels: dict[int, int] = {}  # the label when each backward pass began
        self._label = 0
        self._context = 0
        self._failure = ""
        self._lock = threading.RLock()  # autograd's threads record as well, into the same columns

    def start(self, path: str, max_bytes: int = 0, /) -> None:  # noqa: ARG002
        """Record this process into a new file, whatever its size. Raises RuntimeError."""
        self._path = Path(path)
        try:
            self._path.open("xb").close()
            self._arguments = ArgumentsFile(self._path) if self._keeps_arguments else None
        except OSError as error:
            raise RuntimeError(str(error)) from error
        self._records = {kind: [] for kind in layout.RECORDS}
        thread = {"autograd_thread": 0, "os_thread": threading.get_native_id(), "pthread": threading.get_ident()}
        self.write(TableKind.THREAD, 0, json.dumps(thread).encode())
        self._last_sequence = _next_sequence() - 1
        self._mode = _Mode(self.run)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> tuple[int, str]:
        """Stop and write the file; return the number of events and why it switched itself off, or ''."""
        if self._mode is None or self._path is None:
            raise RuntimeError("no recording is running")
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mode = None
        with self._lock:
            _write_file(self._path, self._records, self._tables)
            if self._arguments is not None:
                self._arguments.close()
                self._arguments = None
        self._groups.clear()
        return len(self._records[ChunkKind.EVENTS]), self._failure

    def write(self, kind: int, id: int, payload: bytes, /) -> None:  # noqa: A002
        """Add an entry to the tables."""
        self._tables.append((kind, id, payload))
        if self._arguments is not None and kind == TableKind.NAMED_TENSOR:
            self._arguments.name()

    def set_label(self, label: int, /) -> int:
        """Set the label and return the one before."""
        before, self._label = self._label, label
        return before

    def set_context(self, context: int, /) -> None:
        """Set the context."""
        self._context = context

    def watch_waits(self, work: type, /) -> None:
        """Nothing: a dispatch mode cannot tell which communication a work is of."""

    def unwatch_waits(self) -> None:
        """Nothing."""

    def open_region(
        self,
        _name: str,
        _overload: str,
        _schema: str,
        _inputs: Sequence[Any],
        _written: tuple[int, ...],
        _may_reuse: bool,
        /,
    ) -> bool:
        """Nothing is one for a dispatch mode: PyTorch does not run compiled graphs under it."""
        return False

    def close_region(self, _results: Sequence[Any] | None, /) -> None:
        """Never called."""

    def where(self, tensor: torch.Tensor, /) -> tuple[int, int, int]:
        """Return the tensor's storage, layout and offset in bytes."""
        with self._lock:
            offset, storage, layout_id = self._place_of(tensor)
            if self._arguments is not None:
                self._arguments.see(tensor)
        return storage, layout_id, offset

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and record it; what goes wrong in recording never reaches the program."""
        if func.namespace in _TRANSPARENT:
            return _run_under(_Mode(self.run), func, args, kwargs)
        call = None
        if not self._failure and func.namespace not in _MARKS:
            with self._shield(), self._lock:
                call = self._begin(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        start = time.monotonic_ns()
        result = _run_inside(func, args, kwargs, call.made) if call.comm is not None else func(*args, **kwargs)
        end = time.monotonic_ns()
        with self._shield(), self._lock:
            self._finish(func, call, result, start, end)
        return result

    @contextmanager
    def _shield(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the program is not at fault
            self._failure = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"truedag: recording stopped, the program runs on: {self._failure}\n")

    def _begin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        arguments = func._schema.arguments
        position = {argument.name: index for index, argument in enumerate(arguments)}
        given = dict(enumerate(args)) | {position[name]: value for name, value in kwargs.items()}
        call = _Call()
        for index in sorted(given):
            self._add(call, given[index], index)
        call.num_inputs = len(call.refs)
        self._place(call)
        if self._arguments is not None:
            call.kept = self._arguments.begin(func, {arguments[index].name: given[index] for index in sorted(given)})
        if func.namespace == "c10d" and "process_group" in position:
            call.comm = self._comm(func, {argument.name: given.get(index) for index, argument in enumerate(arguments)})
        return call

    def _finish(self, func: Any, call: _Call, result: Any, start: int, end: int) -> None:
        outputs = result if isinstance(result, tuple) else (result,)
        for index, value in enumerate(outputs):
            self._add(call, value, index)
        for element, tensor in enumerate(call.made):
            self._add_one(call, tensor, layout.SCRATCH_ARG, element)
        is_long = end - start > _LONGEST_IN_NS
        duration = min((end - start) >> 10, _LONGEST_IN_NS) if is_long else max(end - start, 0)
        flags = call.flags | is_long * EventFlags.LONG | (call.comm is not None) * EventFlags.COMM
        event = (start, duration, self._call(func, call), call.sequence, call.backward_sequence, 0, call.label,
                 self._context, int(flags))  # fmt: skip
        if call.kept is not None and self._arguments is not None:
            self._arguments.finish(call.kept, result, call.made, is_over=call.comm is None)
        if call.comm is not None:
            self._watch_work(outputs, func, call, start)
        if call.comm is not None:
            self._records[ChunkKind.COMMS].append(call.comm)
        self._records[ChunkKind.REFS].extend((ref,) for ref in call.refs)
        self._records[ChunkKind.EVENTS].append(event)

    def _place(self, call: _Call) -> None:
        """Say where in the program an operator runs, as far as autograd and the labels tell."""
        newest = _next_sequence() - 1
        if newest > self._last_sequence:
            self._last_sequence = newest
            call.sequence = newest & 0xFFFFFFFF
        call.label = self._label
        task = torch._C._current_graph_task_id()
        if task == -1:
            return
        # A label from around the backward pass says nothing of what runs in it; one set inside (recomputation) does.
        if self._task_labels.setdefault(task, self._label) == self._label:
            call.label = 0
        call.flags = int(EventFlags.IN_BACKWARD)
        node = torch._C._current_autograd_node()
        if node is not None and int(node._sequence_nr()) < 2**63:
            call.backward_sequence = int(node._sequence_nr()) & 0xFFFFFFFF

    def _op(self, func: Any) -> int:
        name = func._schema.name
        overload = func._schema.overload_name
        key = f"{name}.{overload}"
        known = self._ops.get(key)
        if known is None:
            known = self._ops[key] = len(self._ops) + 1
            told = {
                "name": name,
                "overload": overload,
                "schema": str(func._schema),
                "inplace_view": torch.Tag.inplace_view in func.tags,
            }
            self.write(TableKind.OP, known, json.dumps(told).encode())
        return known

    def _call(self, func: Any, call: _Call) -> int:
        head = (self._op(func), call.num_inputs, len(call.slots) - call.num_inputs)
        key = (head, *call.slots)
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = len(self._calls) + 1
            payload = np.array(head, "<u4").tobytes() + np.array(call.slots, "<u2").tobytes()
            self.write(TableKind.CALL, known, payload)
        return known

    def _add(self, call: _Call, value: Any, index: int) -> None:
        for element, tensor in enumerate(_tensors(value)):
            self._add_one(call, tensor, index, element)

    def _add_one(self, call: _Call, tensor: torch.Tensor, arg: int, element: int) -> None:
        place = self._place_of(tensor)
        number = 0
        if place[1]:
            number = self._tensors.setdefault(place, len(self._tensors) + 1)
            if number > len(self._records[ChunkKind.TENSORS]):
                self._records[ChunkKind.TENSORS].append(place)
        call.refs.append(number)
        call.slots.append((arg, element))

    def _place_of(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """The tensor's offset in bytes, storage and layout."""
        if tensor.layout is not torch.strided or tensor.is_nested:
            return 0, 0, 0
        storage = tensor.untyped_storage()
        place = (storage._cdata, 0 if tensor.is_meta else storage.data_ptr(), storage.nbytes())
        storage_id = self._storages.get(place)
        if storage_id is None:
            storage_id = self._storages[place] = len(self._storages) + 1
            self._records[ChunkKind.STORAGES].append(place)
        itemsize = tensor.element_size()
        key = (_DTYPE_NUMBERS[tensor.dtype], _DEVICE_NUMBERS[tensor.device.type], itemsize, tensor.ndim,
               *tensor.shape, *tensor.stride())  # fmt: skip
        layout_id = self._layouts.get(key)
        if layout_id is None:
            layout_id = self._layouts[key] = len(self._layouts) + 1
            payload = np.array(key[:4], "<i4").tobytes() + np.array(key[4:], "<i8").tobytes()
            self.write(TableKind.LAYOUT, layout_id, payload)
        return int(tensor.storage_offset()) * itemsize, storage_id, layout_id

    def _comm(self, func: Any, given: dict[str, Any]) -> tuple[int, ...]:
        group = dist.ProcessGroup.unbox(given["process_group"])
        group_id, _ = self._groups.get(id(group), (0, group))
        if not group_id:
            group_id = len(self._groups) + 1
            self._groups[id(group)] = (group_id, group)
            told = {
                "name": group.group_name,
                "description": group.group_desc,
                "rank": group.rank(),
                "size": group.size(),
                "backend": group.name(),
                "ranks": list(list_ranks(group)),
            }
            self.write(TableKind.GROUP, group_id, json.dumps(told).encode())
        p2p = func._schema.name in ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")
        order = self._orders.get((group_id, p2p), 0)
        self._orders[group_id, p2p] = order + 1
        peer = next((given[name] for name in given if name in _PEERS), -1)
        tag = given.get("tag", -1)
        asynchronous = p2p or bool(given.get("async_op", True))
        self._num_comms += 1
        return (_backend_sequence(group), order, group_id, peer, tag, -1, int(asynchronous), self._num_comms)

    def _watch_work(self, outputs: Sequence[Any], func: Any, call: _Call, start: int) -> None:
        handle = outputs[-1] if outputs else None
        if not isinstance(handle, torch.ScriptObject):
            return
        try:
            future = dist.Work.unbox(handle).get_future()
        except RuntimeError:  # sends and receives have none
            return
        op = self._op(func)
        # Not of this recorder: a backend's thread may be the last to let go of it, and must not take a group down.
        lock, works = self._lock, self._records[ChunkKind.WORKS]
        comm, kept, arguments = call.comm[-1] if call.comm else 0, call.kept, self._arguments

        def done(_: Any) -> None:
            end = time.monotonic_ns()
            with lock:
                works.append((start, end, comm, op))
                if kept is not None and arguments is not None:
                    arguments.end(kept)

        future.add_done_callback(done)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operator to a function, which runs it."""

    def __init__(self, run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            return NotImplemented  # tensors that answer themselves, like DTensor: the operators are what they call
        return self._run(func, args, kwargs or {})


def _run_inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[torch.Tensor]) -> Any:
    """Run a communication, and collect the tensors that it makes inside."""

    def collect(inner: Any, inner_args: tuple[Any, ...], inner_kwargs: dict[str, Any]) -> Any:
        result = inner(*inner_args, **inner_kwargs)
        made.extend(_tensors(result))
        return result

    return _run_under(_Mode(collect), func, args, kwargs)


def _run_under(mode: _Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator's kernel itself, past the dispatch mode, so that the operators inside it are seen."""
    device = next((tensor.device.type for value in args for tensor in _tensors(value)), "cpu")
    key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
    if not func.has_kernel_for_dispatch_key(key):
        key = torch._C.DispatchKey.CompositeExplicitAutograd
    with mode:
        return func._op_dk(key, *args, **kwargs)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _next_sequence() -> int:
    """The number that autograd gives its next node on this thread."""
    return int(torch._C._autograd._get_sequence_nr())


def _backend_sequence(group: dist.ProcessGroup) -> int:
    try:
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except RuntimeError:  # this backend does not count
        return -1


def _write_file(
    path: Path, records: dict[ChunkKind, list[tuple[Any, ...]]], tables: list[tuple[int, int, bytes]]
) -> None:
    header = np.zeros(layout.FILE_HEADER_BYTES, np.uint8)
    header[: layout.FILE_HEADER.itemsize] = np.array(
        [(layout.FILE_MAGIC, layout.FORMAT_VERSION, layout.FILE_HEADER_BYTES, 1)], layout.FILE_HEADER
    ).view(np.uint8)
    entries = bytearray()
    for kind, number, payload in tables:
        entries += np.array([(kind, number, len(payload), 0)], layout.ENTRY).tobytes()
        entries += payload + bytes(-len(payload) % 8)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(_chunk(ChunkKind.TABLES, 0, bytes(entries)))
        for kind, rows in records.items():
            if rows:
                body: NDArray[np.void] = np.array(rows, layout.RECORDS[kind])
                file.write(_chunk(kind, layout.RECORDS[kind].itemsize, body.tobytes()))


def _chunk(kind: ChunkKind, record_bytes: int, body: bytes) -> bytes:
    whole = -(-(layout.CHUNK.itemsize + len(body)) // layout.ALIGNMENT) * layout.ALIGNMENT
    header = np.zeros(1, layout.CHUNK)
    header["magic"], header["kind"], header["record_bytes"] = layout.CHUNK_MAGIC, kind, record_bytes
    header["bytes"], header["used"] = whole, len(body)
    return header.tobytes() + body + bytes(whole - layout.CHUNK.itemsize - len(body))
