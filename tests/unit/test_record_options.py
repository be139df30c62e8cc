"""What is to be recorded, said by options, by the environment, or by both."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from truedag.tracer.errors import RecordError
from truedag.tracer.record.options import (
    RecordOptions,
    add_record_options,
    inherited_options,
    parse_bytes,
    read_options,
)

FULL = RecordOptions(
    out=Path("/some where/out"), steps="1,3-5", ranks="0,2", recorder="python", max_bytes=1 << 20, collect=True
)


def read(*arguments: str, **environment: str) -> RecordOptions:
    parser = argparse.ArgumentParser()
    add_record_options(parser, default_out="here")
    return read_options(parser.parse_args(arguments), environment, default_out=Path("here"))


@pytest.mark.parametrize("options", [FULL, RecordOptions(out=Path("/out"))])
def test_options_and_environment_say_the_same(options: RecordOptions) -> None:
    assert read(*options.arguments()) == options
    assert read(**options.environment()) == options
    assert inherited_options(options.environment()) == options


def test_an_option_goes_before_the_environment() -> None:
    assert read("--steps", "7", TRUEDAG_STEPS="1", TRUEDAG_RANKS="2") == RecordOptions(
        out=Path("here"), steps="7", ranks="2"
    )
    assert read("--recorder=native", TRUEDAG_RECORDER="python").recorder == "native"


def test_nothing_is_inherited_from_nobody() -> None:
    assert inherited_options({"TRUEDAG_STEPS": "1"}) is None


def test_bytes_are_read_with_their_unit() -> None:
    told = {text: parse_bytes(text) for text in ("1000", "2K", "500M", "3g", "1GB", "2GiB")}
    assert told == {"1000": 1000, "2K": 2048, "500M": 500 << 20, "3g": 3 << 30, "1GB": 1 << 30, "2GiB": 2 << 30}


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "10P", "much"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match="max_bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "environment", [{"TRUEDAG_STEPS": "soon"}, {"TRUEDAG_RANKS": "x"}, {"TRUEDAG_RECORDER": "tape"}]
)
def test_what_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(RecordError):
        read(**environment)
