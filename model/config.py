"""What a model is, whatever it runs on: sizes and choices, checked when they are stated."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

from truedag.model.errors import ModelError

Activation = Literal["gelu", "swiglu"]
RouterScore = Literal["softmax", "sigmoid"]
Implementation = Literal["truedag", "transformer_engine"]
Attention = Literal["unfused", "fused"]
Experts = Literal["sequential", "grouped"]
DataType = Literal["float32", "bfloat16", "float16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "router_score": get_args(RouterScore),
    "implementation": get_args(Implementation),
    "attention": get_args(Attention),
    "experts": get_args(Experts),
    "dtype": get_args(DataType),
}
_POSITIVE = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length", "top_k")
_POSITIVE_OR_NONE = (
    "num_query_groups",
    "head_dim",
    "ffn_hidden_size",
    "num_experts",
    "expert_hidden_size",
    "num_expert_groups",
    "top_k_groups",
    "shared_expert_hidden_size",
)
# What says something about experts, and the value at which it says nothing.
_OF_EXPERTS: tuple[tuple[str, object], ...] = (
    ("expert_hidden_size", None),
    ("num_dense_layers", 0),
    ("router_score", "softmax"),
    ("normalize_top_k", True),
    ("router_scaling", 1.0),
    ("score_correction_bias", False),
    ("num_expert_groups", None),
    ("top_k_groups", None),
    ("shared_expert_hidden_size", None),
    ("shared_expert_gate", False),
    ("capacity_factor", None),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary embedding's low frequencies.

    A frequency whose wavelength is below original_max_position / high_freq_factor stays, one whose wavelength is above
    original_max_position / low_freq_factor is divided by `factor`, those between are interpolated.

    Source: "llama3" in transformers' modeling_rope_utils.py, as in megatron-core's RotaryEmbedding.

    Raises:
        ModelError: a value breaks a rule.
    """

    factor: float
    """How much longer the context is than the one first trained on."""

    low_freq_factor: float = 1.0
    """Bounds the frequencies that are divided."""

    high_freq_factor: float = 4.0
    """Bounds those that stay."""

    original_max_position: int = 8192
    """Tokens of the context first trained on."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ModelError(f"rope_scaling.factor={self.factor}: must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor}: must be positive and less than "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_position < 1:
            raise ModelError(f"rope_scaling.original_max_position={self.original_max_position}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, dense or mixture of experts.

    Attention is multi-head or grouped-query, causal, with rotary embeddings; norms are RMSNorms before attention and
    feed-forward. Multi-head latent attention is none of it: megatron-core's needs Transformer Engine.

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
    """Inner width of a dense feed-forward layer; None: 4 hidden_size. With experts: of the num_dense_layers first."""

    vocab_size: int = 256
    """Rows of the embedding and of the output head; 256 is one per byte. Never padded: a padded row would change
    the softmax, and with it the loss, from one strategy to the next."""

    max_sequence_length: int = 2048
    """Longest sequence that the model accepts, in tokens."""

    num_experts: int | None = None
    """Experts of each layer that has any; None: dense."""

    expert_hidden_size: int | None = None
    """Inner width of one expert; required where there are experts."""

    num_dense_layers: int = 0
    """First layers without experts, where there are experts."""

    top_k: int = 2
    """Experts that a token is sent to."""

    router_score: RouterScore = "softmax"
    """What makes scores of the router's logits: softmax over all experts, or sigmoid of each."""

    normalize_top_k: bool = True
    """A token's weights of its chosen experts are their scores divided by the sum of the chosen ones' scores."""

    router_scaling: float = 1.0
    """The weights are multiplied by it, after they were normalised."""

    score_correction_bias: bool = False
    """An expert's bias is added to its sigmoid score where experts are chosen, and left out of their weights
    (DeepSeek-V3). No gradient reaches it: see score_correction_rate."""

    score_correction_rate: float = 1e-3
    """Each training step raises the bias of the experts that got fewer tokens than the mean by it, and lowers that of
    those that got more."""

    num_expert_groups: int | None = None
    """Experts are in so many equal groups, and a token chooses from top_k_groups of them; None: from all experts."""

    top_k_groups: int | None = None
    """Groups that a token chooses from: those with the largest sums of their top_k / top_k_groups best scores."""

    shared_expert_hidden_size: int | None = None
    """Inner width of the shared experts together, which every token goes through; None: there are none."""

    shared_expert_gate: bool = False
    """The shared experts' output is multiplied by the sigmoid of a learned projection of the token (Qwen2-MoE)."""

    capacity_factor: float | None = None
    """None: no token is dropped. Else each rank sends an expert at most ceil(tokens * top_k / num_experts *
    capacity_factor) of its own tokens, those with the largest weights; so what is dropped depends on how the tokens
    are spread over ranks. No expert's input is padded."""

    activation: Activation = "gelu"
    """Of the feed-forward layers: gelu, or the gated swiglu, whose first projection is twice as wide."""

    implementation: Implementation = "truedag"
    """Of the modules: truedag's, on any device; or Transformer Engine's, on CUDA, where it is installed."""

    attention: Attention = "fused"
    """unfused: scores, softmax and context are operators of their own; fused: scaled_dot_product_attention."""

    experts: Experts = "grouped"
    """sequential: one expert after the other, each a module; grouped: all experts of a rank in one grouped_mm."""

    dtype: DataType = "float32"
    """Of parameters and activations."""

    tied_embeddings: bool = False
    """The output head is the transposed embedding."""

    qkv_bias: bool = False
    """The query, key and value projections have a bias (Qwen2)."""

    qk_norm: bool = False
    """Each head's queries and keys go through an RMSNorm before they are rotated (Qwen3)."""

    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""

    rope_base: float = 10_000
    """Base of the rotary position embedding."""

    rope_scaling: RopeScaling | None = None
    """Stretches the rotary embedding to a longer context; None: as it is."""

    rotary_percent: float = 1.0
    """Share of a head's width that is rotated: its first elements."""

    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back to the residual stream have it divided by
    sqrt(2 num_layers)."""

    seed: int = 1234
    """Of the initial weights: each is drawn from a generator seeded by it and the parameter's logical name."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in _POSITIVE_OR_NONE:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1, or left out")
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"must be one of {', '.join(choices)}")
        self._require("norm_epsilon", self.norm_epsilon > 0, "must be positive")
        self._require("init_std", self.init_std > 0, "must be positive")
        self._check_attention()
        if self.num_experts is None:
            for name, says_nothing in _OF_EXPERTS:
                self._require(name, getattr(self, name) == says_nothing, "needs num_experts")
        else:
            self._check_experts(self.num_experts)

    def _check_attention(self) -> None:
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
        self._require("rope_base", self.rope_base > 1, "must be more than 1")
        rotated = self.kv_channels * self.rotary_percent
        self._require(
            "rotary_percent",
            0 < self.rotary_percent <= 1 and rotated % 2 == 0,
            f"must be in (0, 1] and rotate an even part of a head (it rotates {rotated:g} of {self.kv_channels})",
        )
        self._require(
            "attention",
            self.implementation == "truedag" or self.attention == "fused",
            f"must be fused with implementation={self.implementation!r}, which has no other",
        )

    def _check_experts(self, num_experts: int) -> None:
        self._require("expert_hidden_size", self.expert_hidden_size is not None, "is required with num_experts")
        self._require("top_k", self.top_k <= num_experts, f"must be at most num_experts={num_experts}")
        self._require(
            "num_dense_layers",
            0 <= self.num_dense_layers < self.num_layers,
            f"must be from 0 to num_layers - 1 = {self.num_layers - 1}: with num_experts, a layer has experts",
        )
        self._require("router_scaling", self.router_scaling > 0, "must be positive")
        self._require("score_correction_rate", self.score_correction_rate >= 0, "must not be negative")
        if self.router_score == "softmax":
            self._require("score_correction_bias", not self.score_correction_bias, "needs router_score='sigmoid'")
            self._require("num_expert_groups", self.num_expert_groups is None, "needs router_score='sigmoid'")
            self._require(
                "normalize_top_k",
                not self.normalize_top_k or self.top_k > 1,
                "must be false with top_k=1: the one weight would always be 1 and teach the router nothing",
            )
        else:
            self._require(
                "normalize_top_k",
                self.normalize_top_k == (self.top_k > 1),
                f"must be {str(self.top_k > 1).lower()} with router_score='sigmoid' and top_k={self.top_k}: "
                "megatron-core normalises sigmoid scores exactly where there are several",
            )
        self._check_groups(num_experts)
        self._require(
            "shared_expert_gate",
            not self.shared_expert_gate or self.shared_expert_hidden_size is not None,
            "needs shared_expert_hidden_size",
        )
        self._require(
            "capacity_factor", self.capacity_factor is None or self.capacity_factor > 0, "must be positive, or left out"
        )

    def _check_groups(self, num_experts: int) -> None:
        groups, chosen = self.num_expert_groups, self.top_k_groups
        if groups is None or chosen is None:
            self._require("top_k_groups", groups is None and chosen is None, "and num_expert_groups need each other")
            return
        self._require("num_expert_groups", num_experts % groups == 0, f"must divide num_experts={num_experts}")
        self._require("top_k_groups", chosen <= groups, f"must be at most num_expert_groups={groups}")
        size = num_experts // groups
        self._require(
            "top_k",
            self.top_k % chosen == 0 and self.top_k // chosen <= size,
            f"must be a multiple of top_k_groups={chosen}, and at most {chosen * size}, the experts in so many groups",
        )

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

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, by its number in the whole model, has experts."""
        return self.num_experts is not None and layer >= self.num_dense_layers


def require_implementation(config: ModelConfig) -> None:
    """Refuse an implementation that is not installed on this machine.

    Raises:
        ModelError: says which, and the nearest choice.
    """
    if config.implementation == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ModelError(
            "implementation='transformer_engine': Transformer Engine is not installed here; "
            "install transformer-engine[pytorch], or choose implementation='truedag'"
        )
