"""The audit of graphs that were really recorded: clean as they are, and every fault put into them found and named."""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import audit_mutations
import drawing_mutations
import polars as pl
import pytest
from audit_runs import INFER, TRAIN, read, run
from command_line import truedag

from truedag.tracer.audit.auditing import audit_dataset, audit_drawing
from truedag.tracer.audit.drawing.document import document_of
from truedag.tracer.audit.drawing.parser import parse_dot
from truedag.tracer.audit.drawing.reading import read_drawing
from truedag.tracer.audit.drawing.writing import draw_subject
from truedag.tracer.audit.findings import Audit
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.recorded import subject_of
from truedag.tracer.audit.report import verdict, write_markdown


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("train"), TRAIN)


@pytest.fixture(scope="module")
def infer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("infer"), INFER)


def audit_text(text: str, plan: Plan) -> Audit:
    """Audit a drawing that is at hand."""
    return audit_drawing(read_drawing(document_of(parse_dot(text), Path("drawing.dot"), "dot"), plan.expectation), plan)


def drawing_of(out: Path) -> tuple[str, Plan]:
    tables, plan = read(out)
    return "\n".join(draw_subject(subject_of(tables, name="run"))), plan


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_a_true_graph_has_no_finding_and_leaves_nothing_unchecked(kind: str, request: pytest.FixtureRequest) -> None:
    out: Path = request.getfixturevalue(kind)
    tables, plan = read(out)
    audit = audit_dataset(subject_of(tables, name=kind), plan)
    assert audit.findings == []
    assert audit.unchecked == []
    assert {passed.check.split(".")[0] for passed in audit.passed} >= {
        "structure", "strategy", "communication", "model", "dimension", "balance",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_a_drawing_of_a_true_graph_is_read_back_without_a_finding(kind: str, request: pytest.FixtureRequest) -> None:
    text, plan = drawing_of(request.getfixturevalue(kind))
    audit = audit_text(text, plan)
    assert audit.findings == []
    assert audit.not_understood == []


def test_what_a_graph_does_not_tell_is_unchecked(train: Path) -> None:
    tables, plan = read(train)
    theirs = pl.when(pl.col("kind") == "parameter").then("theirs." + pl.col("label")).otherwise("label")
    silent = replace(
        tables,
        nodes=tables.nodes.with_columns(label=theirs, expert=pl.lit(-1, pl.Int32)),
        groups=tables.groups.with_columns(axis=pl.lit(None, pl.String)),
        ranks=tables.ranks.select("rank", *(pl.lit(-1, pl.Int32).alias(axis) for axis in tables.ranks.columns[1:])),
    )
    audit = audit_dataset(subject_of(silent, name="silent"), plan)
    unchecked = {one.check for one in audit.unchecked}
    assert unchecked == {
        "strategy.coordinates", "strategy.groups", "strategy.experts", "dimension.shard", "balance.experts",
        "balance.tokens",
    }  # fmt: skip
    assert not unchecked & {one.check for one in [*audit.passed, *audit.findings]}


def test_bytes_that_a_drawing_does_not_tell_are_not_held_against_it(train: Path) -> None:
    text, plan = drawing_of(train)
    silent = re.sub(r"\\n(up to )?\d+ bytes( each)?", "", text)
    assert "bytes" in text
    assert "bytes" not in silent
    audit = audit_text(silent, plan)
    assert audit.findings == []
    assert {unchecked.check for unchecked in audit.unchecked} == {
        "communication.bytes", "communication.gradient-twice",
    }  # fmt: skip


def test_a_drawing_says_each_only_where_each_gives_as_much(train: Path) -> None:
    text, _ = drawing_of(train)
    tables, _ = read(train)
    sizes = dict(tables.participants.group_by("node").agg(pl.col("send_bytes").unique().sort()).iter_rows())
    told = re.findall(r'^  n(\d+) \[label="[^"]*\\n(up to )?(\d+) bytes each"', text, re.M)
    assert {bool(most) for _, most, _ in told} == {True, False}
    for node, most, size in told:
        assert sizes[int(node)][-1] == int(size)
        assert (len(sizes[int(node)]) > 1) == bool(most)


@dataclass(kw_only=True)
class Tally:
    """What came of the mutants, by the kind of their fault."""

    made: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    """With any finding."""

    named: Counter[str] = field(default_factory=Counter)
    """With the finding of the right check, at the right place."""

    lost: list[str] = field(default_factory=list)
    """What was wanted of those that were not named rightly, and what was said."""

    def count(self, kind: str, audit: Audit, *, wanted: str, is_named: bool) -> None:
        self.made[kind] += 1
        self.found[kind] += bool(audit.findings)
        self.named[kind] += is_named
        if not is_named:
            said = [(finding.check, finding.layers, finding.ranks) for finding in audit.findings]
            self.lost.append(f"{kind}: wanted {wanted}, got {said}")

    def write(self) -> str:
        """Return it as lines of a table."""
        numbers = [(kind, self.made[kind], self.found[kind], self.named[kind]) for kind in self.made]
        numbers.append((f"{len(self.made)} kinds", self.made.total(), self.found.total(), self.named.total()))
        return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in numbers)


def put_into_graphs(tally: Tally, originals: list[Path], *, rounds: int, seed: int) -> None:
    """Put each kind of fault into each graph so many times, and count what is found."""
    for out in originals:
        tables, plan = read(out)
        original = audit_mutations.Original(tables, plan.expectation.world_size)
        for name, make in audit_mutations.KINDS.items():
            rng = random.Random(f"{seed} {out.name} {name}")  # a new kind changes no other's mutants
            for _ in range(rounds):
                try:
                    mutant = make(original, rng)
                except audit_mutations.UnfitError:
                    continue
                audit = audit_dataset(subject_of(mutant.tables, name=name), plan)
                is_named = any(
                    finding.check in mutant.checks
                    and (mutant.layer is None or mutant.layer in finding.layers)
                    and (mutant.rank is None or mutant.rank in finding.ranks)
                    for finding in audit.findings
                )
                wanted = f"{mutant.checks} {mutant.layer} {mutant.rank}"
                tally.count(name, audit, wanted=wanted, is_named=is_named)


def put_into_drawings(tally: Tally, out: Path, *, rounds: int, seed: int) -> None:
    """The same for the drawing of a graph."""
    text, plan = drawing_of(out)
    sketch = drawing_mutations.Sketch.parse(text)
    for name, change in drawing_mutations.KINDS.items():
        rng = random.Random(f"{seed} {name}")
        for _ in range(rounds):
            changed = sketch.copy()
            try:
                checks = change(changed, rng)
            except drawing_mutations.UnfitError:
                continue
            audit = audit_text(changed.write(), plan)
            is_named = any(finding.check in checks for finding in audit.findings)
            tally.count(f"drawing: {name}", audit, wanted=str(checks), is_named=is_named)


def test_every_kind_of_fault_in_a_graph_is_found_and_named(train: Path, infer: Path) -> None:
    tally = Tally()
    put_into_graphs(tally, [train, infer], rounds=1, seed=11)
    assert len(tally.made) >= 50
    assert tally.lost == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_mutants_are_found_and_named(train: Path, infer: Path) -> None:
    tally = Tally()
    put_into_graphs(tally, [train, infer], rounds=18, seed=23)
    put_into_drawings(tally, train, rounds=9, seed=29)
    print(tally.write())
    assert tally.made.total() >= 2000
    assert tally.lost == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_kind_of_fault_in_a_drawing_is_found_and_named(train: Path) -> None:
    tally = Tally()
    put_into_drawings(tally, train, rounds=2, seed=31)
    assert len(tally.made) >= 35
    assert tally.lost == []


def test_a_missing_rank_is_one_finding_with_its_consequences(train: Path) -> None:
    tables, plan = read(train)
    original = audit_mutations.Original(tables, plan.expectation.world_size)
    mutant = audit_mutations.KINDS["drop a rank"](original, random.Random(3))
    audit = audit_dataset(subject_of(mutant.tables, name="a rank less"), plan)
    first, *others = audit.findings
    assert (first.check, first.ranks, first.follows) == ("strategy.ranks", (mutant.rank,), None)
    assert {finding.check for finding in others} == {
        "communication.unmatched", "communication.bytes", "balance.tokens",
    }  # fmt: skip
    assert {finding.follows for finding in others} == {1}
    assert verdict(audit).startswith("Wrong: 1 error in 4 of")
    text = write_markdown(audit)
    assert text.count("\n1. **") == 1
    assert all(f"finding {number}: **" in text for number in range(2, len(others) + 2))
    # A message that has lost its other half on another rank is a fault of its own.
    beside = next(group for group in plan.expectation.groups["pp"] if mutant.rank in group)
    receives = mutant.tables.nodes.filter((pl.col("kind") == "recv") & ~pl.col("rank").is_in(beside))["node"]
    both = audit_mutations.Original(mutant.tables, plan.expectation.world_size).without(receives.head(1), heal=False)
    again = audit_dataset(subject_of(both, name="two faults"), plan)
    assert any(one.check == "communication.unmatched" and one.follows is None for one in again.findings)


def test_the_command_says_how_a_run_stands(train: Path, tmp_path: Path) -> None:
    clean = truedag("audit", str(train), "--out", str(tmp_path / "report"), cwd=tmp_path)
    assert clean.returncode == 0, clean.stderr
    assert "Right" in clean.stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"audit.md", "audit.json", "audit.sarif"}
    wrong = truedag(
        "audit", str(train), "--deployment", str(train.with_suffix(".yaml")), "strategy=EP2-TP2-PP2", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert wrong.returncode == 3, wrong.stderr
    checks = {finding["check"] for finding in json.loads(wrong.stdout)["findings"]}
    assert checks >= {"communication.expert-tensor", "dimension.shard", "strategy.coordinates"}
    explained = truedag("audit", "--explain", "dimension.shard", cwd=tmp_path)
    assert explained.returncode == 0
    assert "How it decides" in explained.stdout
    assert truedag("audit", "--explain", "no.check", cwd=tmp_path).returncode == 2
    assert truedag("audit", cwd=tmp_path).returncode == 2


def test_a_wrong_drawing_is_marked_and_mended(train: Path, tmp_path: Path) -> None:
    text, _ = drawing_of(train)
    sketch = drawing_mutations.Sketch.parse(text)
    sketch.labels["extra"] = "..."
    sketch.edges.append((next(iter(sketch.labels)), "extra"))
    (tmp_path / "wrong.dot").write_text(sketch.write())
    deployment = str(train.with_suffix(".yaml"))
    result = truedag(
        "audit", "wrong.dot", "--deployment", deployment, "--against", str(train), "--mark", "marked.dot",
        "--fix", "fixed.dot", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    told = json.loads(result.stdout)
    assert [finding["check"] for finding in told["findings"]] == ["honesty.ellipsis"]
    marked = (tmp_path / "marked.dot").read_text()
    assert 'xlabel="finding 1"' in marked
    assert parse_dot(marked)["nodes"]
    mended = truedag("audit", "fixed.dot", "--deployment", deployment, cwd=tmp_path)
    assert mended.returncode == 0, mended.stdout


def test_a_drawing_is_mended_by_a_dry_run_where_there_is_no_run(train: Path, tmp_path: Path) -> None:
    (tmp_path / "a.dot").write_text('digraph { rankdir=LR; q0 [label="QKV projection, layer 0, GPU: 0"]; q0 -> b }')
    deployment = str(train.with_suffix(".yaml"))
    small = ("strategy=TP2-EP2-ETP1", "model.num_layers=2")
    made = truedag("audit", "a.dot", "--deployment", deployment, *small, "--fix", "b.dot", cwd=tmp_path)
    assert made.returncode == 3, made.stderr
    mended = truedag("audit", "b.dot", "--deployment", deployment, *small, cwd=tmp_path)
    assert mended.returncode == 0, mended.stdout
    text = (tmp_path / "b.dot").read_text()
    assert "rankdir=" in text
    assert "GPU: 0-1" in text or "GPU: 0 and 1" in text


def test_an_audit_without_a_run_to_draw_cannot_mend(tmp_path: Path) -> None:
    (tmp_path / "a.dot").write_text('digraph { a [label="QKV projection, layer 0, GPU 0"]; a -> b }')
    result = truedag("audit", "a.dot", "--fix", "b.dot", cwd=tmp_path)
    assert result.returncode == 1
    assert "--deployment" in result.stderr
