"""What operators do to memory, found for all events at once, is what one finds event by event."""

import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from handmade_trace import GROUP, call, chunk, entry, header, records
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.merge.accesses import CUT, EMPTY
from truedag.tracer.merge.nodes import RankNodes, extract_nodes
from truedag.tracer.record.format import NO_SEQUENCE, SCRATCH_ARG, ChunkKind, EventFlags, TableKind
from truedag.tracer.record.trace import read_trace

# Each with the arguments and the results that are tensors.
OPS = [
    ("aten::relu", "(Tensor self) -> Tensor", 1, 1),
    ("aten::add_", "(Tensor(a!) self, Tensor other) -> Tensor(a!)", 2, 1),
    ("aten::add", "(Tensor self, Tensor other, *, Tensor(a!) out) -> Tensor(a!)", 3, 1),
    ("aten::copy_", "(Tensor(a!) self, Tensor src) -> Tensor(a!)", 2, 1),
    ("aten::empty", "(int[] size) -> Tensor", 0, 1),
    ("aten::zeros_like", "(Tensor self) -> Tensor", 1, 1),
    ("aten::native_batch_norm", "(Tensor a, Tensor? b, Tensor? c, Tensor? d, Tensor? e) -> (Tensor, Tensor)", 5, 2),
    ("aten::_foreach_add_", "(Tensor(a!)[] self, Tensor other) -> ()", 9, 0),
    ("aten::lift_fresh", "(Tensor(a) self) -> Tensor(a)", 1, 1),
    ("aten::reshape", "(Tensor(a) self) -> Tensor(a)", 1, 1),
    ("mine::mix", "(Tensor(a!) x, Tensor y) -> (Tensor(a!), Tensor)", 2, 2),
    ("mine::plain", "(Tensor x, Tensor y) -> Tensor", 2, 1),
    ("c10d::allreduce_", "", 1, 2),
    ("c10d::broadcast_", "", 1, 1),
]  # fmt: skip
NUM_STORAGES, NUM_TENSORS = 4, 12
Event = tuple[int, list[int], list[int], list[tuple[int, int]], list[tuple[int, int]], int]


@st.composite
def events(draw: st.DrawFn) -> Event:
    """An operator, its tensors, which argument or result each is, and its flags."""
    op = draw(st.integers(0, len(OPS) - 1))
    name, _, num_inputs, num_outputs = OPS[op]
    tensors = st.integers(0, NUM_TENSORS)
    is_list = "foreach" in name
    slots = [(0, i) if is_list and i < num_inputs - 1 else (1 if is_list else i, 0) for i in range(num_inputs)]
    slots = [slot for slot in slots if draw(st.integers(0, 9))]
    if draw(st.integers(0, 9)) == 0:
        slots += slots[:1]  # an argument that was handed over twice
    results = [(i if name != "c10d::allreduce_" else SCRATCH_ARG, 0) for i in range(num_outputs)]
    inputs = [draw(tensors) for _ in slots]
    outputs = [draw(st.sampled_from(inputs) if inputs and draw(st.booleans()) else tensors) for _ in results]
    flags = EventFlags.COMM if name.startswith("c10d") else EventFlags.FAILED if draw(st.integers(0, 9)) == 0 else 0
    return op, inputs, outputs, slots, results, int(flags)


def write(path: Path, program: list[Event]) -> None:
    entries = [entry(TableKind.META, 0, b'{"rank":0,"world_size":1}'), entry(TableKind.GROUP, 1, GROUP)]
    for number, (name, schema, _, _) in enumerate(OPS, 1):
        told = f'{{"name":"{name}","overload":"","schema":"{name}{schema}"}}'
        entries.append(entry(TableKind.OP, number, told.encode()))
    layouts = [(8,), (4,), (0,)]
    for number, (size,) in enumerate(layouts, 1):
        entries.append(entry(TableKind.LAYOUT, number, struct.pack("<4i2q", 0, 0, 1, 1, size, 1)))
    rows, refs, comms = [], [], []
    for number, (op, inputs, outputs, slots, results, flags) in enumerate(program, 1):
        entries.append(call(number, op + 1, slots, results))
        rows.append((1000 * number, 10, number, NO_SEQUENCE, NO_SEQUENCE, 0, 0, 0, flags))
        refs += [(tensor,) for tensor in (*inputs, *outputs)]
        if flags & EventFlags.COMM:
            comms.append((len(comms), len(comms), 1, number % 2, -1, 0, 0, len(comms) + 1))
    tensors = [(4 * (i % 2) if i % 3 == 1 else 0, 1 + i % NUM_STORAGES, 1 + i % 3) for i in range(NUM_TENSORS)]
    path.write_bytes(
        header()
        + chunk(ChunkKind.TABLES, b"".join(entries))
        + records(ChunkKind.STORAGES, *[(0x50 + 16 * i, 0xA0 + 16 * i, 8) for i in range(NUM_STORAGES)])
        + records(ChunkKind.TENSORS, *tensors)
        + records(ChunkKind.REFS, *refs)
        + records(ChunkKind.COMMS, *comms)
        + records(ChunkKind.EVENTS, *rows)
    )


def told(nodes: RankNodes) -> tuple[object, ...]:
    accesses = nodes.accesses
    columns = (accesses.node, accesses.kind, accesses.storage, accesses.layout, accesses.offset)
    return np.stack(columns, axis=1).tolist(), nodes.op, nodes.inputs, nodes.outputs, nodes.comms


@settings(max_examples=300, deadline=None)
@given(st.lists(events(), min_size=1, max_size=12))
def test_all_events_at_once_say_what_each_says_by_itself(program: list[Event]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        write(path, program)
        trace = read_trace(path)
        assert told(extract_nodes(trace)) == told(extract_nodes(trace, exact=True))


def test_the_programs_hold_what_is_rare(tmp_path: Path) -> None:
    """An operator that fills its argument unsaid, a resized result, memory from outside, and memory without content."""
    program: list[Event] = [
        (4, [], [1], [], [(0, 0)], 0),
        (11, [2, 3], [2], [(0, 0), (1, 0)], [(0, 0)], 0),
        (1, [1, 2], [4], [(0, 0), (1, 0)], [(0, 0)], 0),
        (8, [3], [3], [(0, 0)], [(0, 0)], 0),
        (0, [3], [4], [(0, 0)], [(0, 0)], 0),
    ]
    write(tmp_path / "trace", program)
    nodes = extract_nodes(read_trace(tmp_path / "trace"))
    assert nodes.op == ["aten::empty", "mine::plain", "aten::add_", "aten::relu"]
    assert {EMPTY, CUT} <= set(nodes.accesses.kind.tolist())
    assert told(nodes) == told(extract_nodes(read_trace(tmp_path / "trace"), exact=True))
