"""What a model is, whatever it runs on: sizes and choices, checked when they are stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from truedag.model.errors import ModelError

Activation = Literal["gelu", "swiglu"]
Attention = Literal["unfused", "fused"]
Experts = Literal["sequential", "grouped"]
DataType = Literal["float32", "bfloat16", "float16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "attention": get_args(Attention),
    "experts": get_args(Experts),
    "dtype": get_args(DataType),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, dense or mixture of experts.

    Raises:
        ModelError: a value breaks a rule; the message names the field, the value and the rule.
    """

    num_layers: int
    """Transformer layers in the whole model."""

    hidden_size: int
    """Width of the residual stream."""

    num_attention_heads: int
    """Query heads."""

    num_query_groups: int | None = None
    """Key and value heads; None: as many as query heads."""

    head_dim: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""

    ffn_hidden_size: int | None = None
    """Inner width of a dense feed-forward layer; None: 4 hidden_size. Unused where there are experts."""

    vocab_size: int = 256
    """Rows of the embedding and of the output head; 256 is one per byte. Never padded: a padded row would change
    the softmax, and with it the loss, from one strategy to the next."""

    max_sequence_length: int = 2048
    """Longest sequence that the model accepts, in tokens."""

    num_experts: int | None = None
    """Experts of each layer; None: dense."""

    expert_hidden_size: int | None = None
    """Inner width of one expert; required where there are experts."""

    top_k: int = 2
    """Experts that a token is sent to. Routing drops no token and pads no expert."""

    activation: Activation = "gelu"
    """Of the feed-forward layers: gelu, or the gated swiglu, whose first projection is twice as wide."""

    attention: Attention = "fused"
    """unfused: scores, softmax and context are operators of their own; fused: scaled_dot_product_attention."""

    experts: Experts = "grouped"
    """sequential: one expert after the other, each a module; grouped: all experts of a rank in one grouped_mm."""

    dtype: DataType = "float32"
    """Of parameters and activations."""

    tied_embeddings: bool = False
    """The output head is the transposed embedding."""

    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""

    rope_base: int = 10_000
    """Base of the rotary position embedding."""

    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back to the residual stream have it divided by
    sqrt(2 num_layers)."""

    seed: int = 1234
    """Of the initial weights: each is drawn from a generator seeded by it and the parameter's logical name."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length", "top_k"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("num_query_groups", "head_dim", "ffn_hidden_size", "num_experts", "expert_hidden_size"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1, or left out")
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"must be one of {', '.join(choices)}")
        self._require("norm_epsilon", self.norm_epsilon > 0, "must be positive")
        self._require("rope_base", self.rope_base > 1, "must be more than 1")
        self._require("init_std", self.init_std > 0, "must be positive")
        self._require(
            "head_dim",
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"must be given where num_attention_heads={self.num_attention_heads} does not divide "
            f"hidden_size={self.hidden_size}",
        )
        self._require(
            "head_dim", self.kv_channels % 2 == 0, f"must be even (it is {self.kv_channels}): rotary embeddings pair it"
        )
        self._require(
            "num_query_groups",
            self.num_attention_heads % self.kv_heads == 0,
            f"must divide num_attention_heads={self.num_attention_heads}",
        )
        if self.num_experts is None:
            self._require("expert_hidden_size", self.expert_hidden_size is None, "needs num_experts")
        else:
            self._require("expert_hidden_size", self.expert_hidden_size is not None, "is required with num_experts")
            self._require("top_k", self.top_k <= self.num_experts, f"must be at most num_experts={self.num_experts}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ModelError(f"{name}={getattr(self, name)!r}: {name} {rule}")

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads

    @property
    def dense_hidden_size(self) -> int:
        """Inner width of a dense feed-forward layer."""
        return self.ffn_hidden_size if self.ffn_hidden_size is not None else 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the first projection of a feed-forward layer carries a gate beside its values."""
        return self.activation == "swiglu"
