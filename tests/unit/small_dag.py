"""Small datasets with times that can be added up by hand, written as the merge writes them."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

NODES = {
    "node": pl.Int64, "kind": pl.String, "category": pl.String, "rank": pl.Int32, "op": pl.String, "label": pl.String,
    "module": pl.String, "layer": pl.Int32, "stage": pl.Int32, "microbatch": pl.Int32, "expert": pl.Int32,
    "phase": pl.String, "step": pl.Int32, "decode_step": pl.Int32, "thread": pl.Int32, "stream": pl.Int32,
    "start_ns": pl.Int64, "end_ns": pl.Int64, "timing": pl.String, "flops": pl.Int64, "bytes_read": pl.Int64,
    "bytes_written": pl.Int64, "inputs": pl.String, "outputs": pl.String,
}  # fmt: skip
EDGES = {
    "src": pl.Int64, "dst": pl.Int64, "kind": pl.String, "bytes": pl.Int64, "dtype": pl.String,
    "shape": pl.List(pl.Int64),
}  # fmt: skip
PARTICIPANTS = {
    "node": pl.Int64, "rank": pl.Int32, "group": pl.Int32, "seq": pl.Int64, "arrive_ns": pl.Int64,
    "start_ns": pl.Int64, "end_ns": pl.Int64, "send_bytes": pl.Int64, "recv_bytes": pl.Int64,
}  # fmt: skip
GROUPS = {
    "group": pl.Int32, "axis": pl.String, "ranks": pl.List(pl.Int64), "name": pl.String, "description": pl.String,
}  # fmt: skip
AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")
RANKS = {
    "rank": pl.Int32, "host": pl.String, "device": pl.String, **dict.fromkeys(AXES, pl.Int32),
    "rank_class": pl.Int32, "clock_offset_ns": pl.Int64, "clock_error_ns": pl.Int64,
}  # fmt: skip


class SmallDag:
    """Collects nodes in topological order and writes them."""

    def __init__(self, *, num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self.nodes: list[dict[str, object]] = []
        self.edges: list[dict[str, object]] = []
        self.participants: list[dict[str, object]] = []
        self.groups: list[dict[str, object]] = []
        self.stages: dict[int, int] = {}

    def node(self, kind="compute", rank=0, after=(), *, time=None, **columns) -> int:
        """Add a node that reads what `after` made; `time` is (start, end) in ns, None is unknown."""
        number = len(self.nodes)
        start, end = time or (None, None)
        row = dict.fromkeys(NODES) | {
            "node": number, "kind": kind, "category": "computation", "rank": rank, "op": f"aten::{kind}",
            "label": kind, "layer": -1, "stage": self.stages.get(rank, -1), "microbatch": -1, "expert": -1,
            "step": 0, "decode_step": -1, "thread": 0, "stream": -1, "start_ns": start, "end_ns": end,
            "timing": "none" if end is None else "measured", "bytes_read": 0, "bytes_written": 0,
            "inputs": "float32[2,4]", "outputs": "float32[2,4]",
        }  # fmt: skip
        self.nodes.append(row | columns)
        self.edges += [
            {"src": src, "dst": number, "kind": "data", "bytes": 32, "dtype": "float32", "shape": [2, 4]}
            for src in after
        ]
        return number

    def group(self, axis, ranks) -> int:
        number = len(self.groups)
        self.groups.append(
            {"group": number, "axis": axis, "ranks": list(ranks), "name": str(number), "description": ""}
        )
        return number

    def meet(self, node, group, rank, times, *, send_bytes=32, recv_bytes=32) -> None:
        """Add a rank's part in a communication; times are its arrival, the start of transfer, the end."""
        arrive, start, end = times
        self.participants.append(
            {
                "node": node, "rank": rank, "group": group, "seq": 0, "arrive_ns": arrive, "start_ns": start,
                "end_ns": end, "send_bytes": send_bytes, "recv_bytes": recv_bytes,
            }
        )  # fmt: skip

    def frames(self) -> dict[str, pl.DataFrame]:
        """The tables."""
        ranks = [
            dict.fromkeys(RANKS, -1)
            | {"rank": rank, "host": "h", "device": "cpu", "pp": self.stages.get(rank, -1), "rank_class": 0}
            for rank in range(self.num_ranks)
        ]
        return {
            name: pl.DataFrame(rows, schema=schema)
            for name, rows, schema in (
                ("nodes", self.nodes, NODES),
                ("edges", self.edges, EDGES),
                ("participants", self.participants, PARTICIPANTS),
                ("groups", self.groups, GROUPS),
                ("ranks", ranks, RANKS),
            )
        }

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in self.frames().items():
            frame.write_parquet(folder / f"{name}.parquet")
        meta = {
            "format_version": 1, "deployment": "small", "strategy": None, "world_size": self.num_ranks,
            "missing_ranks": [], "incomplete_ranks": [], "steps": [0], "torch": "2.13.0", "truedag": "0.1.0",
            "recorder": "native", "clock_origin_ns": 0, "num_nodes": len(self.nodes), "num_edges": len(self.edges),
            "num_views_dropped": 7, "num_collectives": 0, "num_messages": 0, "num_unmatched": 0, "unmatched": [],
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder


def pipeline(*, num_microbatches: int = 2) -> SmallDag:
    """Two stages of one rank each, a layer with two experts in each, forward and backward, one gradient reduction."""
    dag = SmallDag(num_ranks=2)
    dag.stages = {0: 0, 1: 1}
    pp, world = dag.group("pp", [0, 1]), dag.group(None, [0, 1])
    ep = [dag.group("ep", [rank]) for rank in (0, 1)]
    clock = iter(range(0, 10_000_000, 100))
    last = {0: (), 1: ()}

    def run(rank, module, phase, microbatch, **columns):
        begin = next(clock)
        layer = rank if ".layers." in module else -1
        node = dag.node(
            "compute", rank, last[rank], time=(begin, begin + 60), module=module, phase=phase, microbatch=microbatch,
            layer=layer, category="routing" if module.endswith(".router") else "computation", **columns,
        )  # fmt: skip
        last[rank] = (node,)

    def talk(kind, rank, label, phase, microbatch, group, **columns):
        begin = next(clock)
        ranks = [0, 1] if group == world else [rank]
        node = dag.node(
            kind, -1 if kind == "collective" else rank, [one for other in ranks for one in last[other]],
            time=(begin, begin + 60), op=f"c10d::{kind}", label=label, category="communication", phase=phase,
            microbatch=microbatch, stage=-1 if group == world else rank, **columns,
        )  # fmt: skip
        for other in ranks:
            dag.meet(node, group, other, (begin, begin + 10, begin + 60))
            last[other] = (node,)
        return node

    def layer(rank, phase, microbatch):
        name = f"decoder.layers.{rank}"
        run(rank, f"{name}.attention", phase, microbatch)
        run(rank, f"{name}.mlp.router", phase, microbatch)
        talk("collective", rank, "all-to-all ep", phase, microbatch, ep[rank], module=f"{name}.mlp", layer=rank)
        for expert in (0, 1):
            run(rank, f"{name}.mlp.experts.{expert}", phase, microbatch, expert=expert)
        talk("collective", rank, "all-to-all ep", phase, microbatch, ep[rank], module=f"{name}.mlp", layer=rank)
        run(rank, name, phase, microbatch)

    for microbatch in range(num_microbatches):
        for phase, first, second in (("forward", 0, 1), ("backward", 1, 0)):
            last[first] = last[first] if phase == "backward" else ()
            layer(first, phase, microbatch)
            send = talk("send", first, "send pp", phase, microbatch, pp)
            last[second] = ()
            recv = talk("recv", second, "receive pp", phase, microbatch, pp)
            dag.edges.append(
                {"src": send, "dst": recv, "kind": "p2p", "bytes": 32, "dtype": "float32", "shape": [2, 4]}
            )
            layer(second, phase, microbatch)
    talk("collective", 0, "all-reduce", "optimizer", -1, world)
    for rank in (0, 1):
        run(rank, "step", "optimizer", -1)
    return dag
