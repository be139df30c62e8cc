"""A Hugging Face config.json as a model's description. No torch, no transformers.

Theory of operation: each key of the file is read by a rule, is known to say nothing about what is computed, or is
refused. So a feature that is not computed here is refused by its name, and one that nobody here has heard of too.
Values left out are those that the architecture gives them in transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from truedag.model.config import RopeScaling
from truedag.model.errors import ModelError

# Keys that change neither what is computed nor what is stored.
_INERT = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_attentions"),
        *("output_hidden_states", "tokenizer_class", "id2label", "label2id", "is_encoder_decoder", "use_return_dict"),
        # How a reference implementation goes about the same arithmetic.
        *("pretraining_tp", "_attn_implementation", "ep_size", "tp_size", "max_window_layers"),
        # An auxiliary loss of training, which is no part of the model as it is described here.
        *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"),
    )
)
_LATENT = "its multi-head latent attention needs Transformer Engine's attention"
_REFUSED = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "kimi_k2": _LATENT,
}
_DTYPES = ("float32", "bfloat16", "float16")

Fields = dict[str, Any]


def read_huggingface(path: Path, *, max_sequence_length: int | None = None) -> Fields:
    """Return the fields of a ModelConfig that a config.json states, other than those that are a choice of ours.

    Args:
        path: the file, or the folder that holds it.
        max_sequence_length: used in place of the file's, in tokens: a sliding window that no sequence is longer than
            does nothing. None: the file's.

    Raises:
        ModelError: the file cannot be read, lacks a key, or asks for what is not computed; the message names file, key,
            value and rule.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as a Hugging Face configuration: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no configuration: it must be an object of keys")
    keys = _Keys(file, values)
    kind = keys.take("model_type")
    if isinstance(kind, str) and kind in _REFUSED:
        keys.refuse("model_type", kind, _REFUSED[kind])
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        keys.refuse("model_type", kind, f"it must be one of {', '.join(sorted(_ARCHITECTURES))}")
    fields = _common(keys)
    if max_sequence_length is not None:
        fields["max_sequence_length"] = max_sequence_length
    _ARCHITECTURES[kind](keys, fields)
    keys.expect_nothing_left()
    return fields


class _Keys:
    """The keys of a file, each taken by whoever understands it."""

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self._file = file
        self._values = values
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def take(self, *names: str) -> Any:
        """Return the value of the first of several names of a key that is there."""
        return self._values[self._find(names)]

    def take_or(self, name: str, default: Any) -> Any:
        self._taken.add(name)
        return self._values[name] if self.has(name) else default

    def take_int(self, *names: str, least: int = 1) -> int:
        return self.integer(name := self._find(names), self._values[name], least=least)

    def take_int_or(self, name: str, default: int, *, least: int = 1) -> int:
        return self.integer(name, self.take_or(name, default), least=least)

    def take_number(self, *names: str) -> float:
        return self.number(name := self._find(names), self._values[name])

    def take_number_or(self, name: str, default: float) -> float:
        return self.number(name, self.take_or(name, default))

    def take_flag(self, *names: str) -> bool:
        return self._flag(name := self._find(names), self._values[name])

    def take_flag_or(self, name: str, default: bool) -> bool:
        return self._flag(name, self.take_or(name, default))

    def take_object_or_empty(self, name: str) -> dict[str, Any]:
        """Return a copy of the object that a key holds, as its reader takes its keys out."""
        if not isinstance(value := self.take_or(name, {}), dict):
            self.refuse(name, value, "it must be an object of keys")
        return dict(value)

    def integer(self, name: str, value: object, *, least: int = 1) -> int:
        # True and False are integers to Python.
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, value, f"it must be an integer of at least {least}")
        return value

    def number(self, name: str, value: object) -> float:
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse(name, value, "it must be a finite number")
        return number

    def expect(self, name: str, default: Any) -> None:
        """Take a key that decides about something that is computed in one way only."""
        value = self.take_or(name, default)
        if value != default or isinstance(value, bool) != isinstance(default, bool):
            self.refuse(name, value, f"only {default!r} is computed")

    def refuse(self, name: str, value: object, why: str) -> NoReturn:
        raise ModelError(f"{self._file}: {name}={value!r}: {why}")

    def expect_nothing_left(self) -> None:
        if left := sorted(name for name in self._values.keys() - self._taken - _INERT if self.has(name)):
            raise ModelError(
                f"{self._file}: {left[0]}={self._values[left[0]]!r}: there is no rule for {', '.join(left)}; "
                "take away what you know to change nothing that is computed"
            )

    def _find(self, names: tuple[str, ...]) -> str:
        self._taken.update(names)
        for name in names:
            if self.has(name):
                return name
        raise ModelError(f"{self._file}: {names[0]} is missing")

    def _flag(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            self.refuse(name, value, "it must be true or false")
        return value


def _common(keys: _Keys) -> Fields:
    """Take what all architectures have."""
    for name, say_nothing in (("hidden_act", "silu"), ("attention_dropout", 0.0), ("initializer_factor", 1.0)):
        keys.expect(name, say_nothing)
    if keys.has("quantization_config"):
        keys.refuse("quantization_config", keys.take("quantization_config"), "quantised weights are not computed with")
    num_heads = keys.take_int("num_attention_heads")
    fields: Fields = {
        "num_layers": keys.take_int("num_hidden_layers"),
        "hidden_size": keys.take_int("hidden_size"),
        "num_attention_heads": num_heads,
        "num_query_groups": keys.take_int_or("num_key_value_heads", num_heads),
        "vocab_size": keys.take_int("vocab_size"),
        "max_sequence_length": keys.take_int("max_position_embeddings"),
        "norm_epsilon": keys.take_number("rms_norm_eps"),
        "tied_embeddings": keys.take_flag_or("tie_word_embeddings", False),
        "init_std": keys.take_number_or("initializer_range", 0.02),
        "activation": "swiglu",
        **_rope(keys),
    }
    if keys.has("head_dim"):
        fields["head_dim"] = keys.take_int("head_dim")
    if keys.has("dtype") or keys.has("torch_dtype"):
        dtype = keys.take("dtype", "torch_dtype")
        if dtype not in _DTYPES:
            keys.refuse("dtype", dtype, f"it must be one of {', '.join(_DTYPES)}")
        fields["dtype"] = dtype
    return fields


def _rope(keys: _Keys) -> Fields:
    """Take the rotary embedding, as transformers 5 states it (rope_parameters) or as those before did."""
    rope, scaling = keys.take_object_or_empty("rope_parameters"), keys.take_object_or_empty("rope_scaling")
    old = {"rope_theta": keys.take_or("rope_theta", None), "rotary": keys.take_or("partial_rotary_factor", None)}
    stated = {name: value for name, value in {**scaling, **rope}.items() if value is not None}
    base = stated.pop("rope_theta", old["rope_theta"])
    rotary = stated.pop("partial_rotary_factor", old["rotary"])
    kind = stated.pop("rope_type", None) or stated.pop("type", None) or "default"
    stated.pop("type", None)
    fields: Fields = {}
    if base is not None:
        fields["rope_base"] = keys.number("rope_theta", base)
    if rotary is not None:
        fields["rotary_percent"] = keys.number("partial_rotary_factor", rotary)
    if kind == "llama3":
        missing = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"} - stated.keys()
        if missing:
            keys.refuse("rope_scaling", scaling or rope, f"{min(missing)} is missing")
        fields["rope_scaling"] = RopeScaling(
            **{name: keys.number(name, stated.pop(name)) for name in ("factor", "low_freq_factor", "high_freq_factor")},
            original_max_position=keys.integer(name := "original_max_position_embeddings", stated.pop(name)),
        )
    elif kind != "default":
        keys.refuse("rope_type", kind, "the rotary embeddings that are computed are default and llama3")
    if stated:
        keys.refuse("rope_parameters", stated, "there is no rule for it")
    return fields


def _refuse_window(keys: _Keys, fields: Fields, *, active: bool) -> None:
    """Refuse attention to a window of the last tokens, where it differs from attention to all of them."""
    # 0 is written where no layer has a window.
    window = keys.take_int("sliding_window", least=0) if keys.has("sliding_window") else None
    layers = keys.take_or("layer_types", None)
    if layers is not None:
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            keys.refuse("layer_types", layers, "it must be a list of names")
        others = sorted(set(layers) - {"full_attention", "sliding_attention"})
        if others:
            keys.refuse("layer_types", others, "only full_attention is computed")
        active = "sliding_attention" in layers
    if active and window is not None and window < fields["max_sequence_length"]:
        keys.refuse(
            "sliding_window",
            window,
            f"attention to a window is not computed, and sequences may be {fields['max_sequence_length']} tokens long; "
            f"nearest valid: max_sequence_length={window}",
        )


def _dense(keys: _Keys, fields: Fields) -> None:
    fields["ffn_hidden_size"] = keys.take_int("intermediate_size")


def _llama(keys: _Keys, fields: Fields) -> None:
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    _dense(keys, fields)
    fields.setdefault("rope_base", 10_000.0)


def _mistral(keys: _Keys, fields: Fields) -> None:
    _dense(keys, fields)
    _refuse_window(keys, fields, active=True)
    _require_base(keys, fields)


def _mixtral(keys: _Keys, fields: Fields) -> None:
    keys.expect("router_jitter_noise", 0.0)
    fields |= {
        "num_experts": keys.take_int("num_local_experts", "num_experts"),
        "expert_hidden_size": keys.take_int("intermediate_size"),
        "top_k": keys.take_int("num_experts_per_tok"),
    }
    _refuse_window(keys, fields, active=True)
    _require_base(keys, fields)


def _qwen(keys: _Keys, fields: Fields) -> None:
    _refuse_window(keys, fields, active=keys.take_flag_or("use_sliding_window", False))
    _require_base(keys, fields)


def _qwen2(keys: _Keys, fields: Fields) -> None:
    _dense(keys, fields)
    fields["qkv_bias"] = True
    _qwen(keys, fields)


def _qwen3(keys: _Keys, fields: Fields) -> None:
    keys.expect("attention_bias", False)
    _dense(keys, fields)
    fields["qk_norm"] = True
    fields.setdefault("head_dim", 128)
    _qwen(keys, fields)


def _qwen_experts(keys: _Keys, fields: Fields) -> None:
    keys.expect("decoder_sparse_step", 1)
    dense = keys.take_or("mlp_only_layers", [])
    if not isinstance(dense, list):
        keys.refuse("mlp_only_layers", dense, "it must be a list of layers")
    if sorted(keys.integer("mlp_only_layers", layer, least=0) for layer in dense) != list(range(len(dense))):
        keys.refuse("mlp_only_layers", dense, "layers without experts must be the first ones")
    fields |= {
        "num_experts": keys.take_int("num_experts", "num_local_experts"),
        "expert_hidden_size": keys.take_int("moe_intermediate_size"),
        "top_k": keys.take_int("num_experts_per_tok"),
        "normalize_top_k": keys.take_flag_or("norm_topk_prob", False),
        "num_dense_layers": len(dense),
    }
    width = keys.take_int("intermediate_size")
    if dense:
        fields["ffn_hidden_size"] = width
    _qwen(keys, fields)


def _qwen2_moe(keys: _Keys, fields: Fields) -> None:
    fields |= {
        "qkv_bias": keys.take_flag_or("qkv_bias", True),
        "shared_expert_hidden_size": keys.take_int("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }
    _qwen_experts(keys, fields)


def _qwen3_moe(keys: _Keys, fields: Fields) -> None:
    keys.expect("attention_bias", False)
    fields["qk_norm"] = True
    _qwen_experts(keys, fields)


def _sigmoid_experts(keys: _Keys, fields: Fields) -> None:
    """Take DeepSeek-V3's routing, as models with ordinary attention have it too."""
    keys.expect("scoring_func", "sigmoid")
    keys.expect("topk_method", "noaux_tc")
    if further := keys.take_int_or("num_nextn_predict_layers", 0, least=0):
        keys.refuse(
            "num_nextn_predict_layers",
            further,
            "layers that predict further tokens are not computed; they change nothing before them, so 0 may stand "
            "here, with weights that hold none of theirs",
        )
    inner, top_k = keys.take_int("moe_intermediate_size"), keys.take_int("num_experts_per_tok")
    fields |= {
        "num_experts": keys.take_int("n_routed_experts", "num_local_experts"),
        "expert_hidden_size": inner,
        "top_k": top_k,
        "num_dense_layers": keys.take_int("first_k_dense_replace", least=0),
        "router_score": "sigmoid",
        "normalize_top_k": keys.take_flag("norm_topk_prob"),
        "router_scaling": keys.take_number("routed_scaling_factor"),
        "score_correction_bias": True,
    }
    if shared := keys.take_int_or("n_shared_experts", 0, least=0):
        fields["shared_expert_hidden_size"] = inner * shared
    width = keys.take_int("intermediate_size")
    if fields["num_dense_layers"]:
        fields["ffn_hidden_size"] = width
    groups, chosen = keys.take_int_or("n_group", 1), keys.take_int_or("topk_group", 1)
    if chosen < groups:
        if top_k // chosen != 2:
            keys.refuse(
                "topk_group",
                chosen,
                f"groups are ranked by their best num_experts_per_tok / topk_group = {top_k // chosen} scores, "
                "this architecture's by their best 2",
            )
        fields |= {"num_expert_groups": groups, "top_k_groups": chosen}
    _require_base(keys, fields)


def _glm4_moe(keys: _Keys, fields: Fields) -> None:
    fields["qkv_bias"] = keys.take_flag_or("attention_bias", False)
    fields["qk_norm"] = keys.take_flag_or("use_qk_norm", False)
    fields.setdefault("rotary_percent", 0.5)
    _sigmoid_experts(keys, fields)


def _dots1(keys: _Keys, fields: Fields) -> None:
    keys.expect("attention_bias", False)
    fields["qk_norm"] = True
    _sigmoid_experts(keys, fields)
    _refuse_window(keys, fields, active=keys.take_int_or("max_window_layers", 62, least=0) < fields["num_layers"])


def _require_base(keys: _Keys, fields: Fields) -> None:
    if "rope_base" not in fields:
        keys.take("rope_theta")


_ARCHITECTURES: dict[str, Callable[[_Keys, Fields], None]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
}
