"""Programs that know nothing of truedag run the same under `truedag.tracer.attach`, and are recorded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.trace import Trace, read_trace
from truedag.tracer.record.trace_folder import find_trace_folders, find_traces

TIMEOUT_S = 150

# Says what a program can see of how it is run, and computes something.
SINGLE = """
import os, sys
assert "torch" not in sys.modules and "numpy" not in sys.modules
os.environ["OMP_NUM_THREADS"] = "1"
import torch
assert torch.get_num_threads() == 1
print(__name__, __file__, sys.argv, sys.path, __spec__, __package__, type(__loader__).__name__, sorted(globals()))
print(sys.modules["__main__"].__dict__ is globals(), sys.stdin.read())
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
for _ in range(6):
    optimizer.zero_grad()
    loss = model(torch.randn(3, 4)).pow(2).sum()
    loss.backward()
    optimizer.step()
print([parameter.tolist() for parameter in model.parameters()])
if "raise" in sys.argv:
    raise ValueError("it did")
if "exit" in sys.argv:
    sys.exit(7)
if "say" in sys.argv:
    sys.exit("said")
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
"""

SPAWN = """
import os, sys, tempfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

def work(rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    loader = DataLoader(torch.arange(8.0), batch_size=4, num_workers=1, multiprocessing_context=sys.argv[1])
    for batch in loader:
        dist.all_reduce(batch)
    late = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(3), group=late)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.ones(2) + 1  # what starts the ranks is none itself
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (os.path.join(folder, "meet"),), nprocs=2, start_method=sys.argv[1])
"""

RANKS = """
import os, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
late = dist.new_group([1, 0])
weight = torch.nn.Parameter(torch.ones(4))
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(5):
    if "once" in sys.argv and step == 2 and rank == 0:
        open("reached", "w").close()
        time.sleep(600)
    optimizer.zero_grad()
    (weight * (rank + step)).sum().backward()
    dist.all_reduce(weight.grad, group=late)
    optimizer.step()
sys.stdout.write(f"{rank} {weight.tolist()}\\n")
dist.destroy_process_group()
"""


def environment(**values: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRUEDAG_") or "CACHE" in name}
    return kept | {"OMP_NUM_THREADS": "1"} | values


def run(*command: str, cwd: Path, text: str = "", **values: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment(**values), input=text, capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def attached(*arguments: str, cwd: Path, text: str = "", **values: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "truedag.tracer.attach", *arguments, cwd=cwd, text=text, **values)


def torchrun(*arguments: str, cwd: Path, **values: str) -> subprocess.CompletedProcess[str]:
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return run(*starter, *arguments, cwd=cwd, **values)


def operators(trace: Trace) -> list[str]:
    thread = max(trace.threads, key=lambda thread: len(thread.events))
    return [trace.ops[int(event["op"])]["name"] for event in thread.events]


def words(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("truedag: ")]


@pytest.mark.parametrize("how", ["well", "raise", "exit", "say", "interrupt"])
def test_a_script_runs_as_under_python(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "single.py").write_text(SINGLE)
    plain = run("scripts/single.py", how, "--out", "mine", cwd=tmp_path, text="some input")
    recorded = attached("--out", "out", "scripts/single.py", how, "--out", "mine", cwd=tmp_path, text="some input")
    assert (recorded.returncode, recorded.stdout) == (plain.returncode, plain.stdout)
    own = words(recorded.stderr)
    assert len(own) == 1
    assert "recorded" in own[0]
    assert recorded.stderr.replace(own[0] + "\n", "") == plain.stderr
    trace = read_trace(tmp_path / "out" / "traces" / "rank-00000.trace")
    assert trace.closed
    assert (trace.rank, trace.meta["world_size"]) == (0, 1)
    assert merge_traces(tmp_path / "out" / "traces", tmp_path / "out" / "dag").num_nodes > 100
    assert set(range(6)) <= set(Graph.open(tmp_path / "out").nodes.collect()["step"])


def test_a_module_runs_as_under_python(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys, torch\nprint(__name__, __package__, __spec__.name, __file__, sys.argv, sys.path)\ntorch.ones(2)\n"
    )
    plain = run("-m", "package", "--steps", "x", cwd=tmp_path)
    recorded = attached("--out", "out", "-m", "package", "--steps", "x", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert (recorded.returncode, recorded.stdout) == (plain.returncode, plain.stdout)
    assert len(find_traces(tmp_path / "out" / "traces")) == 1


def test_what_python_cannot_run_ends_as_under_python(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("a = 1\nb = = 2\n")
    plain, recorded = run("broken.py", cwd=tmp_path), attached("broken.py", cwd=tmp_path)
    assert recorded.returncode == plain.returncode == 1
    assert plain.stderr in recorded.stderr
    assert run("none.py", cwd=tmp_path).returncode == attached("none.py", cwd=tmp_path).returncode == 2
    assert attached("-m", "no_such_module", cwd=tmp_path).returncode == 1
    wrong = attached("--steps", "x", "broken.py", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "'x' is no step" in wrong.stderr


def test_a_program_without_torch_does_not_get_it(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import subprocess, sys, multiprocessing\n"
        'look = \'import sys; print([name for name in ("torch", "numpy") if name in sys.modules], sys.path)\'\n'
        "exec(look)\n"
        "subprocess.run([sys.executable, '-c', look], check=True)\n"
        "if __name__ == '__main__':\n"
        "    pool = multiprocessing.get_context('spawn').Pool(1)\n"
        "    print(pool.map(abs, [-1]))\n"
        "    pool.close()\n"
        "    pool.join()\n"  # else it may be ended before what it printed is out
    )
    plain, recorded = run("plain.py", cwd=tmp_path), attached("--out", "out", "plain.py", cwd=tmp_path)
    assert plain.stdout.startswith("[] [")
    assert (recorded.returncode, recorded.stdout) == (0, plain.stdout)
    assert words(recorded.stderr) == ["truedag: nothing was recorded: the program did not import torch"]


def test_the_environments_own_sitecustomize_has_its_turn(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.told = 'by the environment'\n")
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import sys; print(sys.told)'], check=True)\n"
    )
    recorded = attached("--out", "out", "parent.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert recorded.stdout == "by the environment\n"


@pytest.mark.parametrize(
    ("method", "recorder"), [("spawn", "native"), ("fork", "native"), ("forkserver", "native"), ("spawn", "python")]
)
def test_ranks_that_a_program_starts_itself_are_recorded_and_nothing_else(
    tmp_path: Path, method: str, recorder: str
) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)
    recorded = attached("--out", "out", "--recorder", recorder, "spawn.py", method, cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    assert len(words(recorded.stderr)) == 2
    traces = find_traces(tmp_path / "out" / "traces")
    assert [path.name for path in traces] == ["rank-00000.trace", "rank-00001.trace"]
    assert all(read_trace(path).closed for path in traces)
    summary = merge_traces(tmp_path / "out" / "traces", tmp_path / "out" / "dag")
    assert (summary.num_collectives, summary.num_unmatched, summary.missing_ranks) == (3, 0, ())


def test_windows_of_steps_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    plain = torchrun("ranks.py", cwd=tmp_path)
    options = ("-m", "truedag.tracer.attach", "--out", "out", "--steps", "1,3-")
    recorded = torchrun(*options, "ranks.py", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    assert sorted(recorded.stdout.splitlines()) == sorted(plain.stdout.splitlines())
    assert len(words(recorded.stderr)) == 2
    folders = find_trace_folders(tmp_path / "out")
    assert [str(folder.relative_to(tmp_path / "out")) for folder in folders] == [
        "windows/step-00001/traces",
        "windows/step-00003/traces",
    ]
    for folder, steps in zip(folders, ([1], [3, 4]), strict=True):
        summary = merge_traces(folder, folder.parent / "dag")
        assert summary.num_ranks == 2
        assert (summary.num_collectives, summary.num_unmatched) == (len(steps), 0)
        nodes = Graph.open(folder.parent).nodes.collect()
        computed = nodes.filter((nodes["op"] == "aten::mul") & nodes["phase"].ne_missing("backward"))
        assert sorted(computed["step"].to_list()) == sorted(steps * 2)


def test_ranks_of_a_torchrun_that_the_program_starts_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "starter.py").write_text(
        "import subprocess, sys\nimport torch\ntorch.ones(3)\n"
        "torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '--standalone']\n"
        "subprocess.run([*torchrun, 'ranks.py'], check=True)\n"
    )
    recorded = attached("--out", "out", "--collect", "starter.py", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    assert [path.name for path in (tmp_path / "out" / "traces").iterdir()] in (
        ["rank-00000.trace", "rank-00001.trace"],
        ["rank-00001.trace", "rank-00000.trace"],
    )
    assert len(words(recorded.stderr)) == 2
    summary = merge_traces(tmp_path / "out" / "traces", tmp_path / "dag")
    assert (summary.num_collectives, summary.num_unmatched) == (5, 0)


def test_traces_of_machines_without_a_shared_disk_are_collected(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    # As on two machines: the same folder's name is another folder for each rank.
    (tmp_path / "machine.py").write_text(
        "import os, sys\nhere = f\"machine{os.environ['RANK']}\"\nos.mkdir(here)\nos.chdir(here)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'truedag.tracer.attach', '--collect', '--out=out', "
        "'../ranks.py'])\n"
    )
    recorded = torchrun("machine.py", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    assert len(words(recorded.stderr)) == 2
    names = {path.name for path in (tmp_path / "machine0" / "out" / "traces").iterdir()}
    assert names == {"rank-00000.trace", "rank-00001.trace.gz"}
    summary = merge_traces(tmp_path / "machine0" / "out" / "traces", tmp_path / "dag")
    assert (summary.missing_ranks, summary.num_collectives, summary.num_unmatched) == ((), 5, 0)
    assert [path.name for path in (tmp_path / "machine1" / "out" / "traces").iterdir()] == ["rank-00001.trace"]


def test_what_the_environment_says_holds_for_some_ranks_only(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    recorded = torchrun(
        "-m", "truedag.tracer.attach", "ranks.py", cwd=tmp_path, TRUEDAG_RANKS="1", TRUEDAG_OUT=str(tmp_path / "there")
    )  # fmt: skip
    assert recorded.returncode == 0, recorded.stderr
    assert [path.name for path in find_traces(tmp_path / "there" / "traces")] == ["rank-00001.trace"]
    summary = merge_traces(tmp_path / "there" / "traces", tmp_path / "dag")
    assert (summary.missing_ranks, summary.num_collectives, summary.num_unmatched) == ((0,), 0, 5)


def test_a_rank_that_is_killed_leaves_its_trace_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    # A launcher of one's own: the environment says which rank it is only when the program has begun.
    (tmp_path / "start.py").write_text(
        "import os, sys\nimport torch\n"
        "os.environ.update(RANK=sys.argv[1], WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=sys.argv[2])\n"
        "exec(open('ranks.py').read())\n"
    )
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "truedag.tracer.attach", "--out=out", "start.py", str(rank), str(port), "once"],
            cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        wait_for(tmp_path / "reached", ranks)
        ranks[0].kill()
        _, said = ranks[1].communicate(timeout=TIMEOUT_S)
        assert ranks[1].returncode == 1
        assert "Traceback" in said
        assert len(words(said)) == 1
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    traces = find_traces(tmp_path / "out" / "traces")
    assert [path.name for path in traces] == ["rank-00000.trace", "rank-00001.trace"]
    assert [read_trace(path).closed for path in traces] == [False, True]
    summary = merge_traces(tmp_path / "out" / "traces", tmp_path / "out" / "dag")
    assert (summary.num_collectives, summary.num_unmatched, summary.missing_ranks) == (2, 1, ())


COMPILED = """
import sys, warnings
import torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
model(torch.ones(1, 2))
compiled = torch.compile(model, backend="eager")
for _ in range(3):
    print(compiled(torch.ones(1, 2)).sum().item() != 0)
print(torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["graph_break"])
"""


def test_a_program_that_compiles_is_compiled_as_ever(tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(COMPILED)
    plain = run("-W", "error::UserWarning", "compiled.py", cwd=tmp_path)
    recorded = run("-W", "error::UserWarning", "-m", "truedag.tracer.attach", "--out=out", "compiled.py", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert (recorded.returncode, recorded.stdout) == (0, plain.stdout), recorded.stderr
    trace = read_trace(tmp_path / "out" / "traces" / "rank-00000.trace")
    assert "Sequential.0" in {label["module"] for label in trace.labels.values()}


def test_a_full_disk_ends_the_recording_and_not_the_program(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(
        "import torch\nx = torch.ones(2)\nfor _ in range(250_000):\n    x = torch.add(x, 1)\nprint(x.tolist())\n"
    )
    for blocks in (64, 10_000):  # of 1024 bytes: not even a beginning, and the beginning
        limited = subprocess.run(
            ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", sys.executable, "-m", "truedag.tracer.attach",
             f"--out=out{blocks}", "long.py"],
            cwd=tmp_path, env=environment(PYTHONDONTWRITEBYTECODE="1"), capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert (limited.returncode, limited.stdout) == (0, "[250001.0, 250001.0]\n"), limited.stderr
        assert sum("the program runs on" in line for line in words(limited.stderr)) == 1
    assert list((tmp_path / "out64").rglob("*.trace")) == []
    assert len(operators(read_trace(tmp_path / "out10000" / "traces" / "rank-00000.trace"))) > 1000


def test_what_cannot_be_recorded_is_one_warning_and_the_program_runs_on(tmp_path: Path) -> None:
    (tmp_path / "single.py").write_text(SINGLE)
    (tmp_path / "file").touch()
    plain = run("single.py", "exit", cwd=tmp_path)
    for out in ("file/out", "/proc/out"):
        recorded = attached("--out", out, "--steps", "0,2,4", "single.py", "exit", cwd=tmp_path)
        assert (recorded.returncode, recorded.stdout) == (7, plain.stdout)
        (warning,) = words(recorded.stderr)
        assert "the program runs on" in warning


def test_steps_that_never_come_are_said(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("import torch\ntorch.ones(2)\n")
    recorded = attached("--out", "out", "--steps", "3", "one.py", cwd=tmp_path)
    assert recorded.returncode == 0
    assert words(recorded.stderr) == ["truedag: nothing was recorded: 0 steps ended, none of those to record began"]
    assert not (tmp_path / "out").exists()


def test_a_program_that_says_its_steps_itself_is_believed(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import torch\nfrom truedag.tracer import step, trace\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)\n"
        "with trace('inner', schedule='9') as tracer:\n"
        "    for number in range(4):\n"
        "        torch.full((1,), number)\n"
        "        step() if number % 2 else tracer.step()\n"
        "        optimizer.step()\n"
    )
    recorded = attached("--out", "out", "--steps", "2", "told.py", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    assert not (tmp_path / "inner").exists()
    assert operators(read_trace(tmp_path / "out" / "traces" / "rank-00000.trace")) == ["aten::full"]


def test_a_child_that_was_forked_before_torch_came_is_no_rank(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(
        "import os, sys\nchild = os.fork()\nimport torch\ntorch.ones(3)\n"
        "if child == 0:\n    sys.exit(0)\nassert os.waitpid(child, 0)[1] == 0\n"
    )
    recorded = attached("--out", "out", "early.py", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    assert len(words(recorded.stderr)) == 1
    assert [path.name for path in find_traces(tmp_path / "out" / "traces")] == ["rank-00000.trace"]


def test_an_earlier_recording_gives_way_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("import torch\ntorch.ones(2)\n")
    (tmp_path / "two.py").write_text("import torch\ntorch.ones(2) + 1\n")
    path = tmp_path / "out" / "traces" / "rank-00000.trace"
    assert attached("--out", "out", "one.py", cwd=tmp_path).returncode == 0
    refused = attached("--out", "out", "two.py", cwd=tmp_path)
    assert refused.returncode == 0
    assert "of an earlier run" in words(refused.stderr)[0]
    assert operators(read_trace(path)) == ["aten::ones"]
    assert attached("--out", "out", "--force", "two.py", cwd=tmp_path).returncode == 0
    assert operators(read_trace(path)) == ["aten::ones", "aten::add"]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


WINDOWS = """
import torch
import torch.distributed as dist
from truedag.tracer import trace

dist.init_process_group("gloo")
rank, other = dist.get_rank(), 1 - dist.get_rank()
value = torch.full((2,), float(rank))
dist.all_reduce(value)
with trace("out", schedule="2-4" if rank == 0 else "1-4") as tracer:
    for _ in range(6):
        dist.all_reduce(value)
        for work in [dist.isend(value, other), dist.irecv(torch.empty(2), other)]:
            work.wait()
        tracer.step()
dist.destroy_process_group()
"""


def test_a_program_that_imports_trace_first_may_begin_to_record_anywhere(tmp_path: Path) -> None:
    (tmp_path / "windows.py").write_text(WINDOWS)
    recorded = torchrun("windows.py", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    summary = merge_traces(tmp_path / "out" / "traces", tmp_path / "dag")
    # Rank 1's first step, which rank 0 did not record: a collective, a message each way.
    assert (summary.num_collectives, summary.num_messages, summary.num_unmatched) == (3, 6, 3)
