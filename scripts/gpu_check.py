"""Say in plain words what of truedag works on this machine's GPU: `python scripts/gpu_check.py [PYTEST OPTIONS]`.

It runs tests/gpu with the Python that runs it (one that has a PyTorch with CUDA, and truedag installed) and prints of
each test what its first line says, whether that is so here, and what was measured. Exit code 0: all of it works; 1: not
all; 2: there is nothing to check.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDENT = " " * 8


class PlainWords:
    """Prints a line for each test, and keeps what failed."""

    def __init__(self) -> None:
        self.failed: list[tuple[str, str]] = []
        self.num_passed = 0
        self._said: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Learn what each test says."""
        for item in items:
            told = (getattr(item.obj, "__doc__", None) or item.name).strip().splitlines()[0]
            case = item.name.partition("[")[2].rstrip("]")
            self._said[item.nodeid] = f"{told} [{case}]" if case else told

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Say how a test went; one that fails before or after itself has failed too."""
        told = self._said[report.nodeid]
        if report.failed:
            self.failed.append((told, report.longreprtext))
            print(f"FAILS   {told}\n{INDENT}{reason(report.longreprtext)}", flush=True)
        elif report.when == "call" and report.passed:
            self.num_passed += 1
            print(f"works   {told}", flush=True)
            for name, value in report.user_properties:
                print(f"{INDENT}{name}: {value}")


def main(options: list[str]) -> int:
    """Run the tests; return the exit code."""
    if not torch.cuda.is_available():
        built = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        print(f"Nothing to check: torch {torch.__version__} {built} here.")
        return 2
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    print(f"{gpus}; torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl_version()}\n", flush=True)
    words = PlainWords()
    project = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--override-ini=addopts="]
    code = pytest.main([*project, *quiet, *options, str(ROOT / "tests" / "gpu")], plugins=[words])
    print(f"\n{words.num_passed} work, {len(words.failed)} fail.")
    for told, text in words.failed:
        print(f"\n--- {told}\n{text}")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"pytest ended early ({code.name if isinstance(code, pytest.ExitCode) else code})")
        return 1
    return 1 if words.failed else 0


def reason(text: str) -> str:
    """Return the line of a failure's text that says what was wrong."""
    lines = text.strip().splitlines()
    return next((line.removeprefix("E").strip() for line in lines if line.startswith("E ")), lines[-1])


def nccl_version() -> str:
    """Return NCCL's version, or that there is none."""
    if not torch.distributed.is_nccl_available():
        return "not there"
    return ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    try:
        import pytest
        import torch

        import truedag.tracer  # noqa: F401
    except ImportError as error:
        print(f"Nothing to check: {error} under {sys.executable}. Run it with a Python that has PyTorch and truedag.")
        sys.exit(2)
    sys.exit(main(sys.argv[1:]))
