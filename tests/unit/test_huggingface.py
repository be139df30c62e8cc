"""A Hugging Face configuration is read whole, or refused by the name of what is not computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from truedag.model.config import ModelConfig, RopeScaling
from truedag.model.errors import ModelError
from truedag.model.huggingface import read_huggingface

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
QWEN: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def write(folder: Path, values: object) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_dense_model_is_read(tmp_path: Path) -> None:
    model = ModelConfig(**read_huggingface(write(tmp_path, LLAMA)))
    assert model == ModelConfig(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        vocab_size=128256,
        max_sequence_length=131072,
        activation="swiglu",
        dtype="bfloat16",
        norm_epsilon=1e-5,
        rope_base=500_000.0,
        rope_scaling=RopeScaling(factor=8.0),
    )
    assert read_huggingface(tmp_path / "config.json") == read_huggingface(tmp_path)


def test_routing_like_deepseeks_is_read(tmp_path: Path) -> None:
    model = ModelConfig(**read_huggingface(write(tmp_path, GLM)))
    assert (model.num_experts, model.top_k, model.num_dense_layers, model.ffn_hidden_size) == (128, 8, 1, 10944)
    assert (model.router_score, model.score_correction_bias, model.num_expert_groups) == ("sigmoid", True, None)
    assert (model.shared_expert_hidden_size, model.rotary_percent, model.qkv_bias) == (2816, 0.5, True)


def test_a_shared_expert_with_a_gate_is_read(tmp_path: Path) -> None:
    model = ModelConfig(**read_huggingface(write(tmp_path, {**QWEN, "mlp_only_layers": [0, 1]})))
    assert (model.shared_expert_hidden_size, model.shared_expert_gate, model.qkv_bias) == (5632, True, True)
    assert (model.normalize_top_k, model.num_dense_layers, model.ffn_hidden_size) == (False, 2, 5632)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({**LLAMA, "model_type": "deepseek_v3"}, "multi-head latent attention needs Transformer Engine"),
        ({**LLAMA, "model_type": "gemma2"}, "model_type='gemma2': it must be one of dots1, glm4_moe, llama"),
        ({**LLAMA, "model_type": None}, "model_type is missing"),
        ({**LLAMA, "hidden_size": None}, "hidden_size is missing"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' is computed"),
        ({**LLAMA, "attention_bias": True}, "attention_bias=True"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias=True"),
        ({**LLAMA, "attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({**LLAMA, "logit_scale": 2.0}, "logit_scale=2.0: there is no rule for logit_scale"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({**LLAMA, "rope_scaling": {"type": "llama3", "factor": 4.0}}, "high_freq_factor is missing"),
        ({**LLAMA, "rope_scaling": {"type": "default", "beta": 1}}, "rope_parameters={'beta': 1"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({**LLAMA, "torch_dtype": "int8"}, "dtype='int8': it must be one of float32"),
        ({**LLAMA, "rope_scaling": 3}, "rope_scaling=3: it must be an object of keys"),
        ({**GLM, "n_group": 2, "topk_group": 0}, "topk_group=0: it must be an integer of at least 1"),
        ({**GLM, "n_group": "2"}, "n_group='2': it must be an integer of at least 1"),
        ({**GLM, "first_k_dense_replace": -1}, "first_k_dense_replace=-1: it must be an integer of at least 0"),
        ({**LLAMA, "hidden_size": "8192"}, "hidden_size='8192': it must be an integer of at least 1"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers=True: it must be an integer of at least 1"),
        ({**LLAMA, "vocab_size": 128.0}, "vocab_size=128.0: it must be an integer of at least 1"),
        ({**LLAMA, "rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': it must be a finite number"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps=nan: it must be a finite number"),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": None}, "rope_theta": "1e4"},
            "rope_theta='1e4': it must be a finite",
        ),
        ({**LLAMA, "rope_theta": 10**400}, "it must be a finite number"),
        ({**LLAMA, "rope_scaling": {**LLAMA["rope_scaling"], "factor": True}}, "factor=True: it must be a finite"),
        ({**GLM, "routed_scaling_factor": [1]}, "routed_scaling_factor=[1]: it must be a finite number"),
        ({**LLAMA, "tie_word_embeddings": "false"}, "tie_word_embeddings='false': it must be true or false"),
        ({**LLAMA, "attention_bias": 0}, "attention_bias=0: only False is computed"),
        ({**QWEN, "use_sliding_window": 0}, "use_sliding_window=0: it must be true or false"),
        ({**QWEN, "mlp_only_layers": [False]}, "mlp_only_layers=False: it must be an integer of at least 0"),
        ({**QWEN, "mlp_only_layers": ""}, "mlp_only_layers='': it must be a list of layers"),
        ({**QWEN, "layer_types": "full_attention"}, "layer_types='full_attention': it must be a list of names"),
        ({**QWEN, "use_sliding_window": True}, "sliding_window=4096: attention to a window is not computed"),
        ({**QWEN, "layer_types": ["full_attention", "linear_attention"]}, "layer_types=['linear_attention']"),
        ({**QWEN, "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({**QWEN, "mlp_only_layers": [3]}, "layers without experts must be the first ones"),
        ({**QWEN, "rope_theta": None}, "rope_theta is missing"),
        ({**GLM, "num_nextn_predict_layers": 1}, "layers that predict further tokens are not computed"),
        (
            {**GLM, "n_group": 8, "topk_group": 2},
            "groups are ranked by their best num_experts_per_tok / topk_group = 4",
        ),
        ({**GLM, "scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid' is computed"),
        ([1], "must be an object of keys"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(values: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        read_huggingface(write(tmp_path, values))
    assert str(refusal.value).startswith(str(tmp_path / "config.json"))
    assert says in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_huggingface(tmp_path)


def test_a_window_that_no_sequence_is_longer_than_does_nothing(tmp_path: Path) -> None:
    place = write(tmp_path, {**QWEN, "sliding_window": 0})
    assert read_huggingface(place)["max_sequence_length"] == 8192
    place = write(tmp_path, {**QWEN, "use_sliding_window": True})
    assert read_huggingface(place, max_sequence_length=4096)["max_sequence_length"] == 4096
    with pytest.raises(ModelError, match="max_sequence_length=4096"):
        read_huggingface(place, max_sequence_length=4097)


def test_reading_imports_neither_torch_nor_transformers() -> None:
    code = "import truedag.model.huggingface, truedag.model.checkpoint, sys; "
    code += "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
