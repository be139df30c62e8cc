"""Drawings as engineers and programs make them: what is read, what is said of it, and what is not held against them."""

import json
from pathlib import Path

import pytest

from truedag.launch.deployment_file import load_deployment
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.auditing import audit_drawing
from truedag.tracer.audit.checks.drawn_shapes import read_shapes
from truedag.tracer.audit.drawing.document import DrawingError, read_document
from truedag.tracer.audit.drawing.grammar import read_label
from truedag.tracer.audit.drawing.reading import DrawnSubject, read_drawing
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import Plan, plan
from truedag.tracer.audit.report import write_markdown

ENGINEER = Path(__file__).parents[1] / "data" / "drawings" / "engineer.dot"


@pytest.fixture(scope="module")
def fifth() -> Plan:
    return plan(expect(load_deployment("moe-30b-ep8-tp4-pp2-dp4", ())[1]))


def drawn(folder: Path, text: str, name: str = "drawing.dot") -> DrawnSubject:
    path = folder / name
    path.write_text(text)
    return read_drawing(read_document(path), None)


def audit_of(folder: Path, text: str, wanted: Plan) -> Audit:
    path = folder / "drawing.dot"
    path.write_text(text)
    return audit_drawing(read_drawing(read_document(path), wanted.expectation), wanted)


def test_an_engineers_drawing_is_told_what_it_lacks_and_nothing_else(fifth: Plan) -> None:
    audit = audit_drawing(read_drawing(read_document(ENGINEER), fifth.expectation), fifth)
    titles = {finding.title for finding in audit.findings}
    assert "24 of 1,024 experts are drawn (64 in each of 16 layers)" in titles
    assert "15 layers are drawn as wholes, with nothing of what is inside: 1-15" in titles
    assert "3 nodes hide something behind dots, 'same as' or a count" in titles
    assert "Dispatch all-to-all over EP: in 1 of 16 layers and on 16 of 32 groups" in titles
    # Each part of the one layer that is drawn was understood.
    (attention,) = audit.found("model.attention")
    assert attention.layers == tuple(range(1, 16))
    # Its ranks, its axes, its transfer and its groups are right.
    assert not {"strategy.ranks", "strategy.axis", "strategy.layers", "communication.group"} & {
        finding.check for finding in audit.findings
    }
    assert audit.not_understood == []


def test_a_report_reads_as_a_review(fifth: Plan) -> None:
    audit = audit_drawing(read_drawing(read_document(ENGINEER), fifth.expectation), fifth)
    text = write_markdown(audit)
    lines = text.splitlines()
    assert lines[2].startswith("**Wrong: ")
    assert text.index("| Communications |") < text.index("## Errors") < text.index("## Checked and passed")
    heads = [line for line in lines if line.startswith("### ")]
    assert len(heads) == len(set(heads))
    tenth = next(index for index, line in enumerate(lines) if line.startswith("10. "))
    assert lines[tenth + 2].startswith("    - expected: ")


@pytest.mark.parametrize(
    ("label", "is_hidden"),
    [
        ("... Experts 16-55 ...", True),
        ("Layers 1-7 (same as layer 0)", True),
        ("Transformer Layer x16", True),
        ("8x Decoder Block", True),
        ("56 more experts", True),
        ("QKV projection, GPU: 0...127", False),
        ("Scores [32 x 1024 x 4096]", False),
        ("Top-2 gate", False),
        ("Repeat KV heads", False),
        ("Attention, repeated", True),
    ],
)
def test_what_hides_something_is_known(label: str, is_hidden: bool) -> None:
    assert read_label(label).is_ellipsis == is_hidden


@pytest.mark.parametrize(
    ("label", "roles"),
    [
        ("Gate", ("router",)),
        ("Gate / Router", ("router",)),
        ("Gate & Up Projection", ("first layer",)),
        ("Gate+Up", ("first layer",)),
        ("gate_up_proj", ("first layer",)),
        ("Expert 3 gate_proj", ("expert first layer",)),
    ],
)
def test_a_gate_of_a_feed_forward_is_no_router(label: str, roles: tuple[str, ...]) -> None:
    assert read_label(label).roles == roles


def test_what_is_behind_dots_is_not_drawn(tmp_path: Path) -> None:
    subject = drawn(tmp_path, 'digraph { a [label="... Experts 16-55 ...\\nLayer 0"]; a -> b }').subject
    assert subject.covers.is_empty()


def test_a_layer_like_another_is_not_the_other() -> None:
    assert read_label("Layers 1-7 (same as Layer 0)").numbers["layers"] == tuple(range(1, 8))


def test_a_stage_does_not_make_its_communications_pipeline_communications(tmp_path: Path, fifth: Plan) -> None:
    text = """digraph { subgraph cluster_0 { label="Pipeline Stage 0"; a [label="All-to-All\\nLayer 0\\nGPU: 0-127"];
      e [label="Expert 0 FC1\\nLayer 0\\nGPU: 0"] } a -> e }"""
    path = tmp_path / "drawing.dot"
    path.write_text(text)
    told = read_drawing(read_document(path), fifth.expectation).subject.communications
    assert set(told["axis"]) == {"ep"}
    assert set(told["purpose"]) == {"dispatch"}


def test_an_attention_output_before_a_projection_is_the_context(tmp_path: Path) -> None:
    both = 'digraph { a [label="Softmax"]; b [label="Attention Output"]; c [label="Output Projection"]; a -> b -> c }'
    assert drawn(tmp_path, both).readings["b"].roles == ("attention context",)
    alone = 'digraph { a [label="Softmax"]; b [label="Attention Output"]; c [label="Residual Add"]; a -> b -> c }'
    assert drawn(tmp_path, alone).readings["b"].roles == ("output projection",)


def test_a_send_may_lead_nowhere(tmp_path: Path, fifth: Plan) -> None:
    nodes = [{"id": "a", "label": "Send activations, GPU 0"}, {"id": "b", "label": "Softmax"}]
    text = json.dumps({"nodes": nodes, "links": [{"source": "a", "target": "gone"}, {"source": "a", "target": "b"}]})
    subject = drawn(tmp_path, text, "graph.json")
    assert audit_drawing(subject, fifth).found("structure.dangling-edge")


def test_what_a_drawing_does_not_tell_is_unchecked(tmp_path: Path, fifth: Plan) -> None:
    audit = audit_of(tmp_path, 'digraph { a [label="QKV projection, layer 0\\nout: [32,8,96]"]; a -> b }', fifth)
    told = {passed.check for passed in audit.passed} | {finding.check for finding in audit.findings}
    unchecked = {one.check for one in audit.unchecked}
    assert unchecked >= {
        "structure.unreachable-output", "communication.group", "communication.unmatched", "dimension.edge",
        "dimension.shard",
    }  # fmt: skip
    assert not told & unchecked


def test_ranks_of_both_stages_of_a_transfer_are_read(tmp_path: Path, fifth: Plan) -> None:
    audit = audit_of(tmp_path, 'digraph { a [label="Send/Recv activations\\nGPU: 0-127 -> 128-255"]; a -> b }', fifth)
    titles = [finding.title for finding in audit.found("communication.pipeline")]
    assert titles == ["No activation gradients message between stages is drawn: 0 of 128"]


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("[32, 1024, 4096]", ((32, 1024, 4096),)),
        ("[batch=32, seq_len: 1024, hidden=4096]", ((32, 1024, 4096),)),
        ("(32, 8) and (8, 4)", ((32, 8), (8, 4))),
        ("32x1024", ((32, 1024),)),
        ("[32 \u00d7 1024]", ((32, 1024),)),
        ("[tokens, 4096]", ()),
        ("[B, S, H]", ()),
        ("whatever", ()),
    ],
)
def test_shapes_are_read_however_they_are_written(text: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    assert read_shapes(text) == shapes


SHAPED = """digraph {{
  s [label="Batch split\\nInput: [128,1024,4096]\\nOutput: [32,1024,4096]"];
  n [label="LayerNorm\\nLayer 0\\nGPU: 0\\nInput: [32,1024,4096]\\nOutput: [batch=32, seq=1024, hidden=4096]"];
  q [label="QKV projection\\nLayer 0\\nGPU: 0\\n[32,1024,4096] -> [32,1024,3072]"];
  c [label="Scores\\nLayer 0\\nGPU: 0\\nin: [32,8,1024,128] out: {scores}"];
  m [label="Softmax\\nLayer 0\\nGPU: 0\\nInput: [32,8,1024,1024]\\nOutput: [32,8,1024,1024]"];
  e [label="Expert 0 FC1\\nLayer 0\\nGPU: {gpus}\\nOutput: [512, {width}]"];
  s -> n -> q -> c -> m; n -> e }}"""


@pytest.mark.parametrize(
    ("values", "checks"),
    [
        ({"scores": "[32,8,1024,1024]", "gpus": "0", "width": 896}, set()),
        ({"scores": "[32,8,1024,1024]", "gpus": "0-3", "width": 3584}, set()),
        ({"scores": "[32,8,1024,512]", "gpus": "0", "width": 896}, {"dimension.edge"}),
        ({"scores": "[32,8,1024,1024]", "gpus": "0", "width": 3584}, {"dimension.shard"}),
    ],
)
def test_shapes_in_free_words_are_compared(
    values: dict[str, object], checks: set[str], tmp_path: Path, fifth: Plan
) -> None:
    audit = audit_of(tmp_path, SHAPED.format(**values), fifth)
    assert {finding.check for finding in audit.findings if finding.check.startswith("dimension")} == checks


def test_a_residual_with_one_input_is_none(tmp_path: Path, fifth: Plan) -> None:
    layers = ";".join(
        f'a{n} [label="Residual 1\\nLayer {n}"]; b{n} [label="Residual 2\\nLayer {n}"]; x -> a{n}; y -> a{n}; x -> b{n}'
        for n in range(16)
    )
    single = audit_of(tmp_path, f"digraph {{ {layers} }}", fifth).found("model.residual")
    assert [finding.title for finding in single] == ["16 residual additions with fewer than two inputs"]


def test_yed_says_what_its_groups_and_shapes_say(tmp_path: Path) -> None:
    text = """<graphml xmlns:y="y"><key for="node" id="d6" yfiles.type="nodegraphics"/>
    <graph edgedefault="directed"><node id="n0" yfiles.foldertype="group"><data key="d6"><y:GroupNode>
    <y:Fill color="#F5F5F5"/><y:NodeLabel>Stage 0, GPU 0-3</y:NodeLabel></y:GroupNode></data>
    <graph edgedefault="directed"><node id="n0::n0"><data key="d6"><y:ShapeNode><y:Fill color="#FFCC00"/>
    <y:NodeLabel>All-Reduce TP, Layer 0</y:NodeLabel><y:Shape type="ellipse"/></y:ShapeNode></data></node></graph>
    </node></graph></graphml>"""
    read = drawn(tmp_path, text, "yed.graphml")
    (node,) = read.document.nodes
    assert (node.shape, node.color, node.clusters) == ("ellipse", "#FFCC00", ("Stage 0, GPU 0-3",))
    assert read.subject.where["rank"].to_list() == [0, 1, 2, 3]


@pytest.mark.parametrize("key", ["links", "edges"])
def test_node_link_files_of_any_age_are_read(key: str, tmp_path: Path) -> None:
    nodes = [{"id": "a", "label": "Softmax"}, {"id": "b"}]
    for ends in ({"source": "a", "target": "b"}, {"source": 0, "target": 1}):
        text = json.dumps({"directed": True, "nodes": nodes, key: [ends]})
        (edge,) = drawn(tmp_path, text, "graph.json").document.edges
        assert (edge.source, edge.target) == ("a", "b")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"digraph { a -> b } digraph { c -> d }", "2 graphs"),
        ("digraph { a -> b }".encode("utf-16"), "UTF-16"),
        (b"digraph { {a b}:in -> c }", "no DOT: syntax error in line 1"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "drawing.dot"
    path.write_bytes(data)
    with pytest.raises(DrawingError, match=why) as refusal:
        read_document(path)
    assert "\n" not in str(refusal.value)


def test_braces_in_strings_and_comments_are_no_graphs(tmp_path: Path) -> None:
    read = drawn(tmp_path, '// {\n/* { */ digraph { "a }" -> b; c [label="} digraph {"] }')
    assert len(read.document.nodes) == 3


def test_an_undirected_drawing_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "drawing.dot"
    path.write_text("graph { a -- b }")
    audit = audit_drawing(read_drawing(read_document(path), None), None)
    assert any("undirected" in fact for fact in audit.facts)


def test_labels_that_only_fill_the_memory_are_left_out(tmp_path: Path, fifth: Plan) -> None:
    label = "GPU: 0-999999999, layer 0-99999, expert 0-99999"
    text = json.dumps({"nodes": [{"id": number, "label": f"{label} {number}"} for number in range(400)], "links": []})
    read = drawn(tmp_path, text, "graph.json")
    assert len(read.overflow) > 200
    audit = audit_drawing(read, fifth)
    assert [one.check for one in audit.unchecked].count("strategy.ranks") == 1
    assert "strategy.ranks" not in {one.check for one in [*audit.passed, *audit.findings]}
    assert any("claim to stand for more than there can be" in fact for fact in audit.facts)


def test_a_long_chain_is_followed_to_its_end(tmp_path: Path, fifth: Plan) -> None:
    chain = "; ".join(f"n{number} -> n{number + 1}" for number in range(5000))
    text = f'digraph {{ i [label="Input"]; o [label="Output"]; i -> n0; {chain}; n5000 -> o }}'
    assert audit_of(tmp_path, text, fifth).found("structure.unreachable-output") == []
