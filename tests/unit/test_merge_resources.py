"""What a merge may use: how much memory, how many processes."""

import argparse
import os
from pathlib import Path

import pytest

from truedag.launch.cli import main
from truedag.launch.commands.merge import _bytes
from truedag.tracer.errors import MergeError
from truedag.tracer.merge.making import Workers, choose_processes


@pytest.mark.parametrize(
    ("text", "number"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("123", 123), ("7 b", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, number: int) -> None:
    assert _bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "8 G", "many", "8XB", "-"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        _bytes(text)


def test_memory_bounds_how_many_parts_are_made_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"rank-{rank:05d}.trace" for rank in range(8)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(100 << 20)
    assert choose_processes(paths, 16, None) == 8
    assert choose_processes(paths, 4, 100 << 30) == 4
    assert choose_processes(paths, 8, 3 << 30) == 2
    with pytest.raises(MergeError, match=r"rank-00000.trace .* takes up to 1.5 GiB .* --memory is 1.0 GiB"):
        choose_processes(paths, 8, 1 << 30)


def test_the_command_says_that_memory_is_too_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-00000.trace").write_bytes(bytes(4096))
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "dag"), "--memory", "1MB"]) == 1
    assert "--memory is 0.0 GiB: give it more" in capsys.readouterr().err


def test_tasks_come_back_in_their_order() -> None:
    with Workers(2) as workers:
        assert workers.run(abs, [-3, 2, -1]) == [3, 2, 1]
        assert len({*workers.run(_process, [0, 1]), os.getpid()}) > 1


def _process(_: int) -> int:
    return os.getpid()
