"""Rank classes: ranks that ran the same program with the same structure.

Theory of operation. A rank's program is a list of items, each with a place in it that its data and its timing have no
say in: the operators of each thread in their order, its communications by where in which thread they were called, its
parameters, inputs and outputs in their order. What an item is leaves out what differs between ranks of one role:
times, sizes (but those of parameters), global numbers of experts, and the ranks of process groups, of which the axis
(or the description, where nobody told it), the size and the count among the rank's groups of that kind are its role; a
message's role has how far on in the group (counted around) the other end is, too. Zeros without an element, which
autograd makes for an expert without tokens, are no item of the program's structure.

Ranks of equal items are of one class if data flow between equal places too. Flow into and out of a tensor without
elements leaves no edge; so places where any rank of the class has such a tensor are left out of that comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import polars as pl

_COMMUNICATIONS = ("collective", "send", "recv")
_ROOTED = ("c10d::broadcast_", "c10d::reduce_", "c10d::gather_", "c10d::scatter_")
_LABELS = ("layer", "microbatch", "phase", "step", "decode_step", "category")
_EMPTY_TENSOR = r"\[0[,\]]|,0[,\]]"
_PLACE = ("of", "slot", "at", "turn")  # where in its rank's program an item is
_OPERATOR, _COMMUNICATION, _END, _NOTHING = 0, 1, 2, 3  # kinds of items


def find_rank_classes(
    nodes: pl.LazyFrame, edges: pl.LazyFrame, participants: pl.LazyFrame, groups: pl.LazyFrame
) -> pl.DataFrame:
    """Return rank, rank_class (numbered by their lowest ranks) and structure, the hash that ranks of a class share."""
    named = ("node", "rank", "kind", "op", "label", "module", "expert", "thread", "inputs", "outputs", *_LABELS)
    items = _items(
        nodes.select(*named).collect(),
        edges.select("src", "dst", "kind").collect(),
        participants.select("node", "rank", "group", "seq", "send_bytes", "recv_bytes").collect(),
        groups.select("group", "axis", "ranks", "description").collect(),
    )
    return _classify(items, edges.filter(pl.col("kind") == "data").select("src", "dst").collect())


def class_items(
    nodes: pl.DataFrame, edges: pl.DataFrame, participants: pl.DataFrame, groups: pl.DataFrame
) -> pl.DataFrame:
    """Return node, rank, rank_class and item: nodes of ranks of one class with one item do the same."""
    items = _items(nodes, edges, participants, groups)
    classes = _classify(items, edges.filter(pl.col("kind") == "data").select("src", "dst"))
    return items.join(classes, on="rank").select("node", "rank", "rank_class", "item")


def _items(nodes: pl.DataFrame, edges: pl.DataFrame, participants: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """Return each rank's items: node, rank, kind, record (what it is), item (its number), is_empty."""
    leads = participants.group_by("node").agg(lead=pl.col("rank").min())
    nodes = _normalise(nodes.join(leads, on="node", how="left").with_columns(lead=pl.coalesce("lead", "rank")))
    operators = _operators(nodes)
    communications = _communications(nodes, edges, participants, groups, operators)
    ends = _ends(
        nodes, edges, pl.concat([frame.select("node", "rank", *_PLACE) for frame in (operators, communications)])
    )
    columns = ("node", "rank", "of", "slot", "at", "turn", "record", "is_empty")
    whole = pl.concat([frame.select(*columns) for frame in (operators, communications, ends)])
    place = pl.struct(*_PLACE).rank("dense").over("rank")
    return whole.with_columns(item=place.cast(pl.Int64)).sort("rank", "item", "node")


def _ends(nodes: pl.DataFrame, edges: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    """Number parameters, inputs and outputs by what they are, and then by who first reads or makes them."""
    ends = nodes.filter(~pl.col("kind").is_in(["compute", *_COMMUNICATIONS]))
    ties = edges.filter(pl.col("kind") == "data")
    known = ends.select("node", "rank")
    read = ties.join(known.rename({"node": "src"}), on="src").select("rank", node="src", near="dst")
    made = ties.join(known.rename({"node": "dst"}), on="dst").select("rank", node="dst", near="src")
    turns = places.select("rank", near="node", turn=pl.struct(*_PLACE).rank("dense").over("rank"))
    near = pl.concat([read, made]).join(turns, on=["near", "rank"]).group_by("node").agg(near=pl.col("turn").min())
    return (
        ends.join(near, on="node", how="left")
        .with_columns(
            slot=pl.col("kind").replace_strict({"parameter": 0, "input": 1, "output": 2}, return_dtype=pl.Int64)
        )
        .sort("rank", "slot", "record", "near", "node")
        .with_columns(
            of=pl.lit(_END, pl.Int64), at=pl.int_range(pl.len()).over("rank", "slot"), turn=pl.lit(0, pl.Int64)
        )
    )


def _normalise(nodes: pl.DataFrame) -> pl.DataFrame:
    """Add record: what a node is, without what differs between ranks of one role; is_empty, is_nothing."""
    local = (
        nodes.filter(pl.col("expert") >= 0)
        .select("lead", "layer", "expert")
        .unique()
        .with_columns(local=pl.col("expert").rank("dense").over("lead", "layer"))
    )
    nodes = nodes.join(local, on=["lead", "layer", "expert"], how="left")
    names = nodes.select("module", "label", "expert").unique()
    plain = [
        tuple(_without_expert(name, expert) for name in (module, label)) for module, label, expert in names.iter_rows()
    ]
    names = names.with_columns(pl.DataFrame(plain, schema={"in": pl.String, "called": pl.String}, orient="row"))
    nodes = nodes.join(names, on=["module", "label", "expert"], how="left", nulls_equal=True)
    is_parameter = pl.col("kind") == "parameter"
    types = pl.concat_str(_known("inputs"), pl.lit(" > "), _known("outputs"))
    # Of what flows, only types and how many dimensions; a parameter has the same sizes whatever the data are.
    types = pl.when(is_parameter).then(types).otherwise(types.str.replace_all(r"\d+([,\]])", "_$1"))
    told = pl.concat_str([pl.col(name).cast(pl.String).fill_null("?") for name in _LABELS], separator="|")
    is_empty = _known("inputs").str.contains(_EMPTY_TENSOR) | _known("outputs").str.contains(_EMPTY_TENSOR)
    nodes = nodes.with_columns(
        text=pl.concat_str(
            ["kind", pl.col("op").fill_null(""), "in", "called", told,
             pl.col("local").fill_null(0).cast(pl.String), types], separator="\n",
        ),
        is_empty=is_empty,
        is_nothing=(pl.col("op") == "aten::zeros") & pl.col("outputs").str.contains(_EMPTY_TENSOR),
    )  # fmt: skip
    texts = nodes["text"].unique()
    records = pl.DataFrame(
        {"text": texts, "record": [_digest([text])[:16] for text in texts]},
        schema=dict.fromkeys(("text", "record"), pl.String),
    )
    return nodes.join(records, on="text", how="left").drop("text")


def _without_expert(name: str | None, expert: int | None) -> str:
    """Leave a global expert's number out of a name with dots: `experts.7.linear` is `experts.*.linear`."""
    parts = (name or "").split(".")
    for i in range(1, len(parts)):
        if parts[i] == str(expert) and "expert" in parts[i - 1]:
            parts[i] = "*"
    return ".".join(parts)


def _known(name: str) -> pl.Expr:
    """A column of tensors' types, nothing where it is unknown."""
    return pl.col(name).fill_null("")


def _operators(nodes: pl.DataFrame) -> pl.DataFrame:
    """Number the operators of each thread; threads are told apart by what they ran, not by their numbers."""
    own = nodes.filter(pl.col("kind") == "compute").sort("rank", "thread", "node")
    some = ~pl.col("is_nothing")
    own = own.with_columns(at=some.cum_sum().over("rank", "thread"))
    threads = own.filter(some).group_by("rank", "thread", maintain_order=True).agg(ran=pl.col("record"))
    digests = [_digest(records) for records in threads["ran"]]
    slots = threads.select("rank", "thread", digest=pl.Series(digests, dtype=pl.String)).sort(
        "rank", "digest", "thread"
    )
    slots = slots.with_columns(slot=pl.int_range(pl.len()).over("rank")).drop("digest")
    return own.join(slots, on=["rank", "thread"], how="left").with_columns(
        pl.col("slot").fill_null(-1),
        pl.col("at").cast(pl.Int64),
        turn=pl.lit(0, pl.Int64),
        of=pl.when("is_nothing").then(pl.lit(_NOTHING, pl.Int64)).otherwise(pl.lit(_OPERATOR, pl.Int64)),
    )


def _communications(
    nodes: pl.DataFrame, edges: pl.DataFrame, participants: pl.DataFrame, groups: pl.DataFrame, operators: pl.DataFrame
) -> pl.DataFrame:
    """Number each rank's communications by where they were called and in which role of a group."""
    parts = participants.join(
        nodes.filter(pl.col("kind").is_in(_COMMUNICATIONS)).select("node", "kind", "op", "record", "is_empty"),
        on="node",
    )
    parts = parts.join(groups, on="group", how="left").sort("rank", "node")
    called = _anchors(parts, edges, operators)
    description = pl.when(pl.col("description") == "undefined").then(pl.lit("")).otherwise(pl.col("description"))
    firsts = parts.group_by("rank", "group").agg(
        pl.col("axis").first().fill_null(description.first()).alias("role"),
        pl.col("ranks").first().list.len().alias("size"),
        pl.col("node").min().alias("first"),
    )
    firsts = firsts.sort("rank", "role", "size", "first", nulls_last=True).with_columns(
        count=pl.int_range(pl.len()).over("rank", "role", "size")
    )
    is_root = pl.col("op").is_in(_ROOTED)
    parts = parts.join(firsts, on=["rank", "group"]).join(_distances(parts, edges), on="node", how="left")
    parts = parts.with_columns(
        record=pl.concat_str(
            "record", "role", "size", "count", "distance",
            pl.when(is_root).then(pl.col("send_bytes") > 0), pl.when(is_root).then(pl.col("recv_bytes") > 0),
            separator="\n", ignore_nulls=True,
        )
    ).join(called, on=["node", "rank"])  # fmt: skip
    parts = parts.sort("rank", "slot", "at", "role", "size", "count", "distance", "seq", "node", nulls_last=True)
    return parts.with_columns(
        turn=pl.int_range(pl.len()).over("rank", "slot", "at"), of=pl.lit(_COMMUNICATION, pl.Int64)
    )


def _anchors(parts: pl.DataFrame, edges: pl.DataFrame, operators: pl.DataFrame) -> pl.DataFrame:
    """Say after which operator of which thread each communication was called: node, rank, slot, at."""
    own = operators.select("node", "rank", "slot", "at")
    into = (
        edges.filter(pl.col("kind") == "order")
        .join(parts.select(dst="node").unique(), on="dst", how="semi")
        .select("src", "dst")
    )
    after_operator = into.join(own.rename({"node": "src"}), on="src").select("dst", "rank", "src", "slot", "at")
    after_communication = into.join(parts.select(src="node", rank="rank"), on="src").select("dst", "rank", "src")
    places: dict[tuple[int, int], tuple[int, int, int]] = {}
    for node, rank, before, slot, at in after_operator.iter_rows():
        places[node, rank] = max(places.get((node, rank), (-1, -1, -1)), (before, slot, at))
    chains: dict[tuple[int, int], int] = {}
    for node, rank, before in after_communication.iter_rows():
        chains[node, rank] = max(chains.get((node, rank), -1), before)
    rows = []
    for node, rank in parts.select("node", "rank").sort("node").iter_rows():
        before, slot, at = places.get((node, rank), (-1, -1, -1))
        chained = chains.get((node, rank), -1)
        if chained > before and (chained, rank) in places:
            _, slot, at = places[chained, rank]
        places[node, rank] = (max(before, chained), slot, at)
        rows.append((node, rank, slot, at))
    called = pl.DataFrame(rows, schema=dict.fromkeys(("node", "rank", "slot", "at"), pl.Int64), orient="row")
    return called.with_columns(pl.col("rank").cast(parts.schema["rank"]))


def _distances(parts: pl.DataFrame, edges: pl.DataFrame) -> pl.DataFrame:
    """Say of each message's end how far on in the group the other end is, counted around as in a ring."""
    ends = parts.filter(pl.col("kind") != "collective").select("node", "rank", "ranks")
    ties = edges.filter(pl.col("kind") == "p2p").select("src", "dst")
    both = pl.concat([ties.select(node="src", other="dst"), ties.select(node="dst", other="src")])
    joined = both.join(ends, on="node").join(ends.select(other="node", peer="rank"), on="other")
    rows = [
        (node, (group.index(peer) - group.index(rank)) % len(group))
        for node, rank, group, peer in joined.select("node", "rank", "ranks", "peer").iter_rows()
        if group and peer in group and rank in group
    ]
    found = pl.DataFrame(rows, schema={"node": pl.Int64, "distance": pl.Int64}, orient="row")
    return found.unique("node", keep="first", maintain_order=True)


def _classify(items: pl.DataFrame, edges: pl.DataFrame) -> pl.DataFrame:
    counted = items.filter(pl.col("of") != _NOTHING)
    programs = counted.group_by("rank", maintain_order=True).agg("item", "record")
    likely = pl.DataFrame(
        {
            "rank": programs["rank"],
            "likely": [
                _digest([f"{item} {record}" for item, record in zip(places, records, strict=True)])
                for places, records in programs.select("item", "record").iter_rows()
            ],
        },
        schema={"rank": items.schema["rank"], "likely": pl.String},
    )
    known = counted.join(likely, on="rank").select("node", "rank", "item", "is_empty", "likely")
    empty = known.filter("is_empty").select("likely", "item").unique()
    firm = known.join(empty, on=["likely", "item"], how="anti")
    flow = (
        edges.join(firm.select(src="node", rank="rank", one="item"), on="src")
        .join(firm.select(dst="node", rank="rank", other="item"), on=["dst", "rank"])
        .select("rank", "one", "other")
        .unique()
        .sort("rank", "one", "other")
        .group_by("rank", maintain_order=True)
        .agg("one", "other")
    )
    digests = {
        rank: _digest([f"{one} {other}" for one, other in zip(ones, others, strict=True)])
        for rank, ones, others in flow.iter_rows()
    }
    structures: list[str] = [
        _digest([digest, digests.get(rank, "")]) for rank, digest in likely.sort("rank").iter_rows()
    ]
    numbers: dict[str, int] = {}
    return pl.DataFrame(
        {
            "rank": likely.sort("rank")["rank"],
            "rank_class": [numbers.setdefault(structure, len(numbers)) for structure in structures],
            "structure": structures,
        },
        schema={"rank": items.schema["rank"], "rank_class": pl.Int32, "structure": pl.String},
    )


def _digest(texts: Sequence[str]) -> str:
    return sha256("\0".join(texts).encode()).hexdigest()
