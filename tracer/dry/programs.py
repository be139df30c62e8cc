"""The program of a rank as a digest, and the division of a world into classes of ranks whose programs are the same.

Ranks of one program ran the same operators in the same places, with the same data and order between them. What may
differ are sizes, the numbers of a layer's experts, counted from the rank's own first, and who the other ranks are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from truedag.tracer.dry.world import Groups, Ints
from truedag.tracer.errors import MergeError
from truedag.tracer.merge.labels import NUMBERS, TEXTS, UNKNOWN
from truedag.tracer.merge.making import Workers, make_parts
from truedag.tracer.merge.nodes import RankNodes
from truedag.tracer.merge.part import INPUT, PARAMETER, Part
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.merge.rank_part import make_part
from truedag.tracer.record.trace import read_trace

_EXPERT = re.compile(r"(\.local_experts\.)(\d+)")
_SIZES = re.compile(r"\d+(?=[,\]])")
_MOVED = ("label", "module", "gradient")  # texts that name experts


def read_part(trace: Path) -> Part:
    """Return a rank's part of the graph; that of another rank of its program has the same numbers.

    Raises:
        TraceError: the trace is broken.
        MergeError: nothing is in it.
    """
    (made,) = make_parts([trace], None, Workers())
    if not isinstance(made.part, Part):
        raise MergeError(made.said)
    return _in_order(made.part)


def read_rank(trace: Path) -> tuple[Part, RankNodes]:
    """Return what `read_part` does, and the operators that it was made of; of a rank that recorded something.

    Raises:
        TraceError: the trace is broken.
    """
    graph = build_rank_graph(read_trace(trace))
    return _in_order(make_part(graph)), graph.nodes


def _in_order(part: Part) -> Part:
    """Number what was there before by who reads it: where it lay in memory is no part of the program."""
    kind = part.nodes["kind"]
    sources = np.flatnonzero((kind == INPUT) | (kind == PARAMETER))
    texts, shapes = [*part.told["texts"], ""], [*part.told["shapes"]["outputs"], ""]
    readers: dict[int, list[int]] = {source: [] for source in sources.tolist()}
    read = np.isin(part.edges["src"], sources)
    for src, dst in zip(part.edges["src"][read].tolist(), part.edges["dst"][read].tolist(), strict=True):
        readers[src].append(dst)
    label, shape = part.nodes["label"], part.nodes["shape"]
    # Ranks name other experts, in the same order.
    order = sorted(
        readers,
        key=lambda one: (
            int(kind[one]),
            sorted(readers[one]),
            _EXPERT.sub(r"\1", texts[label[one]]),
            _SIZES.sub("n", shapes[shape[one]]),
            one,
        ),
    )
    ordered = np.arange(part.num_nodes)
    ordered[sources] = order
    number = np.empty(part.num_nodes, np.int32)
    number[ordered] = np.arange(part.num_nodes)
    edges = {**part.edges, **{name: number[part.edges[name]] for name in ("src", "dst")}}
    # Between the same nodes by what they carry: layouts are numbered as they come.
    known = sorted(part.told["layouts"], key=lambda one: (one[1], one[2]))
    carried = np.full(max((one for one, _, _ in known), default=0) + 2, -1)
    carried[[one for one, _, _ in known]] = np.arange(len(known))
    rows = np.lexsort((carried[edges["layout"]], edges["bytes"], edges["kind"], edges["dst"], edges["src"]))
    unlabelled = {name: np.where(column < 0, column, number[column]) for name, column in part.unlabelled.items()}
    return replace(
        part,
        nodes={name: column[ordered] for name, column in part.nodes.items()},
        edges={name: column[rows] for name, column in edges.items()},
        unlabelled=unlabelled,
    )


def hash_program(part: Part, *, first_expert: int) -> str:
    """Return the digest of a rank's program.

    Args:
        part: of the rank.
        first_expert: the lowest number of a layer's experts that the rank holds.
    """
    nodes, found = part.nodes, sha256()
    texts = [*part.told["texts"], ""]
    moved = [_EXPERT.sub(lambda match: f"{match[1]}+{int(match[2]) - first_expert}", text or "") for text in texts]
    for name in dict.fromkeys((*TEXTS, "op", "label")):
        found.update(_digests(moved if name in _MOVED else texts)[nodes[name]].tobytes())
    for name in (*NUMBERS, "kind", "thread"):
        column = nodes[name].astype(np.int64)
        if name == "expert":
            column = np.where(column == UNKNOWN, column, column - first_expert)
        found.update(column.tobytes())
    shapes = part.told["shapes"]
    forms = [_SIZES.sub("n", f"{one}>{other}") for one, other in zip(shapes["inputs"], shapes["outputs"], strict=True)]
    found.update(_digests([*forms, ""])[nodes["shape"]].tobytes())
    for table, names in ((part.edges, ("src", "dst", "kind")), (part.unlabelled, ("src", "dst"))):
        for name in names:
            found.update(table[name].astype(np.int64).tobytes())
    for one in part.comms:
        sizes = (one.sent_bytes, one.received_bytes) if one.is_p2p else ()
        place = one.group.index(one.peer) if one.peer in one.group else -1
        said = (one.node, one.op, len(one.group), place, one.tag, one.reduce_op, one.is_async, one.dtypes, sizes)
        found.update(json.dumps(said).encode())
    return found.hexdigest()


def _digests(texts: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """[texts, 16] the last also stands for none, which is -1."""
    said = [np.frombuffer(sha256((text or "").encode()).digest()[:16], np.uint8) for text in texts]
    return np.stack(said)


def refine_classes(rank_class: Ints, groups: Groups) -> Ints:
    """Divide classes until the ranks of each are in groups of the same make: place by place of the same classes.

    Args:
        rank_class: [world] which class a rank is of.
        groups: name, description and ranks of every process group.

    Returns:
        [world] the classes, numbered by their lowest ranks.
    """
    number = _by_first(rank_class)
    while True:
        said: list[list[tuple[str, bytes]]] = [[(str(one), b"")] for one in number.tolist()]
        for _, description, ranks in groups:
            make = number[list(ranks)].tobytes()
            for rank in ranks:
                said[rank].append((description, make))
        known: dict[tuple[tuple[str, bytes], ...], int] = {}
        finer = np.array([known.setdefault(tuple(one), len(known)) for one in said], np.int64)
        if len(known) == int(number.max()) + 1:
            return number
        number = finer


def _by_first(rank_class: Ints) -> Ints:
    _, first, number = np.unique(rank_class, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    found: Ints = order[number.ravel()]
    return found
