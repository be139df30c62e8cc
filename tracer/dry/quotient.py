"""Join the communications of classes of ranks: what joining all ranks would find, said once for each class.

Theory of operation. The world's quotient by its classes has one rank for each class, its representative. The n-th
collective that a class's ranks call in their group of a team is, for each of the team's groups, the n-th of the classes
that stand in it; so one quotient node stands for one collective in each group of the team. A message that a class sends
to a place in its group is received there by the class of that place.

Where ranks of a class give or get different amounts, each of a team's groups is looked at (`SizedCollective`).

What would make the quotient lie is refused: classes that call different things, messages between ranks of a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from truedag.tracer.dry.sizes import ClassSizes, SizedRows
from truedag.tracer.dry.world import Ints, Team, Teams, World
from truedag.tracer.errors import MergeError
from truedag.tracer.merge.comms import CommRecord
from truedag.tracer.merge.joining import CollectiveNode, Joined, MessageEdge, RankComms, agree
from truedag.tracer.merge.match import find_fault
from truedag.tracer.merge.rank_part import short_name

_ROOTED = frozenset({"c10d::broadcast_", "c10d::reduce_", "c10d::gather_", "c10d::scatter_"})
_TRUST_NO_CLASS = "a bug in truedag, report it; --all-ranks trusts no class"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPart:
    """The part of a class's ranks in a communication, the same for each of them."""

    rank_class: int
    team: int
    node: int
    """Local to the class; of a collective its number in `Joined.collectives`."""

    is_collective: bool
    seq: int
    send_bytes: int
    recv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMessage:
    """A message of each of a class's ranks, in the order of `Joined.messages`."""

    team: int
    place: int
    """Of the receiver, in the team's groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedCollective:
    """A collective that is of other sizes in each group of its team."""

    number: int
    """In `Joined.collectives`."""

    sizes: Ints
    """[4, groups] bytes that all give, and get, and the numbers of the texts of inputs and outputs."""

    def rows(self, row: int) -> SizedRows:
        """Return what differs from the first group, which the class graph's row says."""
        turn = np.flatnonzero((self.sizes != self.sizes[:, :1]).any(axis=0))
        none = np.full((1, len(turn)), -1)  # no FLOPs
        values = np.concatenate([none, self.sizes[:, turn]])
        return SizedRows(row=np.full(len(turn), row), turn=turn, values=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotient:
    """The communications of a world's classes, joined."""

    joined: Joined
    """As that of a world of the representatives alone."""

    team_of: list[int]
    """The team of each of `joined.collectives`."""

    messages: list[ClassMessage]
    parts: list[ClassPart]
    sized: list[SizedCollective]
    axes: dict[int, str]
    """By team: the axis that its groups are told to be."""


def join_classes(
    world: World,
    teams: Teams,
    ranks: Mapping[int, RankComms],
    sizes: Sequence[ClassSizes],
    texts: Sequence[str],
) -> Quotient:
    """Join what the representatives recorded.

    Args:
        world: the classes.
        teams: its groups.
        ranks: what the representatives communicated.
        sizes: by class: those of its ranks.
        texts: by their numbers in the sizes.

    Raises:
        MergeError: what they communicate is not whole, or cannot be told of classes.
    """
    out = Quotient(
        joined=Joined(axes={}, places={rank: {} for rank in ranks}),
        team_of=[],
        messages=[],
        parts=[],
        sized=[],
        axes=_told_axes(teams, ranks),
    )
    collectives: dict[tuple[int, int], dict[int, CommRecord]] = {}
    lanes: _Lanes = {}
    for number, rank in enumerate(world.representatives):
        counts: dict[int, int] = {}
        for record in sorted(ranks[rank].comms, key=lambda one: one.node):
            group = teams.group_of(rank, record.group_name)
            team = teams.teams[int(teams.of_group[group])]
            if record.is_p2p:
                _add_message(lanes, world, teams, group, number, record)
            else:
                place = counts[team.number] = counts.get(team.number, -1) + 1
                collectives.setdefault((team.number, place), {})[number] = record
    for (team_number, place), records in collectives.items():
        sized = _find_sized(world, teams.teams[team_number], records, sizes)
        _join_collective(out, world, teams, teams.teams[team_number], place, records, ranks, sized)
        if sized is not None:
            _say_sizes(out, sized, texts)
    for (team_number, link, source, destination, _), (sends, receives) in lanes.items():
        _join_lane(out, world, team_number, teams.teams[link], (source, destination), (sends, receives), ranks)
    return out


def _told_axes(teams: Teams, ranks: Mapping[int, RankComms]) -> dict[int, str]:
    axes: dict[int, str] = {}
    for rank, one in ranks.items():
        for told in one.told["group_ranks"]:
            if told.get("axis"):
                axes.setdefault(int(teams.of_group[teams.group_of(rank, str(told["name"]))]), str(told["axis"]))
    return axes


# By the team of the messages' group, the team in whose groups they are told by place, places of both ends, and tag:
# what is sent, and what is received.
_Lanes: TypeAlias = dict[tuple[int, int, int, int, int], tuple[list[CommRecord], list[CommRecord]]]


def _add_message(lanes: _Lanes, world: World, teams: Teams, group: int, rank_class: int, record: CommRecord) -> None:
    team = teams.teams[int(teams.of_group[group])]
    # megatron-core sends every second message between two stages in the group of all ranks, where a class has many
    # places: who its peer is, the stages' own group says.
    link = group if team.place_of(rank_class) is not None else teams.find_link(rank_class, record.peer)
    if link is None or record.peer not in world.groups[link][2]:
        raise MergeError(
            f"rank {world.representatives[rank_class]} sends to or receives from rank {record.peer} in group "
            f"{record.group_name}, and no group of both tells each rank of its class which its own peer is: execute "
            "all ranks (--all-ranks)"
        )
    linked = teams.teams[int(teams.of_group[link])]
    own, other = linked.place_of(rank_class), world.groups[link][2].index(record.peer)
    assert own is not None
    is_send = record.op == "c10d::send"
    places = (own, other) if is_send else (other, own)
    lane = lanes.setdefault((team.number, linked.number, *places, record.tag), ([], []))
    lane[not is_send].append(record)


def _find_sized(
    world: World, team: Team, records: Mapping[int, CommRecord], sizes: Sequence[ClassSizes]
) -> Ints | None:
    """Return what the ranks of a team's groups give and get in a collective, and how their texts are numbered.

    Returns:
        [4, groups, places]; None where the ranks of each class say the same.
    """
    if not any(sizes[number].varies(record.node) for number, record in records.items()):
        return None
    members = np.array([world.groups[group][2] for group in team.groups], np.int64)
    columns = [
        sizes[number].comms_of(world.sized_as[members[:, at]], records[number].node)
        for at, number in enumerate(team.classes)
    ]
    found: Ints = np.stack(columns, axis=2)
    return found


def _say_sizes(out: Quotient, sized: Ints, texts: Sequence[str]) -> None:
    """Say of the collective that was joined last what each of its team's groups moves."""
    sums = sized[:2].sum(axis=2)
    # As the first rank of a group has them that has any.
    first = (sized[2:] != 0).argmax(axis=2)
    said = np.take_along_axis(sized[2:], first[:, :, None], axis=2)[:, :, 0]
    one = out.joined.collectives[-1]
    one.bytes_read, one.bytes_written = (int(total) for total in sums[:, 0])
    one.inputs, one.outputs = (texts[number] for number in said[:, 0])
    number = len(out.joined.collectives) - 1
    out.sized.append(SizedCollective(number=number, sizes=np.concatenate([sums, said])))


def _find_fault(by_place: Mapping[int, CommRecord], sized: Ints | None) -> str:
    """Return why the records of a team's groups are no whole collective, '' if they are: of the first that is none."""
    if sized is None:
        return find_fault(by_place)
    for moved in np.unique(sized[:2], axis=1).transpose(1, 2, 0).tolist():
        own = {
            at: replace(by_place[at], sent_bytes=sent, received_bytes=received)
            for at, (sent, received) in enumerate(moved)
        }
        if fault := find_fault(own):
            return fault
    return ""


def _join_collective(
    out: Quotient,
    world: World,
    teams: Teams,
    team: Team,
    place: int,
    records: dict[int, CommRecord],
    ranks: Mapping[int, RankComms],
    sized: Ints | None,
) -> None:
    what = f"{next(iter(records.values())).op} number {place} of the groups {team.description!r}"
    if missing := set(team.classes) - set(records):
        raise MergeError(f"{what} is not called by the ranks of class {sorted(missing)}: {_TRUST_NO_CLASS}")
    by_place = {at: records[number] for at, number in enumerate(team.classes)}
    rooted = next(iter(records.values())).op in _ROOTED
    if rooted and any(
        record.peer == world.representatives[number] and team.place_of(number) is None
        for number, record in records.items()
    ):
        raise MergeError(f"{what} has a root whose class has other ranks in the group: execute all ranks (--all-ranks)")
    # Representatives may be in different groups of the team: a root is told by its place.
    roots = {
        number: -1 if record.peer < 0 else _group_of(world, teams, number, record).index(record.peer)
        for number, record in records.items()
    }
    rooted_at = {at: replace(record, peer=roots[team.classes[at]]) for at, record in by_place.items()}
    if fault := _find_fault(rooted_at, sized):
        raise MergeError(f"{what}: {fault}: {_TRUST_NO_CLASS}")
    axis = out.axes.get(team.number, "")
    first = records[team.classes[0]]
    sides = [(ranks[world.representatives[number]], records[number].node) for number in dict.fromkeys(team.classes)]
    stages = {side.stage for side, _ in sides}
    belonging = agree([side.labels[node] for side, node in sides])
    members = world.groups[team.groups[0]][2]
    if belonging.expert is not None and len(set(world.first_expert[list(members)].tolist())) > 1:
        belonging = replace(belonging, expert=None, module=None)
    node = len(out.joined.collectives)
    out.joined.collectives.append(
        CollectiveNode(
            op=first.op,
            label=f"{short_name(first.op)} {axis}".strip(),
            belonging=belonging,
            sort_ns=0,
            stage=stages.pop() if len(stages) == 1 else None,
            start_ns=0,
            end_ns=None,
            bytes_read=sum(one.sent_bytes for one in by_place.values()),
            bytes_written=sum(one.received_bytes for one in by_place.values()),
            inputs=next((text for side, at in sides if (text := side.text(at, "inputs"))), ""),
            outputs=next((text for side, at in sides if (text := side.text(at, "outputs"))), ""),
        )
    )
    out.team_of.append(team.number)
    sequences = {one.backend_sequence for one in records.values()}
    sequence = sequences.pop() if len(sequences) == 1 and -1 not in sequences else place
    for number, record in records.items():
        out.joined.places[world.representatives[number]][record.node] = node
        out.parts.append(
            ClassPart(
                rank_class=number,
                team=team.number,
                node=node,
                is_collective=True,
                seq=sequence,
                send_bytes=record.sent_bytes,
                recv_bytes=record.received_bytes,
            )
        )


def _group_of(world: World, teams: Teams, rank_class: int, record: CommRecord) -> tuple[int, ...]:
    return world.groups[teams.group_of(world.representatives[rank_class], record.group_name)][2]


def _join_lane(
    out: Quotient,
    world: World,
    team_number: int,
    team: Team,
    places: tuple[int, int],
    ends: tuple[list[CommRecord], list[CommRecord]],
    ranks: Mapping[int, RankComms],
) -> None:
    """Join the messages from one place of a team's groups to another; they are in the groups of team `team_number`."""
    sends, receives = ends
    classes = tuple(team.classes[place] for place in places)
    source, destination = (world.representatives[number] for number in classes)
    if len(sends) != len(receives):
        raise MergeError(
            f"rank {source}'s class sends {len(sends)} messages to place {places[1]} of {team.description!r}, where "
            f"{len(receives)} are received: {_TRUST_NO_CLASS}"
        )
    told = ranks[destination].told
    layouts = {number: (dtype, shape) for number, dtype, shape in told["layouts"]}
    for place, (send, receive) in enumerate(zip(sends, receives, strict=True)):
        if (send.sent_bytes, send.dtypes) != (receive.received_bytes, receive.dtypes):
            raise MergeError(
                f"message {place} from rank {source}'s class to rank {destination}'s is {send.sent_bytes} bytes of "
                f"{send.dtypes} there and {receive.received_bytes} of {receive.dtypes} here: {_TRUST_NO_CLASS}"
            )
        layout = told["shapes"]["first_output"][ranks[destination].shape[receive.node]]
        dtype, shape = layouts.get(layout, (None, None))
        out.joined.messages.append(
            MessageEdge(
                source=source,
                send=send.node,
                destination=destination,
                receive=receive.node,
                num_bytes=receive.received_bytes,
                dtype=dtype,
                shape=shape,
            )
        )
        out.messages.append(ClassMessage(team=team.number, place=places[1]))
        is_numbered = send.number is not None and receive.number is not None
        seq = send.number if is_numbered and send.number is not None else place
        for number, node, sent, received in (
            (classes[0], send.node, send.sent_bytes, 0),
            (classes[1], receive.node, 0, receive.received_bytes),
        ):
            out.parts.append(
                ClassPart(
                    rank_class=number,
                    team=team_number,
                    node=node,
                    is_collective=False,
                    seq=seq,
                    send_bytes=sent,
                    recv_bytes=received,
                )
            )
