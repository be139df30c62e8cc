"""A folder of Hugging Face safetensors as a model's checkpoint: which tensors hold which parameter. No torch.

Theory of operation: a logical parameter is made of pieces, each a tensor of the checkpoint or a part of one. A gated
projection is its gate and its values; the query, key and value projections are interleaved, group by group; experts are
tensors of their own, or one stacked tensor. Two names of the same thing are told apart by what the folder holds. What
the whole model needs is compared with what is there, by name, shape and type, before anything is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from truedag.model.config import ModelConfig
from truedag.model.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")
# Others (8 bits and fewer) are quantised: their numbers mean nothing without scales.
_DTYPES = ("F32", "F16", "BF16")
# What older exports store beside the weights, and everybody computes.
_COMPUTED = ".rotary_emb.inv_freq"
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor of the checkpoint, or the part of one that belongs to one expert or one block."""

    tensor: str
    """The tensor's name."""

    shape: tuple[int, ...]
    """Its whole shape."""

    expert: int | None = None
    """Which part of the first dimension of a tensor that stacks experts; None: it stacks none."""

    half: int | None = None
    """Which half of the rows, where one tensor holds gate (0) and values (1); None: all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a logical parameter is made of pieces: their rows, in `groups` equal parts each, taken part by part."""

    pieces: tuple[Piece, ...]
    """In the order of the parameter's blocks."""

    groups: int = 1
    """1: one piece after the other; else the first group of each, the second of each, ..."""


class Checkpoint:
    """The tensors of a folder, checked against a model. Local; reads names, shapes and types only.

    Raises:
        ModelError: the folder holds no safetensors, or a tensor is missing, superfluous, or of a wrong shape or type;
            the message names file and tensor.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        held = _files_of_tensors(folder)
        self._files = {tensor: file for tensor, file in held.items() if not tensor.endswith(_COMPUTED)}
        self._check()

    def file(self, tensor: str) -> Path:
        """Return the file that holds a tensor."""
        return self.folder / self._files[tensor]

    def recipe(self, name: str) -> Recipe:
        """Return how a parameter or buffer, by its logical name, is made of the checkpoint's tensors."""
        match = _LAYER.match(name)
        if match is None:
            tensor = _OUTSIDE_LAYERS[name]
            rows = () if name == "decoder.final_layernorm.weight" else (self.config.vocab_size,)
            return Recipe(pieces=(Piece(tensor=tensor, shape=(*rows, self.config.hidden_size)),))
        return self._recipe_of_layer(f"model.layers.{match.group(1)}", match.group(2))

    def _recipe_of_layer(self, layer: str, rest: str) -> Recipe:
        config = self.config
        hidden, head = config.hidden_size, config.kv_channels
        if match := _EXPERT.match(rest):
            return self._recipe_of_expert(layer, int(match.group(1)), match.group(2))
        if rest.startswith("self_attention.linear_qkv."):
            columns = (hidden,) if rest.endswith(".weight") else ()
            rows = {"q": config.num_attention_heads * head, "k": config.kv_heads * head, "v": config.kv_heads * head}
            kind = rest.rpartition(".")[2]
            return Recipe(
                pieces=tuple(
                    Piece(tensor=f"{layer}.self_attn.{letter}_proj.{kind}", shape=(size, *columns))
                    for letter, size in rows.items()
                ),
                groups=config.kv_heads,
            )
        if rest.startswith("mlp.shared_experts.linear_fc"):
            assert config.shared_expert_hidden_size is not None
            return self._feed_forward(f"{layer}.mlp.{self._shared}", rest, config.shared_expert_hidden_size)
        if rest.startswith("mlp.linear_fc"):
            return self._feed_forward(f"{layer}.mlp", rest, config.dense_hidden_size)
        experts = config.num_experts or 0
        tensor, shape = {
            "input_layernorm.weight": ("input_layernorm.weight", (hidden,)),
            "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", (hidden,)),
            "self_attention.linear_proj.weight": (
                "self_attn.o_proj.weight",
                (hidden, config.num_attention_heads * head),
            ),
            "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", (head,)),
            "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", (head,)),
            "mlp.router.weight": (f"{self._experts}.gate.weight", (experts, hidden)),
            "mlp.router.expert_bias": (f"{self._experts}.gate.e_score_correction_bias", (experts,)),
            "mlp.shared_experts.gate_weight": ("mlp.shared_expert_gate.weight", (1, hidden)),
        }[rest]
        return Recipe(pieces=(Piece(tensor=f"{layer}.{tensor}", shape=shape),))

    def _recipe_of_expert(self, layer: str, expert: int, linear: str) -> Recipe:
        config = self.config
        assert config.num_experts is not None
        assert config.expert_hidden_size is not None
        prefix, inner = f"{layer}.{self._experts}.experts", config.expert_hidden_size
        if not self._stacked:
            return self._feed_forward(f"{prefix}.{expert}", f".{linear}.", inner)
        if linear == "linear_fc2":
            shape = (config.num_experts, config.hidden_size, inner)
            return Recipe(pieces=(Piece(tensor=f"{prefix}.down_proj", shape=shape, expert=expert),))
        shape = (config.num_experts, 2 * inner, config.hidden_size)
        return Recipe(
            pieces=tuple(
                Piece(tensor=f"{prefix}.gate_up_proj", shape=shape, expert=expert, half=half) for half in (0, 1)
            )
        )

    def _feed_forward(self, prefix: str, rest: str, inner: int) -> Recipe:
        gate, values, down = (
            ("w1", "w3", "w2") if ".block_sparse_moe." in prefix else ("gate_proj", "up_proj", "down_proj")
        )
        hidden = self.config.hidden_size
        if ".linear_fc2." in rest:
            return Recipe(pieces=(Piece(tensor=f"{prefix}.{down}.weight", shape=(hidden, inner)),))
        names = (gate, values) if self.config.gated else (values,)
        return Recipe(pieces=tuple(Piece(tensor=f"{prefix}.{name}.weight", shape=(inner, hidden)) for name in names))

    @cached_property
    def _experts(self) -> str:
        """What a layer's experts and router are part of."""
        return "block_sparse_moe" if any(".block_sparse_moe." in name for name in self._files) else "mlp"

    @cached_property
    def _shared(self) -> str:
        return "shared_expert" if any(".mlp.shared_expert." in name for name in self._files) else "shared_experts"

    @cached_property
    def _stacked(self) -> bool:
        return any(name.endswith(".experts.gate_up_proj") for name in self._files)

    def _check(self) -> None:
        wanted = {piece.tensor: piece for name in logical_names(self.config) for piece in self.recipe(name).pieces}
        if missing := wanted.keys() - self._files.keys():
            raise ModelError(f"{self.folder}: the model needs {_list_names(missing)}, which no file there holds")
        if self.config.tied_embeddings:
            # Some exports store the embedding under both of its names.
            embedding = wanted[_OUTSIDE_LAYERS["embedding.word_embeddings.weight"]]
            wanted[_OUTSIDE_LAYERS["output_layer.weight"]] = embedding
        if superfluous := self._files.keys() - wanted.keys():
            where = sorted({self._files[name] for name in superfluous})[0]
            raise ModelError(
                f"{self.folder / where}: the model has no use for {_list_names(superfluous)}; "
                "does its description belong to these weights?"
            )
        for file in sorted(set(self._files.values())):
            with _open(self.folder / file) as opened:
                for tensor in sorted(wanted.keys() & opened.keys()):
                    part = opened.get_slice(tensor)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    if shape != wanted[tensor].shape:
                        raise ModelError(
                            f"{self.folder / file}: {tensor} has shape {shape}; the model's is {wanted[tensor].shape}"
                        )
                    if dtype not in _DTYPES:
                        raise ModelError(
                            f"{self.folder / file}: {tensor} is of type {dtype}; weights must be of one of "
                            f"{', '.join(_DTYPES)}"
                        )


def logical_names(config: ModelConfig) -> Iterator[str]:
    """Yield the logical names of all parameters and buffers of the whole model."""
    yield "embedding.word_embeddings.weight"
    for layer in range(config.num_layers):
        yield from (f"decoder.layers.{layer}.{rest}" for rest in _names_in_layer(config, layer))
    yield "decoder.final_layernorm.weight"
    if not config.tied_embeddings:
        yield "output_layer.weight"


def _names_in_layer(config: ModelConfig, layer: int) -> Iterator[str]:
    yield from ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    yield from ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")
    if config.qkv_bias:
        yield "self_attention.linear_qkv.bias"
    if config.qk_norm:
        yield from ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
    if not config.has_experts(layer):
        yield from ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
        return
    yield "mlp.router.weight"
    if config.score_correction_bias:
        yield "mlp.router.expert_bias"
    if config.shared_expert_hidden_size is not None:
        yield from ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight")
    if config.shared_expert_gate:
        yield "mlp.shared_experts.gate_weight"
    assert config.num_experts is not None
    for expert in range(config.num_experts):
        for linear in ("linear_fc1", "linear_fc2"):
            yield f"mlp.experts.local_experts.{expert}.{linear}.weight"


_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a folder, by the tensor's name."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ModelError(f"{folder}: there is neither {_SINGLE} nor {_INDEX}")
        with _open(folder / _SINGLE) as opened:
            return dict.fromkeys(opened.keys(), _SINGLE)
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}") from error
    if not isinstance(files, dict):
        raise ModelError(f"{index}: weight_map={files!r}: it must be an object that gives each tensor its file")
    for tensor, file in files.items():
        if not isinstance(file, str):
            raise ModelError(f"{index}: weight_map gives {tensor} the file {file!r}; it must be the name of a file")
    for file in sorted(set(files.values())):
        with _open(folder / file) as opened:
            said = {tensor for tensor, where in files.items() if where == file}
            if said != set(opened.keys()):
                differing = said ^ set(opened.keys())
                raise ModelError(f"{folder / file}: it and {index.name} disagree about {_list_names(differing)}")
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


def _list_names(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more}"
