"""Build the class graph of a world: every node and edge once for each class of ranks, and what it stands for.

Theory of operation. The parts of the representatives are joined as those of all ranks are (`quotient`), and numbered
topologically: that is the class graph. Each of its nodes stands for as many nodes of the whole graph as its class has
ranks, or a collective's team has groups; these have numbers in a row, beginning with the class node's own. So the whole
graph is numbered topologically as well, and a number is found by arithmetic: `graph/class_dataset.py` does it.

The cost goes with the number of classes. Only the tables of ranks and groups have a row for each, and where the routing
gives ranks of a class sizes of their own, those of these sizes (`sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.dry.programs import read_part
from truedag.tracer.dry.quotient import ClassPart, Quotient, join_classes
from truedag.tracer.dry.sizes import (
    ClassSizes,
    Derived,
    Names,
    executed_only,
    measure_sizes,
    size_tables,
    spread_rows,
)
from truedag.tracer.dry.world import Ints, Teams, World
from truedag.tracer.errors import CycleError
from truedag.tracer.graph import FORMAT_VERSION
from truedag.tracer.graph.class_dataset import FORM, FORM_VERSION, ClassEdges
from truedag.tracer.graph.class_world import ClassWorld
from truedag.tracer.merge.clock import Clock
from truedag.tracer.merge.dataset import AXES, begin_folder, finish_folder
from truedag.tracer.merge.global_numbers import RankOrder, number_all
from truedag.tracer.merge.joining import Joined, joined_nodes, read_comms_of
from truedag.tracer.merge.lifetimes import number_peak
from truedag.tracer.merge.microbatches import find_microbatches
from truedag.tracer.merge.part import P2P, Part
from truedag.tracer.merge.rank_part import KERNEL_SCHEMA, short_name
from truedag.tracer.merge.sorting import order_edges, stable_order
from truedag.tracer.merge.tables import (
    NODE_SCHEMA,
    RankPlan,
    collective_nodes,
    edge_table,
    message_edges,
    rank_edges,
    rank_nodes,
)

_TIMES = ("start_ns", "end_ns", "host_start_ns", "host_end_ns")
_NOWHEN = Clock(offset_ns=0, error_ns=None)


def build_class_graph(
    traces: Mapping[int, Path],
    world: World,
    out_dir: Path,
    *,
    deployment: str | None,
    strategy: str | None,
    told: Mapping[str, Any],
    derived: Derived = executed_only,
) -> dict[str, int]:
    """Write the class graph of a world into a folder; return what `meta.json` counts.

    Args:
        traces: of the ranks that were executed.
        world: the classes, and what process groups there are.
        out_dir: the dataset's folder; made new, an earlier dataset in it is replaced.
        deployment: what `meta.json` is to call it.
        strategy: the parallel strategy.
        told: what `meta.json` says under "dry".
        derived: says the sizes of ranks that were not executed.

    Raises:
        TraceError: a trace is broken.
        MergeError: the classes do not make one graph, or it cannot be written.
        CycleError: operations depend on each other in a circle.
    """
    parts = {rank: read_part(traces[rank]) for rank in world.representatives}
    names = Names()
    sizes = measure_sizes(world, parts, traces, names, derived)
    teams = Teams(world)
    comms = {rank: read_comms_of(part) for rank, part in parts.items()}
    quotient = join_classes(world, teams, comms, sizes, list(names.texts))
    joined = quotient.joined
    places, collective_places, cycle = number_all(_orders(parts, joined), joined, lambda size: np.empty(size, np.int64))
    if cycle:
        raise CycleError("the classes' operations depend on each other in a circle: execute all ranks (--all-ranks)")
    microbatches = {}
    if any(part.told["has_microbatch"] for part in parts.values()):
        microbatches = find_microbatches(lambda rank: parts[rank], places, joined)
    first = _first_numbers(world, teams, quotient, places, collective_places)
    numbers = {rank: first[place] for rank, place in places.items()}
    collectives = first[collective_places]
    plans = {
        rank: RankPlan(
            number=numbers[rank],
            collective=joined_nodes(joined, rank, part.num_nodes),
            clock=_NOWHEN,
            origin_ns=0,
            labels=_labels_of_messages(part, quotient, number),
            microbatches=microbatches.get(rank, {}),
            dropped=np.zeros(0, np.int64),
        )
        for number, (rank, part) in enumerate(parts.items())
    }
    frames = {
        "nodes": _nodes(world, teams, quotient, parts, plans, collectives),
        "edges": _edges(quotient, parts, plans, numbers),
        "participants": _participants(world, quotient, numbers, collectives),
        "groups": _groups(world, teams, quotient),
        "ranks": _ranks(world, parts),
        "kernels": pl.DataFrame(schema=KERNEL_SCHEMA),
    }
    frames |= _size_tables(world, quotient, sizes, names, frames, numbers, collectives)
    frames["edges"] = frames["edges"].drop("local")
    counts = _count(world, teams, quotient, frames)
    memory = _memory(world, sizes, numbers, collectives, joined)
    meta = _describe(world, parts, {**counts, "memory": memory}, deployment, strategy, told)
    finish_folder(begin_folder(out_dir), out_dir, frames, meta)
    return counts


def _orders(parts: Mapping[int, Part], joined: Joined) -> dict[int, RankOrder]:
    """What numbering needs; representatives ran one after the other, so only the order on each of them counts."""
    orders = {}
    for rank, part in parts.items():
        collective = joined_nodes(joined, rank, part.num_nodes)
        ends = part.edges["src"], part.edges["dst"]
        touching = np.flatnonzero((collective[ends[0]] >= 0) | (collective[ends[1]] >= 0))
        turn = np.empty(part.num_nodes, np.int64)
        turn[stable_order(part.nodes["sort_ns"])] = np.arange(part.num_nodes)
        orders[rank] = RankOrder(
            time_ns=turn,
            collective=collective,
            edges=_edge_ends(part),
            touching=(ends[0][touching], ends[1][touching]),
        )
        for node, place in joined.places[rank].items():
            one = joined.collectives[place]
            one.sort_ns = max(one.sort_ns, int(turn[node]))
    return orders


def _edge_ends(part: Part) -> Callable[[], tuple[Ints, Ints]]:
    """Return what gives the ends of a part's edges."""
    return lambda: (part.edges["src"], part.edges["dst"])


def _first_numbers(
    world: World, teams: Teams, quotient: Quotient, places: Mapping[int, Ints], collectives: Ints
) -> Ints:
    """By place in the class graph: the first of the numbers of what stands there."""
    sizes = np.zeros(1 + max([-1, *(int(one.max(initial=-1)) for one in (*places.values(), collectives))]), np.int64)
    for number, rank in enumerate(world.representatives):
        sizes[places[rank]] = len(world.members[number])
    for place, team in zip(collectives.tolist(), quotient.team_of, strict=True):
        sizes[place] = len(teams.teams[team].groups)
    return np.cumsum(sizes) - sizes


def _nodes(
    world: World,
    teams: Teams,
    quotient: Quotient,
    parts: Mapping[int, Part],
    plans: Mapping[int, RankPlan],
    collectives: NDArray[np.int64],
) -> pl.DataFrame:
    frames = []
    for number, (rank, part) in enumerate(parts.items()):
        (frame,) = rank_nodes(part, plans[rank], at_once=part.num_nodes + 1)
        frames.append(
            frame.with_columns(
                rank_class=pl.lit(number, pl.Int32),
                team=pl.lit(-1, pl.Int32),
                num=pl.lit(len(world.members[number]), pl.Int64),
            )
        )
    joint = collective_nodes(quotient.joined.collectives, collectives, 0)
    team = np.array(quotient.team_of, np.int64)[np.argsort(collectives)]
    sizes = np.array([len(one.groups) for one in teams.teams], np.int64)
    frames.append(
        joint.with_columns(
            rank_class=pl.lit(-1, pl.Int32),
            team=pl.Series(team, dtype=pl.Int32),
            num=pl.Series(sizes[team], dtype=pl.Int64),
        )
    )
    nothing = [pl.lit(None, NODE_SCHEMA[name]).alias(name) for name in _TIMES]
    return pl.concat(frames).with_columns(*nothing, timing=pl.lit("none")).sort("node")


def _labels_of_messages(part: Part, quotient: Quotient, rank_class: int) -> dict[int, str]:
    """The labels of sends and receives: what they are, and the axis of their group."""
    operators = {record.node: record.op for record in part.comms}
    return {
        one.node: f"{short_name(operators[one.node])} {axis}"
        for one in quotient.parts
        if one.rank_class == rank_class and not one.is_collective and (axis := quotient.axes.get(one.team))
    }


def _edges(
    quotient: Quotient, parts: Mapping[int, Part], plans: Mapping[int, RankPlan], numbers: Mapping[int, Ints]
) -> pl.DataFrame:
    """Return the edges; `local` is an edge's place in its class's part, -1: a message."""
    frames = []
    for number, (rank, part) in enumerate(parts.items()):
        rows = rank_edges(part, plans[rank])
        (frame,) = edge_table([rows], at_once=len(rows.src) + 1)
        frame = frame.with_columns(
            rank_class=pl.lit(number, pl.Int32),
            team=pl.lit(-1, pl.Int32),
            place=pl.lit(-1, pl.Int32),
            local=pl.Series(order_edges(rows.src, rows.dst, rows.kind.astype(np.int64), rows.num_bytes)),
        )
        frames.append(frame.filter(pl.col("src") != pl.col("dst")))
    class_of = {rank: number for number, rank in enumerate(parts)}
    for message, told in zip(quotient.joined.messages, quotient.messages, strict=True):
        (frame,) = edge_table([message_edges([message], numbers, P2P)], at_once=2)
        frames.append(
            frame.with_columns(
                rank_class=pl.lit(class_of[message.source], pl.Int32),
                team=pl.lit(told.team, pl.Int32),
                place=pl.lit(told.place, pl.Int32),
                local=pl.lit(-1, pl.Int64),
            )
        )
    return pl.concat(frames).sort("src", "dst", "kind", "bytes", "rank_class", maintain_order=True)


def _participants(
    world: World, quotient: Quotient, numbers: Mapping[int, Ints], collectives: NDArray[np.int64]
) -> pl.DataFrame:
    def number_of(one: ClassPart) -> int:
        if one.is_collective:
            return int(collectives[one.node])
        return int(numbers[world.representatives[one.rank_class]][one.node])

    columns = {
        "node": [number_of(one) for one in quotient.parts],
        "rank_class": [one.rank_class for one in quotient.parts],
        "team": [one.team for one in quotient.parts],
        "seq": [one.seq for one in quotient.parts],
        "send_bytes": [one.send_bytes for one in quotient.parts],
        "recv_bytes": [one.recv_bytes for one in quotient.parts],
    }
    schema = {"node": pl.Int64, "rank_class": pl.Int32, "team": pl.Int32}
    schema |= dict.fromkeys(("seq", "send_bytes", "recv_bytes"), pl.Int64)
    never = [pl.lit(None, pl.Int64).alias(name) for name in ("arrive_ns", "start_ns", "end_ns")]
    return pl.DataFrame(columns, schema=schema).with_columns(never).sort("node", "rank_class")


def _size_tables(
    world: World,
    quotient: Quotient,
    sizes: Sequence[ClassSizes],
    names: Names,
    frames: Mapping[str, pl.DataFrame],
    numbers: Mapping[int, Ints],
    collectives: Ints,
) -> dict[str, pl.DataFrame]:
    """Return the tables of the sizes that ranks of a class, and groups of a team, have of their own."""
    node = frames["nodes"]["node"].to_numpy()
    first = np.searchsorted(node, collectives)
    nodes = [one.rows(int(first[one.number])) for one in quotient.sized]
    edges, parts = [], []
    edge_class, local = (frames["edges"][name].to_numpy() for name in ("rank_class", "local"))
    part_node, part_class = (frames["participants"][name].to_numpy() for name in ("node", "rank_class"))
    for number, (rank, own) in enumerate(zip(world.representatives, sizes, strict=True)):
        if len(own.sized) == 1:
            continue
        row = np.searchsorted(node, numbers[rank])
        row[list(quotient.joined.places[rank])] = -1  # `SizedCollective` tells of them
        nodes += spread_rows(world, number, own, "nodes", row)
        here = np.flatnonzero((edge_class == number) & (local >= 0))
        row = np.full(int(local.max(initial=-1)) + 1, -1)
        row[local[here]] = here
        edges += spread_rows(world, number, own, "edges", row)
        here = np.flatnonzero(part_class == number)
        of_node = dict(zip(part_node[here].tolist(), here.tolist(), strict=True))
        places = quotient.joined.places[rank]
        met = [collectives[places[one]] if one in places else numbers[rank][one] for one in own.place]
        parts += spread_rows(world, number, own, "comms", np.array([of_node.get(int(one), -1) for one in met]))
    return size_tables(nodes, edges, parts, names)


def _memory(
    world: World, sizes: Sequence[ClassSizes], numbers: Mapping[int, Ints], collectives: Ints, joined: Joined
) -> list[dict[str, Any]]:
    """What ranks have in memory, by class; by ranks where those of a class have sizes of their own."""
    found = []
    for number, (first, own) in enumerate(zip(world.representatives, sizes, strict=True)):
        sized_as = world.sized_as[world.members[number]]
        for rank, one in zip(own.sized.tolist(), own.ranks, strict=True):
            if one.memory is None:
                continue
            who: dict[str, Any] = {"rank_class": number}
            if len(own.sized) > 1:
                who["ranks"] = world.members[number][sized_as == rank].tolist()
            found.append({**who, **number_peak(one.memory, numbers[first], collectives, joined.places[first])})
    return found


def _groups(world: World, teams: Teams, quotient: Quotient) -> pl.DataFrame:
    used = {one.team for one in quotient.parts}
    of = teams.of_group.tolist()
    return pl.DataFrame(
        {
            "group": range(len(world.groups)),
            "axis": [quotient.axes.get(team) for team in of],
            "ranks": [list(ranks) for _, _, ranks in world.groups],
            "name": [name for name, _, _ in world.groups],
            "description": [
                description if team in used else "" for team, (_, description, _) in zip(of, world.groups, strict=True)
            ],
            "team": of,
        },
        schema={
            "group": pl.Int32, "axis": pl.String, "ranks": pl.List(pl.Int64), "name": pl.String,
            "description": pl.String, "team": pl.Int32,
        },
    )  # fmt: skip


def _ranks(world: World, parts: Mapping[int, Part]) -> pl.DataFrame:
    told = [part.told["meta"] for part in parts.values()]
    size = len(world.rank_class)
    nowhere = np.full(size, -1)
    columns: dict[str, Any] = {
        "rank": np.arange(size),
        "host": [told[number]["host"] for number in world.rank_class.tolist()],
        "device": [told[number]["device"] for number in world.rank_class.tolist()],
        **{axis: world.coordinates.get(axis, nowhere) for axis in AXES},
        "rank_class": world.rank_class,
        "first_expert": world.first_expert,
    }
    schema = {"rank": pl.Int32, "host": pl.String, "device": pl.String}
    schema |= dict.fromkeys((*AXES, "rank_class", "first_expert"), pl.Int32)
    unknown = (
        "clock_offset_ns",
        "clock_error_ns",
        "gpu_clock_correction_ns",
        "gpu_clock_drift_ns",
        "gpu_clock_error_ns",
    )
    return pl.DataFrame(columns, schema=schema).with_columns(pl.lit(None, pl.Int64).alias(name) for name in unknown)


def _count(world: World, teams: Teams, quotient: Quotient, frames: Mapping[str, pl.DataFrame]) -> dict[str, int]:
    sizes = [len(one.groups) for one in teams.teams]
    messages = zip(quotient.joined.messages, quotient.messages, strict=True)
    return {
        "num_classes": len(world.members),
        "num_class_nodes": len(frames["nodes"]),
        "num_class_edges": len(frames["edges"]),
        "num_nodes": int(frames["nodes"]["num"].sum()),
        "num_edges": ClassEdges.of(frames["nodes"], frames["edges"]).count(
            ClassWorld.of(frames["ranks"], frames["groups"])
        ),
        "num_collectives": sum(sizes[team] for team in quotient.team_of),
        "num_messages": sum(sizes[told.team] for _, told in messages),
    }


def _describe(
    world: World,
    parts: Mapping[int, Part],
    counts: Mapping[str, Any],
    deployment: str | None,
    strategy: str | None,
    told: Mapping[str, Any],
) -> dict[str, Any]:
    first = next(iter(parts.values())).told["meta"]
    views = [part.told["num_views"] for part in parts.values()]
    return {
        "format_version": FORMAT_VERSION,
        "form": FORM,
        "form_version": FORM_VERSION,
        "deployment": deployment,
        "strategy": strategy,
        "world_size": len(world.rank_class),
        "missing_ranks": [],
        "incomplete_ranks": [rank for rank, part in parts.items() if not part.told["closed"]],
        "steps": sorted({step for part in parts.values() for step in part.told["steps"]}),
        "torch": str(first["torch"]),
        "truedag": version("truedag"),
        "recorder": str(first["recorder"]),
        "clock_origin_ns": 0,
        **counts,
        "num_views_dropped": sum(len(ranks) * number for ranks, number in zip(world.members, views, strict=True)),
        "num_unmatched": 0,
        "num_kernels": 0,
        "opaque": [],
        "unmatched": [],
        "dry": dict(told),
    }
