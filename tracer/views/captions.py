"""What is written on the drawing's nodes: names, shapes, ranks, counts, in as few signs as say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.graph.tensor_types import read_tensors

_DTYPES = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint8": "u8", "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2",
}  # fmt: skip
_MAX_SHAPES = 3


def write_groups(groups: Sequence[Sequence[int]]) -> str:
    """Name process groups by their ranks, or count them where there are many."""
    if len(groups) <= 4 and sum(len(group) for group in groups) <= 16:
        return " ".join("{" + write_runs(group) + "}" for group in groups)
    sizes = {len(group) for group in groups}
    return f"{len(groups):,} groups of {write_runs(sizes)}"


def count(number: int, noun: str) -> str:
    """Write a count with its noun: 1 call, 16 calls."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count_in_calls(total: int, num_calls: int, fewest: int, most: int, noun: str) -> str:
    """Write how many ran in how many calls: 33 ops x 8 where each call ran as many, else 265 ops in 8."""
    return f"{count(fewest, noun)} x {num_calls:,}" if fewest == most else f"{count(total, noun)} in {num_calls:,}"


def name_layers(layers: Collection[int]) -> str:
    """Name layers by their numbers: layer 3, layers 0-7."""
    return f"layer{'' if len(layers) == 1 else 's'} {write_runs(layers)}"


def write_boundaries(pairs: Iterable[tuple[int, int]]) -> str:
    """Name the layers between which a message goes: layer 19→20."""
    written = ", ".join(f"{one}→{other}" for one, other in sorted(pairs))
    return f"layer{'s' if ',' in written else ''} {written}" if written else ""


def write_shapes(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Write tensor types, the largest first; many of one kind as a range in each dimension that varies."""
    kinds: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for dtype, shape in shapes:
        kinds.setdefault((dtype, len(shape)), set()).add(shape)
    written = []
    for (dtype, _), found in kinds.items():
        if len(found) <= _MAX_SHAPES:
            parts = [",".join(map(str, shape)) for shape in sorted(found, key=_size, reverse=True)]
        else:
            spans = [(min(column), max(column)) for column in zip(*found, strict=True)]
            parts = [",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)]
        largest = max(map(_size, found))
        written += [(largest, f"{_DTYPES.get(dtype, dtype)}[{part}]") for part in parts]
    return [text for _, text in sorted(written, key=lambda pair: (-pair[0], pair[1]))]


def write_in_out(into: Sequence[str], out: Sequence[str]) -> str:
    """Write what goes in and comes out, each as `write_shapes` has it; nothing if neither is known."""
    if len(into) == len(out) == 1 and into[0].partition("[")[0] == out[0].partition("[")[0]:
        out = ["[" + out[0].partition("[")[2]]  # the same type is written once
    return f"{' '.join(into)} → {' '.join(out)}".strip() if into or out else ""


def relative_module(module: str, layer: int) -> str:
    """Return a module's path inside its layer, or without the word model at its head."""
    names = module.split(".")
    if layer >= 0 and str(layer) in names:
        return ".".join(names[names.index(str(layer)) + 1 :])
    return ".".join(names[1:] if names[0] == "model" and len(names) > 1 else names)


def name_computation(parts: Sequence[tuple[str | None, str]]) -> str:
    """Name a stretch of operators by the modules they ran in, in order; a layer's own operators by what they are.

    Args:
        parts: (module inside its layer, operator) in order; a module may be None or '', the layer's own.
    """
    names: dict[str, list[str]] = {}
    own: Counter[str] = Counter()
    for path, op in parts:
        if path:
            names.setdefault(path.split(".")[0], []).append(path)
        else:
            op = op.rpartition("::")[2]
            own[op] += 1
            names.setdefault(f"\0{op}", [])
    if not any(name for name in names if name[0] != "\0"):
        return ", ".join(op for op, _ in own.most_common(3)) + (f" and {len(own) - 3} more" if len(own) > 3 else "")
    titles = []
    for name, paths in names.items():
        if name[0] == "\0":
            titles.append(name[1:])
        else:
            alike = set(paths)
            titles.append(alike.pop().rpartition(".")[2] if len(alike) == 1 else name)
    return " + ".join(titles)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def count_elements(text: str) -> int:
    """Count the elements of the tensors that a list in the dataset names."""
    return sum(_size(shape) for _, shape in read_tensors(text))
