"""Writes small models of transformers with random weights, and their logits: an implementation that is not ours.

Run in a process of its own, `python transformers_models.py FOLDER`: it imports nothing of truedag and no megatron-core.
Each model's folder gets config.json, safetensors, tokens.npy [B, S] and logits.npy [B, S, V]; and of prompts, which are
the beginnings of the tokens, generated.npy [B, T] and generated_logits.npy [B, T, V]: decoded greedily with a cache.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

BATCH, LENGTH, VOCABULARY = 2, 16, 64
PROMPT_LENGTHS, DECODE_STEPS = (16, 10), 16
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SIGMOID = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
_SOFTMAX = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# By the name of the folder: the architecture, and what it has beside the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**_SOFTMAX, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", {**_SOFTMAX, "norm_topk_prob": True, "head_dim": 16}),
    "glm4_moe": ("glm4_moe", {**_SIGMOID, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "dots1": ("dots1", {**_SIGMOID, "n_shared_experts": 2}),
}
_SEVERAL_FILES = ("mixtral",)
_STACKED_EXPERTS = ("dots1",)


def main(folder: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for seed, (name, (architecture, more)) in enumerate(MODELS.items()):
        torch.manual_seed(100 + seed)
        config = AutoConfig.for_model(architecture, **_SIZES, **more)
        if hasattr(config, "num_mtp_layers"):
            config.num_mtp_layers = 0
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "norm" in tensor_name:
                    tensor.normal_(1.0, 0.3)
                elif "inv_freq" not in tensor_name:
                    tensor.normal_(0.0, 0.3)
            tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
            logits = model(tokens).logits
        place = folder / name
        model.save_pretrained(place, max_shard_size="20KB" if name in _SEVERAL_FILES else "1GB")
        if name in _STACKED_EXPERTS:
            save_file(
                {key: value.contiguous() for key, value in model.state_dict().items()}, place / "model.safetensors"
            )
        np.save(place / "tokens.npy", tokens.numpy())
        np.save(place / "logits.npy", logits.numpy())
        generated = [generate(model, tokens[row : row + 1, :length]) for row, length in enumerate(PROMPT_LENGTHS)]
        np.save(place / "generated.npy", np.array([row for row, _ in generated]))
        np.save(place / "generated_logits.npy", torch.stack([steps for _, steps in generated]).numpy())


def generate(model: Any, prompt: Any) -> tuple[list[int], Any]:
    """Return the token of the prefill and of each decode step, and the logits [T, V] that each was chosen from."""
    import torch

    tokens, logits = [], []
    cache, last = None, prompt
    with torch.no_grad():
        for _ in range(DECODE_STEPS + 1):
            output = model(last, past_key_values=cache, use_cache=True)
            cache, here = output.past_key_values, output.logits[0, -1]
            logits.append(here)
            tokens.append(int(here.argmax()))
            last = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
