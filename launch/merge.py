"""The flow of `truedag merge`: traces, and what the run's folder around them says, become a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from truedag.launch.deployment import RunRecord
from truedag.launch.errors import FolderError
from truedag.launch.rank_state import read_states
from truedag.launch.run_folder import RunFolder
from truedag.tracer.record.trace_folder import find_traces


def merge_into(
    traces: Path,
    out: Path,
    *,
    replace: bool,
    show: Callable[[str], None],
    processes: int | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Merge the traces of a folder into a new dataset; return what the merge says of itself.

    Args:
        traces: the folder of the traces.
        out: where the dataset goes.
        replace: whether a dataset that is there may be replaced.
        show: hears what is being done.
        processes: how many work on it; None: one for each core that may be used.
        memory_bytes: what they may take together; None: no bound.

    Raises:
        FolderError: there are no traces, they are of different runs, or `out` is in the way.
        TruedagError: the traces do not make one true graph.
    """
    if not find_traces(traces):
        raise FolderError(f"{traces} holds no *.trace files: name the traces folder of a run")
    _check_free(out, replace=replace)
    folder = RunFolder(root=traces.absolute().parent)
    _check_one_run(folder)
    from truedag.tracer.merge.merging import Resources, merge_traces

    record = _read_record(folder)
    merged = merge_traces(
        traces,
        out,
        deployment=record.deployment.name if record is not None else None,
        strategy=record.strategy if record is not None else None,
        progress=show,
        resources=Resources(
            processes=processes or Resources.of_machine().processes,
            memory_bytes=memory_bytes,
        ),
    )
    return dataclasses.asdict(merged)


def _check_free(out: Path, *, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise FolderError(f"{out} is there already: choose another with --out, or replace it with --force")
    if not (out / "meta.json").is_file():
        raise FolderError(f"{out} is no dataset of truedag's (it has no meta.json), so --force does not delete it")


def _check_one_run(folder: RunFolder) -> None:
    """Refuse traces that were brought together from nodes of different runs, as far as states beside them tell."""
    states = read_states(folder.ranks)
    runs = {state.run: rank for rank, state in states.items() if state.run and folder.trace(rank).exists()}
    if len(runs) > 1:
        some = " and ".join(f"rank {rank}" for rank in list(runs.values())[:2])
        raise FolderError(
            f"{folder.traces} holds traces of different runs, among them {some}: bring those of one run together"
        )


def _read_record(folder: RunFolder) -> RunRecord | None:
    try:
        return RunRecord.model_validate_json(folder.record.read_bytes())
    except (OSError, ValidationError):
        return None
