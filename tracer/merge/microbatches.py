"""Give messages and gradient accumulation the microbatch of the data they carry.

A message carries what its producer made, so it belongs to that microbatch and phase; the receive to the send's. So do
copies that nobody labelled, from which a message is sent or into which it goes. An operator of autograd's engine
without a forward operator (it adds a finished gradient to a parameter's) belongs to the microbatch of what it adds, not
of what it adds to. A collective, if its participants do not say otherwise, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.joining import ALL_RANKS, Joined, joined_nodes
from truedag.tracer.merge.labels import UNKNOWN
from truedag.tracer.merge.part import Part

Said = tuple[int, str | None]  # microbatch, phase
Node = tuple[int, int]


def find_microbatches(
    load: Callable[[int], Part], numbers: Mapping[int, NDArray[np.int64]], joined: Joined
) -> dict[int, dict[int, Said]]:
    """Return what nodes of each rank take from their data; collectives' labels are changed.

    Args:
        load: gives a rank's part.
        numbers: each rank's nodes' numbers: they are taken in this order.
        joined: the communications.
    """
    wanted: dict[int, Node] = {}  # by number
    producers: dict[int, list[int]] = {}
    own: dict[int, Said] = {}  # of producers, by number
    for rank, number in numbers.items():
        part = load(rank)
        src, dst = (part.unlabelled[name] for name in ("src", "dst"))
        collective = joined_nodes(joined, rank, part.num_nodes)
        microbatch, phase = part.nodes["microbatch"], part.nodes["phase"]
        texts = part.told["texts"]
        for node in dst[src < 0].tolist():
            place = int(collective[node])
            wanted[int(number[node])] = (rank, node) if place < 0 else (ALL_RANKS, place)
        used = src >= 0
        for before, after in zip(src[used].tolist(), dst[used].tolist(), strict=True):
            producers.setdefault(int(number[after]), []).append(int(number[before]))
            place = int(collective[before])
            if place >= 0:
                label = joined.collectives[place].belonging
                if label.microbatch is not None:
                    own[int(number[before])] = label.microbatch, label.phase
            elif microbatch[before] != UNKNOWN:
                said = int(phase[before])
                own[int(number[before])] = int(microbatch[before]), None if said < 0 else texts[said]
        for node in dst[src < 0].tolist():
            if collective[node] < 0 and microbatch[node] != UNKNOWN:
                said = int(phase[node])
                own[int(number[node])] = int(microbatch[node]), None if said < 0 else texts[said]
    for message in joined.messages:
        send, receive = numbers[message.source][message.send], numbers[message.destination][message.receive]
        producers.setdefault(int(receive), []).append(int(send))
    found: dict[int, dict[int, Said]] = {rank: {} for rank in numbers}
    for number_of in sorted(wanted):
        rank, node = wanted[number_of]
        if rank == ALL_RANKS and joined.collectives[node].belonging.microbatch is not None:
            continue
        if rank != ALL_RANKS and number_of in own:
            continue
        known = {own[before] for before in producers.get(number_of, ()) if before in own}
        if len(known) != 1:
            continue
        microbatch_of, phase_of = known.pop()
        if rank == ALL_RANKS:
            belonging = joined.collectives[node].belonging
            phase_of = belonging.phase or phase_of
            joined.collectives[node].belonging = replace(belonging, microbatch=microbatch_of, phase=phase_of)
        else:
            part = load(rank)
            said = int(part.nodes["phase"][node])
            phase_of = phase_of if said < 0 else part.told["texts"][said] or phase_of
            found[rank][node] = microbatch_of, phase_of
        own[number_of] = microbatch_of, phase_of
    return found
