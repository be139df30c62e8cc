"""A model description is checked when it is stated."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from truedag.model.config import ModelConfig
from truedag.model.errors import ModelError

SPARSE = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_experts=4, expert_hidden_size=32)


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
    ],
)
def test_a_broken_rule_names_field_value_and_rule(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        replace(SPARSE, **changes)
    assert says in str(refusal.value)


def test_sizes_left_out_follow_from_the_others() -> None:
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    assert (model.kv_channels, model.kv_heads, model.dense_hidden_size, model.gated) == (16, 4, 256, False)


def test_descriptions_do_not_import_torch() -> None:
    modules = "truedag.model.config, truedag.parallel.strategy, truedag.parallel.training, truedag.parallel.environment"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
