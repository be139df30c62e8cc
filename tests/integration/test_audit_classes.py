"""The audit of a class graph finds what the audit of all that it stands for finds, in right graphs and wrong ones."""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from command_line import truedag, write_small_deployment

from truedag.launch.deployment import RunRecord
from truedag.launch.expected.expectation import expect
from truedag.launch.run_audit import read_subject
from truedag.parallel.strategy import parse_strategy
from truedag.tracer.audit.auditing import audit_dataset, audit_drawing
from truedag.tracer.audit.drawing.document import document_of
from truedag.tracer.audit.drawing.parser import parse_dot
from truedag.tracer.audit.drawing.reading import DrawnSubject, read_drawing
from truedag.tracer.audit.drawing.repair import draw_repaired
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import Plan, plan
from truedag.tracer.audit.recorded import read_tables, subject_of
from truedag.tracer.graph import Graph

SIXTEEN = (
    "strategy=EP2-TP2-PP2-DP2", "workload.global_batch_size=8", "model.num_attention_heads=4",
    "model.experts=sequential", "model.attention=unfused",
)  # fmt: skip


@dataclass
class Rows:
    """The rows of a class graph, to be spoiled."""

    nodes: pl.DataFrame
    edges: pl.DataFrame
    participants: pl.DataFrame
    ranks: pl.DataFrame

    @classmethod
    def read(cls, dag: Path) -> Rows:
        return cls(*(pl.read_parquet(dag / f"{name}.parquet") for name in ("nodes", "edges", "participants", "ranks")))

    def write(self, dag: Path) -> None:
        self.edges = self.edges.sort("src", "dst", maintain_order=True)
        for name in ("nodes", "edges", "participants", "ranks"):
            getattr(self, name).write_parquet(dag / f"{name}.parquet")

    def pick(self, rng: random.Random, condition: pl.Expr) -> int:
        return int(rng.choice(self.nodes.filter(condition)["node"].to_list()))

    def drop(self, node: int) -> None:
        self.nodes = self.nodes.filter(pl.col("node") != node)
        self.edges = self.edges.filter((pl.col("src") != node) & (pl.col("dst") != node))
        self.participants = self.participants.filter(pl.col("node") != node)

    def change(self, node: int, column: str, value: pl.Expr) -> None:
        here = pl.col("node") == node
        self.nodes = self.nodes.with_columns(pl.when(here).then(value).otherwise(column).alias(column))


def _is(op: str, module: str) -> pl.Expr:
    return (
        (pl.col("op") == op)
        & pl.col("module").str.contains(module).fill_null(False)
        & (pl.col("phase") == "forward")
        & (pl.col("layer") >= 0)
    )


QKV = _is("aten::mm", r"linear_qkv$")
EXPERT = _is("aten::mm", r"linear_fc1$") & (pl.col("expert") >= 0)
EXCHANGE = _is("c10d::alltoall_base_", r"mlp") & ~pl.col("inputs").str.starts_with("int64")


def lose_an_operator(rows: Rows, rng: random.Random) -> None:
    rows.drop(rows.pick(rng, QKV))


def lose_an_expert(rows: Rows, rng: random.Random) -> None:
    rows.drop(rows.pick(rng, EXPERT))


def call_an_expert_by_another_number(rows: Rows, rng: random.Random) -> None:
    rows.change(rows.pick(rng, EXPERT), "expert", pl.col("expert") + 1)


def lose_an_exchange(rows: Rows, rng: random.Random) -> None:
    rows.drop(rows.pick(rng, EXCHANGE))


def lose_a_message(rows: Rows, rng: random.Random) -> None:
    rows.drop(rows.pick(rng, pl.col("kind") == "send"))


def part_a_message(rows: Rows, rng: random.Random) -> None:
    place = rng.choice(rows.edges.with_row_index().filter(pl.col("kind") == "p2p")["index"].to_list())
    rows.edges = rows.edges.with_row_index().filter(pl.col("index") != place).drop("index")


def send_other_bytes(rows: Rows, rng: random.Random) -> None:
    node = rows.pick(rng, EXCHANGE)
    here = pl.col("node") == node
    rows.participants = rows.participants.with_columns(
        send_bytes=pl.when(here).then(pl.col("send_bytes") + 4).otherwise("send_bytes")
    )


def move_an_operator_to_another_layer(rows: Rows, rng: random.Random) -> None:
    rows.change(rows.pick(rng, QKV), "layer", pl.lit(7, pl.Int32))


def write_another_shape(rows: Rows, rng: random.Random) -> None:
    rows.change(rows.pick(rng, QKV), "outputs", pl.col("outputs").str.replace(r",(\d+)\]", ",7]"))


def hold_another_shard(rows: Rows, rng: random.Random) -> None:
    held = (pl.col("kind") == "parameter") & pl.col("label").str.contains("linear_proj.weight").fill_null(False)
    rows.change(rows.pick(rng, held), "outputs", pl.col("outputs").str.replace(r"\[\d+", "[5"))


def cut_an_operator_off(rows: Rows, rng: random.Random) -> None:
    node = rows.pick(rng, QKV)
    rows.edges = rows.edges.filter((pl.col("src") != node) & (pl.col("dst") != node))


def read_from_nowhere(rows: Rows, rng: random.Random) -> None:
    node = rows.pick(rng, QKV)
    rows.edges = rows.edges.filter(pl.col("dst") != node)


def draw_an_edge_twice(rows: Rows, rng: random.Random) -> None:
    node = rows.pick(rng, QKV)
    rows.edges = pl.concat([rows.edges, rows.edges.filter((pl.col("dst") == node) & (pl.col("bytes") > 0))])


def turn_an_edge(rows: Rows, rng: random.Random) -> None:
    node = rows.pick(rng, QKV)
    back = rows.edges.filter((pl.col("dst") == node) & (pl.col("kind") == "data")).head(1)
    back = back.with_columns(src="dst", dst="src")
    rows.edges = pl.concat([rows.edges, back])


def stand_elsewhere(rows: Rows, rng: random.Random) -> None:
    rank = rng.randrange(len(rows.ranks))
    rows.ranks = rows.ranks.with_columns(
        tp=pl.when(pl.col("rank") == rank).then(1 - pl.col("tp")).otherwise("tp").cast(pl.Int32)
    )


FAULTS: dict[Callable[[Rows, random.Random], None], str] = {
    lose_an_operator: "model.attention",
    lose_an_expert: "model.experts",
    call_an_expert_by_another_number: "model.experts",
    lose_an_exchange: "communication.",
    lose_a_message: "communication.pipeline",
    part_a_message: "communication.unmatched",
    send_other_bytes: "communication.bytes",
    move_an_operator_to_another_layer: "strategy.layers",
    write_another_shape: "dimension.",
    hold_another_shard: "dimension.shard",
    cut_an_operator_off: "structure.orphan",
    read_from_nowhere: "structure.source",
    draw_an_edge_twice: "structure.duplicate-edge",
    turn_an_edge: "structure.cycle",
    stand_elsewhere: "strategy.coordinates",
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    done = truedag("dry", str(write_small_deployment(folder)), *SIXTEEN, "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def both_audits(folder: Path, wanted: Plan) -> tuple[Audit, Audit]:
    """Audit the rows, and all that they stand for."""
    whole = subject_of(read_tables(Graph.open(folder)), name="run")
    subject = read_subject(folder, name="run")
    assert subject.copies is not None
    return audit_dataset(subject, wanted), audit_dataset(whole, wanted)


def told(audit: Audit) -> list[tuple[object, ...]]:
    """What an audit found, without which of several nodes it names first."""
    return sorted((one.check, one.severity, one.num_nodes, one.ranks, one.layers, one.title) for one in audit.findings)


def plan_of(folder: Path) -> Plan:
    record = RunRecord.model_validate_json((folder / "run.json").read_text())
    return plan(expect(record.deployment))


def test_a_right_class_graph_passes_the_same_checks_over_as_much(dry: Path) -> None:
    few, all_ranks = both_audits(dry, plan_of(dry))
    assert few.findings == all_ranks.findings == []
    assert few.passed == all_ranks.passed
    assert "one rank of each class" in few.facts[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_class_is_told_of_all_its_ranks(
    fault: Callable[[Rows, random.Random], None], dry: Path, tmp_path: Path
) -> None:
    shutil.copytree(dry / "dag", tmp_path / "dag")
    rows = Rows.read(tmp_path / "dag")
    fault(rows, random.Random(5))
    rows.write(tmp_path / "dag")
    few, all_ranks = both_audits(tmp_path, plan_of(dry))
    assert told(few) == told(all_ranks)
    assert few.passed == all_ranks.passed
    assert any(finding.check.startswith(FAULTS[fault]) for finding in few.findings), told(few)


def test_the_wrong_deployment_is_told_of_the_class_graph_as_of_the_whole(dry: Path) -> None:
    record = RunRecord.model_validate_json((dry / "run.json").read_text())
    deployment = record.deployment
    other = deployment.model_copy(update={"strategy": parse_strategy("TP2-PP2-DP4-EP2-ETP1")})
    few, all_ranks = both_audits(dry, plan(expect(other)))
    assert told(few) == told(all_ranks)
    assert few.faults


def read_text(text: str, wanted: Plan) -> DrawnSubject:
    return read_drawing(document_of(parse_dot(text), Path("drawing.dot"), "dot"), wanted.expectation)


SKETCH = """digraph { rankdir=LR;
  subgraph cluster_a { label="Stage 0"; q0 [label="QKV projection\nlayer 0\nGPU: 0", shape=hexagon]; }
  q0 -> out
}"""


@pytest.fixture(scope="module")
def mended(dry: Path) -> tuple[str, Plan]:
    wanted = plan_of(dry)
    return draw_repaired(read_subject(dry, name="run"), read_text(SKETCH, wanted)), wanted


def test_a_drawing_is_mended_from_rows_in_its_own_manner(mended: tuple[str, Plan]) -> None:
    text, wanted = mended
    audit = audit_drawing(read_text(text, wanted), wanted)
    assert audit.findings == []
    assert audit.not_understood == []
    assert 'rankdir="LR"' in text
    assert text.count("subgraph cluster_stage_") == 2
    q0 = r"QKV projection\nlayer 0\nGPU: 0-7\nforward\nstands for 16 recorded"
    assert f'"q0" [label="{q0}", shape="hexagon"]' in text
    # EP varies slower than TP, and DP slowest within a stage.
    assert r"layer 0\nexperts 0-1: GPU: 0-1 and 4-5\nexperts 2-3: GPU: 2-3 and 6-7\n" in text


def test_a_mended_drawing_tells_experts_apart_where_the_drawing_does(dry: Path) -> None:
    wanted = plan_of(dry)
    apart = SKETCH.replace("q0 -> out", 'e [label="Expert 1 FC1\nlayer 0\nGPU: 0"]; q0 -> e; e -> out')
    text = draw_repaired(read_subject(dry, name="run"), read_text(apart, wanted))
    assert audit_drawing(read_text(text, wanted), wanted).findings == []
    assert "expert 3" in text
    assert "experts 0-1" not in text


def summed(text: str) -> str:
    """Sum each region by an all-reduce, as without sequence parallelism."""
    gathers = re.findall(r'^ *("\w+") .label="[^"]*(?:: all-gather over (?:tp|etp)|sequence gradients)', text, re.M)
    into: dict[str, list[str]] = {}
    edges = re.findall(r'^ *("\w+") -> ("\w+")', text, re.M)
    for source, target in edges:
        into.setdefault(target, []).append(source)
    lines = [line for line in text.splitlines()[:-1] if "->" not in line]
    lines = [line for line in lines if not line.strip().startswith(tuple(f"{gather} [" for gather in gathers))]

    def made(node: str) -> set[str]:
        return {node} if node not in gathers else {one for before in into.get(node, ()) for one in made(before)}

    lines += [f"{start} -> {target};" for source, target in edges if target not in gathers for start in made(source)]
    return "\n".join(lines).replace("reduce-scatter", "all-reduce") + "}"


def test_an_all_reduce_is_as_good_as_a_reduce_scatter_and_an_all_gather(mended: tuple[str, Plan]) -> None:
    text, wanted = mended
    audit = audit_drawing(read_text(summed(text), wanted), wanted)
    assert audit.findings == []
    assert any("All-reduces were taken for" in fact for fact in audit.facts)


def test_an_all_reduce_beside_reduce_scatters_is_of_another_kind(mended: tuple[str, Plan]) -> None:
    text, wanted = mended
    spoiled = text.replace("attention output: reduce-scatter over tp", "attention output: all-reduce over tp", 1)
    (finding,) = audit_drawing(read_text(spoiled, wanted), wanted).findings
    assert finding.check == "communication.kind"
    assert "Attention output is drawn as 1 all-reduce, beside" in finding.title
    assert finding.num_nodes == 1


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    few = ("model.num_layers=2", "workload.decode_steps=4", "workload.num_prompts=8")
    done = truedag("dry", "moe-10b-tp2-ep2-pp2", *few, "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_a_step_that_reads_no_earlier_slots_of_the_cache_is_found(generation: Path) -> None:
    wanted = plan_of(generation)
    subject = read_subject(generation, name="run")
    assert audit_dataset(subject, wanted).findings == []
    writes = subject.nodes.filter(pl.col("role") == "cache write")["node"]
    step = subject.nodes.filter((pl.col("layer") == 1) & (pl.col("decode_step") == 2))["node"]
    cut = pl.col("src").is_in(writes.implode()) & pl.col("dst").is_in(step.implode())
    spoiled = dataclasses.replace(subject, edges=subject.edges.filter(~cut))
    (finding,) = audit_dataset(spoiled, wanted).found("model.cache")
    assert (finding.layers, finding.ranks) == ((1,), (2, 3))


FOLD = re.compile(r"(decode steps 1-3, each like decode step 0\\nGPU: 0-3\\n[^\"]*stands for )([\d,]+)( recorded)")


@pytest.fixture(scope="module")
def mended_generation(generation: Path) -> tuple[str, Plan]:
    wanted = plan_of(generation)
    return draw_repaired(read_subject(generation, name="run"), read_text(SKETCH, wanted)), wanted


def test_decode_steps_that_are_alike_are_one_node(generation: Path, mended_generation: tuple[str, Plan]) -> None:
    text, wanted = mended_generation
    drawn = read_text(text, wanted)
    audit = audit_drawing(drawn, wanted)
    assert (audit.findings, audit.not_understood) == ([], [])
    assert "honesty.steps" in {passed.check for passed in audit.passed}
    (fold,) = FOLD.finditer(text)
    # What is recorded of the drawn parts in all steps is drawn, or stands behind the fold.
    told = Counter(
        step
        for reading in drawn.readings.values()
        if reading.phase == "decode" and reading.fold is None
        for step in [reading.numbers["decode_step"][0]] * (reading.num_recorded or 0)
    )
    assert list(told) == [0]
    assert int(fold.group(2).replace(",", "")) == 3 * told[0]
    # Each layer of step 0 reads the cache that the prefill wrote; the last token leads to the fold.
    assert text.count("constraint=false") > 0
    assert 'newrank="true"' in text
    _, nodes = parse_dot(text)["edges"], parse_dot(text)["nodes"]
    name = next(one for one, attributes, _ in nodes if "each like" in attributes["label"])
    assert any(target == name for _, target, _ in parse_dot(text)["edges"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: FOLD.sub(r"\g<1>17\3", text), "stands for 17 nodes; it stands for"),
        (lambda text: text.replace("decode steps 1-3, each", "decode steps 1-2, each"), "step 3 is neither drawn nor"),
        (lambda text: text.replace("each like decode step 0", "each like decode step 7"), "step 7, which is not drawn"),
        (lambda text: FOLD.sub(r"and so on", text), "neither drawn nor in a fold"),
    ],
)
def test_a_fold_that_says_what_is_wrong_is_found(
    change: Callable[[str], str], told: str, mended_generation: tuple[str, Plan]
) -> None:
    text, wanted = mended_generation
    spoiled = change(text)
    assert spoiled != text
    titles = [finding.title for finding in audit_drawing(read_text(spoiled, wanted), wanted).found("honesty.steps")]
    assert any(told in title for title in titles), titles


def test_a_step_that_differs_is_drawn_in_full(generation: Path) -> None:
    wanted = plan_of(generation)
    subject = read_subject(generation, name="run")
    softmax = subject.nodes.filter((pl.col("role") == "attention softmax") & (pl.col("decode_step") == 2))["node"]
    other = pl.when(pl.col("node").is_in(softmax.implode())).then(pl.lit("fused attention")).otherwise("role")
    spoiled = dataclasses.replace(subject, nodes=subject.nodes.with_columns(role=other))
    text = draw_repaired(spoiled, read_text(SKETCH, wanted))
    assert "decode step 1, like decode step 0" in text
    assert "decode step 3, like decode step 0" in text
    assert r"fused attention\nlayer 0\nGPU: 0-1\ndecode step 2" in text
