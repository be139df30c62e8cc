"""Faults put into drawings of true graphs at random places, each with the check that must find it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

Kind = Callable[["Sketch", random.Random], tuple[str, ...]]
KINDS: dict[str, Kind] = {}


class UnfitError(Exception):
    """The drawing has no place for this kind of fault."""


@dataclass(slots=True)
class Sketch:
    """Nodes by id with their labels, and edges, to be changed and written again."""

    labels: dict[str, str]
    rest: dict[str, str]
    """What else stands in a node's brackets."""

    edges: list[tuple[str, str]]
    roles: dict[str, list[str]] = field(default_factory=dict)
    """Ids by the first line of the label, numbers left out."""

    @classmethod
    def parse(cls, text: str) -> Sketch:
        """Read what `draw_subject` writes."""
        labels, rest = {}, {}
        for name, label, other in re.findall(r'^  (n\d+) \[label="([^"]*)"(.*)\];$', text, re.M):
            labels[name], rest[name] = label, other
        sketch = cls(labels, rest, re.findall(r"^  (n\d+) -> (n\d+)", text, re.M))
        for name, label in labels.items():
            sketch.roles.setdefault(label.split("\\n")[0], []).append(name)
        return sketch

    def copy(self) -> Sketch:
        """Return a copy that can be changed."""
        return Sketch(dict(self.labels), dict(self.rest), list(self.edges), self.roles)

    def write(self) -> str:
        """Return it as DOT."""
        nodes = [f'  {name} [label="{label}"{self.rest.get(name, "")}];' for name, label in self.labels.items()]
        return "\n".join(["digraph truedag {", *nodes, *(f"  {one} -> {two};" for one, two in self.edges), "}"])

    def pick(self, rng: random.Random, pattern: str) -> str:
        """Return a random node whose first line fits."""
        fitting = [name for line, names in self.roles.items() if re.search(pattern, line) for name in names]
        if not fitting:
            raise UnfitError
        return rng.choice(fitting)

    def remove(self, name: str, *, heal: bool) -> None:
        """Take a node away; `heal` joins what it joined."""
        before = [one for one, two in self.edges if two == name]
        after = [two for one, two in self.edges if one == name]
        self.edges = [edge for edge in self.edges if name not in edge]
        if heal:
            self.edges += [pair for pair in ((one, two) for one in before for two in after) if pair not in self.edges]
        del self.labels[name]

    def place(self, name: str) -> dict[str, str]:
        """Return what a label says of the place."""
        line = self.labels[name].split("\\n")[1]
        told = {}
        for word in ("layer", "expert", "rank", "ranks", "microbatch", "decode step"):
            match = re.search(rf"\b{word} ([\d and-]+?)(?=,|$)", line)
            if match:
                told[word] = match.group(1)
        return told


def _dropping(pattern: str, *checks: str) -> Kind:
    def change(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
        sketch.remove(sketch.pick(rng, pattern), heal=rng.random() < 0.5)
        return checks

    return change


def _dropping_all(pattern: str, *checks: str) -> Kind:
    """Drop all nodes of one kind: a dimension that was forgotten."""

    def change(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
        sketch.pick(rng, pattern)
        gone = {name for line, names in sketch.roles.items() if re.search(pattern, line) for name in names}
        sketch.labels = {name: label for name, label in sketch.labels.items() if name not in gone}
        sketch.edges = [(one, two) for one, two in sketch.edges if one not in gone and two not in gone]
        return checks

    return change


KINDS |= {
    "drop an attention communication": _dropping(r"^attention (input|output):", "communication.tensor"),
    "drop a dispatch": _dropping(r"^dispatch:", "communication.dispatch"),
    "drop a combine": _dropping(r"^combine:", "communication.combine"),
    "drop a dense gradient reduction": _dropping(r"^dense gradients:", "communication.gradient"),
    "drop an expert gradient reduction": _dropping(r"^expert gradients:", "communication.gradient"),
    "drop a send": _dropping(r"^send ", "communication.unmatched", "communication.pipeline"),
    "drop a receive": _dropping(r"^receive ", "communication.unmatched"),
    "drop a residual": _dropping(r"residual$", "model.residual"),
    "drop a norm": _dropping(r"^(attention|feed-forward) norm$", "model.norm"),
    "drop a projection": _dropping(r"^(QKV|output) projection$", "model.attention", "model.backward"),
    "drop a softmax": _dropping(r"^attention softmax$", "model.attention"),
    "drop a router's choice": _dropping(r"^top-k choice$", "model.feed-forward"),
    "drop an expert's activation": _dropping(r"^expert activation$", "model.experts"),
    "drop the final norm": _dropping(r"^final norm$", "model.ends"),
    "drop an embedding": _dropping(r"^embedding$", "model.ends"),
    "no all-to-all": _dropping_all(r"all-to-all over ep", "communication.dispatch"),
    "no gradient synchronisation": _dropping_all(r"gradients: ", "communication.gradient"),
    "no tensor parallelism": _dropping_all(r" over tp", "communication.tensor"),
    "no stage transfers": _dropping_all(r"^(send|receive) ", "communication.pipeline"),
    "no residuals": _dropping_all(r"residual$", "model.residual"),
    "no output projection": _dropping_all(r"^output projection$", "model.attention"),
}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of fault."""

    def register(change: Kind) -> Kind:
        KINDS[name] = change
        return change

    return register


@kind("drop a rank")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    rank = sketch.place(sketch.pick(rng, r"^QKV projection$"))["rank"]
    for name in [name for name in sketch.labels if sketch.place(name).get("rank") == rank]:
        del sketch.labels[name]
    pattern = re.compile(rf"(ranks [\d and-]*?)\b{rank}\b")
    sketch.labels = {
        name: re.sub(r"(ranks )(?:and )|(?: and )(?=,)", r"\1", pattern.sub(r"\1", label))
        for name, label in sketch.labels.items()
    }
    sketch.edges = [(one, two) for one, two in sketch.edges if one in sketch.labels and two in sketch.labels]
    # Runs such as 0-3 still name it; it is gone only where no label has it.
    if any(re.search(r"ranks \d+-\d+", label) for label in sketch.labels.values()):
        raise UnfitError
    return ("strategy.ranks",)


@kind("drop a layer")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    layer = sketch.place(sketch.pick(rng, r"^QKV projection$"))["layer"]
    gone = {name for name in sketch.labels if sketch.place(name).get("layer") == layer}
    sketch.labels = {name: label for name, label in sketch.labels.items() if name not in gone}
    sketch.edges = [(one, two) for one, two in sketch.edges if one not in gone and two not in gone]
    return ("strategy.layers",)


@kind("sampled experts")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    expert = sketch.place(sketch.pick(rng, r"^expert first layer$")).get("expert")
    if expert is None:
        raise UnfitError
    gone = {name for name in sketch.labels if sketch.place(name).get("expert") == expert}
    sketch.labels = {name: label for name, label in sketch.labels.items() if name not in gone}
    sketch.edges = [(one, two) for one, two in sketch.edges if one not in gone and two not in gone]
    return ("strategy.experts",)


@kind("move an operator to another stage")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^(attention norm|attention softmax)$")
    place = sketch.place(name)
    others = [sketch.place(other) for other in sketch.roles["attention softmax"]]
    away = [other["rank"] for other in others if other["layer"] != place["layer"]]
    same = {other["rank"] for other in others if other["layer"] == place["layer"]}
    there = [rank for rank in away if rank not in same]
    if not there:
        raise UnfitError
    sketch.labels[name] = re.sub(r"\brank \d+", f"rank {rng.choice(there)}", sketch.labels[name], count=1)
    return ("strategy.layers",)


@kind("swap ranks between groups")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^(attention output|dispatch|combine|attention input):.*over (tp|ep)$")
    numbers = re.findall(r"\d+", sketch.place(name)["ranks"])
    ranks = {rank for other in sketch.labels for rank in re.findall(r"\brank (\d+)", sketch.labels[other])}
    others = sorted(ranks - set(numbers))
    if not others or "-" in sketch.place(name)["ranks"]:
        raise UnfitError
    sketch.labels[name] = re.sub(
        r"ranks [\d and]+", f"ranks {rng.choice(others)} and {rng.choice(numbers)}", sketch.labels[name], count=1
    )
    return ("communication.group",)


@kind("wrong bytes")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    # What a rank gives in a backward dispatch depends on the routing: no audit can say that it is wrong.
    told = re.compile(r"(attention (output|input):|loss:|send activations|dispatch\b.*\bforward)")
    name = rng.choice([name for name, label in sketch.labels.items() if told.match(label)])
    sketch.labels[name] = re.sub(
        r"(\d+) bytes", lambda match: f"{2 * int(match.group(1))} bytes", sketch.labels[name], count=1
    )
    return ("communication.bytes",)


@kind("another kind")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^attention output: (reduce-scatter|all-reduce)")
    if "reduce-scatter" in sketch.labels[name]:
        sketch.labels[name] = sketch.labels[name].replace("reduce-scatter", "all-reduce")
    else:
        sketch.labels[name] = sketch.labels[name].replace("all-reduce", "all-gather")
    return ("communication.kind",)


@kind("a communication too many")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^(attention output|combine):")
    sketch.labels["n999999"] = sketch.labels[name]
    sketch.edges += [(one, "n999999") for one, two in sketch.edges if two == name]
    return ("communication.extra",)


@kind("a gradient reduced twice")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^(dense|expert|sequence) gradients:")
    sketch.labels["n999999"] = sketch.labels[name]
    sketch.edges += [(one, "n999999") for one, two in sketch.edges if two == name]
    return ("communication.gradient-twice",)


@kind("a cycle")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    one, two = rng.choice(sketch.edges)
    sketch.edges.append((two, one))
    return ("structure.cycle",)


@kind("an orphan")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    sketch.labels["n999999"] = sketch.labels[sketch.pick(rng, r"^attention norm$")]
    return ("structure.orphan",)


@kind("an edge drawn twice")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    sketch.edges.append(rng.choice(sketch.edges))
    return ("structure.duplicate-edge",)


@kind("an island")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    label = sketch.labels[sketch.pick(rng, r"^attention norm$")]
    sketch.labels |= {"n999998": label, "n999999": label}
    sketch.edges.append(("n999998", "n999999"))
    return ("structure.components",)


@kind("an output that nothing leads to")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^Output: ")
    sketch.edges = [(one, two) for one, two in sketch.edges if two != name]
    return ("structure.unreachable-output",)


@kind("an ellipsis")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^attention softmax$")
    sketch.labels["n999999"] = "..."
    sketch.edges.append((name, "n999999"))
    return ("honesty.ellipsis",)


@kind("representative GPUs")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^QKV projection$")
    sketch.labels[name] += "\\n(representative GPU)"
    return ("honesty.sampling",)


@kind("a wrong shape")
def _(sketch: Sketch, rng: random.Random) -> tuple[str, ...]:
    name = sketch.pick(rng, r"^(QKV projection|output projection)$")
    sketch.labels[name] = re.sub(
        r"(out: \w+\[\d+,)(\d+)\]", lambda match: f"{match.group(1)}{int(match.group(2)) + 8}]", sketch.labels[name]
    )
    return ("dimension.operator",)
