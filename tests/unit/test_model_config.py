"""A model description is checked when it is stated."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from truedag.model.config import ModelConfig, RopeScaling, require_implementation
from truedag.model.errors import ModelError

SPARSE = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_experts=4, expert_hidden_size=32)

DENSE: dict[str, object] = {"num_experts": None, "expert_hidden_size": None}
SIGMOID: dict[str, object] = {"router_score": "sigmoid"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_query_groups": 3}, "must divide num_attention_heads=4"),
        ({"num_query_groups": 0}, "num_query_groups=0"),
        ({"num_attention_heads": 3}, "head_dim=None: head_dim must be given"),
        ({"head_dim": 7}, "head_dim=7: head_dim must be even"),
        ({"activation": "relu"}, "must be one of gelu, swiglu"),
        ({"attention": "flash"}, "must be one of unfused, fused"),
        ({"experts": "all"}, "must be one of sequential, grouped"),
        ({"dtype": "int8"}, "must be one of float32"),
        ({"top_k": 5}, "must be at most num_experts=4"),
        ({"expert_hidden_size": None}, "is required with num_experts"),
        ({"num_experts": None}, "expert_hidden_size needs num_experts"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({"init_std": -1.0}, "init_std must be positive"),
        ({"rope_base": 1}, "rope_base must be more than 1"),
        ({"rotary_percent": 0.3}, "rotates 4.8 of 16"),
        ({"rotary_percent": 0.0}, "rotary_percent=0.0"),
        ({"implementation": "apex"}, "must be one of truedag, transformer_engine"),
        ({"implementation": "transformer_engine", "attention": "unfused"}, "attention must be fused"),
        ({"num_dense_layers": 2}, "num_dense_layers must be from 0 to num_layers - 1 = 1"),
        ({"num_dense_layers": -1}, "num_dense_layers=-1"),
        ({"router_score": "relu"}, "must be one of softmax, sigmoid"),
        ({"router_scaling": 0.0}, "router_scaling must be positive"),
        ({"top_k": 1}, "normalize_top_k must be false with top_k=1"),
        ({"score_correction_bias": True}, "score_correction_bias needs router_score='sigmoid'"),
        ({"num_expert_groups": 2, "top_k_groups": 1}, "num_expert_groups needs router_score='sigmoid'"),
        ({**SIGMOID, "normalize_top_k": False}, "normalize_top_k must be true with router_score='sigmoid'"),
        ({**SIGMOID, "top_k": 1}, "normalize_top_k must be false with router_score='sigmoid' and top_k=1"),
        ({**SIGMOID, "score_correction_rate": -1.0}, "score_correction_rate must not be negative"),
        ({**SIGMOID, "num_expert_groups": 2}, "top_k_groups and num_expert_groups need each other"),
        ({**SIGMOID, "num_expert_groups": 3, "top_k_groups": 1}, "num_expert_groups must divide num_experts=4"),
        ({**SIGMOID, "num_expert_groups": 2, "top_k_groups": 3}, "top_k_groups must be at most num_expert_groups=2"),
        ({**SIGMOID, "num_expert_groups": 4, "top_k_groups": 1}, "top_k must be a multiple of top_k_groups=1"),
        ({"shared_expert_gate": True}, "shared_expert_gate needs shared_expert_hidden_size"),
        ({"shared_expert_hidden_size": 0}, "shared_expert_hidden_size=0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({**DENSE, "num_dense_layers": 1}, "num_dense_layers needs num_experts"),
        ({**DENSE, "router_score": "sigmoid"}, "router_score needs num_experts"),
        ({**DENSE, "capacity_factor": 1.0}, "capacity_factor needs num_experts"),
        ({**DENSE, "shared_expert_hidden_size": 8}, "shared_expert_hidden_size needs num_experts"),
    ],
)
def test_a_broken_rule_names_field_value_and_rule(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        replace(SPARSE, **changes)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"factor": 0.5}, "rope_scaling.factor=0.5: must be at least 1"),
        ({"factor": 8.0, "low_freq_factor": 4.0}, "rope_scaling.low_freq_factor=4.0"),
        ({"factor": 8.0, "original_max_position": 0}, "rope_scaling.original_max_position=0"),
    ],
)
def test_a_broken_rule_of_rope_scaling_names_it(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        RopeScaling(**values)
    assert says in str(refusal.value)


def test_first_layers_may_be_dense() -> None:
    model = replace(SPARSE, num_dense_layers=1)
    assert [model.has_experts(layer) for layer in range(2)] == [False, True]
    assert not any(
        ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2).has_experts(layer) for layer in (0, 1)
    )


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_transformer_engine_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ModelError, match="Transformer Engine is not installed here"):
        require_implementation(replace(SPARSE, implementation="transformer_engine"))
    require_implementation(SPARSE)


def test_sizes_left_out_follow_from_the_others() -> None:
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    assert (model.kv_channels, model.kv_heads, model.dense_hidden_size, model.gated) == (16, 4, 256, False)


def test_descriptions_do_not_import_torch() -> None:
    modules = "truedag.model.config, truedag.parallel.strategy, truedag.parallel.training, truedag.parallel.environment"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
