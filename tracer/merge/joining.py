"""Put the joined communications into the graph: one node for a collective, one edge for a message.

A collective takes the place of its participants' records. Each participant's time is split at the arrival of the last
one; what participants do not say alike (the microbatch of a gradient reduction, say) is unknown of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.align import Clock, Span, split_waiting
from truedag.tracer.merge.columns import NO_TIME, P2P, Assembly, EdgeList
from truedag.tracer.merge.labels import Label
from truedag.tracer.merge.match import Collective, Matched, Message
from truedag.tracer.merge.nodes import CommRecord, describe_tensors
from truedag.tracer.merge.rank_graph import RankGraph


def told_axes(graphs: Sequence[RankGraph]) -> dict[tuple[str, tuple[int, ...]], str]:
    """Which axis each group is, by name and ranks, as any of its members told."""
    axes = {}
    for graph in graphs:
        for told in graph.nodes.trace.group_ranks.values():
            if told.get("axis"):
                axes[told["name"], tuple(told["ranks"])] = str(told["axis"])
    return axes


_SHORT = {
    "_allgather_base_": "all-gather", "allgather_": "all-gather", "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather", "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "alltoall_": "all-to-all", "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast", "reduce_": "reduce", "gather_": "gather", "scatter_": "scatter", "send": "send",
    "recv_": "receive", "recv_any_source_": "receive", "barrier": "barrier", "monitored_barrier_": "barrier",
}  # fmt: skip


def short_name(op: str) -> str:
    """Name an operator as people do: `aten::mm` is mm, `c10d::allreduce_` all-reduce."""
    namespace, _, name = op.rpartition("::")
    return _SHORT.get(name, name) if namespace == "c10d" else name


def add_collective(
    out: Assembly,
    collective: Collective,
    by_rank: Mapping[int, RankGraph],
    clocks: Mapping[int, Clock],
    axes: Mapping[tuple[str, tuple[int, ...]], str],
) -> int:
    """Add the node of a collective and its participants; return the node's place."""
    spans, last = _spans(collective.records, by_rank, clocks)
    record = collective.records[collective.group[0]]
    nodes = [(by_rank[rank].nodes, one.node) for rank, one in collective.records.items()]
    labels = _agree([by_rank[rank].nodes.labels[one.node] for rank, one in collective.records.items()])
    stages = {by_rank[rank].nodes.trace.meta["coordinates"].get("pp") for rank in collective.group}
    axis = axes.get((collective.group_name, collective.group), "")
    arrivals = [span.arrive_ns for span in spans.values()]
    ends = [span.end_ns for span in spans.values() if span.end_ns != NO_TIME]
    sizes = {rank: (one.sent_bytes, one.received_bytes) for rank, one in collective.records.items()}
    node = out.add(
        rank=-1,
        kind="collective",
        op=record.op,
        label=f"{short_name(record.op)} {axis}".strip(),
        labels=labels,
        sort_ns=last,
        stage=stages.pop() if len(stages) == 1 else None,
        start_ns=min(arrivals),
        end_ns=max(ends) if len(ends) == len(spans) and _comparable(spans, clocks) else None,
        bytes_read=sum(sent for sent, _ in sizes.values()),
        bytes_written=sum(received for _, received in sizes.values()),
        # As the first rank has them that has any: a broadcast's root receives nothing, the others send nothing.
        inputs=next((text for of, at in nodes if (text := describe_tensors(of.trace.layouts, of.inputs[at]))), ""),
        outputs=next((text for of, at in nodes if (text := describe_tensors(of.trace.layouts, of.outputs[at]))), ""),
    )
    sequences = {one.backend_sequence for one in collective.records.values()}
    for rank, span in spans.items():
        sent, received = sizes[rank]
        _participate(
            out,
            node,
            rank,
            collective.group_name,
            collective.group,
            sequences.copy().pop() if len(sequences) == 1 and -1 not in sequences else collective.order,
            span,
            sent,
            received,
            collective.records[rank].waited_ns,
        )
    return node


def _spans(
    records: Mapping[int, CommRecord], by_rank: Mapping[int, RankGraph], clocks: Mapping[int, Clock]
) -> tuple[dict[int, Span], int]:
    """Every participant's time, and when the last one arrived.

    Ends are NO_TIME where the backend did not tell, starts where the participants' clocks cannot be compared.
    """
    arrivals, ends = {}, {}
    for rank, record in records.items():
        nodes, clock = by_rank[rank].nodes, clocks[rank]
        begin = record.work_start_ns
        # A backend may announce a message's work when it is on its way already; not so the kernel that sends it.
        if begin is None or (record.op == "c10d::send" and by_rank[rank].kernels is None):
            begin = int(nodes.start_ns[record.node])
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


def _agree(labels: Sequence[Label]) -> Label:
    """What all participants say alike; what they do not is unknown."""
    first = labels[0]

    def same(values: list[object]) -> bool:
        return all(value == values[0] for value in values)

    return Label(
        module=first.module if same([label.module for label in labels]) else None,
        layer=first.layer if same([label.layer for label in labels]) else None,
        expert=first.expert if same([label.expert for label in labels]) else None,
        category=first.category if same([label.category for label in labels]) else None,
        microbatch=first.microbatch if same([label.microbatch for label in labels]) else None,
        phase=first.phase if same([label.phase for label in labels]) else None,
        step=first.step if same([label.step for label in labels]) else None,
        decode_step=first.decode_step if same([label.decode_step for label in labels]) else None,
    )


def _participate(
    out: Assembly,
    node: int,
    rank: int,
    group_name: str,
    group: tuple[int, ...],
    sequence: int,
    span: Span,
    sent: int,
    received: int,
    waited_ns: int | None,
) -> None:
    out.participants.append(
        {
            "node": node,
            "rank": rank,
            "group": (group_name, group),
            "seq": sequence,
            "arrive_ns": span.arrive_ns,
            "start_ns": None if span.start_ns == NO_TIME else span.start_ns,
            "end_ns": None if span.end_ns == NO_TIME else span.end_ns,
            "send_bytes": sent,
            "recv_bytes": received,
            "waited_ns": waited_ns,
        }
    )


def join_message(
    out: Assembly,
    edges: EdgeList,
    message: Message,
    place: Mapping[int, NDArray[np.int64]],
    by_rank: Mapping[int, RankGraph],
    clocks: Mapping[int, Clock],
) -> None:
    """Join a send's node to its receive's, and add both as participants."""
    send = int(place[message.source][message.send.node])
    receive = int(place[message.destination][message.receive.node])
    graph = by_rank[message.destination]
    sent, received = message.send.sent_bytes, message.receive.received_bytes
    layout = graph.nodes.outputs[message.receive.node][0]
    number = len(out.layouts)
    out.layouts.append(graph.nodes.trace.layouts[layout])
    edges.add(np.array([send]), np.array([receive]), P2P, np.array([received], np.int64), np.array([number], np.int64))
    # Two records of one rank sending to itself are one participant each.
    send_spans, _ = _spans({message.source: message.send}, by_rank, clocks)
    receive_spans, _ = _spans({message.destination: message.receive}, by_rank, clocks)
    send_span, receive_span = send_spans[message.source], receive_spans[message.destination]
    last = max(send_span.arrive_ns, receive_span.arrive_ns)
    comparable = _comparable({message.source, message.destination}, clocks)
    if comparable and NO_TIME not in (send_span.end_ns, receive_span.end_ns):
        # A backend may tell the end of a send only when it is waited for: what was received had left before.
        end = max(min(send_span.end_ns, receive_span.end_ns), send_span.arrive_ns)
        send_span = replace(send_span, end_ns=end)
    for node, rank, span, bytes_out, bytes_in, waited_ns in (
        (send, message.source, send_span, sent, 0, message.send.waited_ns),
        (receive, message.destination, receive_span, 0, received, message.receive.waited_ns),
    ):
        start = last if span.end_ns == NO_TIME else min(last, span.end_ns)
        start = start if comparable else NO_TIME
        _participate(
            out,
            node,
            rank,
            message.group_name,
            message.group,
            message.order,
            replace(span, start_ns=start),
            bytes_out,
            bytes_in,
            waited_ns,
        )


def participate_alone(
    out: Assembly,
    matched: Matched,
    place: Mapping[int, NDArray[np.int64]],
    by_rank: Mapping[int, RankGraph],
    clocks: Mapping[int, Clock],
) -> None:
    """Keep what could not be joined: each record is a node of its own, with what is known of it."""
    for unmatched in matched.unmatched:
        for rank, record in unmatched.records.items():
            spans, _ = _spans({rank: record}, by_rank, clocks)
            _participate(
                out,
                int(place[rank][record.node]),
                rank,
                record.group_name,
                record.group,
                unmatched.order,
                spans[rank],
                record.sent_bytes,
                record.received_bytes,
                record.waited_ns,
            )
