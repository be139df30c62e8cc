"""One run of the small deployment for all tests that only look at what a run leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command_line import Ran


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Recorded natively, with its routing, into `out`. Nobody writes into it: who must, copies it first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).parent / "integration"), *sys.path])
        from command_line import run_small
    return run_small(tmp_path_factory.mktemp("small"), "trace.routing=true")
