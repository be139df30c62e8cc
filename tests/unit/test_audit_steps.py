"""Decode steps in a drawing: drawn, or folded with what the fold says, which is checked."""

from pathlib import Path

import pytest

from truedag.launch.deployment_file import load_deployment
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.auditing import audit_drawing
from truedag.tracer.audit.drawing.document import document_of
from truedag.tracer.audit.drawing.folds import read_count, read_fold
from truedag.tracer.audit.drawing.grammar import read_label
from truedag.tracer.audit.drawing.parser import parse_dot
from truedag.tracer.audit.drawing.reading import DrawnSubject, read_drawing
from truedag.tracer.audit.plan import Plan, plan

FOLD = "decode steps 1-3, each like decode step 0"


@pytest.fixture(scope="module")
def wanted() -> Plan:
    return plan(expect(load_deployment("moe-10b-tp2-ep2-pp2", ("workload.decode_steps=4",))[1]))


def drawn(*labels: str, wanted: Plan | None = None) -> DrawnSubject:
    """Read two operators of decode step 0, which stand for 5 nodes, and some folds."""
    told = [
        "QKV projection\\nlayer 0\\nGPU: 0-1\\ndecode step 0\\nstands for 4 recorded",
        "attention softmax\\nlayer 8\\nGPU: 2\\ndecode step 0",
        *labels,
    ]
    nodes = "; ".join(f'n{number} [label="{label}"]' for number, label in enumerate(told))
    edges = "; ".join(f"n{number} -> n{number + 1}" for number in range(len(told) - 1))
    document = document_of(parse_dot(f"digraph {{ {nodes}; {edges} }}"), Path("steps.dot"), "dot")
    return read_drawing(document, None if wanted is None else wanted.expectation)


def titles(read: DrawnSubject, wanted: Plan | None) -> list[str]:
    return [finding.title for finding in audit_drawing(read, wanted).found("honesty.steps")]


@pytest.mark.parametrize(
    ("text", "steps", "like"),
    [
        (FOLD, (1, 2, 3), 0),
        ("Decode steps 2..15 are the same as step 1", tuple(range(2, 16)), 1),
        ("steps 4 and 6: like decode step 2", (4, 6), 2),
        ("decode step 15, like decode step 0", (15,), 0),
    ],
)
def test_a_fold_is_read(text: str, steps: tuple[int, ...], like: int) -> None:
    fold = read_fold(text)
    assert fold is not None
    assert (fold.steps, fold.like) == (steps, like)
    reading = read_label(f"{text}\nreads of the passes before: cache write\nstands for 1,234 recorded")
    assert (reading.certainty, reading.roles, reading.is_ellipsis, reading.num_recorded) == ("stated", (), False, 1234)


@pytest.mark.parametrize("text", ["decode step 3", "layers 1-7 like layer 0", "step 1", "like step 2"])
def test_what_is_no_fold_is_read_as_none(text: str) -> None:
    assert read_fold(text) is None


@pytest.mark.parametrize(
    ("text", "number"), [("stands for 16 recorded", 16), ("stands for 8 GPUs", None), ("16", None)]
)
def test_a_count_is_one_of_nodes(text: str, number: int | None) -> None:
    assert read_count(text) == number


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ((f"{FOLD}\\nstands for 15 recorded",), []),
        ((f"{FOLD}\\nGPU: 0-3\\nstands for 15 nodes",), []),
        ((f"{FOLD}\\nGPU: 0-1\\nstands for 12 nodes", f"{FOLD}\\nGPU: 2-3\\nstands for 3 nodes"), []),
        ((f"{FOLD}\\nstands for 14 recorded",), ["The fold of decode steps 1-3 says that it stands for 14 nodes; it "
                                                "stands for 15"]),
        ((FOLD,), ["The fold of decode steps 1-3 does not say how many nodes it stands for"]),
        ((f"{FOLD}\\nGPU: 0-1\\nstands for 12 nodes",), ["Decode steps 1-3 are folded as like step 0, but for 1 of its "
                                                         "2 nodes"]),
        (("decode steps 1-3 like step 9\\nstands for 15 nodes",), ["Decode steps 1-3 are folded as like step 9, which "
                                                                   "is not drawn"]),
        (("decode steps 1,2 like step 0\\nstands for 10 nodes",), ["Decode step 3 is neither drawn nor in a fold"]),
        (("decode steps 1-4 like step 0\\nstands for 20 nodes",), ["Decode step 4 is none of the deployment's"]),
        (("decode steps 0-3 like step 0\\nstands for 20 nodes",), ["Decode step 0 is drawn, and in a fold too"]),
        ((f"{FOLD}\\nstands for 15 nodes", "decode step 3, like decode step 0\\nstands for 5 nodes"),
         ["Decode step 3 is in two folds"]),
        ((), ["Decode steps 1-3 are neither drawn nor in a fold"]),
    ],
)  # fmt: skip
def test_a_fold_is_right_or_told_what_is_wrong(labels: tuple[str, ...], told: list[str], wanted: Plan) -> None:
    assert titles(drawn(*labels, wanted=wanted), wanted) == told


def test_a_fold_says_too_little_without_a_deployment_as_well() -> None:
    assert titles(drawn(f"{FOLD}\\nstands for 15 recorded"), None) == []
    assert len(titles(drawn(f"{FOLD}\\nstands for 16 recorded"), None)) == 1


def test_steps_may_be_counted_from_one(wanted: Plan) -> None:
    read = drawn(wanted=wanted)
    text = "; ".join(f'n{step} [label="attention softmax\\nlayer 0\\ndecode step {step}"]' for step in range(1, 5))
    read = read_drawing(document_of(parse_dot(f"digraph {{ {text} }}"), Path("a.dot"), "dot"), wanted.expectation)
    assert titles(read, wanted) == []


def test_what_is_folded_is_there_in_each_of_its_steps() -> None:
    covers = drawn(f"{FOLD}\\nstands for 15 recorded").subject.covers
    steps = covers.filter(role="QKV projection")["decode_step"].sort().to_list()
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "is_right"), [(6, True), (9, True), (7, False)])
def test_a_fold_may_count_what_edges_name_or_not(number: int, is_right: bool) -> None:
    nodes = [f'{name} [label="{role}\\nlayer 0\\ndecode step 0"]' for name, role in (("a", "softmax"), ("b", "QKV"))]
    fold = f'f [label="{FOLD}\\nstands for {number} recorded"]'
    text = f'digraph {{ {"; ".join(nodes)}; {fold}; b -> a [label="TP all-reduce"]; a -> f }}'
    read = read_drawing(document_of(parse_dot(text), Path("a.dot"), "dot"), None)
    assert (titles(read, None) == []) is is_right


def test_experts_that_are_listed_place_by_place_are_there_in_each_step() -> None:
    listed = 'a [label="expert\\nlayer 0\\ndecode step 0\\nexperts 0-7: GPU 0-1\\nexperts 8-15: GPU 2-3"]'
    text = f'digraph {{ {listed}; f [label="{FOLD}\\nstands for 3 recorded"]; a -> f }}'
    covers = read_drawing(document_of(parse_dot(text), Path("a.dot"), "dot"), None).subject.covers
    told = covers.group_by("decode_step").agg(experts=covers["expert"].n_unique()).sort("decode_step")
    assert told.rows() == [(step, 16) for step in range(4)]


def test_a_drawing_that_numbers_no_step_is_not_asked_for_steps(wanted: Plan) -> None:
    document = document_of(parse_dot('digraph { a [label="Softmax, decode"]; a -> b }'), Path("a.dot"), "dot")
    audit = audit_drawing(read_drawing(document, wanted.expectation), wanted)
    assert "honesty.steps" in {one.check for one in audit.unchecked}
