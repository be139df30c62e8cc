"""`detailed`: every operator of the layers of one rank class of each stage, and of all experts.

The first sheet is the chain of all layers; each leads to a sheet of its operators. Layers that are alike share one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.errors import DrawError
from truedag.tracer.views import captions
from truedag.tracer.views.calls import Calls, read_calls
from truedag.tracer.views.chain import AFTER, ALONE, BEFORE, make_chain
from truedag.tracer.views.chain_sheet import ChainSubject, draw_chain
from truedag.tracer.views.gpus import write_gpus
from truedag.tracer.views.operator_sheet import Subject, draw_operators
from truedag.tracer.views.operators import Operators, fold_operators
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import Link, Sheet, link_views

NAME = "detailed"
# Outside the layers, a sheet of more operators is folded by depth (`depths.py`): every parameter's update is alike.
MAX_OPERATORS = 120
# If it still has more than this, it is no picture any more: it is left out, and counted.
_MOST_OPERATORS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a graph is drawn; None is all.

    Attributes:
        layers: these layers alone, each on sheets of its own.
        stages: these stages.
        rank: a rank whose class is drawn for its stage; None: the class of the stage's lowest rank.
    """

    layers: tuple[int, ...] | None = None
    stages: tuple[int, ...] | None = None
    rank: int | None = None

    def has_stage(self, stage: int) -> bool:
        """Whether a stage is drawn."""
        return self.stages is None or stage in self.stages

    def check_stages(self, known: Collection[int], scope: Scope) -> None:
        """Refuse stages that are not there.

        Raises:
            DrawError: there is one.
        """
        if unknown := sorted(set(self.stages or ()) - set(known)):
            raise DrawError(f"stage {unknown[0]} is not in the graph of {scope.whole.path}: it has {write_runs(known)}")


def draw_detailed(scope: Scope, choice: Choice, say: Callable[[str], None], *, linked: Sequence[str]) -> list[Sheet]:
    """Draw the chain of layers and their operators; `linked` are the views that links may lead to.

    Raises:
        DrawError: what was chosen is not in the graph.
    """
    leads = _leads(scope, choice)
    calls = {}
    for stage, lead in leads.items():
        say(f"reading stage {stage}" if stage >= 0 else "reading the operators")
        calls[stage] = read_calls(scope, lead)
    known = {layer for one in calls.values() for layer in one.items["layer"].unique().to_list() if layer >= 0}
    if choice.layers is not None and (unknown := sorted(set(choice.layers) - known)):
        raise DrawError(
            f"layer {unknown[0]} is not in the graph of {scope.whole.path}: it has layers {write_runs(known)}"
        )
    ways: dict[tuple[int, str | None, int], str] = {}
    contents: list[tuple[Operators, Subject]] = []
    left_out: list[str] = []
    for stage, one in calls.items():
        for layers, phase in _contents(one, choice):
            found = fold_operators(scope, one, layers, phase)
            if found is None:
                continue
            if layers == (-1,) and len(found.operators) > MAX_OPERATORS:
                found = fold_operators(scope, one, layers, phase, by_depth=True)
                assert found is not None, "it has operators"
            if layers == (-1,) and len(found.operators) > _MOST_OPERATORS:
                left_out.append(
                    f"{phase or 'outside the phases'} of stage {stage}: {captions.count(found.num_nodes, 'node')}"
                )
                continue
            subject = _subject(scope, one, found, stage, phase, link_views(linked, but=""))
            for layer in layers:
                for slot in (layer,) if layer >= 0 else (BEFORE, AFTER, ALONE):
                    ways[stage, phase, slot] = subject.name
            contents.append((found, subject))
    say(f"laying out {captions.count(len(contents), 'sheet')} of operators")
    sheets = draw_operators(contents)
    chain = make_chain(scope.whole, calls, scope.faults)
    told = f"Left out as too many for a sheet, and counted here: {'; '.join(left_out)}." if left_out else ""
    first = draw_chain(
        chain,
        ChainSubject(
            name=NAME,
            title=f"{scope.name}: every layer",
            ranks={s: scope.members[r] for s, r in leads.items()},
            ways=ways,
            told=tuple(part for part in (told, _tell_classes(scope)) if part),
            links=link_views(linked, but=NAME),
            num_total=scope.num_total,
            about=scope.about,
            faults=scope.faults,
        ),
    )
    return [first, *sheets]


def _tell_classes(scope: Scope) -> str:
    """Say which classes there are beside those that are drawn."""
    told = [f"{write_gpus(ranks)} (stage {scope.coordinate(first, 'pp')})" for first, ranks in scope.members.items()]
    if len(told) > 16:
        return f"There are {len(told):,} rank classes; --rank draws the class of another rank."
    return f"Rank classes: {'; '.join(told)}. --rank draws the class of another rank."


def _leads(scope: Scope, choice: Choice) -> dict[int, int]:
    """Choose a class for each stage, by its lowest rank."""
    if choice.rank is not None and choice.rank not in scope.places:
        raise DrawError(
            f"rank {choice.rank} is not in the graph of {scope.whole.path}: it has {len(scope.places)} ranks"
        )
    leads: dict[int, int] = {}
    for first in sorted(scope.members):
        leads.setdefault(scope.coordinate(first, "pp"), first)
    if choice.rank is not None:
        leads[scope.coordinate(choice.rank, "pp")] = scope.class_of(choice.rank)
    choice.check_stages(leads, scope)
    return {stage: lead for stage, lead in leads.items() if choice.has_stage(stage)}


def _contents(calls: Calls, choice: Choice) -> list[tuple[tuple[int, ...], str | None]]:
    """List the layers and phases that make a sheet each."""
    phases = calls.items.sort("node")["phase"].unique(maintain_order=True).to_list()
    if choice.layers is not None:
        kinds: list[tuple[int, ...]] = [(layer,) for layer in choice.layers if layer in calls.items["layer"]]
    else:
        kinds = [*calls.layers.values(), (-1,)]
    return [(layers, phase) for layers in kinds for phase in phases]


def _subject(
    scope: Scope, calls: Calls, found: Operators, stage: int, phase: str | None, links: tuple[Link, ...]
) -> Subject:
    is_layer = found.layers != (-1,)
    layers = write_runs(found.layers)
    noun = "layer" if len(found.layers) == 1 else "layers"
    where = f"{noun} {layers}" if is_layer else "outside the layers"
    parts = ([f"stage-{stage}"] if stage >= 0 else []) + [f"{noun}-{layers}" if is_layer else "outside-layers"]
    stage_words = f"stage {stage}, " if stage >= 0 else ""
    told = []
    if len(found.layers) > 1:
        told.append(f"Layers {layers} are alike (checked): the same modules and communications in the same phases.")
    if scope.is_folded:
        told.append("One GPU of the class was read, and of each other place on the expert axis; x counts its calls.")
    return Subject(
        name="/".join((NAME, ".".join([*parts, _file_name(phase)]))),
        title=f"{scope.name}: {phase or 'outside the phases'}, {stage_words}{where}",
        stage=stage,
        ranks=scope.members[calls.lead],
        told=tuple(told),
        links=links,
        num_total=scope.num_total,
    )


def _file_name(phase: str | None) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in phase or "no-phase")
