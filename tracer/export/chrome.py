"""Chrome's trace events as JSON: for chrome://tracing, Speedscope and whatever else reads them. Times are µs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from truedag.tracer.export.timeline import NUMBERS, TEXTS, RankTimeline, list_timelines, list_tracks
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
        for timeline in list_timelines(graph):
            show(f"writing rank {timeline.rank}")
            tracks = {name: place for place, name in enumerate(list_tracks(timeline.slices))}
            slices = timeline.slices.with_columns(tid=pl.col("track").replace_strict(tracks, return_dtype=pl.Int64))
            file.write(",\n".join([*_describe(timeline, tracks), *_events(slices, timeline.rank)]) + ",\n")
            flows = slices.filter(pl.col("flow").is_not_null())
            ends.append(flows.select("flow", "start_ns", "is_receive", "tid", rank=pl.lit(timeline.rank)))
            num_slices += len(slices)
        arrows = _flows(pl.concat(ends)) if ends else []
        file.write(",\n".join([*arrows, '{"ph":"M","pid":0,"name":"trace_by","args":{"name":"truedag"}}']) + "\n]}\n")
    return {"num_slices": num_slices}


def _describe(timeline: RankTimeline, tracks: Mapping[str, int]) -> list[str]:
    events: list[dict[str, object]] = [
        {"name": "process_name", "args": {"name": timeline.name}},
        {"name": "process_sort_index", "args": {"sort_index": timeline.rank}},
    ]
    for name, tid in tracks.items():
        events.append({"name": "thread_name", "tid": tid, "args": {"name": name}})
        events.append({"name": "thread_sort_index", "tid": tid, "args": {"sort_index": tid}})
    return [json.dumps({"ph": "M", "pid": timeline.rank} | event) for event in events]


def _events(slices: pl.DataFrame, rank: int) -> list[str]:
    """Write complete events: the columns that a slice has are its arguments."""
    told = [*NUMBERS, *TEXTS]
    texts = {name: _quote(slices[name]) for name in ("name", "category", *TEXTS)}
    arguments = [
        pl.when(pl.col(name).is_not_null()).then(pl.format('"' + name + '":{}', name)).alias(name) for name in told
    ]
    head = '{{"ph":"X","pid":' + str(rank) + ',"tid":{},"ts":{},"dur":{},"name":{},"cat":{},"args":'
    events = slices.with_columns(**texts).select(
        event=pl.concat_str(
            pl.format(
                head, "tid", _microseconds(pl.col("start_ns")), _microseconds(pl.col("end_ns") - pl.col("start_ns")),
                "name", "category",
            ),
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
