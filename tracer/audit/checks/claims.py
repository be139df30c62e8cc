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
        audit.judge("claim.gpus", [*_gpus(claim, expectation), *_places(claim, expectation)], "GPUs and where they are")
    if stated["claim.parameters"]:
        audit.judge("claim.parameters", _parameters(claim, expectation), f"{expectation.num_parameters:,} parameters")
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
            f"; {folded:,} if expert axes are laid over the others, which must then be said"
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


def _places(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    for stages, ranks in claim.places.get("gpus_of_stage", ()):
        right = tuple(rank for stage in stages for rank in _stage(expectation, stage))
        yield from _place(f"stage {write_runs(stages)}", ranks, right)
    for layers, ranks in claim.places.get("gpus_of_layers", ()):
        known = [layer for layer in layers if layer < len(expectation.stage_of_layer)]
        right = tuple({rank for layer in known for rank in expectation.ranks_of_layer(layer)})
        yield from _place(f"layers {write_runs(layers)}", ranks, right)
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
        yield from _place(f"experts {write_runs(experts)}", ranks, right)


def _stage(expectation: Expectation, stage: int) -> tuple[int, ...]:
    return expectation.ranks_of_stage(stage) if stage < expectation.num_stages else ()


def _place(what: str, ranks: tuple[int, ...], right: tuple[int, ...]) -> Iterator[Finding]:
    if set(ranks) != set(right):
        yield _finding(
            "claim.gpus", f"{what.capitalize()} are declared on GPUs {write_runs(ranks)}; the strategy puts them on "
            f"{write_runs(right) or 'none'}", f"GPUs {write_runs(right)}", f"GPUs {write_runs(ranks)}",
        )  # fmt: skip


def _parameters(claim: Claim, expectation: Expectation) -> Iterator[Finding]:
    declared, computed = claim.numbers["parameters"], expectation.num_parameters
    if abs(declared - computed) > _CLOSE * computed:
        yield _finding(
            "claim.parameters", f"{_short(declared)} parameters are declared; the declared sizes make "
            f"{_short(computed)} ({computed:,}), {_ratio(declared, computed)}", f"{computed:,}", f"{declared:,.0f}",
        )  # fmt: skip


def _ratio(declared: float, computed: float) -> str:
    if declared == 0:
        return "not none"
    return f"{computed / declared:.3g} times as many" if computed > declared else f"1/{declared / computed:.3g} of them"


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
        word = name.replace("_", " ")
        if real is None:
            yield _finding("claim.sizes", f"{word.capitalize()} {declared:,.0f} is declared; the deployment has none",
                           "none", f"{declared:,.0f}")  # fmt: skip
        elif declared != real:
            yield _finding(
                "claim.sizes", f"{word.capitalize()} {declared:,.0f} is declared; the deployment has {real:,g}",
                f"{real:,g}", f"{declared:,.0f}",
            )  # fmt: skip


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
    told = {key: (claim.numbers[key], "is declared") for key in sizes if key in claim.numbers}
    # Who is silent about key and value heads, and has a deployment, has those of the deployment.
    if "heads" in told and "kv_heads" not in told and expectation is not None:
        told["kv_heads"] = (expectation.numbers["kv_heads"], "is the deployment's")
    if not told:
        audit.skip("claim.architecture", f"none of the sizes of {name} is declared")
        return
    wrong = [
        _finding(
            "claim.architecture",
            f"{key.replace('_', ' ').capitalize()} {number:,.0f} {says}; {name} has {real:,.0f}",
            f"{real:,.0f}",
            f"{number:,.0f}",
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
