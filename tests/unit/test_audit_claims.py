"""The five declarations: each contradiction is told with both numbers; and what the arithmetic of a claim is."""

from pathlib import Path

import pytest
import yaml

from truedag.launch.deployment_file import load_deployment
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.auditing import audit_claim
from truedag.tracer.audit.catalogue import CHECKS, explain
from truedag.tracer.audit.claim import ClaimError, claim_of_text, parse_number, read_claim
from truedag.tracer.audit.findings import Audit, Finding
from truedag.tracer.audit.plan import plan
from truedag.tracer.audit.report import verdict
from truedag.tracer.audit.sarif import to_sarif

DECLARATIONS = Path(__file__).parents[1] / "data" / "declarations"


def audit_of(name: str) -> Audit:
    claim = read_claim(yaml.safe_load((DECLARATIONS / f"{name}.yaml").read_text()), name=name)
    return audit_claim(claim, plan(expect(load_deployment(name, ())[1])), {})


@pytest.mark.parametrize(
    ("name", "contradictions"),
    [
        (
            "moe-30b-ep64-tp8-pp2-dp2",
            {
                "claim.sizes": [
                    (
                        "64 sequences a replica, of the 2 copies of each expert",
                        "1 sequence on each of 128 replicas of the dense layers",
                    )
                ]
            },
        ),
        (
            "moe-10b-tp2-ep2-pp2",
            {
                "claim.parameters": [("10,000,000,000 parameters", "318,128,640 parameters")],
                "strategy.world-size": [("4 GPUs", "8 ranks")],
            },
        ),
        (
            "llama3-70b-tp2-pp4",
            {
                "claim.parameters": [("70,000,000,000 parameters", "88,002,011,136 parameters")],
                "claim.architecture": [
                    ("64 key and value heads", "8 key and value heads"),
                    ("feed-forward width 32,768", "feed-forward width 28,672"),
                ],
            },
        ),
        ("moe-30b-ep64-tp2-pp8", {"claim.parameters": [("30,000,000,000 parameters", "138,779,168,768 parameters")]}),
        ("moe-30b-ep8-tp4-pp2-dp4", {}),
    ],
)
def test_a_declaration_is_told_its_contradictions(name: str, contradictions: dict[str, list[tuple[str, str]]]) -> None:
    audit = audit_of(name)
    told: dict[str, list[tuple[str, str]]] = {}
    for finding in audit.findings:
        told.setdefault(finding.check, []).append((finding.found, finding.expected))
    assert told == contradictions


def claimed(**values: object) -> list[Finding]:
    claim = read_claim(values, name="claim")
    return audit_claim(claim, plan(expect(load_deployment("moe-30b-ep8-tp4-pp2-dp4", ())[1])), {}).findings


@pytest.mark.parametrize(
    ("values", "check"),
    [
        ({"strategy": "EP8-TP4-PP2-DP4", "gpus": 128}, "strategy.world-size"),
        ({"gpus": 512}, "claim.gpus"),
        ({"gpus_of_stage": {0: "0-63"}}, "claim.gpus"),
        ({"gpus_of_experts": {"0-7": "0-3"}}, "claim.gpus"),
        ({"gpus_of_layers": {"0-7": "128-255"}}, "claim.gpus"),
        ({"groups": {"tp": 32}}, "claim.groups"),
        ({"groups": {"tp": [[0, 1, 2, 4]]}}, "claim.groups"),
        ({"parameters": "300B"}, "claim.parameters"),
        ({"layers": 32}, "claim.sizes"),
        ({"ffn": 1024}, "claim.sizes"),
        ({"experts_per_rank": 4}, "claim.sizes"),
        ({"memory_per_gpu": "100 MB"}, "claim.memory"),
    ],
)
def test_a_wrong_number_is_told(values: dict[str, object], check: str) -> None:
    assert check in {finding.check for finding in claimed(**values)}


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({"layers": 32}, "32 layers are declared; the deployment has 16 layers"),
        ({"hidden": 7}, "Hidden size 7 is declared; the deployment has hidden size 4,096"),
        (
            {"batch_per_replica": 3},
            "3 sequences a replica are declared; a dense layer has 32 replicas (DP32), 4 sequences each",
        ),
        (
            {"batch_per_replica": 32},
            "32 sequences a replica are declared, which is right of the 4 copies of each expert (EDP4); "
            "a dense layer has 32 replicas (DP32), 4 sequences each",
        ),
        (
            {"gpus_of_stage": {0: "0-63"}},
            "Stage 0 is declared on GPUs 0-63; the strategy puts it on GPUs 0-127",
        ),
    ],
)
def test_a_finding_says_what_its_numbers_count(values: dict[str, object], title: str) -> None:
    assert title in [finding.title for finding in claimed(**values)]


def test_a_right_claim_has_no_finding() -> None:
    assert claimed(
        strategy="EP8-TP4-PP2-DP4", gpus=256, parameters="31B", layers=16, groups={"tp": 64, "ep": 32, "pp": 128},
        gpus_of_stage={0: "0-127", 1: "128-255"}, experts_per_rank=8, memory_per_gpu="80 GB",
    ) == []  # fmt: skip


def test_what_needs_a_run_or_a_deployment_is_said_to_be_unchecked() -> None:
    claim = read_claim({"strategy": "TP2-PP2", "gpus": 4, "parameters": "1B", "model": "Unheard Of"}, name="claim")
    audit = audit_claim(claim, None, {})
    assert {unchecked.check for unchecked in audit.unchecked} >= {"claim.parameters", "claim.architecture"}
    assert [passed.check for passed in audit.passed] == ["strategy.world-size"]
    told = claimed(tokens_per_second=5)
    assert told == []


def test_a_measured_throughput_is_compared() -> None:
    claim = read_claim({"tokens_per_second": 1000}, name="claim")
    wanted = plan(expect(load_deployment("moe-30b-ep8-tp4-pp2-dp4", ())[1]))
    findings = audit_claim(claim, wanted, {"tokens_per_second": 10.0}).findings
    assert [finding.check for finding in findings] == ["claim.throughput"]


@pytest.mark.parametrize("told", [[], {"color": "red"}, {"gpus": "many"}, {"groups": [1]}, {"gpus_of_stage": {0: "x"}}])
def test_a_claim_that_is_none_is_refused(told: object) -> None:
    with pytest.raises(ClaimError, match="claim"):
        read_claim(told, name="claim")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"num_layer": 3}, "did you mean num_layers"),
        ({"layers": 3, "num_layers": 3}, "stated twice"),
        ({"gpus": -4}, "no count"),
        ({"gpus": float("nan")}, "no count"),
        ({"gpus": [[1] * 9] * 9}, "a number is needed"),
        ({"name": [["x"] * 9] * 9}, "no text"),
        ({"strategy": "fancy"}, "names no axis"),
        ({"groups": {"tp": [[]]}}, "no list of GPUs"),
        ({"gpus_of_stage": {0: []}}, "no list of GPUs"),
    ],
)
def test_what_is_wrong_with_a_claim_is_said(told: dict[str, object], why: str) -> None:
    with pytest.raises(ClaimError, match=why):
        read_claim(told, name="claim")


@pytest.mark.parametrize("number", [10**400, "9" * 400, "1e999", -1, float("nan")])
def test_a_number_beyond_all_reason_is_none(number: object) -> None:
    with pytest.raises(ClaimError, match="gpus"):
        read_claim({"gpus": number}, name="claim")
    with pytest.raises(ClaimError, match="groups"):
        read_claim({"strategy": "TP8", "groups": {"tp": number}}, name="claim")


def test_axes_beside_a_strategy_are_added_to_it_or_said_to_contradict_it() -> None:
    claim = read_claim({"strategy": "EP8-TP4", "tp": 8, "pipeline_parallel_size": 2}, name="claim")
    assert claim.axes == {"ep": 8, "tp": 4, "pp": 2}
    assert claim.not_understood == ("TP8: the strategy says TP4",)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("groups: {tp: [*x11]}", "groups.tp: a number"),
        ("gpus_of_stage: {0: {a: *x11}}", "gpus_of_stage: it is no list"),
    ],
)
def test_endless_values_are_not_written_out(told: str, why: str) -> None:
    levels = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12))
    with pytest.raises(ClaimError, match=why):
        read_claim(yaml.safe_load(f"strategy: TP8\nx0: &x0 x\n{levels}\n{told}\n"), name="claim")


def test_data_and_context_alone_are_no_axes() -> None:
    claim = read_claim({"strategy": {"tensor": 8, "data": 2}, "data": "stories", "context": 4096}, name="claim")
    assert claim.axes == {"tp": 8, "dp": 2}
    assert claim.not_understood == ("data: stories", "context: 4096")


def test_the_names_of_other_tools_are_known() -> None:
    assert read_claim({"num_hidden_layers": None, "hidden_size": 64, "world_size": 8}, name="claim").numbers == {
        "hidden": 64,
        "gpus": 8,
    }


def test_memory_is_compared_with_all_that_training_keeps() -> None:
    (finding,) = claimed(memory_per_gpu="1 GB")
    assert "weights, gradients and optimizer state alone take" in finding.title


def test_no_parameters_are_a_contradiction_too() -> None:
    (finding,) = claimed(parameters=0)
    assert (finding.check, finding.found) == ("claim.parameters", "0 parameters")


def test_heads_alone_say_nothing_of_key_and_value_heads() -> None:
    audit = audit_claim(read_claim({"model": "Llama 3 70B", "heads": 64}, name="claim"), None, {})
    assert audit.findings == []
    assert [(passed.check, passed.what) for passed in audit.passed] == [
        ("claim.architecture", "1 of 8 sizes of Llama 3 70B")
    ]


def test_a_claim_of_nothing_is_not_right() -> None:
    audit = audit_claim(read_claim({"name": "nothing", "notes": "none"}, name="claim"), None, {})
    assert verdict(audit) == "Nothing could be checked."


def test_a_title_is_no_claim_of_what_is_in_each_part() -> None:
    told = claim_of_text(
        "8 layers per stage, 8 experts per GPU, 8 GPUs / node, 8x7B, 64 experts per layer", name="title"
    )
    assert told is not None
    assert told.numbers == {"experts": 64}


def test_a_title_is_a_claim() -> None:
    claim = claim_of_text("EP8-TP4-PP2-DP4 on 256 GPUs (30B MoE), all communications shown", name="title")
    assert claim is not None
    assert (claim.product, claim.numbers) == (256, {"gpus": 256.0, "parameters": 30e9})
    assert claim_of_text("a drawing", name="title") is None


@pytest.mark.parametrize(("text", "number"), [("30B", 30e9), ("1,024", 1024), (7, 7), ("80 GB", 80e9), ("1.5k", 1500)])
def test_numbers_have_units(text: object, number: float) -> None:
    assert parse_number(text, "x") == number


def test_every_check_explains_itself() -> None:
    for name, check in CHECKS.items():
        assert name == check.id
        assert "How it decides" in explain(check)


def test_findings_are_in_sarif() -> None:
    audit = audit_of("llama3-70b-tp2-pp4")
    told = to_sarif(audit, uri="claim.yaml")
    (run,) = told["runs"]
    assert len(run["results"]) == len(audit.findings)
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
