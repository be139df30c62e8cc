"""How drawings are read: labels, dialects, the fifth deployment's drawing, and those that mean harm."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truedag.launch.deployment_file import load_deployment
from truedag.launch.expected.expectation import expect
from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.auditing import audit_drawing
from truedag.tracer.audit.drawing.document import DrawingError, read_document
from truedag.tracer.audit.drawing.grammar import read_label
from truedag.tracer.audit.drawing.marking import mark_drawing
from truedag.tracer.audit.drawing.numbers import read_numbers
from truedag.tracer.audit.drawing.reading import read_drawing
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import plan
from truedag.tracer.audit.report import write_markdown

DATA = Path(__file__).parents[1] / "data"
FIFTH = "moe-30b-ep8-tp4-pp2-dp4"


@pytest.mark.parametrize(
    ("label", "roles"),
    [
        ("QKV Projection\nLayer 3\nGPU: 0-127", ("QKV projection",)),
        ("Multi-Head Attention", ("QKV projection", "attention scores", "attention softmax", "attention context")),
        ("Attention output projection", ("output projection",)),
        ("Softmax", ("attention softmax",)),
        ("Router softmax", ("router",)),
        ("Gate selection (top-2)", ("router",)),
        ("Expert 5 FC1", ("expert first layer",)),
        ("GELU (expert 7)", ("expert activation",)),
        ("FFN down_proj", ("second layer",)),
        ("RMSNorm 2", ("feed-forward norm",)),
        ("Final LayerNorm", ("final norm",)),
        ("LM head", ("head",)),
        ("Residual Add", ("residual",)),
        ("KV cache", ("cache write",)),
        ("something of no trade", ()),
    ],
)
def test_a_word_of_the_trade_is_a_role(label: str, roles: tuple[str, ...]) -> None:
    assert read_label(label).roles == roles


@pytest.mark.parametrize(
    ("label", "kind", "purpose", "axis"),
    [
        ("TP All-Reduce", "all-reduce", None, "tp"),
        ("All-to-All dispatch (EP)", "all-to-all", "dispatch", "ep"),
        ("a2a combine", "all-to-all", "combine", None),
        ("gradient all_reduce over DP", "all-reduce", "dense gradients", "dp"),
        ("Send activations to stage 1", "send", "activations", None),
        ("Receive", "recv", None, None),
        ("attention output: reduce-scatter over tp", "reduce-scatter", "attention output", "tp"),
    ],
)
def test_a_communication_says_its_kind(label: str, kind: str, purpose: str | None, axis: str | None) -> None:
    reading = read_label(label)
    assert (reading.kind, reading.purpose, reading.axis) == (kind, purpose, axis)


@pytest.mark.parametrize(
    ("label", "ranks"),
    [
        ("x GPU: 0-3", (0, 1, 2, 3)),
        ("x gpu_3", (3,)),
        ("x rank3", (3,)),
        ("x GPUs [4, 6 and 8]", (4, 6, 8)),
        ("x ranks 0 to 2", (0, 1, 2)),
        ("x TP rank 1", ()),
        ("x [batch=128, seq=1024]", ()),
    ],
)
def test_gpus_are_read_however_they_are_written(label: str, ranks: tuple[int, ...]) -> None:
    assert read_label(label).numbers.get("ranks", ()) == ranks


@pytest.mark.parametrize(
    ("label", "experts"),
    [
        ("FC1 experts e0..e7", range(8)),
        ("FC1 E0-E7", range(8)),
        ("FC1 experts 0..7", range(8)),
        ("FC1 Expert 0 - Expert 7", range(8)),
        ("FC1 experts E0 to E3, E8", (0, 1, 2, 3, 8)),
        ("FC1 experts 0-56 step 8", range(0, 57, 8)),
    ],
)
def test_experts_are_read_however_they_are_written(label: str, experts: Sequence[int]) -> None:
    reading = read_label(label)
    assert (reading.roles, reading.numbers["experts"]) == (("expert first layer",), tuple(experts))


@pytest.mark.parametrize(
    ("label", "ranks", "steps"),
    [
        ("x GPU: 0-1016 step 8", range(0, 1017, 8), ()),
        ("x GPU: 0-1 to 8-9 step 4 and 20", (0, 1, 4, 5, 8, 9, 20), ()),
        ("decode GPU 0-3 step 2", range(4), (2,)),
        ("decode GPU 0-8 step 2, decode step 5", range(0, 9, 2), (5,)),
        ("decode rank0-rank3, decode steps 4-6", range(4), (4, 5, 6)),
        ("decode GPU 0, decode steps: 16", (0,), ()),
        ("x GPU 0-3 to 99-98 step 0", (0, 1, 2, 3), ()),
    ],
)
def test_a_step_of_a_range_is_none_of_decoding(label: str, ranks: Sequence[int], steps: Sequence[int]) -> None:
    numbers = read_label(label).numbers
    assert numbers["ranks"] == tuple(ranks)
    if label.startswith("decode"):
        assert numbers.get("decode_step", ()) == tuple(steps)


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 6), st.integers(1, 40), st.integers(1, 9)), max_size=4
    ),
    pair=st.sampled_from([",", "-"]),
)
def test_numbers_that_are_written_are_read_back(parts: list[tuple[int, int, int, int]], pair: str) -> None:
    numbers = {
        low + one + turn * step for low, size, step, times in parts for turn in range(times) for one in range(size)
    }
    text = write_runs(numbers, pair=pair)
    assert read_numbers(text) == tuple(sorted(numbers))
    reading = read_label(f"x GPU: {text.replace(',', ' and ')}")
    assert reading.numbers.get("ranks", ()) == tuple(sorted(numbers))


def test_a_list_of_experts_says_which_are_where(tmp_path: Path) -> None:
    path = tmp_path / "experts.dot"
    label = r"expert first layer\nlayer 3\nexperts 0-1: GPU: 0 and 4\nexperts 2 and 3: GPU: 1"
    path.write_text(f'digraph {{ a [label="{label}"]; a -> b }}')
    subject = read_drawing(read_document(path), None).subject
    told = (
        subject.covers.join(subject.where, on="node").select("role", "layer", "expert", "rank").sort("expert", "rank")
    )
    assert told.rows() == [
        ("expert first layer", 3, expert, rank) for expert, rank in ((0, 0), (0, 4), (1, 0), (1, 4), (2, 1), (3, 1))
    ]
    assert len(subject.nodes) == 2


@pytest.mark.parametrize(
    ("edge", "messages"),
    [("a -> b [style=dashed]", {"3>131"}), ("b -> a [style=dashed]", {"131>3"}), ("a -> b", set())],
)
def test_a_dashed_edge_between_stages_is_a_transfer(edge: str, messages: set[str], tmp_path: Path) -> None:
    path = tmp_path / "dashed.dot"
    nodes = r'a [label="residual add\nlayer 7\nGPU: 3"]; b [label="RMSNorm\nlayer 8\nGPU: 131"]'
    path.write_text(f"digraph {{ {nodes}; {edge} }}")
    wanted = expect(load_deployment(FIFTH, ())[1])
    told = read_drawing(read_document(path), wanted).subject.communications
    assert set(told.filter(kind="message")["members"]) == messages
    assert set(told["purpose"]) <= {"activations", "activation gradients"}


def test_a_range_without_an_end_is_cut() -> None:
    assert len(read_numbers("0-999999999")) <= 1 << 20


def audit_of(path: Path, deployment: str = FIFTH) -> Audit:
    wanted = plan(expect(load_deployment(deployment, ())[1]))
    return audit_drawing(read_drawing(read_document(path), wanted.expectation), wanted)


def test_the_fifth_deployment_drawing_is_told_everything_that_is_wrong_with_it() -> None:
    audit = audit_of(DATA / "drawings" / f"{FIFTH}.dot")
    titles = {finding.check: "\n".join(one.title for one in audit.found(finding.check)) for finding in audit.findings}
    assert "23 nodes for 256 GPUs" in titles["honesty.node-count"]
    assert "2 of 4 TP ranks" in titles["strategy.axis"]
    assert "No EP parallelism is shown: 1 of 8" in titles["strategy.axis"]
    assert "No DP parallelism is shown: 1 of 32" in titles["strategy.axis"]
    assert "2 of 4 members" in titles["communication.group"]
    assert "No dispatch all-to-all over EP is drawn: 0 of" in titles["communication.dispatch"]
    assert "No combine all-to-all over EP is drawn: 0 of" in titles["communication.combine"]
    assert "No dense gradients all-reduce over DP is drawn: 0 of" in titles["communication.gradient"]
    assert "No expert gradients all-reduce over EDP is drawn: 0 of" in titles["communication.gradient"]
    assert "Output projection: drawn in 0 of 16 layers" in titles["model.attention"]
    assert "Attention residual and feed-forward residual: drawn in 0 of 16" in titles["model.residual"]
    assert "Feed-forward norm: drawn in 0 of 16 layers" in titles["model.norm"]
    assert "drawn in 0 of 16 layers" in titles["model.feed-forward"]
    assert "drawn in 0 of 16 layers" in titles["model.experts"]
    assert "final norm and head: not drawn" in titles["model.ends"]
    assert "252 of 256 ranks are missing" in titles["strategy.ranks"]
    assert "14 of 16 layers are missing" in titles["strategy.layers"]
    assert all(finding.expected and finding.found and finding.fix for finding in audit.findings)


DIALECTS = {
    "records.dot": 'digraph { a [shape=record, label="{<p0> QKV projection|layer 0|GPU 1}"]; a -> b }',
    "html.dot": "digraph { a [label=<<table><tr><td>QKV projection</td></tr><tr><td>layer 0</td></tr>"
    "<tr><td>GPU 1</td></tr></table>>]; a -> b }",
    "clusters.dot": 'digraph { subgraph cluster_0 { label="Layer 0"; subgraph cluster_g { label="GPU 1"; '
    'a [label="QKV projection"]; } } a -> b }',
    "ids.dot": "digraph { l0_gpu_1_qkv -> b }",
    "yed.graphml": '<graphml><key id="d0" for="node" attr.name="label"/><graph edgedefault="directed">'
    '<node id="a"><data key="d0">QKV projection, layer 0, GPU 1</data></node><node id="b"/>'
    '<edge source="a" target="b"/></graph></graphml>',
    "networkx.json": json.dumps(
        {
            "nodes": [{"id": "a", "label": "QKV projection", "layer": 0, "rank": 1}, {"id": "b"}],
            "links": [{"source": "a", "target": "b"}],
        }
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_says_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(DIALECTS[name])
    subject = read_drawing(read_document(path), None).subject
    assert subject.covers.select("role", "layer").rows() == [("QKV projection", 0)]
    assert subject.where["rank"].to_list() == [1]
    assert len(subject.edges) == 1


def test_a_cluster_without_any_label_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "bare.dot"
    path.write_text('digraph { subgraph "cluster layer 3" { a [label="Softmax"] } a -> b }')
    subject = read_drawing(read_document(path), None).subject
    assert subject.covers["layer"].to_list() == [3]


def test_a_legend_is_no_orphan(tmp_path: Path) -> None:
    path = tmp_path / "legend.dot"
    path.write_text(
        'digraph { a [label="Softmax"]; a -> b; key [shape=plaintext, label="red: hot"]; lost [label="Norm"] }'
    )
    (finding,) = audit_drawing(read_drawing(read_document(path), None), None).found("structure.orphan")
    assert finding.nodes == ("lost",)


def test_a_key_of_attention_is_no_legend(tmp_path: Path) -> None:
    path = tmp_path / "key.dot"
    path.write_text('digraph { a [label="Key"]; subgraph cluster_key { b [label="Softmax"] } a -> c }')
    drawn = read_drawing(read_document(path), None)
    assert drawn.not_understood == ("Key", "c")
    assert drawn.subject.covers.is_empty()


HARMFUL = {
    "million.dot": "digraph {" + ";".join(f"n{i}->n{i + 1}" for i in range(1_000_000)) + "}",
    "deep.dot": "digraph {" + "subgraph cluster_a {" * 5000 + "a" + "}" * 5000 + "}",
    "torn.dot": "digraph { a -> b [label=",
    "zero.dot": "digraph { a\0 }",
    "empty.dot": "",
    "bomb.graphml": '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><graphml><node id="&b;"/></graphml>',
    "file.graphml": '<!DOCTYPE x SYSTEM "file:///etc/passwd"><graphml/>',
    "deep.graphml": "<graphml>" + "<graph><node id='a'>" * 3000,
    "other.graphml": "<html/>",
    "deep.json": "[" * 100_000,
    "list.json": "[1]",
    "twice.json": json.dumps({"nodes": [{"id": "a"}, {"id": "b"}, {"id": "a"}], "links": []}),
    "twice.graphml": '<graphml><graph><node id="a"/><node id="a"/></graph></graphml>',
    "many.json": json.dumps({"nodes": [{"id": number} for number in range(200_000)], "links": []}),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_drawing_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(HARMFUL[name])
    with pytest.raises(DrawingError, match=name):
        read_document(path)


def test_broken_text_is_refused_and_latin_is_read_where_it_is_declared(tmp_path: Path) -> None:
    broken = tmp_path / "broken.dot"
    broken.write_bytes(b'digraph { a [label="\xff\xfe"] }')
    with pytest.raises(DrawingError, match="UTF-8"):
        read_document(broken)
    latin = tmp_path / "latin.dot"
    latin.write_bytes('digraph { charset="latin1"; a [label="sch\xf6n"] }'.encode("latin1"))
    assert [node.id for node in read_document(latin).nodes] == ["a"]


def test_what_is_in_labels_stays_text_in_every_report(tmp_path: Path) -> None:
    path = tmp_path / "script.dot"
    path.write_text('digraph { x [label="<script>alert(1)</script> `rm`"]; y [label="..."]; x -> y; x -> y }')
    drawn = read_drawing(read_document(path), None)
    audit = audit_drawing(drawn, None)
    assert "<script>" not in write_markdown(audit)
    marked = tmp_path / "marked.dot"
    marked.write_text(mark_drawing(drawn, audit))
    assert {node.id for node in read_document(marked).nodes} >= {"x", "y"}


def test_numbers_beyond_all_reason_do_not_cost_memory(tmp_path: Path) -> None:
    path = tmp_path / "range.dot"
    path.write_text('digraph { a [label="expert 0-99999999 FC1\\nlayer 0-99999999\\nGPU: 0-999999999"]; a -> b }')
    assert audit_of(path).findings


def test_any_text_is_read_or_refused_and_never_breaks_the_reader(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = ["GPU:", "layer", "expert", "0-3", "QKV", "->", "{", "}", "<", ">", "[", "]", '"', "\\n", "...", "stage 1",
             "all-reduce", "é", "\\", "|", "=", ";", "subgraph", "label", "cluster_0", "99999999"]  # fmt: skip
    wanted = plan(expect(load_deployment(FIFTH, ())[1]))
    read = 0
    for number in range(24):
        body = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 40)))
        label = body.replace('"', "'").replace("\\", "/")
        text = f'digraph {{ a [label="{label}"]; a -> b }}' if number % 2 else f"digraph {{ {body} }}"
        path = tmp_path / f"{number}.dot"
        path.write_text(text)
        try:
            audit = audit_drawing(read_drawing(read_document(path), wanted.expectation), wanted)
        except DrawingError:
            continue
        assert write_markdown(audit)
        read += 1
    assert read >= 10
