"""PyTorch's own profiler as the reference: of each kernel, the operators that were running when it was launched.

With CPU and CUDA activities Kineto gives each kernel the number of the operator that launched it ("External id"), by
the thread's own stack of operators, where truedag has the times of a launch and of operators alone.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

Key = tuple[int, str, int]  # correlation, name, bytes


def profiled(path: Path, program: Callable[[], object]) -> None:
    """Run a program under CPU and CUDA activities into a file such as the recorder has of CUDA activities."""
    waits = torch._C._profiler._ExperimentalConfig(enable_cuda_sync_events=True)
    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=both, experimental_config=waits, acc_events=True) as profiler:
        program()
        torch.cuda.synchronize()
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    plain.unlink()


def launching_operators(path: Path) -> dict[Key, list[str]]:
    """Return the names of the operators around each kernel's launch, outermost first; none: outside of all of them."""
    events = json.loads(gzip.decompress(path.read_bytes()), parse_float=Decimal)["traceEvents"]
    operators: dict[int, list[dict[str, Any]]] = defaultdict(list)
    by_number: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" and event.get("ph") == "X":
            operators[event["tid"]].append(event)
            by_number[event["args"]["External id"]] = event
    found = {}
    for event in events:
        if event.get("cat") in _ON_GPU and event.get("ph") == "X":
            args = event["args"]
            launcher = by_number.get(args.get("External id", 0))
            around = [] if launcher is None else _around(operators[launcher["tid"]], launcher)
            found[args.get("correlation", 0), event["name"], args.get("bytes", 0)] = around
    return found


def _around(operators: list[dict[str, Any]], inner: dict[str, Any]) -> list[str]:
    """The operators of a thread that begin no later than one, and end no earlier."""
    end = inner["ts"] + inner["dur"]
    around = [one for one in operators if one["ts"] <= inner["ts"] and one["ts"] + one["dur"] >= end]
    return [one["name"] for one in sorted(around, key=lambda one: (one["ts"], -one["dur"]))]
