"""A recording leaves no trace in the program: neither in its results, nor in what it holds afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from truedag.tracer.record.trace import read_trace

RESULTS = """
import contextlib, copy, hashlib, io, os, pickle, sys, threading, torch
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset
from truedag.tracer.record.recording import record
torch.manual_seed(3)
digest = hashlib.sha256()
def told(*tensors):
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x / 2
    @staticmethod
    def backward(ctx, gradient): return gradient / 2
def train():
    data = TensorDataset(torch.randn(32, 6), torch.randn(32, 1))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.GELU(), torch.nn.Linear(8, 1))
    kinds = [
        torch.optim.AdamW(model.parameters(), foreach=True),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=False),
        torch.optim.Adam(model.parameters(), fused=True),
    ]
    loader = DataLoader(
        data, batch_size=8, shuffle=True, num_workers=2, multiprocessing_context=sys.argv[2], persistent_workers=True
    )
    for optimizer in kinds:
        for x, y in loader:
            loss = (Halved.apply(model(x)) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            told(loss)
    told(*model.parameters())
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    told(*pickle.loads(pickle.dumps(list(model.parameters()))))
    torch.utils.data.get_worker_info()
def memory():
    base = torch.arange(24.0)
    view = base.view(4, 6)[:, ::2]
    view.mul_(3)
    base.numpy()[3] += 1
    told(base, view)
    foreign = torch.frombuffer(bytearray(range(64)), dtype=torch.uint8)
    foreign.add_(1)
    passed = torch.from_dlpack(torch.arange(7.0))
    told(foreign, passed.sin_())
    shared = torch.arange(5.0).share_memory_()
    shared.mul_(2)
    told(shared)
    grown = torch.arange(4.0)
    grown.resize_(100)[4:] = 1
    grown.untyped_storage().resize_(40)
    told(grown.resize_(10))
    lazy = torch._lazy_clone(base)
    lazy.add_(1)
    told(base, lazy)
    raw = torch.UntypedStorage(16)
    raw.fill_(7)
    told(torch.empty(0, dtype=torch.uint8).set_(raw))
    other = torch.zeros(3)
    other.data = base[:3]
    other.add_(1)
    told(base, other)
    path = Path(sys.argv[1]) / "mapped.bin"
    path.write_bytes(bytes(400))
    mapped = torch.from_file(str(path), shared=True, size=100)
    mapped.add_(2)
    del mapped
    digest.update(path.read_bytes())
def child_of_a_thread():
    def work():
        told(torch.rand(5))
        child = os.fork()
        if child == 0:
            os._exit(int(torch.ones(3).sum()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
def main():
    path = Path(sys.argv[1]) / "rank.trace"
    block = record(path, synchronize=False) if sys.argv[3] == "recorded" else contextlib.nullcontext()
    kept = []
    with block:
        train()
        memory()
        child_of_a_thread()
        kept.append(torch.randn(1000))
    told(kept.pop(), torch.get_rng_state())
    print(digest.hexdigest())
if __name__ == "__main__":
    main()
"""

HOLDINGS = """
import gc, os, sys, threading, torch
from pathlib import Path
from truedag.tracer.record.recording import record
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
def step():
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
is_running = True
def others():
    while is_running:
        step_of_mine.wait(0.001)
        torch.ones(3).add_(1)
step_of_mine = threading.Event()
threads = [threading.Thread(target=others) for _ in range(3)]
for thread in threads: thread.start()
def holdings():
    gc.collect()
    status = Path("/proc/self/status").read_text()
    anonymous = int(status.split("RssAnon:")[1].split()[0])
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    return [files, threads, len(gc.get_objects()), maps, anonymous]
path = Path(sys.argv[1])
cycles = int(sys.argv[2])
for i in range(cycles):
    if i == cycles // 4: before = holdings()
    with record(path, watch=[("model", model)], synchronize=False) as recording:
        step()
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert recording.num_events > 40 and not recording.switched_off
    path.unlink()
after = holdings()
is_running = False
for thread in threads: thread.join()
print(*(b - a for a, b in zip(before, after)))
"""

STEPS = """
import sys, threading, torch
from pathlib import Path
from truedag.tracer.record.recording import record
torch.set_num_threads(1)
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) >> 10
with record(Path(sys.argv[1]), synchronize=False):
    for i in range(10_000):
        if i == 1_000: before = anonymous()
        big = torch.empty(1 << 20, dtype=torch.uint8).fill_(1)
        big = big + 1
        handed = [big]
        del big
        if i % 10 == 0:  # given back by a thread that then ends
            thread = threading.Thread(target=handed.clear)
            thread.start()
            thread.join()
    after = anonymous()
print(after - before)
"""


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout.strip()


@pytest.mark.parametrize("workers", ["fork", "spawn"])
def test_results_are_the_same_bit_by_bit(workers: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(RESULTS)
    digests = {}
    for how in ("unrecorded", "recorded"):
        ended = subprocess.run(
            [sys.executable, str(script), str(tmp_path), workers, how],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == 0, ended.stderr
        digests[how] = ended.stdout
    assert digests["recorded"] == digests["unrecorded"] != ""
    trace = read_trace(tmp_path / "rank.trace")
    assert trace.closed
    assert sum(len(thread.events) for thread in trace.threads) > 500


def test_a_thousand_recordings_that_have_ended_hold_nothing(tmp_path: Path) -> None:
    files, threads, objects, maps, anonymous_kib = map(int, run(HOLDINGS, tmp_path / "rank.trace", 1000).split())
    assert (files, threads) == (0, 0)
    assert objects < 50
    assert maps < 20
    assert anonymous_kib < 4096


def test_memory_that_is_given_back_is_free(tmp_path: Path) -> None:
    assert int(run(STEPS, tmp_path / "rank.trace")) < 16
