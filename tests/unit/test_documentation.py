"""What the documentation shows is there: pictures that the script makes, and command lines that the commands take."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from truedag.launch.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# In a block that is indented, without what is said of it behind; or alone between backticks.
COMMAND_LINE = re.compile(r"^ {4}(?:\.venv/bin/)?(truedag .*?)(?: +#.*)?$|`(truedag \w+ [^`]*--[^`]*)`", re.MULTILINE)


def shown_commands() -> list[str]:
    found = [match for page in PAGES for match in COMMAND_LINE.finditer(page.read_text())]
    return sorted({(match[1] or match[2]).replace("\n", " ") for match in found})


def test_every_picture_is_shown_and_made_by_the_script() -> None:
    shown = {
        (page.parent / place).resolve()
        for page in PAGES
        for place in re.findall(r"\]\(([^)]*\.png)\)", page.read_text())
    }
    assert shown == set((ROOT / "docs").glob("*.png"))
    script = (ROOT / "scripts" / "docs_pictures.py").read_text()
    assert [path.name for path in sorted(shown) if script.count(f'"{path.stem}": ') != 1] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for way in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / way).exists(), f"{page.name} leads to {way}"


@pytest.mark.parametrize("line", shown_commands())
def test_commands_take_the_lines_that_are_shown(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = COMMANDS[name].load()
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    command.configure(parser)
    parse = parser.parse_args if command.takes_program else parser.parse_intermixed_args
    parse(arguments)
