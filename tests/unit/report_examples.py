"""Small graphs whose report is known by hand: a pipeline, an overlap, prompts, three steps."""

from __future__ import annotations

from dag_source import DagSource
from small_dag import SmallDag

from truedag.tracer.analysis.report import Report, make_report
from truedag.tracer.graph import Graph

META = {
    "deployment": "small", "strategy": None, "torch": "2.13.0", "recorder": "native", "num_views_dropped": 0,
    "num_unmatched": 0, "unmatched": [],
}  # fmt: skip


def report_of(dag: SmallDag, *, steps: dict[int, int] | None = None, **options: float) -> Report:
    """The report of a graph in memory; `steps` says which nodes are of another step than the first."""
    for node, step in (steps or {}).items():
        dag.nodes[node]["step"] = step
    source = DagSource(dag)
    source.meta = META | {"world_size": dag.num_ranks}
    return make_report(Graph(source), **options)


def gpipe(num_microbatches: int, num_stages: int, time: int) -> SmallDag:
    """A pipeline without any cost but compute: all forward passes, then all backward, each pass takes `time`.

    A stage is busy for 2 m of the 2 (m + p - 1) slots: the bubble is (p - 1) / (m + p - 1) of each rank's step.
    """
    dag = SmallDag(num_ranks=num_stages)
    dag.stages = {rank: rank for rank in range(num_stages)}
    pp = dag.group("pp", range(num_stages))
    free = dict.fromkeys(range(num_stages), 0)
    last: dict[int, tuple[int, ...]] = dict.fromkeys(range(num_stages), ())

    def send(source: int, target: int, made: int, ready: int, phase: str) -> tuple[int, int]:
        out = dag.node("send", source, (made,), time=(ready, ready), phase=phase, label="send pp")
        dag.meet(out, pp, source, (ready, ready, ready))
        begun = max(ready, free[target])
        into = dag.node("recv", target, last[target], time=(free[target], begun), phase=phase, label="receive pp")
        dag.meet(into, pp, target, (free[target], begun, begun))
        dag.edges.append({"src": out, "dst": into, "kind": "p2p", "bytes": 8, "dtype": "float32", "shape": [2]})
        return into, begun

    def run(phase: str, order: list[int]) -> None:
        for microbatch in range(num_microbatches):
            ready, made = 0, -1
            for place, rank in enumerate(order):
                if place:
                    made, ready = send(order[place - 1], rank, made, ready, phase)
                begun = max(ready, free[rank])
                after = (*last[rank], *((made,) if place else ()))
                made = dag.node(rank=rank, after=after, time=(begun, begun + time), phase=phase, microbatch=microbatch)
                last[rank] = (made,)
                free[rank] = ready = begun + time

    run("forward", list(range(num_stages)))
    run("backward", list(range(num_stages))[::-1])
    return dag


def overlapping() -> SmallDag:
    """Two ranks; an all-reduce moves data from 20 to 60, rank 0 computes 0-20 and 30-50, rank 1 0-20 and 60-70."""
    dag = SmallDag(num_ranks=2)
    dp = dag.group("dp", [0, 1])
    one, two = (dag.node(rank=rank, time=(0, 20)) for rank in (0, 1))
    reduce = dag.node("collective", -1, (one, two), time=(20, 60), label="all-reduce dp")
    for rank in (0, 1):
        dag.meet(reduce, dp, rank, (20, 20, 60), send_bytes=4000, recv_bytes=4000)
    dag.node(rank=0, time=(30, 50))
    dag.node(rank=1, after=(reduce,), time=(60, 70))
    return dag


def prompts() -> SmallDag:
    """Two batches of prompts are prefilled until 100 and 180, two decode steps end at 240 and 300, on two TP ranks."""
    dag = SmallDag(num_ranks=2)
    for rank in (0, 1):
        for microbatch, (rows, length, begin, end) in enumerate(((2, 8, 10, 100), (1, 16, 100, 180))):
            dag.node(rank=rank, time=(begin, begin + 5), op="aten::embedding", phase="prefill", microbatch=microbatch,
                     inputs=f"float32[128,16] int64[{rows},{length}]")  # fmt: skip
            dag.node(rank=rank, time=(begin + 5, end), phase="prefill", microbatch=microbatch)
        for step, end in enumerate((240, 300)):
            dag.node(rank=rank, time=(end - 50, end - 45), op="aten::embedding", phase="decode", microbatch=0,
                     decode_step=step, inputs="float32[128,16] int64[3,1]")  # fmt: skip
            dag.node(rank=rank, time=(end - 45, end), phase="decode", microbatch=0, decode_step=step)
    return dag


def three_steps() -> SmallDag:
    dag = SmallDag(num_ranks=2)
    for step, (begin, span) in enumerate(((0, 10), (100, 20), (200, 60))):
        for rank in (0, 1):
            dag.node(rank=rank, time=(begin, begin + span // (rank + 1)), step=step)
    return dag
