"""A small class graph with times, as a dry run for a device writes it: two stages of two ranks with other experts."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from small_dag import EDGES, GROUPS, NODES, PARTICIPANTS, RANKS

from truedag.tracer.graph.class_dataset import FORM, FORM_VERSION

_EP, _PP = (0, 1), 2  # teams: the experts' group of each stage, and two pairs of ranks across the stages
_RANKS = [[[0, 1]], [[2, 3]], [[0, 2], [1, 3]]]


def write_classes(folder: Path) -> Path:
    """Write it: each class computes an expert and meets its stage, the first sends to the second, and both meet."""
    nodes, edges, parts = [], [], []
    ends = {0: 0, 1: 0}
    last: dict[int, int] = {}
    number = 0

    def add(kind, rank_class, after=(), *, team=-1, takes=0, start=None, **columns):
        nonlocal number
        classes = [rank_class] if rank_class >= 0 else [0, 1] if team == _PP else [team]
        begin = max(ends[one] for one in classes) if start is None else start
        timed = kind != "parameter"
        row = dict.fromkeys(NODES) | {
            "node": number, "kind": kind, "category": "computation", "rank": 2 * rank_class if rank_class >= 0 else -1,
            "op": f"aten::{kind}", "label": kind, "layer": -1, "stage": rank_class, "microbatch": -1, "expert": -1,
            "phase": "forward", "step": 0, "decode_step": -1, "thread": 0, "stream": -1,
            "start_ns": begin if timed else None, "end_ns": begin + takes if timed else None,
            "timing": "estimated" if timed else "none", "bytes_read": 64, "bytes_written": 32,
            "inputs": "float32[2,4]", "outputs": "float32[2,4]",
        }  # fmt: skip
        num = 2 if rank_class >= 0 else len(_RANKS[team])
        own = team if rank_class < 0 else -1
        nodes.append(row | columns | {"rank_class": rank_class, "team": own, "num": num})
        for one, src in after:
            edges.append(
                {"src": src, "dst": number, "kind": "data", "bytes": 32, "dtype": "float32", "shape": [2, 4],
                 "rank_class": one, "team": -1, "place": -1}
            )  # fmt: skip
        if kind in ("collective", "send", "recv"):
            parts.extend(
                {"node": number, "rank_class": one, "team": team, "seq": 0, "arrive_ns": min(ends[one], begin),
                 "start_ns": begin, "end_ns": begin + takes, "send_bytes": 32, "recv_bytes": 32}
                for one in classes
            )  # fmt: skip
        for one in classes:
            ends[one] = begin + takes if timed else ends[one]
            last[one] = number
        number += num
        return number - num

    def compute(rank_class, takes):
        weight = add("parameter", rank_class, module=f"decoder.layers.{rank_class}", label="weight")
        expert = {"expert": 0, "module": f"decoder.layers.{rank_class}.mlp.experts.local_experts.0"}
        before = [(rank_class, weight)]
        node = add("compute", rank_class, before, takes=takes, flops=16, layer=rank_class, op="aten::mm", **expert)
        talk = {"label": "all-to-all ep", "op": "c10d::alltoall_base_", "category": "communication"}
        met = add("collective", -1, [(rank_class, node)], team=_EP[rank_class], takes=30, layer=rank_class, **talk)
        return add("compute", rank_class, [(rank_class, met)], takes=10, layer=rank_class, label="add")

    sent = add("send", 0, [(0, compute(0, 100))], team=_PP, takes=20, label="send pp", op="c10d::send")
    took = add("recv", 1, team=_PP, takes=20, start=140, label="receive pp", op="c10d::recv_")
    edges.append(
        {"src": sent, "dst": took, "kind": "p2p", "bytes": 32, "dtype": "float32", "shape": [2, 4], "rank_class": 0,
         "team": _PP, "place": 1}
    )  # fmt: skip
    compute(1, 200)
    whole = {"label": "all-reduce pp", "op": "c10d::allreduce_", "category": "communication", "phase": "optimizer"}
    met = add("collective", -1, [(0, last[0]), (1, last[1])], team=_PP, takes=40, **whole)
    for one in (0, 1):
        add("compute", one, [(one, met)], takes=50 + one, label="step", phase="optimizer")
    groups = [(team, ranks) for team, groups in enumerate(_RANKS) for ranks in groups]
    ranks = [
        dict.fromkeys(RANKS, -1)
        | {"rank": rank, "host": "h", "device": "cuda", "pp": rank // 2, "rank_class": rank // 2,
           "clock_offset_ns": None, "clock_error_ns": None, "first_expert": rank % 2}
        for rank in range(4)
    ]  # fmt: skip
    own = {"rank_class": pl.Int32, "team": pl.Int32}
    named = [
        {"group": place, "axis": "pp" if team == _PP else "ep", "ranks": ranks, "name": str(place), "description": "",
         "team": team}
        for place, (team, ranks) in enumerate(groups)
    ]  # fmt: skip
    tables = {
        "nodes": pl.DataFrame(nodes, schema=NODES | own | {"num": pl.Int64}).with_columns(
            *(pl.lit(None, pl.Int64).alias(name) for name in ("host_start_ns", "host_end_ns")),
            gradient=pl.lit(None, pl.String),
        ),
        "edges": pl.DataFrame(edges, schema=EDGES | own | {"place": pl.Int32}),
        "participants": pl.DataFrame(
            parts, schema={name: kind for name, kind in PARTICIPANTS.items() if name not in ("rank", "group")} | own
        ),
        "groups": pl.DataFrame(named, schema=GROUPS | {"team": pl.Int32}),
        "ranks": pl.DataFrame(ranks, schema=RANKS | {"first_expert": pl.Int32}),
        "kernels": pl.DataFrame(schema={"node": pl.Int64}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    meta = {
        "format_version": 1, "form": FORM, "form_version": FORM_VERSION, "deployment": "small", "strategy": None,
        "world_size": 4, "missing_ranks": [], "incomplete_ranks": [], "steps": [0], "torch": "2.13.0",
        "truedag": "0.1.0", "recorder": "native", "clock_origin_ns": 0, "num_nodes": number,
        "num_edges": 2 * len(edges), "num_views_dropped": 7, "num_unmatched": 0, "unmatched": [],
        "dry": {"assumed": ["nothing is computed"]},
        "estimate": {
            "device": "h100", "gpus_per_node": 8, "step_ns": max(ends.values()), "prefill_ns": None, "flops": 64,
            "flops_utilization": 0.5, "model_flops_utilization": 0.25, "compute_share": 0.5,
            "exposed_communication_share": 0.25, "idle_share": 0.25, "bubble_share": 0.125, "tokens_per_s": 10.0,
            "memory_bytes": 1000, "assumptions": ["links are free"],
        },
        "memory": [
            {"rank_class": one, "parameter_bytes": 400, "gradient_bytes": 0, "state_bytes": 0,
             "activation_bytes": 500 + 200 * one, "peak_bytes": 900 + 200 * one, "peak_node": 2, "peak_op": "aten::mm",
             "peak_module": None, "peak_phase": "forward", "peak_microbatch": None, "alive": []}
            for one in (0, 1)
        ],
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
