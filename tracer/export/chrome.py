"""Chrome's trace events as JSON: for chrome://tracing, Speedscope and whatever else reads them. Times are µs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from truedag.tracer.export.timeline import NUMBERS, TEXTS, Timeline, list_timelines
from truedag.tracer.graph import Graph


def write_chrome(graph: Graph, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write a file of complete events, metadata and flows; returns how many slices are in it.

    Raises:
        OSError: it cannot be written.
    """
    num_slices = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
        ends: list[pl.DataFrame] = []
        for make in list_timelines(graph):
            timeline = make()
            show(f"writing rank {max(timeline.names, default=0)}")
            rank, place = (timeline.tracks[name].gather(timeline.slices["track"]) for name in ("rank", "place"))
            slices = timeline.slices.with_columns(rank=rank, tid=place)
            file.writelines(f"{event},\n" for event in _describe(timeline))
            file.writelines(f"{event},\n" for event in _events(slices))
            ends.append(
                slices.filter(pl.col("flow").is_not_null()).select("flow", "start_ns", "is_receive", "tid", "rank")
            )
            num_slices += len(slices)
        arrows = _flows(pl.concat(ends)) if ends else []
        file.write(",\n".join([*arrows, '{"ph":"M","pid":0,"name":"trace_by","args":{"name":"truedag"}}']) + "\n]}\n")
    return {"num_slices": num_slices}


def _describe(timeline: Timeline) -> list[str]:
    events: list[dict[str, object]] = []
    for rank, name in timeline.names.items():
        events.append({"pid": rank, "name": "process_name", "args": {"name": name}})
        events.append({"pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}})
    for rank, place, name in timeline.tracks.select("rank", "place", "name").iter_rows():
        track = {"pid": rank, "tid": place}
        events.append(track | {"name": "thread_name", "args": {"name": name}})
        events.append(track | {"name": "thread_sort_index", "args": {"sort_index": place}})
    return [json.dumps({"ph": "M"} | event) for event in events]


def _events(slices: pl.DataFrame) -> list[str]:
    """Write complete events: the columns that a slice has are its arguments."""
    texts = {name: _quote(slices[name]) for name in ("name", "category", *TEXTS)}
    has = {name: pl.col(name) >= 0 for name in NUMBERS} | {name: pl.col(name).is_not_null() for name in TEXTS}
    arguments = [
        pl.when(is_told).then(pl.format('"' + name + '":{}', name)).alias(name) for name, is_told in has.items()
    ]
    head = '{{"ph":"X","pid":{},"tid":{},"ts":{},"dur":{},"name":{},"cat":{},"args":'
    start, took = (_microseconds(time) for time in (pl.col("start_ns"), pl.col("end_ns") - pl.col("start_ns")))
    events = slices.with_columns(**texts).select(
        event=pl.concat_str(
            pl.format(head, "rank", "tid", start, took, "name", "category"),
            pl.lit("{"), pl.concat_str(arguments, separator=",", ignore_nulls=True), pl.lit("}}"),
        )
    )  # fmt: skip
    return events["event"].to_list()


def _flows(ends: pl.DataFrame) -> list[str]:
    """Write an arrow from each slice of a flow to the next that began; a receive is after its send."""
    ordered = ends.sort("flow", "is_receive", "start_ns", "rank")
    place, size = pl.int_range(pl.len()).over("flow"), pl.len().over("flow")
    marked = ordered.with_columns(
        mark=pl.when(place == 0).then(pl.lit("s")).when(place + 1 == size).then(pl.lit("f")).otherwise(pl.lit("t")),
        size=size,
    ).filter(pl.col("size") > 1)
    return [
        json.dumps(
            {"ph": mark, "id": flow, "pid": rank, "tid": tid, "ts": start / 1e3, "name": "communication",
             "cat": "communication", "bp": "e"}
        )
        for mark, flow, rank, tid, start in marked.select("mark", "flow", "rank", "tid", "start_ns").iter_rows()
    ]  # fmt: skip


def _microseconds(time: pl.Expr) -> pl.Expr:
    """Write ns as µs, exactly."""
    return pl.format("{}.{}", time // 1000, (time % 1000).cast(pl.String).str.zfill(3))


def _quote(texts: pl.Series) -> pl.Series:
    """Write texts as JSON's; null stays null."""
    unique = texts.unique().drop_nulls().to_list()
    return texts.replace_strict({text: json.dumps(text) for text in unique}, default=None, return_dtype=pl.String)
