"""What is written on the boxes of the world: parts of the batch, rank classes, communications, what is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.views import captions
from truedag.tracer.views.gpus import list_gpus, write_gpus
from truedag.tracer.views.heads import Heads
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.speed import Speed
from truedag.tracer.views.world import BatchPart, RankClass, Traffic, World


def describe_tokens(scope: Scope, num_sequences: int, num_tokens: int) -> str:
    """Say how large a batch or a part of it is."""
    cut = f" on each of {scope.size('cp')} places on cp" if scope.size("cp") > 1 else ""
    return f"{captions.count(num_sequences, 'sequence')}, {num_tokens:,} tokens{cut}"


def describe_part(scope: Scope, part: BatchPart) -> list[str]:
    """Say what a part of the batch is, and on which GPUs."""
    split = f"over {part.num_places:,} places on dp" if part.num_places > 1 else ""
    return [
        f"part {part.place} ({part.axis} {part.place})",
        describe_tokens(scope, part.num_sequences, part.num_tokens),
        split,
        write_gpus(part.ranks),
    ]


def describe_class(scope: Scope, world: World, one: RankClass) -> list[str]:
    """Say which GPUs a class has, what each ran, and what each held."""
    noun = "GPU" if len(one.ranks) == 1 else "GPUs"
    spans = []
    for axis in scope.axes:
        places = {scope.coordinate(rank, axis) for rank in one.ranks}
        spans.append(f"{axis} {write_runs(places)}")
    return [
        f"class of GPU {one.first}: {len(one.ranks):,} {noun}",
        write_gpus(one.ranks),
        ", ".join(spans),
        _describe_heads(scope, world.heads, one.ranks),
        f"each {scope.about}{' to '.join(f'{num:,}' for num in dict.fromkeys(one.num_operators))} operators, "
        f"{one.num_communications:,} communications",
        f"each {one.num_parameters / 1e6:,.2f} M parameters",
        *_describe_memory(world, one),
        "not timed" if one.busy_ns is None else f"{write_time(one.busy_ns)} in operators, mean of a GPU",
    ]


def _describe_heads(scope: Scope, heads: Heads | None, ranks: Sequence[int]) -> str:
    if heads is None:
        return ""
    places = {scope.coordinate(rank, "tp") for rank in ranks}
    each = f", {heads.num} each" if len(places) > 1 else ""
    return f"attention heads {write_runs(heads.of(places))} of {heads.num_total}{each}"


def _describe_memory(world: World, one: RankClass) -> list[str]:
    """Say what a GPU had in memory at most and of what, and its share of what all GPUs had."""
    if one.memory is None:
        return []
    known = [(len(other.ranks), other.memory.peak_bytes) for other in world.classes if other.memory is not None]
    share = ""
    if len(known) == len(world.classes):
        share = f", {100 * one.memory.peak_bytes / sum(num * size for num, size in known):.3g} % of all GPUs' memory"
    held = one.memory
    parts = (
        ("parameters", held.parameter_bytes),
        ("gradients", held.gradient_bytes),
        ("state", held.state_bytes),
        ("activations", held.activation_bytes),
    )
    return [
        f"each {write_bytes(held.peak_bytes)} at most{share}",
        ", ".join(f"{name} {write_bytes(size)}" for name, size in parts if size),
    ]


def describe_traffic(one: Traffic) -> list[str]:
    """Say over what ranks talk, in which groups, how often and how much."""
    if one.kind != "collective":
        labels = ", ".join(one.calls)
        title = f"{labels}: {one.phase}" if one.phase else labels
        calls = [captions.count(sum(one.calls.values()), "message")]
    else:
        title = f"over {one.axis}" if one.axis else "over a group of no told axis"
        calls = [_describe_groups(one)]
        calls += [", ".join(f"{label.rpartition(' ')[0] or label} x {num:,}" for label, num in one.calls.items())]
    return [
        title,
        *calls,
        captions.write_in_out(*one.shapes),
        write_bytes(one.num_bytes),
        "not timed" if one.transfer_ns is None else f"{write_time(one.transfer_ns)}, wait {write_time(one.wait_ns)}",
    ]


def _describe_groups(one: Traffic) -> str:
    first = "{" + list_gpus(tuple(one.first)) + "}"
    if sum(one.groups.values()) == 1:
        return f"one group {first}"
    counted = [f"{captions.count(num, 'group')} of {size:,}" for size, num in one.groups.items()]
    return f"{' and '.join(counted)}, the first {first}"


def describe_experts(held: Mapping[int, tuple[int, ...]]) -> str:
    """Name the experts that a GPU holds, by layer."""
    kinds = set(held.values())
    if len(kinds) > 1:
        return "experts differ by layer"
    (one,) = kinds
    return f"expert{'' if len(one) == 1 else 's'} {write_runs(one)}"


def describe_merged(world: World) -> list[str]:
    """Say what comes out in the end, and of an answer how fast it was."""
    sequences = captions.count(world.num_sequences, "sequence")
    if world.num_decode_steps:
        told = ["tokens", f"{sequences}, {captions.count(world.num_decode_steps, 'decode step')} after prefill"]
        return [*told, *_describe_speed(world.speed)]
    if not world.has_backward:
        return ["one step", f"{sequences}, no backward pass was told"]
    merged = ", merged" if any(one.is_merge for one in world.traffic) else ""
    return ["one step", f"gradients of {sequences}{merged}"]


def _describe_speed(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["not timed"]
    text = [f"{write_time(speed.first_token_ns)} to the first token"]
    if speed.output_token_ns is not None:
        text.append(f"{write_time(speed.output_token_ns)} per output token")
    if speed.tokens_per_s_per_rank is not None:
        text.append(f"{speed.tokens_per_s_per_rank:,.1f} tokens/s per GPU, prompts and answers")
    return text


def describe_merge(one: Traffic) -> list[str]:
    """Say what merges the parts of a batch, and in which stage."""
    title, *rest = describe_traffic(one)
    return [title + (f", stage {one.stage}" if one.stage >= 0 else ", across stages"), *rest]
