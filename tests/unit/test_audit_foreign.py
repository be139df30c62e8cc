"""Strangers' drawings and claims in many dialects: the right ones have no finding, each fault is found and named."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.unit import drawn_plans as plans
from tests.unit.drawn_plans import Box

from truedag.launch.audit import Request, audit_subject
from truedag.launch.deployment_file import load_deployment
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.auditing import audit_drawing
from truedag.tracer.audit.claim import ClaimError, read_claim
from truedag.tracer.audit.claim_text import claim_of_prose
from truedag.tracer.audit.drawing.document import DrawingError, read_document
from truedag.tracer.audit.drawing.grammar import read_label
from truedag.tracer.audit.drawing.reading import read_drawing
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import Plan, plan

FIFTH = "moe-30b-ep8-tp4-pp2-dp4"
LLAMA = "llama3-70b-tp2-pp4"
MIXTURE = "moe-10b-tp2-ep2-pp2"
TENTH = "moe-30b-ep64-tp2-pp8"
_DENSE = {"TP8": (12, "TP8"), "TP2-DP2": (4, "TP2-DP2"), "VPP": (16, "TP1-PP4-VPP2-DP2"), "ZeRO": (12, "DP8")}
_YAML = """
name: dense
model: {{num_layers: {layers}, hidden_size: 1024, num_attention_heads: 16, head_dim: 64, ffn_hidden_size: 4096,
  activation: swiglu, vocab_size: 32000, max_sequence_length: 2048, dtype: bfloat16, attention: unfused}}
strategy: {strategy}
workload: {{kind: train, text: the-lamp-at-hollin-point.txt, micro_batch_size: 1, global_batch_size: 32,
  sequence_length: 2048, distributed_optimizer: {sharded}}}
backend: {{name: nccl}}
"""
TEXT = Path(__file__).parents[2] / "launch" / "deployments" / "the-lamp-at-hollin-point.txt"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    folder = tmp_path_factory.mktemp("deployments")
    (folder / TEXT.name).write_bytes(TEXT.read_bytes())

    @cache
    def of(name: str) -> Plan:
        if name in _DENSE:
            path = folder / f"{name}.yaml"
            layers, strategy = _DENSE[name]
            path.write_text(_YAML.format(layers=layers, strategy=strategy, sharded=str(name == "ZeRO").lower()))
            name = str(path)
        return plan(expect(load_deployment(name, ())[1]))

    return of


def mixture() -> plans.Plan:
    return plans.inference(16, 2, 2, tp=2, experts=16)


def fifth(*, folded: bool = False) -> plans.Plan:
    return plans.training(16, 2, 128, tp=4, experts=64, folded=folded)


def llama(*, folded: bool = True) -> plans.Plan:
    return plans.inference(80, 4, 2, tp=2, folded=folded)


def tensor(*, folded: bool = False) -> plans.Plan:
    return plans.training(12, 1, 8, tp=8, dp=False, folded=folded)


def small() -> plans.Plan:
    return plans.training(4, 1, 4, tp=2)


def phased(box: Box) -> str:
    return plans.label(box, phase=True)


def on(text: str) -> Callable[[Box], str]:
    """Return the label of a box that says its GPUs in some other way."""
    return lambda box: plans.label(box, gpus=text)


def colored(plan_: plans.Plan) -> str:
    colors = ("#FF9999", "#99CCFF", "#99FF99", "#FFFF99")
    keys = "".join(f'k{n} [label="GPU {2 * n}-{2 * n + 1}", fillcolor="{color}"];' for n, color in enumerate(colors))
    drawn = plans.as_dot(
        plan_, lambda box: plans.label(box, gpus="", phase=True), attributes=', fillcolor="COLOR{}"',
        head=f'subgraph cluster_key {{ label="Legend"; {keys} }}',
    )  # fmt: skip
    return re.sub(r"COLOR(\d)", lambda match: colors[int(match[1])], drawn)


LEGEND = 'subgraph cluster_l { label="Legend"; c1 [label="Computation"]; c2 [label="Communication"]; c1 -> c2; }'
BUSY = ("QKV", "scores", "softmax", "context", "projection", "up", "silu", "down")
RIGHT: dict[str, tuple[str, str, Callable[[], str]]] = {
    "clusters": (FIFTH, "a.dot", lambda: plans.as_dot(fifth())),
    "folded by stage": (FIFTH, "a.dot", lambda: plans.as_dot(fifth(folded=True))),
    "terse": (FIFTH, "a.dot", lambda: plans.as_flat_dot(fifth(), plans.terse)),
    "HTML tables": (FIFTH, "a.gv", lambda: plans.as_tables(fifth())),
    "records": (FIFTH, "a.dot", lambda: plans.as_records(fifth())),
    "yEd": (FIFTH, "a.graphml", lambda: plans.as_yed(fifth())),
    "legend and title": (
        FIFTH, "a.dot", lambda: plans.as_dot(fifth(), head=f'label="MoE: EP8-TP4-PP2-DP4, 256 GPUs"; {LEGEND}'),
    ),
    "prefill and decode": (LLAMA, "a.dot", lambda: plans.as_dot(llama(), phased)),
    "colours of a legend": (LLAMA, "a.dot", lambda: colored(llama())),
    "experts of two ranks": (MIXTURE, "a.dot", lambda: plans.as_dot(mixture(), phased)),
    "rank by rank": (
        "TP8", "a.dot", lambda: plans.as_flat_dot(plans.rank_by_rank(tensor(), BUSY), on("gpu_{}")),
    ),
    "each participant": (
        "TP8", "a.dot", lambda: plans.as_flat_dot(plans.rank_by_rank(tensor(), [*BUSY, "attention sum"]), on("rank{}")),
    ),
    "optimizer shards": ("ZeRO", "a.dot", lambda: plans.as_dot(plans.training(12, 1, 8, tp=1, sharded=True))),
    "links": ("TP2-DP2", "a.json", lambda: plans.as_json(small(), "links")),
    "edges": ("TP2-DP2", "a.json", lambda: plans.as_json(small(), "edges")),
    "from and to": ("TP2-DP2", "a.json", lambda: plans.as_json(small(), "from")),
    "Cytoscape": ("TP2-DP2", "a.json", lambda: plans.as_json(small(), "cytoscape")),
    **{
        text: ("TP8", "a.dot", lambda text=text: plans.as_flat_dot(tensor(folded=True), on(text)))
        for text in ("GPU0-GPU7", "dev0..dev7", "cuda:0...cuda:7", "GPU #0-#7", "NPU 0-7", "GPU 0 - GPU 7",
                     "device_ids=[0,1,2,3,4,5,6,7]", "GPUs [0..7]", "all 8 GPUs")
    },
}  # fmt: skip


def audit_of(text: str, name: str, wanted: Plan, folder: Path) -> Audit:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return audit_drawing(read_drawing(read_document(path), wanted.expectation), wanted)


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_drawing_has_no_finding(case: str, wanted: Callable[[str], Plan], tmp_path: Path) -> None:
    deployment, name, write = RIGHT[case]
    audit = audit_of(write(), name, wanted(deployment), tmp_path)
    assert [finding.title for finding in audit.findings] == []
    assert audit.not_understood == []


def dropped(plan_: plans.Plan, *parts: str) -> plans.Plan:
    plan_.drop(lambda box: box.part in parts)
    return plan_


def swapped(plan_: plans.Plan, one: str, other: str) -> plans.Plan:
    plan_.swap(one, other)
    return plan_


def without(plan_: plans.Plan, *edges: tuple[str, str]) -> plans.Plan:
    assert set(edges) <= set(plan_.edges)
    plan_.edges = [edge for edge in plan_.edges if edge not in edges]
    return plan_


def led(plan_: plans.Plan, edge: tuple[str, str], source: str) -> plans.Plan:
    """Let an edge come from somewhere else."""
    plan_.edges = [(source, edge[1]) if one == edge else one for one in plan_.edges]
    return plan_


def moved(plan_: plans.Plan, gpus: tuple[int, int], which: Callable[[Box], bool]) -> plans.Plan:
    plan_.move(which, gpus)
    return plan_


def with_sums_after_qkv() -> plans.Plan:
    drawn = tensor()
    for layer in range(12):
        box = Box(id=f"l{layer}_more", part="sum after QKV", gpus=(0, 7), stage=0, layers=(layer, layer))
        drawn.add(box, f"l{layer}_qkv")
        drawn.edges.append((box.id, f"l{layer}_scores"))
    return drawn


def with_a_second_reduction() -> plans.Plan:
    drawn = small()
    drawn.add(Box(id="again", part="dense gradients", gpus=(0, 3), stage=0, phase="backward"), "b_dp0")
    drawn.edges.append(("again", "b_opt0"))
    return drawn


def reduced_early() -> plans.Plan:
    drawn = small()
    drawn.edges = [edge for edge in drawn.edges if edge[1] != "b_dp0"] + [("losssum", "b_dp0")]
    return drawn


FAULTS: dict[str, tuple[str, Callable[[], str], dict[str, str]]] = {
    "dispatch only in the backward pass": (
        FIFTH, lambda: plans.as_dot(dropped(fifth(folded=True), "dispatch")),
        {"communication.dispatch": "No dispatch all-to-all over EP is drawn: 0 of 256, in the forward pass"},
    ),
    "sum after attention only in the backward pass": (
        "TP8", lambda: plans.as_dot(dropped(tensor(), "attention sum")),
        {"communication.tensor": "No attention output all-reduce over TP is drawn: 0 of 12, in the forward pass"},
    ),
    "a sum of decode": (
        LLAMA, lambda: plans.as_dot(dropped_in(llama(), "decode", "feed-forward sum"), phased),
        {"communication.tensor": "No feed-forward output all-reduce over TP is drawn: 0 of 80, in decode"},
    ),
    "a sum too many": (
        "TP8", lambda: plans.as_dot(with_sums_after_qkv()),
        {
            "communication.extra": "Attention output all-reduce 2 times in 12 layers: 0-11",
            "model.order": "Attention output comes before attention scores, attention softmax, attention context and "
                           "output projection in 12 layers: 0-11",
        },
    ),
    "a sum too many on each rank": (
        "TP8",
        lambda: plans.as_flat_dot(
            plans.rank_by_rank(with_sums_after_qkv(), [*BUSY, "attention sum", "sum after QKV"]), on("rank{}")
        ),
        {
            "communication.extra": "Attention output all-reduce 2 times in 12 layers: 0-11",
            "model.order": "Attention output comes before attention scores, ",
        },
    ),
    "gradients twice": (
        "TP2-DP2", lambda: plans.as_dot(with_a_second_reduction()),
        {"communication.gradient-twice": "Dense gradients are reduced 2 times, one after the other"},
    ),
    "gradients over one replica": (
        TENTH, lambda: plans.as_dot(plans.training(16, 8, 128, tp=2, experts=64, folded=True)),
        {"communication.extra": "8 expert gradients all-reduce, which EP64-TP2-PP8"},
    ),
    "softmax before scores": (
        "TP8", lambda: plans.as_dot(swapped(tensor(), "scores", "softmax")),
        {"model.order": "Attention softmax comes before attention scores in 12 layers: 0-11"},
    ),
    "dispatch after experts": (
        FIFTH, lambda: plans.as_dot(swapped(fifth(), "dispatch", "FC2")),
        {"model.order": "Expert second layer comes before "},
    ),
    "sum before projection": (
        "TP8", lambda: plans.as_dot(swapped(tensor(), "attention sum", "projection")),
        {"model.order": "Attention output comes before output projection in 12 layers: 0-11"},
    ),
    "a residual from elsewhere": (
        "TP8", lambda: plans.as_dot(led(tensor(), ("l4_add2", "l5_add1"), "l1_add2")),
        {"model.order": "1 edge between layers that do not follow each other: layer 5 reads feed-forward residual of "
                        "layer 1"},
    ),
    "gradients before the backward pass": (
        "TP2-DP2", lambda: plans.as_dot(reduced_early()),
        {"model.order": "1 gradient reduction that no part of the backward pass leads to"},
    ),
    "an expert cut in two": (
        FIFTH, lambda: plans.as_dot(without(fifth(), ("l3_act", "l3_fc2"))),
        {"model.order": "1 part that reads nothing: expert second layer in layers 3"},
    ),
    "decode without the token": (
        LLAMA, lambda: plans.as_dot(without(llama(), ("p_got", "d_embedding")), phased),
        {"model.cache": "1 embedding of decode does not depend on the token that prefill sampled"},
    ),
    "decode without a layer's cache": (
        LLAMA, lambda: plans.as_dot(without(llama(folded=False), ("p_l7_cache", "d_l7_cache")), phased),
        {"model.cache": "Decoding reads nothing of the same layer's prefill in 1 layer: 7"},
    ),
    "attention on some ranks": (
        "TP8", lambda: plans.as_dot(moved(tensor(), (0, 1), lambda box: box.part in ("QKV", "scores"))),
        {"model.attention": "QKV projection and attention scores of layers 0-11: on 2 of 8 ranks of stage 0"},
    ),
    "experts of two ranks on one": (
        MIXTURE,
        lambda: plans.as_dot(
            moved(mixture(), (0, 0), lambda box: bool(box.experts) and box.stage == 0),
            phased,
        ),
        {"strategy.experts": "64 of 256 experts are drawn on ranks that do not hold them: expert 8 of layer 0 on "
                             "rank 0"},
    ),
}  # fmt: skip


def dropped_in(plan_: plans.Plan, phase: str, part: str) -> plans.Plan:
    plan_.drop(lambda box: box.part == part and box.phase == phase)
    return plan_


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_found_and_named_and_nothing_else_is(
    case: str, wanted: Callable[[str], Plan], tmp_path: Path
) -> None:
    deployment, write, faults = FAULTS[case]
    findings = audit_of(write(), "a.dot", wanted(deployment), tmp_path).findings
    told = {
        finding.check: "\n".join(one.title for one in findings if one.check == finding.check) for finding in findings
    }
    assert {check for check in told if check not in faults} <= {"model.order"}
    for check, title in faults.items():
        assert title in told.get(check, ""), told


def edged(*, sums: bool = True) -> str:
    """Return two replicas of two ranks, whose communications are labels of edges between equal parts."""
    lines = ["digraph {"]
    parts = ("RMSNorm 1", "QKV proj", "Scores", "Softmax", "Context", "Out proj", "Residual add (attn)", "RMSNorm 2",
             "MLP up proj", "SwiGLU", "MLP down proj", "Residual add (mlp)")  # fmt: skip
    for rank in range(4):
        names = [f"L{layer} {part}" for layer in range(4) for part in parts]
        names = ["Embedding", *names, "Final RMSNorm", "LM head", "Cross-entropy loss", "Backward pass", "AdamW step"]
        lines.append(f'subgraph cluster_{rank} {{ label="GPU {rank}";')
        lines += [f'g{rank}_{place} [label="{name}"]' for place, name in enumerate(names)] + ["}"]
        lines += [f"g{rank}_{place} -> g{rank}_{place + 1}" for place in range(len(names) - 1)]
        for layer in range(4):
            start = 12 * layer
            lines += [f"g{rank}_{start} -> g{rank}_{start + 7}", f"g{rank}_{start + 7} -> g{rank}_{start + 12}"]
            if sums and rank % 2 == 0:
                lines += [
                    f'g{rank}_{start + place} -> g{rank + 1}_{start + place} [label="NCCL AllReduce (TP)", dir=both]'
                    for place in (6, 11)
                ]
        if rank < 2:
            lines.append(f'g{rank}_52 -> g{rank + 2}_52 [label="NCCL AllReduce grads (DP)", dir=both]')
    return "\n".join([*lines, "}"])


def test_communications_may_be_labels_of_edges(wanted: Callable[[str], Plan], tmp_path: Path) -> None:
    right = audit_of(edged(), "a.dot", wanted("TP2-DP2"), tmp_path)
    assert [finding.title for finding in right.findings] == []
    assert any("18 communications drawn as labels of edges" in fact for fact in right.facts)
    wrong = audit_of(edged(sums=False), "a.dot", wanted("TP2-DP2"), tmp_path)
    assert len(wrong.found("communication.tensor")) == 4
    other = audit_of(edged().replace("g0_52 -> g2_52", "g0_52 -> g1_52"), "a.dot", wanted("TP2-DP2"), tmp_path)
    assert other.found("communication.group")


@pytest.mark.parametrize(
    ("label", "name", "numbers"),
    [
        ("GPU(0:7)", "ranks", None),
        ("layers[0:12]", "layers", tuple(range(12))),
        ("layers[3] norm", "layers", (3,)),
        ("transformer.h.3.mlp", "layers", (3,)),
        ("L0-L11 norm", "layers", tuple(range(12))),
        ("qkv r0-3", "ranks", (0, 1, 2, 3)),
        ("worker 0-3", "ranks", (0, 1, 2, 3)),
        ("layer 3/16 norm", "layers", (3,)),
        ("Expert 5 / 64", "experts", (5,)),
        ("rank 0/1", "ranks", (0, 1)),
        ("ranks 0/4", "ranks", (0, 4)),
        ("GPUs 0/2/4", "ranks", (0, 2, 4)),
    ],
)
def test_numbers_are_read_or_left(label: str, name: str, numbers: tuple[int, ...] | None) -> None:
    assert read_label(label).numbers.get(name) == numbers


def test_what_begins_like_an_end_is_none() -> None:
    assert read_label("Input LayerNorm").roles == ("attention norm",)
    assert read_label("Input tokens").end == "input"
    assert read_label("AR(tp) attn").kind == "all-reduce"
    assert read_label("AR decoding loop").kind is None


CLAIM = "EP8-TP4-PP2-DP4 on 256 GPUs, 30B parameters, 48 layers, batch 128, 16 experts per GPU"
TABLE = (
    "# Plan\n\nWe use **EP8-TP4-PP2-DP4** on **256 GPUs**.\n\n| Layers | 48 |\n|---|---|\n| Experts per GPU | 16 |\n"
)
JSON = '{"tp": 4, "pp": 2, "ep": 8, "dp": 4, "num_gpus": 256, "num_layers": 48, "experts_per_gpu": 16, "zone": "x"}'


@pytest.mark.parametrize(("name", "text"), [("a.txt", CLAIM), ("a.md", TABLE), ("a.json", JSON)])
def test_a_claim_may_be_in_words_or_json(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    request = Request(subject=path, deployment=FIFTH, overrides=(), against=None, mark=None, fix=None)
    audit = audit_subject(request, progress=lambda text: None)
    told = {finding.title for finding in audit.findings}
    assert told == {
        "48 layers are declared; the deployment has 16 layers",
        "16 experts of a layer on a rank are declared; the deployment has 8 experts of a layer on a rank",
    }
    assert "strategy.world-size" in {passed.check for passed in audit.passed}
    assert audit.not_understood == (["zone: x"] if name == "a.json" else [])


def test_a_number_that_no_phrase_takes_is_listed() -> None:
    claim = claim_of_prose("TP=8 on 64 x 8 x 2 GPUs = 1024; 8-way tensor parallel, 17 wonders", name="claim")
    assert claim.axes == {"tp": 8}
    assert any("17 wonders" in one for one in claim.not_understood)
    assert '17 in "8-way tensor parallel, 17 wonders"' in claim.not_understood
    twice = claim_of_prose("TP8, later TP4, 32 layers and 16 layers", name="claim")
    assert any("TP8 is stated before" in one for one in twice.not_understood)
    assert any("32 is stated before" in one for one in twice.not_understood)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("TP4: stage 0 on GPUs 0-127, layers 0-39; GPU 0 has experts 0 to 7", {}),
        ("TP4 on 4*8 GPUs, 64 \u2013 128 ranks, batch 2-4", {}),
        ("TP4-PP2: 32 nodes of 8 GPUs, 8 GPUs per node, 256 GPUs", {"gpus": 256}),
        ("TP4: Mixtral 8x7B, GPUs 4, 5 and 6", {}),
        ("EP8: each GPU holds 8 experts, every stage has 24 layers", {"experts_per_rank": 8, "layers_per_stage": 24}),
        ("DP4, micro-batch size 4, global batch size 128", {"batch": 128}),
        ("DP4, batch 32 per DP replica, 64 experts per layer", {"batch_per_replica": 32, "experts": 64}),
    ],
)
def test_a_number_of_some_is_none_of_all(text: str, numbers: dict[str, float]) -> None:
    assert claim_of_prose(text, name="claim").numbers == numbers


@pytest.mark.parametrize(
    ("gpus", "number"), [("0-999999999", 1_000_000_000), ([0, 1, 2], 3), ("0-7, 16-23", 16), (8, 8), ("256 H100", 256)]
)
def test_declared_gpus_are_counted(gpus: object, number: int) -> None:
    claim = read_claim({"strategy": "TP8-XP4", "gpus": gpus}, name="claim")
    assert claim.numbers["gpus"] == number
    assert claim.not_understood == ("strategy: XP4",)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"nodes": [{"id": "\\ud800"}], "links": []}')
    with pytest.raises(DrawingError, match="surrogate"):
        read_document(path)


@pytest.mark.parametrize("text", ["TP" + "8" * 19_000, "batch" + " :" * 9_000, "1x" * 9_000, "GPUs " * 3_900])
def test_a_long_text_is_read(text: str) -> None:
    assert len(claim_of_prose(f"TP8 {text}", name="claim").not_understood) <= 60


def test_a_text_that_is_no_claim_is_refused() -> None:
    with pytest.raises(ClaimError, match="no more than 20,000 characters"):
        claim_of_prose("TP8 " * 10_000, name="claim")
    with pytest.raises(ClaimError, match="states no strategy"):
        claim_of_prose("a fine day", name="claim")
