"""One Chromium for all tests of the page; without one they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Chromium, find_chromium


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install one (apt-get install chromium), or name it with CHROMIUM")
    with Chromium(program) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    """It, with what went wrong before forgotten; a test ends without an error of the page and without a request."""
    chromium.errors.clear()
    chromium.requests.clear()
    yield chromium
    assert chromium.errors == []
    assert [one for one in chromium.requests if not one.startswith(("file://", "data:", "http://127.0.0.1:"))] == []
