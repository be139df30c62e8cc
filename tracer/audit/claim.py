"""What somebody declares of a deployment, in numbers: from a YAML file, or from the title of a drawing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from truedag.tracer.audit.drawing.numbers import read_numbers
from truedag.tracer.errors import TruedagError

_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10,
           "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_NUMBER = re.compile(r"^\s*([\d][\d,_]*(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)", re.I)
_TOKEN = re.compile(r"(?<![A-Za-z])(VPP|ETP|EDP|TP|PP|DP|EP|CP)[\s=:]?(\d+)", re.I)
NUMBERS = (
    "gpus", "parameters", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "experts", "expert_hidden",
    "top_k", "vocabulary", "batch", "sequence", "memory_per_gpu", "tokens_per_second", "layers_per_stage",
    "experts_per_rank", "stages", "max_sequence", "batch_per_replica", "tokens_per_second_per_gpu",
    "time_to_first_token_ms",
)  # fmt: skip
MEASURED = ("tokens_per_second", "tokens_per_second_per_gpu", "time_to_first_token_ms")
"""Those of `NUMBERS` that only a run can tell."""
_ALIASES = {
    "num_gpus": "gpus",
    "world_size": "gpus",
    "num_parameters": "parameters",
    "params": "parameters",
    "num_layers": "layers",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "num_kv_heads": "kv_heads",
    "num_query_groups": "kv_heads",
    "num_key_value_heads": "kv_heads",
    "ffn_hidden_size": "ffn",
    "intermediate_size": "ffn",
    "num_experts": "experts",
    "num_local_experts": "experts",
    "expert_hidden_size": "expert_hidden",
    "moe_intermediate_size": "expert_hidden",
    "vocab_size": "vocabulary",
    "batch_size": "batch",
    "global_batch_size": "batch",
    "sequence_length": "sequence",
    "seq_len": "sequence",
    "num_stages": "stages",
    "num_experts_per_tok": "top_k",
    "total_gpus": "gpus",
    "n_gpus": "gpus",
    "gpu_count": "gpus",
    "num_devices": "gpus",
    "experts_per_gpu": "experts_per_rank",
    "experts_per_device": "experts_per_rank",
    "local_experts": "experts_per_rank",
    "vocab": "vocabulary",
    "n_layers": "layers",
    "num_transformer_layers": "layers",
    "d_model": "hidden",
    "hidden_dim": "hidden",
    "hidden_dimension": "hidden",
    "n_heads": "heads",
    "attention_heads": "heads",
    "head_dimension": "head_dim",
    "ffn_hidden": "ffn",
    "ffn_dim": "ffn",
    "d_ff": "ffn",
    "seq_length": "sequence",
    "n_experts": "experts",
    "experts_per_layer": "experts",
    "total_experts": "experts",
    "total_parameters": "parameters",
    "model_size": "parameters",
    "pipeline_stages": "stages",
    "gpu_memory": "memory_per_gpu",
    "model_name": "model",
    "parallelism": "strategy",
    "parallel_strategy": "strategy",
    "throughput": "tokens_per_second",
    "top_k_experts": "top_k",
    "moe_top_k": "top_k",
}
_AXIS_NAMES = {"tensor": "TP", "pipeline": "PP", "data": "DP", "expert": "EP", "context": "CP"}
_AXIS_KEY = re.compile(
    r"^(?:(tensor|pipeline|data|expert|context)[\s_\-]*(?:model[\s_\-]*)?(?:parallel(?:ism)?)?|(vpp|etp|edp|tp|pp|dp|ep|cp))"
    r"(?:[\s_\-]*(?:size|degree))?$",
    re.I,
)
_GROUPS_KEY = re.compile(r"^(?:num_)?(etp|edp|tp|pp|dp|ep|cp)_groups$", re.I)  # fmt: skip
_LONGEST_UNREAD = 80
_MOST = 1e30
_MOST_UNREAD = 50
_RANGES = re.compile(
    r"\s*\d{1,12}\s*(?:-|\u2013|to|\.\.\.?)\s*\d{1,12}\s*(?:,\s*\d{1,12}\s*(?:-|\u2013|to|\.\.\.?)\s*\d{1,12}\s*)*"
)
# 24 layers per stage are not all layers.
_NOT_EACH = r"(?!\s*(?:/|(?:per|each|an?|on each|on every)\b)(?!\s*(?:layer|model|moe)))"
_PLACES = ("gpus_of_stage", "gpus_of_layers", "gpus_of_experts")
_WORDS = ("name", "model", "strategy", "notes")


class ClaimError(TruedagError):
    """A claim cannot be read; the message says which part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is declared."""

    name: str = "claim"
    model: str | None = None
    """The model that is named, as in "Llama 3 70B"."""

    strategy: str | None = None
    """As it is written."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """By the names in `NUMBERS`."""

    groups: Mapping[str, int] = field(default_factory=dict)
    """How many groups an axis is said to have."""

    members: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Groups of an axis as lists of ranks."""

    places: Mapping[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = field(default_factory=dict)
    """gpus_of_stage, gpus_of_layers, gpus_of_experts: what is where, as pairs of numbers and ranks."""

    not_understood: tuple[str, ...] = ()
    """What it states beside that, which no check knows."""

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by axis, as the strategy's text states them."""
        return {axis.lower(): int(size) for axis, size in _TOKEN.findall(self.strategy or "")}

    @property
    def product(self) -> int:
        """Of all sizes that are stated but VPP, which is no axis of ranks."""
        return math.prod(size for axis, size in self.axes.items() if axis != "vpp")

    @property
    def folded_product(self) -> int:
        """The same where expert axes are laid over the others."""
        return math.prod(size for axis, size in self.axes.items() if axis not in ("vpp", "ep", "etp", "edp"))


def read_claim(told: object, *, name: str) -> Claim:
    """Return a claim from a mapping, as a YAML file holds it.

    Raises:
        ClaimError: a key is unknown, or a value is no number or list where one is needed.
    """
    if not isinstance(told, Mapping):
        raise ClaimError(f"{name}: a claim is a mapping, such as strategy: EP8-TP4-PP2-DP4 and gpus: 256")
    known = {*NUMBERS, *_PLACES, *_WORDS, "groups"}
    told, unread = _joined(told, name)
    named: dict[str, object] = {}
    for written, value in told.items():
        key = _ALIASES.get(str(written).lower(), str(written))
        if key not in known:
            near = get_close_matches(key, [*known, *_ALIASES], n=1)
            if not near and any(_ALIASES.get(str(one), str(one)) in known for one in told):
                # Lists in lists by aliases of YAML may be endless when they are written out.
                shown = value if isinstance(value, str | int | float | None) else "..."
                unread.append(f"{written}: {shown}"[:_LONGEST_UNREAD])
                continue
            hint = f"did you mean {near[0]}?" if near else f"it may state {', '.join(sorted(known))}"
            raise ClaimError(f"{name}: {str(written)!r} is nothing that a claim states; {hint}")
        if key in named:
            raise ClaimError(f"{name}: {key} is stated twice, the second time as {written}")
        named[key] = value
    told = named
    for word in _WORDS:
        if told.get(word) is not None and not isinstance(told[word], str | int | float):
            raise ClaimError(f"{name}: {word} is no text")
    if told.get("strategy") is not None and not _TOKEN.search(str(told["strategy"])):
        raise ClaimError(f"{name}: strategy {str(told['strategy'])!r} names no axis, such as EP8-TP4-PP2-DP4")
    groups: dict[str, int] = {}
    members: dict[str, tuple[tuple[int, ...], ...]] = {}
    stated = told.get("groups") or {}
    if not isinstance(stated, Mapping):
        raise ClaimError(f"{name}: groups: must be a number or lists of GPUs for each axis, such as tp: 64")
    for axis, value in stated.items():
        if isinstance(value, list):
            members[str(axis).lower()] = tuple(_ranks(one, f"{name}: groups.{axis}") for one in value)
        else:
            groups[str(axis).lower()] = int(parse_number(value, f"{name}: groups.{axis}"))
    return Claim(
        name=str(told.get("name", name)),
        model=None if told.get("model") is None else str(told["model"]),
        strategy=None if told.get("strategy") is None else str(told["strategy"]),
        numbers={
            key: _count_gpus(told[key], f"{name}: {key}")
            if key == "gpus"
            else parse_number(told[key], f"{name}: {key}")
            for key in NUMBERS
            if told.get(key) is not None
        },
        groups=groups,
        members=members,
        places={key: _places(told[key], f"{name}: {key}") for key in _PLACES if told.get(key) is not None},
        not_understood=(*_odd_axes(str(told.get("strategy") or "")), *unread[:_MOST_UNREAD]),
    )


def _joined(told: Mapping[object, object], name: str) -> tuple[dict[object, object], list[str]]:
    """Return a mapping in which axes that are stated one by one are a strategy, and numbers of groups are groups.

    Where a strategy is written out too, it has the word; sizes of axes that contradict it are returned.
    """
    flat = dict(told)
    axes: dict[str, object] = {}
    sizes = flat.get("strategy", flat.get("parallelism"))
    for inner, rows in ((True, dict(sizes) if isinstance(sizes, Mapping) else {}), (False, dict(flat))):
        for key, value in rows.items():
            match = _AXIS_KEY.match(str(key))
            # Alone, data and context are no axes.
            if match is None or (not inner and match[1] and "parallel" not in str(key).lower()):
                if inner:
                    raise ClaimError(f"{name}: strategy: {str(key)!r} is no axis, such as tp or tensor_parallel_size")
                continue
            if not inner:
                del flat[key]
            axes[_AXIS_NAMES.get((match[1] or "").lower(), (match[2] or "").upper())] = value
    unread = []
    if axes:
        stated = flat.pop("parallelism", None) or flat.get("strategy")
        written = [stated] if isinstance(stated, str) else []
        said = {axis.upper(): int(size) for axis, size in _TOKEN.findall("-".join(written))}
        for axis, size in axes.items():
            number = parse_number(size, f"{name}: {axis}")
            if axis not in said:
                written.append(f"{axis}{number:.0f}")
            elif number != said[axis]:
                unread.append(f"{axis}{number:g}: the strategy says {axis}{said[axis]}")
        flat["strategy"] = "-".join(written)
    groups = {match[1].lower(): key for key in list(flat) if (match := _GROUPS_KEY.match(str(key))) is not None}
    if groups:
        told_groups = flat.get("groups")
        both = dict(told_groups) if isinstance(told_groups, Mapping) else {}
        flat["groups"] = both | {axis: flat.pop(key) for axis, key in groups.items()}
    return flat, unread


def claim_of_text(text: str, *, name: str) -> Claim | None:
    """Return what a title declares: a strategy such as EP8-TP4-PP2-DP4, GPUs, parameters; None: nothing."""
    strategy = "-".join(f"{axis.upper()}{size}" for axis, size in _TOKEN.findall(text))
    numbers: dict[str, float] = {}
    if (gpus := re.search(rf"(\d[\d,]*)\s*(?:gpus|devices|ranks)\b{_NOT_EACH}", text, re.I)) is not None:
        numbers["gpus"] = float(gpus.group(1).replace(",", ""))
    if (size := re.search(r"(?<![\d.])(?<!\d[x\u00d7])(\d+(?:\.\d+)?)\s*([BT])\b(?!\w)", text)) is not None:
        numbers["parameters"] = float(size.group(1)) * _SCALES[size.group(2).lower()]
    if (layers := re.search(rf"(\d+)\s*layers\b{_NOT_EACH}", text, re.I)) is not None:
        numbers["layers"] = float(layers.group(1))
    if (experts := re.search(rf"(\d+)\s*experts\b{_NOT_EACH}", text, re.I)) is not None:
        numbers["experts"] = float(experts.group(1))
    if not numbers and not strategy:
        return None
    return Claim(name=name, strategy=strategy or None, numbers=numbers)


def _odd_axes(strategy: str) -> tuple[str, ...]:
    """Return the words of a strategy that are no axis: XP4, FSDP."""
    words = re.findall(r"[A-Za-z]{2,}\d*", _TOKEN.sub(" ", strategy))
    return tuple(f"strategy: {word}" for word in dict.fromkeys(words) if word.lower() not in ("orthogonal", "folded"))


def _count_gpus(value: object, what: str) -> float:
    """Return how many GPUs are declared: a number, or as many as a range or a list names."""
    if isinstance(value, list) and value and all(type(one) is int and one >= 0 for one in value):
        return float(len(set(value)))
    ranges = _RANGES.fullmatch(value) if isinstance(value, str) else None
    if ranges is None:
        kinds = (
            re.fullmatch(r"\s*(\d[\d,_]*)\s*(?:x\s*)?(?!e\d)[A-Za-z][\w\- ]*", value)
            if isinstance(value, str)
            else None
        )
        return parse_number(value if kinds is None else kinds[1], what)
    return float(sum(abs(int(high) - int(low)) + 1 for low, high in re.findall(r"(\d+)\D+(\d+)", str(value))))


def parse_number(value: object, what: str) -> float:
    """Return a number with its unit: 30B, 1,024, 80 GB.

    Raises:
        ClaimError: it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= _MOST:
            shown = f"more than {_MOST:g}" if value > _MOST else repr(value)
            raise ClaimError(f"{what}: {shown} is no count or size")
        return float(value)
    if not isinstance(value, str):
        raise ClaimError(f"{what}: a number is needed, such as 256 or 30B")
    match = _NUMBER.match(value)
    if match is not None and re.match(r"\s*(?:-|\u2013|to\b|\.\.)\s*\d", value[match.end() :]):
        raise ClaimError(f"{what}: {value[:80]!r} is a range, where a number is needed")
    if match is None or (match.group(2) and match.group(2).lower() not in _SCALES):
        raise ClaimError(f"{what}: {value!r} is no number")
    scale = _SCALES.get(match.group(2).lower(), 1.0) if match.group(2) else 1.0
    number = float(match.group(1).replace(",", "").replace("_", "")) * scale
    if number > _MOST:
        raise ClaimError(f"{what}: {value[:80]!r} is no count or size")
    return number


def _ranks(value: object, what: str) -> tuple[int, ...]:
    if isinstance(value, list):
        numbers = tuple(int(parse_number(one, what)) for one in value)
    else:
        numbers = read_numbers(str(value)) if isinstance(value, str | int) else ()
    if not numbers:
        raise ClaimError(f"{what}: it is no list of GPUs, such as 0-127 or [0, 2]")
    return numbers


def _places(value: object, what: str) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    if not isinstance(value, Mapping):
        raise ClaimError(f"{what}: must say for each what GPUs it is on, such as 0-7: 0-1")
    return tuple((_ranks(key, what), _ranks(ranks, what)) for key, ranks in value.items())
