"""What a drawing's ranks exchange, rank by rank or group by group, and what edges between passes say."""

from pathlib import Path

import pytest

from truedag.launch.deployment_file import load_deployment
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.auditing import audit_drawing
from truedag.tracer.audit.checks import drawn_extra
from truedag.tracer.audit.drawing import exchanges
from truedag.tracer.audit.drawing.document import document_of
from truedag.tracer.audit.drawing.grammar import read_label
from truedag.tracer.audit.drawing.parser import parse_dot
from truedag.tracer.audit.drawing.reading import DrawnSubject, read_drawing
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import Plan, plan

PARTS = ("attention norm", "QKV projection", "softmax", "output projection", "feed-forward residual")


@pytest.fixture(scope="module")
def wanted() -> Plan:
    return plan(expect(load_deployment("moe-30b-ep8-tp4-pp2-dp4", ())[1]))


def drawn(text: str, wanted: Plan) -> DrawnSubject:
    return read_drawing(document_of(parse_dot(f"digraph {{ {text} }}"), Path("a.dot"), "dot"), wanted.expectation)


def audit_of(text: str, wanted: Plan) -> Audit:
    return audit_drawing(drawn(text, wanted), wanted)


def passed(microbatch: int, layers: range) -> tuple[str, list[str]]:
    """Return the nodes of a pass forward, and their ids in their order."""
    told = [(f"m{microbatch}_{layer}_{turn}", layer, part) for layer in layers for turn, part in enumerate(PARTS)]
    nodes = "; ".join(
        f'{name} [label="{part}\\nlayer {layer}\\nforward microbatch {microbatch}"]' for name, layer, part in told
    )
    return nodes, [name for name, _, _ in told]


def test_one_microbatch_after_another_is_no_order_of_parts(wanted: Plan) -> None:
    (first, ones), (second, others) = passed(0, range(16)), passed(1, range(16))
    audit = audit_of(f"{first}; {second}; {' -> '.join(ones + others)}", wanted)
    assert audit.found("model.order") == []
    turned = audit_of(f"{first}; {' -> '.join(reversed(ones))}", wanted)
    assert turned.found("model.order")


def test_where_a_drawing_begins_and_ends_nothing_is_cut(wanted: Plan) -> None:
    nodes, ids = passed(0, range(16))
    inner = [name for name in ids if name[-1] not in "04"]
    there = "; ".join(node for node in nodes.split("; ") if node.split(" [")[0] in inner)
    assert audit_of(f"{there}; {' -> '.join(inner)}", wanted).found("model.order") == []
    cut = audit_of(f"{there}; {' -> '.join(inner[:7])}; {' -> '.join(inner[7:])}", wanted).found("model.order")
    assert [finding.title for finding in cut] == [
        "1 part that reads nothing: attention softmax in layers 2",
        "1 part that is read by nobody: QKV projection in layers 2",
    ]


def test_an_edge_past_a_missing_layer_follows_from_its_being_missing(wanted: Plan) -> None:
    nodes, ids = passed(0, range(16))
    kept = [name for name in ids if "_4_" not in name]
    there = "; ".join(node for node in nodes.split("; ") if "_4_" not in node)
    findings = audit_of(f"{there}; {' -> '.join(kept)}", wanted).findings
    (order,) = (finding for finding in findings if finding.check == "model.order")
    assert order.layers == (4,)
    assert order.follows is not None
    assert findings[order.follows - 1].check == "strategy.layers"


def test_a_node_for_a_whole_message_is_no_send_without_a_receive(wanted: Plan) -> None:
    halves = 's [label="send activations, GPU 0"]; r [label="recv activations, GPU 128"]; q [label="QKV layer 0"]'
    whole = 'm [label="P2P transfer GPU 1 -> GPU 129"]'
    audit = audit_of(f"{halves}; {whole}; q -> s -> r; q -> m", wanted)
    assert audit.found("communication.unmatched") == []
    assert audit_of(f'{halves}; s2 [label="send activations, GPU 1"]; q -> s -> r; q -> s2', wanted).found(
        "communication.unmatched"
    )


def test_an_edge_that_names_one_half_is_a_message(wanted: Plan) -> None:
    ends = 'a [label="second layer, layer 7, GPU 0"]; b [label="attention norm, layer 8, GPU 128"]'
    told = drawn(f'{ends}; a -> b [label="recv activations"]', wanted).subject.communications
    assert told["members"].to_list() == ["0>128"]


def test_edges_of_two_decode_steps_are_two_communications(wanted: Plan) -> None:
    steps = "; ".join(
        f'a{step} [label="output projection layer 0 GPU 0-3 decode step {step}"]; '
        f'b{step} [label="attention residual layer 0 GPU 0-3 decode step {step}"]; '
        f'a{step} -> b{step} [label="TP all-reduce"]'
        for step in range(2)
    )
    read = drawn(f"{steps}; b0 -> a1", wanted)
    assert sorted(read.subject.communications["decode_step"]) == [0, 1]
    assert audit_drawing(read, wanted).found("structure.cycle") == []


@pytest.mark.parametrize(
    ("label", "ranks"),
    [
        ("Send from GPU 3 to GPU 131", (3, 131)),
        ("send GPUs 0-1 to GPUs 4-5", (0, 1, 4, 5)),
        ("QKV, GPU 0 to GPU 3", (0, 1, 2, 3)),
    ],
)
def test_a_message_from_one_to_another_is_of_these_alone(label: str, ranks: tuple[int, ...]) -> None:
    assert read_label(label).numbers["ranks"] == ranks


@pytest.mark.parametrize(
    ("edges", "follows"),
    [
        ({0: [5], 5: [1]}, True),
        ({0: [5], 1: [5], 5: [6]}, False),
        ({0: [5], 5: [0], 1: [6]}, False),
        ({0: [5], 1: [5], 2: [5], 5: [2]}, True),
    ],
)
def test_what_follows_another_is_found_and_a_circle_is_none(edges: dict[int, list[int]], follows: bool) -> None:
    assert drawn_extra._follow(edges, [0, 1, 2]) is follows


def test_a_gathering_over_replicas_is_of_parameters(wanted: Plan) -> None:
    text = (
        'a [label="Adam"]; b [label="DP all-gather, GPU 0-255"]; c [label="DP all-reduce, GPU 0-255"]; a -> b; c -> a'
    )
    told = drawn(text, wanted).subject.communications.select("kind", "purpose").unique().sort("kind").rows()
    assert told == [("all-gather", "dense parameters"), ("all-reduce", "dense gradients")]


@pytest.mark.parametrize("gpus", ["GPU 0", "GPUs 0-255"])
def test_a_communication_of_endless_places_costs_no_memory(
    gpus: str, wanted: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "_MOST_ROWS", 10_000)
    monkeypatch.setattr(exchanges, "_MOST_HELD", 40_000)
    label = f"attention output TP all-reduce, {gpus}, layers 0-1023, microbatch 0-63"
    nodes = "; ".join(f'a{number} [label="{label}"]' for number in range(100))
    read = drawn(nodes, wanted)
    assert len(read.subject.communications) <= 40_000
    assert read.overflow
