"""A small model on replicas of two stages, with experts, for drawings."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from dag_source import as_graph
from small_dag import SmallDag

from truedag.tracer.graph import Graph


def replicas(*, num_layers: int = 2, num_experts: int = 2) -> SmallDag:
    """Two stages of two ranks, which are replicas of each other; layers of `num_experts` experts, tokens in, a loss."""
    dag = SmallDag(num_ranks=4)
    dag.stages = {0: 0, 1: 0, 2: 1, 3: 1}
    pp, dp = [dag.group("pp", [0, 2]), dag.group("pp", [1, 3])], [dag.group("dp", [0, 1]), dag.group("dp", [2, 3])]
    for rank in range(4):
        last = ()
        stage = dag.stages[rank]
        if stage == 0:
            tokens = dag.node("input", rank, outputs="int64[3,4]")
            last = (
                dag.node(rank=rank, after=(tokens,), module="model.embedding", phase="forward", microbatch=0),
            )  # fmt: skip
    for rank in (0, 1, 2, 3):
        stage, replica = dag.stages[rank], rank % 2
        last = [row["node"] for row in dag.nodes if row["rank"] == rank][-1:] if stage == 0 else []
        if stage == 1:
            recv = dag.node("recv", rank, label="receive pp", category="communication", phase="forward", microbatch=0)
            dag.meet(recv, pp[replica], rank, (None, None, None), send_bytes=0)
            send = next(row["node"] for row in dag.nodes if row["kind"] == "send" and row["rank"] == rank - 2)
            dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 32, "dtype": "float32", "shape": [2]})
            last = [recv]
        for layer in range(stage * num_layers, (stage + 1) * num_layers):
            name, told = f"decoder.layers.{layer}", {"phase": "forward", "microbatch": 0, "layer": layer}
            weight = dag.node("parameter", rank, label=f"{name}.norm.weight", module=f"{name}.norm", layer=layer)
            norm = dag.node(
                rank=rank, after=[*last, weight], module=f"{name}.norm", op="aten::mul", label="mul", **told
            )
            gate = dag.node(rank=rank, after=[norm], module=f"{name}.mlp.router", category="routing", **told)
            pick = dag.node(
                rank=rank, after=[gate], module=f"{name}.mlp.router", category="routing", **told, label="topk"
            )
            outs = []
            for expert in range(num_experts):
                module = f"{name}.mlp.experts.{expert}.fc"
                one = dag.node(rank=rank, after=[pick], module=module, op="aten::mm", label="mm", expert=expert, **told)
                outs.append(dag.node(rank=rank, after=[one], module=module, label="gelu", expert=expert, **told))
            last = [dag.node(rank=rank, after=[*outs, norm], module=name, op="aten::add", label="add", **told)]
        if stage == 0:
            send = dag.node(
                "send", rank, last, label="send pp", category="communication", phase="forward", microbatch=0
            )  # fmt: skip
            dag.meet(send, pp[replica], rank, (None, None, None), recv_bytes=0)
    for stage in (0, 1):
        both = [2 * stage, 2 * stage + 1]
        before = [max(row["node"] for row in dag.nodes if row["rank"] == rank) for rank in both]
        sync = dag.node("collective", -1, before, label="all-reduce dp", category="communication", phase="optimizer")
        dag.nodes[sync]["stage"] = stage
        for rank in both:
            dag.meet(sync, dp[stage], rank, (None, None, None))
            dag.node(rank=rank, after=[sync], phase="optimizer", label="step")
    return dag


def with_places(dag: SmallDag) -> Graph:
    """A graph whose ranks say where they stand, and of which class they are."""
    graph = as_graph(dag)
    ranks = graph._source.frames["ranks"]
    graph._source.frames["ranks"] = ranks.with_columns(
        dp=pl.col("rank") % 2, pp=pl.col("rank") // 2, rank_class=pl.col("rank") // 2
    )
    graph._source.meta |= {"num_nodes": len(dag.nodes)}
    return graph


def folded(graph: Graph) -> Graph:
    """The same as a class graph: one rank of each class is read for all."""
    graph._source.meta |= {"form": "classes"}
    return graph


def write_with_places(dag: SmallDag, folder: Path) -> Path:
    """Write its dataset, whose ranks say where they stand; return where it is."""
    path = dag.write(folder)
    with_places(dag)._source.frames["ranks"].write_parquet(path / "ranks.parquet")
    return path
