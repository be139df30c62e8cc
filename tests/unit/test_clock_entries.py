"""CLOCK entries of a trace: read as they are, refused if they are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from handmade_trace import entry, header, tables

from truedag.tracer.errors import TraceError
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.trace import read_trace

TOLD: dict[str, Any] = {
    "clock": "here",
    "peer_clock": "there",
    "peer_host": "far",
    "num_pings": 32,
    "pings": [[1, 2, 3, 4], [5, 6, 7, 8]],
}


def write(path: Path, *told: dict[str, Any]) -> Path:
    entries = (entry(TableKind.CLOCK, 0, json.dumps(one).encode()) for one in told)
    path.write_bytes(header() + tables(*entries))
    return path


def test_samples_are_read_in_their_order(tmp_path: Path) -> None:
    second = TOLD | {"pings": [[9, 9, 9, 9]]}
    assert read_trace(write(tmp_path / "trace", TOLD, second)).clock_samples == [TOLD, second]


@pytest.mark.parametrize(
    "broken",
    [
        {"pings": [[1, 2, 3]]},
        {"pings": [[1, 2, 3, 4.5]]},
        {"pings": [[1, 2, 3, 2**63]]},
        {"pings": [1]},
        {"pings": None},
        {"clock": 3},
        {"peer_clock": None},
    ],
)
def test_a_broken_sample_is_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    path = write(tmp_path / "trace", TOLD | broken)
    with pytest.raises(TraceError, match="is broken"):
        read_trace(path)
