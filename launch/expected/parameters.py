"""The parameters of a model by their logical names, and along which dimension each is split. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from truedag.model.config import ModelConfig
from truedag.tracer.audit.expectation import Parameter


def expected_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Yield every parameter of the whole model, as `truedag.model.parameters` names them."""
    hidden, vocabulary = model.hidden_size, model.vocab_size
    yield Parameter(name="embedding.word_embeddings.weight", shape=(vocabulary, hidden), dim=0)
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield Parameter(name="decoder.final_layernorm.weight", shape=(hidden,), dim=None)
    if not model.tied_embeddings:
        yield Parameter(name="output_layer.weight", shape=(vocabulary, hidden), dim=0)


def _layer(model: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden, width = model.hidden_size, model.kv_channels
    heads = model.num_attention_heads * width
    qkv = heads + 2 * model.kv_heads * width
    name = f"decoder.layers.{layer}"
    yield Parameter(name=f"{name}.input_layernorm.weight", shape=(hidden,), dim=None, layer=layer)
    yield Parameter(name=f"{name}.self_attention.linear_qkv.weight", shape=(qkv, hidden), dim=0, layer=layer)
    if model.qkv_bias:
        yield Parameter(name=f"{name}.self_attention.linear_qkv.bias", shape=(qkv,), dim=0, layer=layer)
    if model.qk_norm:
        for part in ("q", "k"):
            yield Parameter(
                name=f"{name}.self_attention.{part}_layernorm.weight", shape=(width,), dim=None, layer=layer
            )
    yield Parameter(name=f"{name}.self_attention.linear_proj.weight", shape=(hidden, heads), dim=1, layer=layer)
    yield Parameter(name=f"{name}.pre_mlp_layernorm.weight", shape=(hidden,), dim=None, layer=layer)
    if not model.has_experts(layer):
        yield from _feed_forward(model, f"{name}.mlp", model.dense_hidden_size, layer=layer)
        return
    assert model.num_experts is not None
    assert model.expert_hidden_size is not None
    yield Parameter(name=f"{name}.mlp.router.weight", shape=(model.num_experts, hidden), dim=None, layer=layer)
    for expert in range(model.num_experts):
        prefix = f"{name}.mlp.experts.local_experts.{expert}"
        yield from _feed_forward(model, prefix, model.expert_hidden_size, layer=layer, axis="etp", expert=expert)
    if model.shared_expert_hidden_size is not None:
        yield from _feed_forward(model, f"{name}.mlp.shared_experts", model.shared_expert_hidden_size, layer=layer)
        if model.shared_expert_gate:
            gate = f"{name}.mlp.shared_experts.gate_weight"
            yield Parameter(name=gate, shape=(1, hidden), dim=None, layer=layer)


def _feed_forward(
    model: ModelConfig, name: str, width: int, *, layer: int, axis: str = "tp", expert: int = -1
) -> Iterator[Parameter]:
    rows = 2 * width if model.gated else width
    for part, shape, dim in (
        ("linear_fc1", (rows, model.hidden_size), 0),
        ("linear_fc2", (model.hidden_size, width), 1),
    ):
        yield Parameter(name=f"{name}.{part}.weight", shape=shape, dim=dim, axis=axis, layer=layer, expert=expert)
