"""Chakra execution traces: one file a rank, which Chakra's tools read and ASTRA-sim runs.

A file is a GlobalMetadata message and then one Node message for each operator and each communication that the rank was
in, in topological order, every message after its length. Data dependencies are the graph's data edges on that rank,
control dependencies its program order; parameters, inputs and outputs are no activities and are left out. Node numbers
are the graph's. comm_groups.json names the ranks of each group for ASTRA-sim, whose group numbers begin at 1.

Source: mlcommons/chakra, schema/protobuf/et_def.proto (field numbers) and its feeder (names of attributes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from truedag.tracer.export.timeline import COMMUNICATIONS, divide_ranks
from truedag.tracer.export.wire import bytes_field, number_field, packed_field, varint
from truedag.tracer.graph import Graph
from truedag.tracer.graph.tensor_types import read_tensors

SCHEMA_VERSION = "0.0.4"
_COMPUTE, _SEND, _RECEIVE, _COLLECTIVE = 4, 5, 6, 7
_TYPES = {"compute": _COMPUTE, "send": _SEND, "recv": _RECEIVE, "collective": _COLLECTIVE}
# CollectiveCommType, by the beginning of our labels; REDUCE_SCATTER is 7.
_COLLECTIVES = {
    "all-reduce": 0, "reduce": 1, "all-gather": 2, "gather": 3, "scatter": 4, "broadcast": 5, "all-to-all": 6,
    "reduce-scatter": 7, "barrier": 9,
}  # fmt: skip
_INT32, _INT64, _UINT64, _BOOL, _STRING = 7, 9, 13, 27, 29
_COLUMNS = ("node", "kind", "op", "label", "module", "layer", "microbatch", "expert", "phase", "step", "stream",
            "start_ns", "end_ns", "flops", "bytes_read", "bytes_written", "inputs", "outputs", "timing")  # fmt: skip
_DEPENDENCIES = ("data", "order")
_AT_ONCE = 500_000  # nodes that are read at once
_TOTALS = ("num_nodes", "num_data_dependencies", "num_order_dependencies", "num_unnamed_collectives",
           "num_open_messages")  # fmt: skip


def write_chakra(graph: Graph, folder: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write trace.RANK.et of every rank of the graph and comm_groups.json.

    Returns:
        How many nodes, dependencies on data and on order there are, over all ranks; how many collectives are of a kind
        that Chakra has no name for, which are operators there; and how many sends and receives have no other end in the
        graph, or in the part of it: whom they reach is not said, and they have no tag.

    Raises:
        OSError: a file cannot be written.
    """
    groups = graph.groups.select("group", "ranks").sort("group").collect()
    members = {str(group + 1): ranks for group, ranks in groups.iter_rows()}
    (folder / "comm_groups.json").write_text(json.dumps(members) + "\n", encoding="utf-8")
    messages = _number_messages(graph)
    total = dict.fromkeys(_TOTALS, 0)
    for read in _read(graph):
        show(f"writing rank {read.rank}")
        with (folder / f"trace.{read.rank}.et").open("wb") as file:
            _write(file.write, bytes_field(1, SCHEMA_VERSION) + bytes_field(2, _string("producer", "truedag")))
            for node in _write_nodes(read, messages):
                _write(file.write, node)
        total["num_nodes"] += len(read.nodes)
        total["num_data_dependencies"] += sum(map(len, read.data.values()))
        total["num_order_dependencies"] += sum(map(len, read.order.values()))
        total["num_unnamed_collectives"] += sum(
            kind == "collective" and _comm_type(label) is None
            for kind, label in read.nodes.select("kind", "label").iter_rows()
        )
        ends = read.nodes.filter(pl.col("kind").is_in(["send", "recv"]))["node"]
        total["num_open_messages"] += sum(node not in messages for node in ends)
    return total


@dataclass(frozen=True, slots=True)
class _Rank:
    """A rank's operators and the communications it was in; by node, what it follows from by data and by order."""

    rank: int
    nodes: pl.DataFrame
    data: Mapping[int, list[int]]
    order: Mapping[int, list[int]]


def _write(write: Callable[[bytes], Any], message: bytes) -> None:
    write(varint(len(message)) + message)


def _read(graph: Graph) -> Iterator[_Rank]:
    """Read ranks one after the other, the tables once for many of them."""
    sizes = dict(graph.nodes.group_by("rank").len().collect().iter_rows())
    batches = list(divide_ranks(graph.ranks.select("rank").collect()["rank"].sort().to_list(), sizes, _AT_ONCE))
    for ranks in batches:
        part = graph if len(batches) == 1 else graph.subgraph(ranks=ranks)
        nodes = _list_nodes(part, ranks)
        edges = _list_dependencies(part, nodes)
        own = nodes.partition_by("at", as_dict=True, include_key=False)
        dependencies = edges.partition_by("at", "kind", as_dict=True, include_key=False)
        for rank in ranks:
            follows = {
                kind: dict(dependencies[rank, kind].iter_rows()) if (rank, kind) in dependencies else {}
                for kind in _DEPENDENCIES
            }
            yield _Rank(rank, own.get((rank,), nodes.clear().drop("at")), follows["data"], follows["order"])


def _list_nodes(graph: Graph, ranks: Sequence[int]) -> pl.DataFrame:
    """List each rank's (`at`) operators, and the communications it was in, with what it gave to them."""
    met = graph.participants.filter(pl.col("rank").is_in(ranks)).select(
        "node", "group", "send_bytes", "recv_bytes", at="rank", met_start="start_ns", met_end="end_ns"
    )
    is_shared = pl.col("kind") == "collective"
    is_own = pl.col("kind").is_in([*_TYPES]) & ~is_shared & pl.col("rank").is_in(ranks)
    own = graph.nodes.filter(is_own).select(*_COLUMNS, at="rank").join(met, on=["node", "at"], how="left")
    shared = graph.nodes.filter(is_shared).select(_COLUMNS).join(met, on="node")
    # Waiting for others is what a simulator finds out: from the last arrival on, if that is known.
    is_met = pl.col("kind").is_in(COMMUNICATIONS) & pl.col("group").is_not_null()
    return (
        pl.concat([own, shared], how="diagonal")
        .with_columns(
            start_ns=pl.when(is_met).then("met_start").otherwise("start_ns"),
            end_ns=pl.when(is_met).then("met_end").otherwise("end_ns"),
        )
        .select("at", *_COLUMNS, "group", "send_bytes", "recv_bytes")
        .sort("at", "node")
        .collect()
    )


def _list_dependencies(graph: Graph, nodes: pl.DataFrame) -> pl.DataFrame:
    """Return what each node (`dst`) of a rank (`at`) follows from there, by edges of a kind."""
    here = nodes.lazy().select("at", "node")
    return (
        graph.edges.filter(pl.col("kind").is_in(_DEPENDENCIES))
        .select("kind", "src", "dst")
        .join(here.rename({"node": "src"}), on="src")
        .join(here.rename({"node": "dst"}), on=["dst", "at"], how="semi")
        .unique()
        .group_by("at", "kind", "dst")
        .agg(pl.col("src").sort())
        .collect()
    )


def _number_messages(graph: Graph) -> Mapping[int, tuple[int, int, int]]:
    """Return source, destination and tag of each end of a message; tags count the messages from one to the other."""
    ranks = graph.nodes.filter(pl.col("kind").is_in(["send", "recv"])).select("node", "rank")
    sent = graph.edges.filter(pl.col("kind") == "p2p").select("src", "dst").unique()
    pairs = (
        sent.join(ranks.rename({"node": "src", "rank": "source"}), on="src")
        .join(ranks.rename({"node": "dst", "rank": "target"}), on="dst")
        .sort("src")
        .with_columns(tag=pl.int_range(pl.len()).over("source", "target"))
        .collect()
    )
    numbers = {}
    for src, dst, *message in pairs.select("src", "dst", "source", "target", "tag").iter_rows():
        numbers[src] = numbers[dst] = (message[0], message[1], message[2])
    return numbers


def _write_nodes(read: _Rank, messages: Mapping[int, tuple[int, int, int]]) -> Iterator[bytes]:
    shared: dict[tuple[Any, ...], bytes] = {}
    for row in read.nodes.iter_rows(named=True):
        node, start, end = row["node"], row["start_ns"], row["end_ns"]
        label = row["kind"], row["op"], row["label"], row["module"], row["layer"], row["microbatch"], row["expert"]
        key = (*label, row["phase"], row["inputs"], row["outputs"], row["flops"], row["bytes_read"], row["stream"],
               row["group"], row["send_bytes"], row["recv_bytes"], row["step"], row["timing"])  # fmt: skip
        constant = shared.get(key)
        if constant is None:
            constant = shared[key] = _describe(row)
        times = b""
        if start is not None and end is not None:
            length = max(end - start, 0)
            times = number_field(6, max(start, 0) // 1000) + number_field(7, round(length / 1000))
            times += bytes_field(10, _number("start_ns", _INT64, start)) + bytes_field(
                10, _number("duration_ns", _INT64, length)
            )
        talk = b""
        if row["kind"] in ("send", "recv"):
            own = "comm_src" if row["kind"] == "send" else "comm_dst"
            told = dict(zip(("comm_src", "comm_dst", "comm_tag"), messages.get(node, ()), strict=False)) or {
                own: read.rank
            }
            talk = b"".join(bytes_field(10, _number(name, _INT32, value)) for name, value in told.items())
        yield (
            number_field(1, node)
            + constant
            + packed_field(4, read.order.get(node, ()))
            + packed_field(5, read.data.get(node, ()))
            + times
            + talk
        )


def _describe(row: Mapping[str, Any]) -> bytes:
    """Write what does not differ between the calls of an operator."""
    kind, comm_type = row["kind"], _comm_type(row["label"])
    is_named = kind != "collective" or comm_type is not None
    attributes = [
        _flag("is_cpu_op", is_set=kind == "compute" and row["stream"] < 0),
        _string("op", row["op"]),
        *(_string(name, row[name]) for name in ("module", "phase", "timing") if row[name]),
        *(_number(name, _INT64, row[name]) for name in ("layer", "microbatch", "expert", "step") if row[name] >= 0),
    ]
    if kind == "compute":
        attributes.append(_number("num_ops", _INT64, row["flops"] or 0))
        attributes.append(_number("tensor_size", _UINT64, (row["bytes_read"] or 0) + (row["bytes_written"] or 0)))
    else:
        size = row["recv_bytes"] if kind == "recv" else row["send_bytes"]
        attributes.append(_number("comm_size", _INT64, size or 0))
        if row["group"] is not None:
            attributes.append(_string("pg_name", str(row["group"] + 1)))
        if kind == "collective" and comm_type is not None:
            attributes.append(_number("comm_type", _INT64, comm_type))
    return b"".join(
        (
            bytes_field(2, row["label"]),
            number_field(3, _TYPES[kind] if is_named else _COMPUTE),
            _tensors(8, row["inputs"]),
            _tensors(9, row["outputs"]),
            *(bytes_field(10, attribute) for attribute in attributes),
        )
    )


def _comm_type(label: str) -> int | None:
    return _COLLECTIVES.get(label.split(" ", 1)[0])


def _tensors(field: int, types: str | None) -> bytes:
    """Write types of tensors, as PyTorch's execution traces do."""
    found = read_tensors(types or "")
    if not found:
        return b""
    shapes = json.dumps([sizes for _, sizes in found])
    names = json.dumps([f"Tensor({dtype})" for dtype, _ in found])
    return bytes_field(field, bytes_field(2, shapes) + bytes_field(3, names))


def _number(name: str, kind: int, value: int) -> bytes:
    return bytes_field(1, name) + number_field(kind, value)


def _flag(name: str, *, is_set: bool) -> bytes:
    return bytes_field(1, name) + number_field(_BOOL, int(is_set))


def _string(name: str, value: str) -> bytes:
    return bytes_field(1, name) + bytes_field(_STRING, value)
