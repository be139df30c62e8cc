"""Join the parts by their communications: one node for a collective, one edge for a message.

A collective takes the place of its participants' records: each rank's producers lead into it, it leads to each rank's
consumers. Each participant's time is split at the arrival of the last one; what participants do not say alike (the
microbatch of a gradient reduction, say) is unknown of the whole. A message joins its send to its receive by an edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from truedag.tracer.merge.align import Clock, Span, split_waiting
from truedag.tracer.merge.comms import CommRecord
from truedag.tracer.merge.labels import NUMBERS, TEXTS, Label, LabelColumns
from truedag.tracer.merge.match import Collective, Matched, Message
from truedag.tracer.merge.part import NO_TIME, Part
from truedag.tracer.merge.rank_part import short_name

Group = tuple[str, tuple[int, ...]]  # its name, its ranks
ALL_RANKS = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankComms:
    """What joining needs of a rank: its communications (by local node), and what is told once."""

    told: Mapping[str, Any]
    stage: int | None
    num_nodes: int
    comms: list[CommRecord]
    start_ns: Mapping[int, int]
    labels: Mapping[int, Label]
    shape: Mapping[int, int]

    def text(self, node: int, name: str) -> str:
        """Return the `inputs` or `outputs` of a communication."""
        found: str = self.told["shapes"][name][self.shape[node]]
        return found


@dataclass(slots=True, kw_only=True)
class CollectiveNode:
    """The node of a collective, times on the graph's clock."""

    op: str
    label: str
    belonging: Label
    sort_ns: int
    stage: int | None
    start_ns: int
    end_ns: int | None
    bytes_read: int
    bytes_written: int
    inputs: str
    outputs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageEdge:
    """A message, from one rank's node to another's."""

    source: int
    send: int
    destination: int
    receive: int
    num_bytes: int
    dtype: str | None
    shape: list[int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """A rank's part in a communication; the node is that rank's, or of `ALL_RANKS` a collective."""

    owner: int
    node: int
    rank: int
    group: Group
    seq: int
    arrive_ns: int
    start_ns: int | None
    end_ns: int | None
    send_bytes: int
    recv_bytes: int
    waited_ns: int | None


@dataclass(slots=True, kw_only=True)
class Joined:
    """The communications of all ranks, joined."""

    axes: Mapping[Group, str]
    collectives: list[CollectiveNode] = field(default_factory=list)
    places: dict[int, dict[int, int]] = field(default_factory=dict)  # rank -> local node -> collective
    messages: list[MessageEdge] = field(default_factory=list)
    participants: list[Participant] = field(default_factory=list)


def read_comms_of(part: Part) -> RankComms:
    """Take from a part what joining needs of it."""
    nodes = [record.node for record in part.comms]
    here = np.array(nodes, np.int64)
    rows = {name: column[here] for name, column in part.nodes.items()}
    columns = LabelColumns(columns={name: rows[name] for name in (*NUMBERS, *TEXTS)}, texts=part.told["texts"])
    return RankComms(
        told=part.told,
        stage=part.stage,
        num_nodes=part.num_nodes,
        comms=part.comms,
        start_ns=dict(zip(nodes, rows["sort_ns"].tolist(), strict=True)),
        labels=dict(zip(nodes, columns.labels(), strict=True)),
        shape=dict(zip(nodes, rows["shape"].tolist(), strict=True)),
    )


def join_communications(ranks: Mapping[int, RankComms], matched: Matched, clocks: Mapping[int, Clock]) -> Joined:
    """Make the nodes, edges and participants of what was matched."""
    out = Joined(axes=_told_axes(ranks), places={rank: {} for rank in ranks})
    for collective in matched.collectives:
        _add_collective(out, collective, ranks, clocks)
    for message in matched.messages:
        _join_message(out, message, ranks, clocks)
    for unmatched in matched.unmatched:
        # Each record is a node of its own, with what is known of it.
        for rank, record in unmatched.records.items():
            spans, _ = _spans({rank: record}, ranks, clocks)
            group = (record.group_name, record.group)
            _participate(out, rank, record.node, rank, group, unmatched.order, spans[rank], record)
    return out


def _told_axes(ranks: Mapping[int, RankComms]) -> dict[Group, str]:
    """Which axis each group is, by name and ranks, as any of its members told."""
    axes = {}
    for one in ranks.values():
        for told in one.told["group_ranks"]:
            if told.get("axis"):
                axes[told["name"], tuple(told["ranks"])] = str(told["axis"])
    return axes


def _add_collective(
    out: Joined, collective: Collective, ranks: Mapping[int, RankComms], clocks: Mapping[int, Clock]
) -> None:
    records = collective.records
    spans, last = _spans(records, ranks, clocks)
    group = (collective.group_name, collective.group)
    record = records[collective.group[0]]
    stages = {ranks[rank].stage for rank in collective.group}
    ends = [span.end_ns for span in spans.values() if span.end_ns != NO_TIME]
    sides = [(ranks[rank], one.node) for rank, one in records.items()]
    node = len(out.collectives)
    out.collectives.append(
        CollectiveNode(
            op=record.op,
            label=f"{short_name(record.op)} {out.axes.get(group, '')}".strip(),
            belonging=agree([ranks[rank].labels[one.node] for rank, one in records.items()]),
            sort_ns=last,
            stage=stages.pop() if len(stages) == 1 else None,
            start_ns=min(span.arrive_ns for span in spans.values()),
            end_ns=max(ends) if len(ends) == len(spans) and _comparable(spans, clocks) else None,
            bytes_read=sum(one.sent_bytes for one in records.values()),
            bytes_written=sum(one.received_bytes for one in records.values()),
            # As the first rank has them that has any: a broadcast's root receives nothing, the others send nothing.
            inputs=next((text for side, at in sides if (text := side.text(at, "inputs"))), ""),
            outputs=next((text for side, at in sides if (text := side.text(at, "outputs"))), ""),
        )
    )
    sequences = {one.backend_sequence for one in records.values()}
    sequence = sequences.pop() if len(sequences) == 1 and -1 not in sequences else collective.order
    for rank, span in spans.items():
        out.places[rank][records[rank].node] = node
        _participate(out, ALL_RANKS, node, rank, group, sequence, span, records[rank])


def _spans(
    records: Mapping[int, CommRecord], ranks: Mapping[int, RankComms], clocks: Mapping[int, Clock]
) -> tuple[dict[int, Span], int]:
    """Every participant's time, and when the last one arrived.

    Ends are NO_TIME where the backend did not tell, starts where the participants' clocks cannot be compared.
    """
    arrivals, ends = {}, {}
    for rank, record in records.items():
        clock, begin = clocks[rank], record.work_start_ns
        # A backend may announce a message's work when it is on its way already; not so the kernel that sends it.
        if begin is None or (record.op == "c10d::send" and ranks[rank].told["gpu_clock"] is None):
            begin = ranks[rank].start_ns[record.node]
        arrivals[rank] = clock.at(begin)
        if record.work_end_ns is not None:
            ends[rank] = clock.at(record.work_end_ns)
    last = max(arrivals.values())
    comparable = _comparable(records, clocks)
    if comparable and len(ends) == len(records):
        return split_waiting(arrivals, ends), last
    start = last if comparable else NO_TIME
    return {
        rank: Span(arrive_ns=arrive, start_ns=start, end_ns=ends.get(rank, NO_TIME))
        for rank, arrive in arrivals.items()
    }, last


def _comparable(ranks: Iterable[int], clocks: Mapping[int, Clock]) -> bool:
    """Whether times of these ranks can be compared: one rank's always, several ranks' if their errors are known."""
    some = list(ranks)
    return len(some) == 1 or all(clocks[rank].error_ns is not None for rank in some)


def agree(labels: Sequence[Label]) -> Label:
    """What all participants say alike; what they do not is unknown, and so is a gradient."""
    said = {}
    for one in fields(Label):
        values = [getattr(label, one.name) for label in labels]
        said[one.name] = values[0] if all(value == values[0] for value in values) else None
    return Label(**{**said, "gradient": None})


def _participate(
    out: Joined, owner: int, node: int, rank: int, group: Group, sequence: int, span: Span, record: CommRecord
) -> None:
    out.participants.append(
        Participant(
            owner=owner,
            node=node,
            rank=rank,
            group=group,
            seq=sequence,
            arrive_ns=span.arrive_ns,
            start_ns=None if span.start_ns == NO_TIME else span.start_ns,
            end_ns=None if span.end_ns == NO_TIME else span.end_ns,
            send_bytes=record.sent_bytes,
            recv_bytes=record.received_bytes,
            waited_ns=record.waited_ns,
        )
    )


def _join_message(out: Joined, message: Message, ranks: Mapping[int, RankComms], clocks: Mapping[int, Clock]) -> None:
    """Join a send's node to its receive's, and add both as participants."""
    told, send, receive = ranks[message.destination].told, message.send, message.receive
    layout = told["shapes"]["first_output"][ranks[message.destination].shape[receive.node]]
    dtype, shape = next(((dtype, shape) for number, dtype, shape in told["layouts"] if number == layout), (None, None))
    out.messages.append(
        MessageEdge(
            source=message.source,
            send=send.node,
            destination=message.destination,
            receive=receive.node,
            num_bytes=receive.received_bytes,
            dtype=dtype,
            shape=shape,
        )
    )
    # Two records of one rank sending to itself are one participant each.
    send_spans, _ = _spans({message.source: send}, ranks, clocks)
    receive_spans, _ = _spans({message.destination: receive}, ranks, clocks)
    send_span, receive_span = send_spans[message.source], receive_spans[message.destination]
    last = max(send_span.arrive_ns, receive_span.arrive_ns)
    comparable = _comparable({message.source, message.destination}, clocks)
    if comparable and NO_TIME not in (send_span.end_ns, receive_span.end_ns):
        # A backend may tell the end of a send only when it is waited for: what was received had left before.
        end = max(min(send_span.end_ns, receive_span.end_ns), send_span.arrive_ns)
        send_span = replace(send_span, end_ns=end)
    for rank, span, record in (
        (message.source, send_span, replace(send, received_bytes=0)),
        (message.destination, receive_span, replace(receive, sent_bytes=0)),
    ):
        start = last if span.end_ns == NO_TIME else min(last, span.end_ns)
        start = start if comparable else NO_TIME
        group = (message.group_name, message.group)
        _participate(out, rank, record.node, rank, group, message.order, replace(span, start_ns=start), record)


def joined_nodes(joined: Joined, rank: int, num_nodes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return [nodes] the collective that took each of a rank's nodes' place, -1: none."""
    found = np.full(num_nodes, -1)
    places = joined.places[rank]
    found[list(places)] = list(places.values())
    return found
