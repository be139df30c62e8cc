"""Numbers after an option: none that a command could only misunderstand."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

import pytest

from truedag.launch.cli import main
from truedag.launch.typed_numbers import natural, positive


@pytest.mark.parametrize(("read", "text", "number"), [(positive, "3", 3), (natural, "0", 0), (natural, "12", 12)])
def test_whole_numbers_are_read(read: Callable[[str], int], text: str, number: int) -> None:
    assert read(text) == number


@pytest.mark.parametrize(
    ("read", "text"),
    [(positive, "0"), (positive, "-1"), (positive, "two"), (natural, "-1"), (natural, ""), (natural, "1.5"),
     (natural, "٣")],
)  # fmt: skip
def test_what_is_none_is_refused(read: Callable[[str], int], text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is no whole number from"):
        read(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("dry", "small", "--gpus-per-node", "0"),
        ("dry", "small", "--jobs", "0"),
        ("dry", "small", "--verify", "-1"),
        ("merge", "traces", "--out", "dag", "--processes", "0"),
        ("critical-path", "out", "--top", "0"),
        ("export", "out", "--to", "csv", "--max", "0"),
    ],
)
def test_commands_refuse_them(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    assert "is no whole number from" in capsys.readouterr().err
