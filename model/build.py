"""Builds this rank's part of a model: a megatron-core GPTModel chunk with seeded weights or a checkpoint's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from truedag.model.checkpoint import Checkpoint
from truedag.model.config import ModelConfig
from truedag.model.parameters import initialize
from truedag.model.specs import block_spec
from truedag.model.weights import load

_LOG = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the ranks divide the model, as far as its modules have to know."""

    tp: int = 1
    """Tensor-parallel size."""

    cp: int = 1
    """Context-parallel size."""

    pp: int = 1
    """Pipeline stages."""

    vpp: int = 1
    """Chunks of the model on each stage."""

    ep: int = 1
    """Expert-parallel size."""

    etp: int = 1
    """Expert tensor-parallel size."""

    sequence_parallel: bool = False
    """Norms and residuals are split along the sequence over the tensor-parallel ranks."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, the core attention, or every layer."""


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


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
            "moe_layer_freq": [int(config.has_experts(layer)) for layer in range(config.num_layers)],
            "moe_shared_expert_intermediate_size": config.shared_expert_hidden_size,
            "moe_shared_expert_gate": config.shared_expert_gate,
            "moe_router_topk": config.top_k,
            "moe_router_score_function": config.router_score,
            "moe_router_pre_softmax": not config.normalize_top_k,
            "moe_router_topk_scaling_factor": config.router_scaling,
            "moe_router_num_groups": config.num_expert_groups,
            "moe_router_group_topk": config.top_k_groups,
            "moe_router_enable_expert_bias": config.score_correction_bias,
            "moe_router_bias_update_rate": config.score_correction_rate,
            "moe_expert_capacity_factor": config.capacity_factor,
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
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        params_dtype=_DTYPES[config.dtype],
        pipeline_dtype=_DTYPES[config.dtype],
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        tensor_model_parallel_size=sharding.tp,
        context_parallel_size=sharding.cp,
        pipeline_model_parallel_size=sharding.pp,
        virtual_pipeline_model_parallel_size=sharding.vpp if sharding.vpp > 1 else None,
        expert_model_parallel_size=sharding.ep,
        expert_tensor_parallel_size=sharding.etp,
        sequence_parallel=sharding.sequence_parallel,
        # Freed storage under a send in flight is silently wrong on gloo; the others need Apex or Transformer Engine.
        deallocate_pipeline_outputs=False,
        batch_p2p_sync=False,
        # Interleaved and not overlapped, two stages take each other's messages for another chunk's: silently wrong.
        overlap_p2p_comm=sharding.vpp > 1,
        batch_p2p_comm=sharding.vpp == 1,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        moe_permute_fusion=False,
        transformer_impl="local" if config.implementation == "truedag" else "transformer_engine",
        moe_grouped_gemm=config.implementation == "transformer_engine" and config.experts == "grouped",
        **_RECOMPUTE[sharding.recompute],
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
    vp_stage: int = 0,
    weights: Path | None = None,
) -> nn.Module:
    """Build this rank's GPTModel chunk on `device`, with this rank's slices of seeded weights, or of given ones.

    Every rank of the pipeline group must call it where embeddings are tied (their sharing synchronises).

    Args:
        config: the model.
        transformer: from `transformer_config`, for the same model.
        pre_process: the chunk has the embedding (it is the first of the first stage).
        post_process: the chunk has the final norm and the output head (it is the last of the last stage).
        pg_collection: megatron-core's ProcessGroupCollection of this rank.
        device: where the chunk goes.
        vp_stage: which of the stage's chunks it is, where there are several.
        weights: a folder of Hugging Face safetensors, of which this rank reads its slices; None: seeded weights.

    Raises:
        ModelError: the implementation is not installed, or the weights are not those of the model.
    """
    num_chunks = transformer.virtual_pipeline_model_parallel_size or 1
    num_layers = config.num_layers // (pg_collection.pp.size() * num_chunks)
    first = num_layers * (vp_stage * pg_collection.pp.size() + pg_collection.pp.rank())
    chunk: nn.Module = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(config, range(first, first + num_layers)),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_base,
        rotary_percent=config.rotary_percent,
        pg_collection=pg_collection,
        vp_stage=vp_stage if num_chunks > 1 else None,
    ).to(device)
    _scale_rope(chunk, config)
    _mark_experts(chunk)
    tp = (pg_collection.tp.rank(), pg_collection.tp.size())
    etp = (pg_collection.expt_tp.rank(), pg_collection.expt_tp.size())
    if weights is None:
        initialize(chunk, config, tp=tp, etp=etp)
    else:
        num_bytes = load(chunk, Checkpoint(weights, config), tp=tp, etp=etp)
        _LOG.info("read %d bytes of %s", num_bytes, weights)
    return chunk


def _scale_rope(chunk: Any, config: ModelConfig) -> None:
    """Stretch the rotary embedding: the model's constructor takes the factor only."""
    if (scaling := config.rope_scaling) is not None:
        rope = chunk.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position,
        )


def _mark_experts(chunk: nn.Module) -> None:
    """Say which dimension of each expert's matrix is split: Transformer Engine says the first of every one."""
    weight: Any
    for name, weight in chunk.named_parameters():
        if ".mlp.experts." in name and weight.dim() == 2:
            weight.tensor_model_parallel = True
            weight.partition_dim = 0 if ".linear_fc1." in name else 1


def _leave_uninitialized(weight: Tensor) -> Tensor:
    """Megatron-core's initialisation hook; `initialize` fills all weights afterwards, by name."""
    return weight
