"""Safetensors that are not a model's are refused before anything is read, with the file and the tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from truedag.model.checkpoint import Checkpoint, Piece, logical_names
from truedag.model.config import ModelConfig
from truedag.model.errors import ModelError

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=16,
    ffn_hidden_size=12,
    activation="swiglu",
)
LAYER = {
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
    **{f"model.layers.0.{name}": shape for name, shape in LAYER.items()},
}


def tensors() -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def write(folder: Path, held: dict[str, np.ndarray]) -> Path:
    save_file(held, folder / "model.safetensors")
    return folder


def refusal(folder: Path, model: ModelConfig = MODEL) -> str:
    with pytest.raises(ModelError) as error:
        Checkpoint(folder, model)
    return str(error.value)


def test_a_models_own_tensors_are_taken(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, tensors()), MODEL)
    recipes = [checkpoint.recipe(name) for name in logical_names(MODEL)]
    assert sorted(piece.tensor for recipe in recipes for piece in recipe.pieces) == sorted(SHAPES)
    assert checkpoint.recipe("decoder.layers.0.self_attention.linear_qkv.weight").groups == 2
    assert checkpoint.file("lm_head.weight") == tmp_path / "model.safetensors"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    held = tensors()
    del held["model.layers.0.mlp.up_proj.weight"]
    assert refusal(write(tmp_path, held)) == (
        f"{tmp_path}: the model needs model.layers.0.mlp.up_proj.weight, which no file there holds"
    )


def test_a_superfluous_tensor_is_named(tmp_path: Path) -> None:
    held = {**tensors(), "model.layers.1.input_layernorm.weight": np.ones(8, np.float32)}
    message = refusal(write(tmp_path, held))
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: the model has no use for model.layers.1.input_layer")


def test_what_older_exports_store_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    computed = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = Checkpoint(write(tmp_path, {**tensors(), computed: np.ones(1, np.float64)}), MODEL)
    assert checkpoint.file("model.norm.weight") == tmp_path / "model.safetensors"
    other = "model.layers.0.self_attn.rotary_emb.scale"
    held = {**tensors(), computed: np.ones(1, np.float32), other: np.ones(1, np.float32)}
    message = refusal(write(tmp_path, held))
    assert f"no use for {other};" in message


def test_a_tied_embedding_may_be_stored_twice(tmp_path: Path) -> None:
    tied = replace(MODEL, tied_embeddings=True)
    checkpoint = Checkpoint(write(tmp_path, tensors()), tied)
    recipes = [checkpoint.recipe(name) for name in logical_names(tied)]
    assert "lm_head.weight" not in {piece.tensor for recipe in recipes for piece in recipe.pieces}
    held = {**tensors(), "lm_head.weight": np.ones((15, 8), np.float32)}
    assert "lm_head.weight has shape (15, 8); the model's is (16, 8)" in refusal(write(tmp_path, held), tied)


def test_a_wrong_shape_or_type_is_named(tmp_path: Path) -> None:
    held = {**tensors(), "model.norm.weight": np.ones(9, np.float32)}
    assert refusal(write(tmp_path, held)) == (
        f"{tmp_path / 'model.safetensors'}: model.norm.weight has shape (9,); the model's is (8,)"
    )
    held = {**tensors(), "model.norm.weight": np.ones(8, np.int8)}
    assert "model.norm.weight is of type I8; weights must be of one of F32" in refusal(write(tmp_path, held))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: there is neither model.safetensors nor")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be read as safetensors" in refusal(tmp_path)


def test_an_index_that_its_files_do_not_bear_out_is_refused(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "a.safetensors")}))
    assert Checkpoint(tmp_path, MODEL).file("lm_head.weight") == tmp_path / "a.safetensors"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*SHAPES, "other"], "a.safetensors")}))
    assert "disagree about other" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "b.safetensors")}))
    assert f"{tmp_path / 'b.safetensors'} cannot be read" in refusal(tmp_path)
    index.write_text("{}")
    assert "index.json cannot be read" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    assert refusal(tmp_path).startswith(f"{index}: weight_map=['a']: it must be an object")
    index.write_text(json.dumps({"weight_map": {"a": 5}}))
    assert refusal(tmp_path).startswith(f"{index}: weight_map gives a the file 5;")


def test_an_expert_is_its_own_tensors_or_a_part_of_a_stacked_one(tmp_path: Path) -> None:
    model = replace(MODEL, num_experts=3, expert_hidden_size=6, ffn_hidden_size=None)
    router = "model.layers.0.mlp.gate.weight"
    dense = {name: value for name, value in tensors().items() if ".mlp." not in name}
    held = {**dense, router: np.ones((3, 8), np.float32)}
    stacked = {
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((3, 12, 8), np.float32),
        "model.layers.0.mlp.experts.down_proj": np.ones((3, 8, 6), np.float32),
    }
    name = "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"
    pieces = Checkpoint(write(tmp_path, {**held, **stacked}), model).recipe(name).pieces
    whole = {"tensor": "model.layers.0.mlp.experts.gate_up_proj", "shape": (3, 12, 8)}
    assert pieces == (Piece(**whole, expert=2, half=0), Piece(**whole, expert=2, half=1))
    single = {
        f"model.layers.0.mlp.experts.{expert}.{projection}.weight": np.ones(shape, np.float32)
        for expert in range(3)
        for projection, shape in {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}.items()
    }
    pieces = Checkpoint(write(tmp_path, {**held, **single}), model).recipe(name).pieces
    assert [piece.tensor for piece in pieces] == [
        "model.layers.0.mlp.experts.2.gate_proj.weight",
        "model.layers.0.mlp.experts.2.up_proj.weight",
    ]
