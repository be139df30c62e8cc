"""Write all nodes and edges of all ranks of a class graph: some ranks at a time, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from truedag.tracer.graph.class_dataset import ClassDataset
from truedag.tracer.merge.dataset import begin_folder, divide, file_names, finish_folder
from truedag.tracer.merge.finishing import EDGES_IN_A_FILE, write_table

_SMALL = ("participants", "groups", "ranks")


def expand(classes: ClassDataset, out_dir: Path, *, progress: Callable[[str], None]) -> None:
    """Write the dataset of the whole graph, as merging the traces of all ranks would.

    Args:
        classes: the class graph.
        out_dir: the dataset's folder; made new, an earlier dataset in it is replaced.
        progress: hears what is being done.

    Raises:
        MergeError: it cannot be written.
    """
    fresh = begin_folder(out_dir)
    sizes = classes.scan_classes("nodes").filter(pl.col("rank_class") >= 0).group_by("rank_class").len().collect()
    size_of = dict(sizes.iter_rows())
    ranks = classes.scan("ranks").select("rank", "rank_class").sort("rank").collect()
    sharing = divide({rank: size_of.get(number, 0) for rank, number in ranks.iter_rows()})
    is_small = len(sharing) == 1
    for place, some in enumerate(sharing):
        progress(f"writing {len(sharing)} parts of the dataset: {place} done")
        names = file_names(fresh, some, is_small=is_small)
        nodes = classes.scan("nodes", frozenset(some))
        _write((nodes if is_small else nodes.filter(pl.col("rank") >= 0)).collect(), names["nodes"], is_small=is_small)
        edges = _together(classes.edges_of(frozenset(some)), at_once=None if is_small else EDGES_IN_A_FILE)
        for number, frame in enumerate(edges):
            _write(frame, names["edges"], is_small=is_small, number=number)
    if not is_small:
        joint = classes.scan("nodes").filter(pl.col("rank") < 0).collect(engine="streaming")
        _write(joint.sort("node"), file_names(fresh, None, is_small=False)["nodes"], is_small=False)
    meta = {name: value for name, value in classes.meta.items() if name not in ("form", "form_version")}
    frames = {name: classes.scan(name).collect() for name in (*_SMALL, "kernels")}
    frames["groups"] = frames["groups"].drop("team")
    finish_folder(fresh, out_dir, frames, meta)


def _write(frame: pl.DataFrame, path: Path, *, is_small: bool, number: int = 0) -> None:
    write_table(frame, path if is_small else path.with_name(f"{path.stem}-{number:05d}{path.suffix}"))


def _together(frames: Iterator[pl.DataFrame], *, at_once: int | None) -> Iterator[pl.DataFrame]:
    """Put frames together up to so many rows; None: all."""
    held: list[pl.DataFrame] = []
    for frame in frames:
        if held and at_once is not None and sum(map(len, held)) + len(frame) > at_once:
            yield pl.concat(held)
            held = []
        held.append(frame)
    if held:
        yield pl.concat(held)
