"""Checks of what is declared: against the arithmetic, the deployment, and the model that is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from truedag.tracer.analysis.quantities import write_bytes, write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.claim import MEASURED, Claim
from truedag.tracer.audit.expectation import Expectation
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.published import published_sizes

_CLOSE = 0.1
# A declared number with what it counts.
_QUANTITIES = {
    "gpus": "{} GPUs", "parameters": "{} parameters", "layers": "{} layers", "hidden": "hidden size {}",
    "heads": "{} query heads", "kv_heads": "{} key and value heads", "head_dim": "head size {}",
    "ffn": "feed-forward width {}", "experts": "{} experts a layer", "expert_hidden": "expert width {}",
    "top_k": "{} experts a token", "vocabulary": "a vocabulary of {} tokens", "batch": "{} sequences a step",
    "sequence": "{} tokens a sequence", "layers_per_stage": "{} layers a stage", "stages": "{} stages",
    "experts_per_rank": "{} experts of a layer on a rank", "max_sequence": "{} tokens a sequence at most",
    "batch_per_replica": "{} sequences a replica",
}  # fmt: skip


def check_claim(claim: Claim, expectation: Expectation | None, audit: Audit, measured: Mapping[str, float]) -> None:
    """Check a claim; what needs a deployment is left out where none is named."""
    if claim.strategy is not None:
        what = f"{claim.strategy}: {claim.product:,} ranks"
        audit.judge("strategy.world-size", _world_size(claim, expectation), what)
    if claim.model is not None:
        _judge_model(claim, expectation, audit)
    _judge_rates(claim, measured, audit)
    sizes = [name for name in claim.numbers if name not in ("parameters", "gpus", "memory_per_gpu", *MEASURED)]
    axes = {*claim.groups, *claim.members}
    stated = {
        "claim.gpus": "gpus" in claim.numbers or bool(claim.places),
        "claim.parameters": "parameters" in claim.numbers,
        "claim.sizes": bool(sizes),
        "claim.groups": bool(axes),
        "claim.memory": "memory_per_gpu" in claim.numbers,
    }
    if expectation is None:
        for check in (check for check, is_stated in stated.items() if is_stated):
            audit.skip(check, "no deployment is named to compare with")
        return
    if stated["claim.gpus"]:
        audit.judge("claim.gpus", [*_gpus(claim, expectation), *_places(claim, expectation)], _tell_gpus(claim))
    if stated["claim.parameters"]:
        what = f"{_short(claim.numbers['parameters'])} declared, {expectation.num_parameters:,} by the sizes"
        audit.judge("claim.parameters", _parameters(claim, expectation), what)
    if stated["claim.sizes"]:
        audit.judge("claim.sizes", _sizes(claim, sizes, expectation), write_count(len(sizes), "number"))
    if stated["claim.groups"]:
        audit.judge("claim.groups", _groups(claim, expectation), f"the groups of {', '.join(sorted(axes))}")
    if stated["claim.memory"]:
        audit.judge("claim.memory", _memory(claim, expectation), f"{_state(expectation)} of the fullest rank")


def _finding(check: str, title: str, expected: str, found: str, *, fix: str | None = None) -> Finding:
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=fix or CHECKS[check].fix,
        severity=CHECKS[check].severity,
    )  # fmt: skip


def _world_size(claim: Claim, expectation: Expectation | None) -> Iterator[Finding]:
    declared = claim.numbers.get("gpus")
    axes = "x".join(f"{axis.upper()}{size}" for axis, size in claim.axes.items() if axis != "vpp")
    if declared is not None and declared != claim.product:
        folded = claim.folded_product
        hint = (
            f"; it is {folded:,} where expert axes are laid over the others: say which is meant"
            if folded == declared
            else ""
        )
        yield _finding(
            "strategy.world-size", f"{axes} is {claim.product:,} ranks, and {declared:,.0f} GPUs are declared{hint}",
            f"{claim.product:,} ranks", f"{declared:,.0f} GPUs",
        )  # fmt: skip
    elif declared is None and expectation is not None and claim.product != expectation.world_size:
        yield _finding(
            "strategy.world-size", f"{axes} is {claim.product:,} ranks, and the deployment has "
            f"{expectation.world_size:,}", f"{expectation.world_size:,} ranks", f"{claim.product:,}",
        )  # fmt: skip


def _gpus(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    declared = claim.numbers.get("gpus")
    if declared is not None and declared != expectation.world_size:
        yield _finding(
            "claim.gpus", f"{declared:,.0f} GPUs are declared, and {expectation.strategy} has "
            f"{expectation.world_size:,}",
            f"{expectation.world_size:,}", f"{declared:,.0f}",
        )  # fmt: skip


def _tell_gpus(claim: Claim) -> str:
    told = [f"{claim.numbers['gpus']:,.0f} GPUs"] if "gpus" in claim.numbers else []
    told += [f"the GPUs of {name.removeprefix('gpus_of_')} {write_runs(one for numbers, _ in rows for one in numbers)}"
             for name, rows in claim.places.items()]  # fmt: skip
    return ", ".join(told)


def _places(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    for stages, ranks in claim.places.get("gpus_of_stage", ()):
        right = tuple(rank for stage in stages for rank in _stage(expectation, stage))
        yield from _place("stage", stages, ranks, right)
    for layers, ranks in claim.places.get("gpus_of_layers", ()):
        known = [layer for layer in layers if layer < len(expectation.stage_of_layer)]
        right = tuple({rank for layer in known for rank in expectation.ranks_of_layer(layer)})
        yield from _place("layer", layers, ranks, right)
    for experts, ranks in claim.places.get("gpus_of_experts", ()):
        right = tuple(
            {
                rank
                for stage in expectation.ranks_of_expert
                for expert in experts
                if expert < len(stage)
                for rank in stage[expert]
            }
        )
        yield from _place("expert", experts, ranks, right)


def _stage(expectation: Expectation, stage: int) -> tuple[int, ...]:
    return expectation.ranks_of_stage(stage) if stage < expectation.num_stages else ()


def _place(noun: str, numbers: Sequence[int], ranks: tuple[int, ...], right: tuple[int, ...]) -> Iterator[Finding]:
    if set(ranks) != set(right):
        several = len(numbers) > 1
        what = f"{noun.capitalize()}{'s' if several else ''} {write_runs(numbers)}"
        yield _finding(
            "claim.gpus", f"{what} {'are' if several else 'is'} declared on GPUs {write_runs(ranks)}; the strategy "
            f"puts {'them' if several else 'it'} on " + (f"GPUs {write_runs(right)}" if right else "none"),
            f"GPUs {write_runs(right)}" if right else "none", f"GPUs {write_runs(ranks)}",
        )  # fmt: skip


def _parameters(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    declared, computed = claim.numbers["parameters"], expectation.num_parameters
    if abs(declared - computed) > _CLOSE * computed:
        yield _finding(
            "claim.parameters", f"{_short(declared)} parameters are declared; the deployment's sizes make "
            f"{_short(computed)} ({computed:,}), {_ratio(declared, computed)}",
            _count("parameters", computed), _count("parameters", declared),
        )  # fmt: skip


def _ratio(declared: float, computed: float) -> str:
    if declared == 0:
        return "not none"
    if computed > declared:
        return f"{computed / declared:.3g} times as many"
    return f"{declared / computed:.3g} times fewer"


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,.0f}"


def _sizes(claim: Claim, names: Sequence[str], expectation: Expectation) -> Iterator[Finding]:
    numbers = dict(expectation.numbers)
    stages = expectation.num_stages
    numbers["stages"] = stages
    numbers["layers_per_stage"] = len(expectation.stage_of_layer) / stages
    if expectation.num_experts:
        numbers["experts_per_rank"] = expectation.num_experts / expectation.sizes["ep"]
    for name in names:
        declared, real = claim.numbers[name], numbers.get(name)
        if name == "batch_per_replica" and real is not None:
            yield from _per_replica(declared, expectation)
        elif real is None:
            yield _finding("claim.sizes", f"{_capital(_count(name, declared))} {_are(name)} declared; the deployment "
                           "has none", "none", _count(name, declared))  # fmt: skip
        elif declared != real:
            yield _finding(
                "claim.sizes", f"{_capital(_count(name, declared))} {_are(name)} declared; the deployment has "
                f"{_count(name, real)}", _count(name, real), _count(name, declared),
            )  # fmt: skip


def _per_replica(declared: float, expectation: Expectation) -> Iterator[Finding]:
    """The batch is split over the replicas of the dense layers; an expert has fewer copies."""
    batch, dense, copies = expectation.numbers["batch"], expectation.sizes["dp"], expectation.sizes["edp"]
    if declared == batch / dense:
        return
    each = f"a dense layer has {write_count(dense, 'replica')} (DP{dense}), {_sequences(batch / dense)} each"
    found = _count("batch_per_replica", declared)
    is_of_experts = bool(expectation.num_experts) and declared * copies == batch
    of_experts = f", which is right of the {copies} copies of each expert (EDP{copies})" if is_of_experts else ""
    yield Finding(
        check="claim.sizes", title=f"{found} are declared{of_experts}; {each}",
        expected=f"{_sequences(batch / dense)} on each of {write_count(dense, 'replica')} of the dense layers",
        found=found + (f", of the {copies} copies of each expert" if is_of_experts else ""),
        fix="Say of which replicas: those of the dense layers, or the copies of an expert.",
        severity="warning" if is_of_experts else CHECKS["claim.sizes"].severity,
    )  # fmt: skip


def _sequences(number: float) -> str:
    return f"{number:,g} sequence" + ("" if number == 1 else "s")


def _count(name: str, number: float) -> str:
    return _QUANTITIES[name].format(f"{number:,.0f}" if number == int(number) else f"{number:,g}")


def _are(name: str) -> str:
    return "are" if _QUANTITIES[name].startswith("{}") else "is"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _groups(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    for axis, declared in claim.groups.items():
        real = len(expectation.groups.get(axis, ()))
        if declared != real:
            yield _finding(
                "claim.groups", f"{declared:,} {axis.upper()} groups are declared; {expectation.world_size:,} ranks "
                f"make {real:,} groups of {expectation.sizes.get(axis, 0)}", f"{real:,}", f"{declared:,}",
            )  # fmt: skip
    for axis, groups in claim.members.items():
        real_groups = {tuple(sorted(group)) for group in expectation.groups.get(axis, ())}
        wrong = [group for group in groups if tuple(sorted(group)) not in real_groups]
        if wrong:
            mine = next((group for group in sorted(real_groups) if wrong[0][0] in group), ())
            yield _finding(
                "claim.groups", f"{len(wrong)} of {len(groups)} declared {axis.upper()} groups are none: "
                f"[{write_runs(wrong[0])}]", f"[{write_runs(mine)}]", f"[{write_runs(wrong[0])}]",
            )  # fmt: skip


def _judge_model(claim: Claim, expectation: Expectation | None, audit: Audit) -> None:
    published = published_sizes(claim.model or "")
    if published is None:
        audit.skip("claim.architecture", f"no published sizes are known of {claim.model!r}")
        return
    name, sizes = published
    told = {key: (claim.numbers[key], "{are} declared") for key in sizes if key in claim.numbers}
    # Who is silent about key and value heads, and has a deployment, has those of the deployment.
    if "heads" in told and "kv_heads" not in told and expectation is not None:
        told["kv_heads"] = (expectation.numbers["kv_heads"], "{are} the deployment's, as none are declared")
    if not told:
        audit.skip("claim.architecture", f"none of the sizes of {name} is declared")
        return
    wrong = [
        _finding(
            "claim.architecture",
            f"{_capital(_count(key, number))} {says.format(are=_are(key))}; {name} has {_count(key, real)}",
            _count(key, real),
            _count(key, number),
        )
        for key, real in sizes.items()
        for number, says in ([told[key]] if key in told else [])
        if (abs(number - real) > _CLOSE * real if key == "parameters" else number != real)
    ]
    audit.judge("claim.architecture", wrong, f"{len(told)} of {len(sizes)} sizes of {name}")


def _memory(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    declared = claim.numbers["memory_per_gpu"]
    needed = max(_held_bytes(expectation, stage) for stage in range(expectation.num_stages))
    if declared < needed:
        yield _finding(
            "claim.memory", f"{write_bytes(declared)} a GPU are declared; {_state(expectation)} alone take "
            f"{write_bytes(needed)} on the fullest rank",
            f"at least {write_bytes(needed)}", write_bytes(declared),
        )  # fmt: skip


def _held_bytes(expectation: Expectation, stage: int) -> int:
    """Bytes of the parameters that one rank of a stage holds, and of what training keeps of each."""
    total = 0.0
    last = expectation.num_stages - 1
    for parameter in expectation.parameters:
        if parameter.layer >= 0:
            here = expectation.stage_of_layer[parameter.layer] == stage
        else:
            here = stage == (0 if parameter.name.startswith("embedding") else last)
        if here:
            split = expectation.sizes[parameter.axis] if parameter.dim is not None else 1
            spread = expectation.sizes["ep"] if parameter.expert >= 0 else 1
            total += parameter.size / split / spread
    return int(total * (expectation.bytes_per_parameter + expectation.training_bytes_per_parameter))


def _state(expectation: Expectation) -> str:
    return "weights, gradients and optimizer state" if expectation.kind == "train" else "weights"


def _judge_rates(claim: Claim, measured: Mapping[str, float], audit: Audit) -> None:
    declared = [name for name in MEASURED if name in claim.numbers]
    if not declared:
        return
    known = [name for name in declared if name in measured]
    if len(known) < len(declared):
        audit.skip("claim.throughput", "no run was named that measured it: --against names one")
    if known:
        told = ", ".join(f"{measured[name]:,.4g} {_UNITS[name]}" for name in known)
        audit.judge("claim.throughput", _rates(claim, {name: measured[name] for name in known}), told)


_UNITS = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_gpu": "tokens/s a GPU",
    "time_to_first_token_ms": "ms to the first token",
}


def _rates(claim: Claim, measured: Mapping[str, float]) -> Iterator[Finding]:
    for name, real in measured.items():
        declared = claim.numbers[name]
        if abs(declared - real) > _CLOSE * real:
            yield _finding(
                "claim.throughput", f"{declared:,.4g} {_UNITS[name]} are declared; {real:,.4g} were measured",
                f"{real:,.4g}", f"{declared:,.4g}",
            )  # fmt: skip
