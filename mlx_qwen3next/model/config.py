"""The model's configuration: one frozen dataclass from either config dialect.

The hub's files (``rope_theta``, ``rope_scaling``, ``full_attention_interval``) and transformers
5's (``rope_parameters``, ``layer_types``) describe the same model, and both become a
:class:`Config`. A model that cannot be run is refused here, by the value's name.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..compute.rope import Rope, Yarn

C = TypeVar("C")

MODEL_TYPE = "qwen3_next"

# Keys without which no Qwen3-Next can be built; the rest have the family's defaults.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "rms_norm_eps",
)
_MOE_REQUIRED = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
# Other bounds than "at least 1": a convolution of one tap mixes no tokens.
_LEAST = {"linear_conv_kernel_dim": 2, "num_experts": 0, "intermediate_size": 0}
_MOST = {"num_hidden_layers": 10_000}
_LARGEST = 2**31 - 1  # of MLX's dimensions


@dataclass(frozen=True)
class Config:
    """The contents of a Qwen3-Next checkpoint's ``config.json``, validated.

    Names are the checkpoint's. ``layer_types`` holds ``"linear_attention"`` or
    ``"full_attention"`` per layer; ``quantization`` is mlx-lm's mapping (``group_size``, ``bits``,
    ``mode`` and per-path entries) or None. Other libraries' ``quantization_config`` is not read:
    whether weights are quantized shows in the tensors. With ``rope_scaling``,
    ``max_position_embeddings`` is the stretched length.

    Raises:
        ValueError: a value is missing, of the wrong kind, or impossible; the message names it.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    layer_types: tuple[str, ...]
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    norm_topk_prob: bool
    tie_word_embeddings: bool
    rope_scaling: Yarn | None = None
    quantization: Mapping[str, Any] | None = None
    model_type: str = MODEL_TYPE

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Reads either dialect. Unknown keys are ignored, as in transformers."""
        model_type = raw.get("model_type")
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type is {model_type!r}; this package runs {MODEL_TYPE!r} only. "
                "mlx_lm.generate and mlx_lm.server run other models."
            )
        required = _REQUIRED + (_MOE_REQUIRED if raw.get("num_experts") else ())
        if missing := [key for key in required if raw.get(key) is None]:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if raw.get("attention_bias"):
            raise ValueError("attention_bias is true; no Qwen3-Next checkpoint has biases")
        if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {act!r}; Qwen3-Next uses 'silu'")

        layers = read_integer(raw, "num_hidden_layers")
        rope = read_rope(raw)
        positions = read_integer(raw, "max_position_embeddings", default=32768)
        scaling = _yarn(rope, positions) if rope["rope_type"] == "yarn" else None
        counts: dict[str, Any] = dict.fromkeys(_MOE_REQUIRED, 0)
        counts |= {key: read_integer(raw, key) for key in required if key != "rms_norm_eps"}
        return cls(
            **counts,
            rms_norm_eps=read_number(raw, "rms_norm_eps"),
            layer_types=_layer_types(raw, layers),
            rope_theta=read_number(rope, "rope_theta"),
            partial_rotary_factor=read_number(rope, "partial_rotary_factor", default=0.25),
            max_position_embeddings=positions
            if scaling is None
            else max(positions, scaling.length),
            intermediate_size=read_integer(raw, "intermediate_size", default=0),
            decoder_sparse_step=read_integer(raw, "decoder_sparse_step", default=1),
            mlp_only_layers=_layer_list(raw, "mlp_only_layers", layers),
            norm_topk_prob=_flag(raw, "norm_topk_prob", default=True),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", default=False),
            rope_scaling=scaling,
            quantization=_quantization(raw),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Reads ``config.json``. Errors name the file."""
        return from_json(path, cls.from_dict)

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads ({heads}) is not divisible by "
                f"num_key_value_heads ({kv_heads})"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads ({self.linear_num_value_heads}) is not divisible by "
                f"linear_num_key_heads ({self.linear_num_key_heads})"
            )
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dims % 2 or not self.rotary_dims:
            raise ValueError(
                f"partial_rotary_factor ({self.partial_rotary_factor}) of head_dim "
                f"({self.head_dim}) is {self.head_dim * self.partial_rotary_factor} dims; "
                "it must be a positive even number, at most head_dim"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds "
                f"num_experts ({self.num_experts})"
            )
        if self.rope_scaling and self.rope_theta <= 1:
            raise ValueError(f"rope_theta ({self.rope_theta}) must be above 1 for YaRN")
        dense = [i for i in range(self.num_hidden_layers) if not self.is_sparse(i)]
        if dense and not self.intermediate_size:
            raise ValueError(f"layer {dense[0]} is dense, but the config lacks intermediate_size")

    def with_rope_scaling(self, scaling: Mapping[str, Any]) -> Config:
        """Returns this config with another scaling of the original length.

        Args:
            scaling: as ``rope_scaling`` in a config file, such as
                ``{"rope_type": "yarn", "factor": 4.0}``.

        Raises:
            ValueError: a value of it is wrong.
        """
        before, positions = self.rope_scaling, self.max_position_embeddings
        original = positions if before is None else before.original_max_position_embeddings
        changes = {"max_position_embeddings": original, "rope_scaling": scaling}
        return Config.from_dict(self.to_dict() | changes)

    def is_linear(self, layer: int) -> bool:
        """Returns whether the layer mixes tokens by Gated DeltaNet (else by gated attention)."""
        return self.layer_types[layer] == "linear_attention"

    def is_sparse(self, layer: int) -> bool:
        """Returns whether the layer's MLP is a mixture of experts (else dense)."""
        return (
            layer not in self.mlp_only_layers
            and self.num_experts > 0
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def rope(self) -> Rope:
        """The rotary position embedding."""
        return Rope(self.rotary_dims, self.rope_theta, self.rope_scaling)

    @property
    def rotary_dims(self) -> int:
        """The number of a head's dimensions that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_key_dim(self) -> int:
        """Hk * Dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """Hv * Dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_dim(self) -> int:
        """Channels of the causal convolution over [Q | K | V]."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as a plain dict that :meth:`from_dict` reads back."""
        raw = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in raw.items()}


def from_json(path: str | Path, parse: Callable[[dict[str, Any]], C]) -> C:
    """Returns what ``parse`` makes of the object in a JSON file.

    Raises:
        ValueError: the file cannot be read, or ``parse`` refuses it; the message names the file.
    """
    raw = read_json(path)
    try:
        return parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: the file cannot be read or holds none; the message names it.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, not a JSON object")
    return raw


def read_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns RoPE's options of either dialect by name; ``rope_scaling`` wins, as there."""
    merged = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    merged["rope_type"] = "default"
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{key} is {rope!r}, not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise ValueError(
                f"rope_type of {key} is {kind!r}; 'default' and 'yarn' are what this package runs"
            )
        merged |= {name: value for name, value in rope.items() if value is not None}
        merged["rope_type"] = kind if rope else merged["rope_type"]
    if merged["rope_theta"] is None:
        raise ValueError("the config lacks rope_theta")
    return merged


def _yarn(rope: Mapping[str, Any], positions: int) -> Yarn:
    """Returns YaRN's options, with transformers' defaults; ``positions`` of the config."""
    original = read_integer(rope, "original_max_position_embeddings", default=positions)
    factor = read_number(rope, "factor", default=positions / original)
    fast, slow = (
        read_number(rope, key, default=turns)
        for key, turns in (("beta_fast", 32), ("beta_slow", 1))
    )
    if factor < 1 or factor * original > _LARGEST:
        raise ValueError(
            f"factor must be at least 1, and {original} positions times it at most {_LARGEST}, "
            f"got {factor}"
        )
    if fast < slow:
        raise ValueError(f"beta_fast ({fast}) must be at least beta_slow ({slow})")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1

    attention = magnitude(1)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = magnitude(read_number(rope, "mscale")) / magnitude(
            read_number(rope, "mscale_all_dim")
        )
    return Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=read_number(rope, "attention_factor", default=attention),
        beta_fast=fast,
        beta_slow=slow,
        truncate=_flag(rope, "truncate", default=True),
    )


def _layer_types(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    types = raw.get("layer_types")
    if types is None:
        interval = read_integer(raw, "full_attention_interval", default=4)
        return tuple(
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
        )
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        raise ValueError(f"layer_types must be a list of {layers} names, got {types!r}")
    if unknown := sorted(set(map(str, types)) - {"linear_attention", "full_attention"}):
        raise ValueError(f"layer_types has unknown {unknown}")
    return tuple(types)


def _layer_list(raw: Mapping[str, Any], key: str, layers: int) -> tuple[int, ...]:
    value = raw.get(key)
    value = [] if value is None else value
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers for i in value
    ):
        raise ValueError(f"{key} must list layer indices below {layers}, got {value!r}")
    return tuple(value)


def _quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = raw.get("quantization")
    if value is not None and (
        not isinstance(value, Mapping) or not {"group_size", "bits"} <= set(value)
    ):
        raise ValueError(f"quantization must give group_size and bits, got {value!r}")
    return value


def read_integer(raw: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be an integer, got {value!r}")
    least, most = _LEAST.get(key, 1), _MOST.get(key, _LARGEST)
    if not least <= value <= most:
        raise ValueError(f"{key} must be within {least} and {most}, got {value}")
    return value


def read_number(raw: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number, got {value!r}")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} must be positive and finite, got {value}")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value
