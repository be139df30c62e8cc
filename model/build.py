"""Builds this rank's part of a model: a megatron-core GPTModel chunk with seeded weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from truedag.model.config import ModelConfig
from truedag.model.parameters import initialize
from truedag.model.specs import block_spec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the ranks divide the model, as far as its modules have to know."""

    tp: int = 1
    """Tensor-parallel size."""

    pp: int = 1
    """Pipeline stages."""

    ep: int = 1
    """Expert-parallel size."""

    etp: int = 1
    """Expert tensor-parallel size."""

    sequence_parallel: bool = False
    """Norms and residuals are split along the sequence over the tensor-parallel ranks."""


def transformer_config(config: ModelConfig, sharding: Sharding) -> TransformerConfig:
    """Return megatron-core's configuration: every fusion off, so that what the model states are the operators that run.

    Routing has no auxiliary loss: it would add collectives of its own kind and a second source of gradients to every
    layer, and none of it is part of the model as it is described.
    """
    moe: dict[str, Any] = {}
    if config.num_experts is not None:
        moe = {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.expert_hidden_size,
            "moe_router_topk": config.top_k,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.kv_channels,
        ffn_hidden_size=config.dense_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        activation_func=functional.silu if config.gated else functional.gelu,
        gated_linear_unit=config.gated,
        # What it means here: the activation is a module of our spec.
        use_te_activation_func=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        params_dtype=_DTYPES[config.dtype],
        pipeline_dtype=_DTYPES[config.dtype],
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        tensor_model_parallel_size=sharding.tp,
        pipeline_model_parallel_size=sharding.pp,
        expert_model_parallel_size=sharding.ep,
        expert_tensor_parallel_size=sharding.etp,
        sequence_parallel=sharding.sequence_parallel,
        # Freed storage under a send in flight is silently wrong on gloo; the others need Apex or Transformer Engine.
        deallocate_pipeline_outputs=False,
        batch_p2p_sync=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        moe_permute_fusion=False,
        transformer_impl="local",
        **moe,
    )


def build_chunk(
    config: ModelConfig,
    transformer: TransformerConfig,
    *,
    pre_process: bool,
    post_process: bool,
    pg_collection: Any,
    device: torch.device,
) -> nn.Module:
    """Build this rank's GPTModel chunk on `device`, with this rank's slices of the seeded weights.

    Every rank of the pipeline group must call it where embeddings are tied (their sharing synchronises).

    Args:
        config: the model.
        transformer: from `transformer_config`, for the same model.
        pre_process: the chunk has the embedding (it is the first stage).
        post_process: the chunk has the final norm and the output head (it is the last stage).
        pg_collection: megatron-core's ProcessGroupCollection of this rank.
        device: where the chunk goes.
    """
    chunk: nn.Module = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(config, num_layers=config.num_layers // pg_collection.pp.size()),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_base,
        pg_collection=pg_collection,
    ).to(device)
    initialize(
        chunk,
        config,
        tp=(pg_collection.tp.rank(), pg_collection.tp.size()),
        etp=(pg_collection.expt_tp.rank(), pg_collection.expt_tp.size()),
    )
    return chunk


def _leave_uninitialized(weight: Tensor) -> Tensor:
    """Megatron-core's initialisation hook; `initialize` fills all weights afterwards, by name."""
    return weight
