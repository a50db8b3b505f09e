"""DFlash: a drafter that reads chosen layers' hidden states and drafts a block of tokens at once.

With s_i the outputs of the target's chosen layers at token i, one after the other, and B the size
of a block::

    c_i = hidden_norm(fc(s_i))                      of every verified token that the target has read
    x_0 … x_{B-1} = embed(t_p, mask, …, mask)       t_p the last token, which it has not read
    x = x + attention(input_layernorm(x), c_<p)     in each layer, keys and values from both
    x = x + mlp(post_attention_layernorm(x))
    m = norm(x)                                     logits(m_j) predict t_{p+j}, for j = 1 … B - 1

Each layer's keys and values of c are made by the same projections as the block's, and hold for all
later blocks; c_i is at position i, x_j at position p + j. Nothing is masked: the block's tokens see
each other. Embedding and output are the target's. Attention is Qwen3's: norms of queries and keys,
RoPE on whole heads, no biases.

Chen, Liang and Liu 2026, "DFlash: Block Diffusion for Flash Speculative Decoding" (arXiv
2602.06036), and the authors' implementation (github.com/z-lab/dflash).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache import AttentionCache, Cache
from .config import from_json, read_integer, read_number, read_rope
from .qwen3_next import MLP, RMSNorm

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "block_size",
    "num_target_layers",
)


@dataclass(frozen=True)
class DFlashConfig:
    """The contents of a drafter's ``config.json``, validated; names are the checkpoint's.

    Raises:
        ValueError: a value is missing, of the wrong kind, or impossible; the message names it.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_size: int
    num_target_layers: int
    rms_norm_eps: float
    rope_theta: float
    mask_token_id: int
    target_layer_ids: tuple[int, ...]

    @classmethod
    def from_file(cls, path: str | Path) -> DFlashConfig:
        """Reads ``config.json``. Errors name the file."""
        return from_json(path, cls.from_dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DFlashConfig:
        """Reads the hub's form. Unknown keys are ignored."""
        own = raw.get("dflash_config")
        if not isinstance(own, Mapping):
            raise ValueError("this is no DFlash drafter: the config lacks dflash_config")
        if missing := [key for key in (*_SIZES, "rms_norm_eps") if raw.get(key) is None]:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if raw.get("attention_bias"):
            raise ValueError("attention_bias is true; no DFlash drafter of Qwen3's form has biases")
        if (act := raw.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act is {act!r}; a DFlash drafter of Qwen3's form uses 'silu'")
        if set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError("layer_types has others than full_attention, which alone is supported")
        rope = read_rope(raw)
        if rope["rope_type"] != "default":
            raise ValueError(f"rope_type is {rope['rope_type']!r}; a DFlash drafter uses 'default'")
        sizes = {key: read_integer(raw, key) for key in _SIZES}
        layers = own.get("target_layer_ids")
        if layers is None:
            layers = spread_layers(sizes["num_target_layers"], sizes["num_hidden_layers"])
        # The last layer's output is not handed out.
        if not _are_integers(layers, 0, sizes["num_target_layers"] - 2):
            raise ValueError(
                "target_layer_ids must list layers that another follows, of "
                f"{sizes['num_target_layers']}, got {layers!r}"
            )
        mask: Any = own.get("mask_token_id")
        if not _are_integers([mask], 0, sizes["vocab_size"] - 1):
            raise ValueError(f"mask_token_id must be a token id, got {mask!r}")
        return cls(
            **sizes,
            rms_norm_eps=read_number(raw, "rms_norm_eps"),
            rope_theta=read_number(rope, "rope_theta"),
            mask_token_id=mask,
            target_layer_ids=tuple(layers),
        )

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not divisible by "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")


def _are_integers(values: Any, least: int, most: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) > 0
        and all(type(i) is int and least <= i <= most for i in values)
    )


def spread_layers(target_layers: int, draft_layers: int) -> list[int]:
    """The target's layers that a drafter reads where its config names none: evenly from the second
    to the last but two, and the middle one for a drafter of one layer."""
    if draft_layers == 1:
        return [target_layers // 2]
    step = (target_layers - 4) / (draft_layers - 1)
    return [round(1 + i * step) for i in range(draft_layers)]


class BlockAttention(nn.Module):
    """Attention of a block's tokens to the verified tokens and to each other, unmasked."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        H, hd, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.hd, self.rope_theta = hd, config.rope_theta
        self.q_proj = nn.Linear(H, config.num_attention_heads * hd, bias=False)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * hd, bias=False)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, H, bias=False)
        self.q_norm, self.k_norm = RMSNorm(hd, eps), RMSNorm(hd, eps)

    def keys_and_values(self, x: mx.array, position: int) -> tuple[mx.array, mx.array]:
        """Keys and values ``[B, nkv, L, hd]`` of ``x`` ``[B, L, H]``, the first at ``position``."""
        k = self._turned(self.k_norm(self._heads(self.k_proj(x))), position)
        return k, self._heads(self.v_proj(x))

    def __call__(self, x: mx.array, cache: AttentionCache, position: int) -> mx.array:
        """Returns ``[B, L, H]``, as ``x``; the cache takes the block's keys and values as well."""
        q = self._turned(self.q_norm(self._heads(self.q_proj(x))), position)
        k, v = cache.update_and_fetch(*self.keys_and_values(x, position))
        o = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.hd**-0.5)
        return self.o_proj(o.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self.hd).swapaxes(1, 2)

    def _turned(self, x: mx.array, position: int) -> mx.array:
        return mx.fast.rope(
            x, self.hd, traditional=False, base=self.rope_theta, scale=1.0, offset=position
        )


class BlockLayer(nn.Module):
    """Attention, then an MLP, each residual."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = BlockAttention(config)
        self.mlp = MLP(H, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(H, eps), RMSNorm(H, eps)

    def __call__(self, x: mx.array, cache: AttentionCache, position: int) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache, position)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlash(nn.Module):
    """The drafter; parameters are the checkpoint's."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * H, H, bias=False)
        self.hidden_norm, self.norm = RMSNorm(H, eps), RMSNorm(H, eps)
        self.layers = [BlockLayer(config) for _ in range(config.num_hidden_layers)]

    def read(self, states: mx.array, cache: Cache, position: int) -> None:
        """Adds the keys and values of verified tokens to the cache.

        Args:
            states: s_i ``[1, L, n H]``, the outputs of the n target layers, one after the other.
            position: of the first of these tokens.
        """
        context = self.hidden_norm(self.fc(states))
        for layer, entry in zip(self.layers, cache, strict=True):
            entry.update_and_fetch(*layer.self_attn.keys_and_values(context, position))

    def __call__(self, x: mx.array, cache: Cache, position: int) -> mx.array:
        """Returns m ``[1, B, H]`` for the embeddings ``x`` ``[1, B, H]`` of a block.

        Args:
            cache: holds what :meth:`read` has added, and is left so.
            position: of the block's first token.
        """
        before = cache[0].offset
        try:
            for layer, entry in zip(self.layers, cache, strict=True):
                x = layer(x, entry, position)
        finally:
            for entry in cache:
                entry.trim(entry.offset - before)
        return self.norm(x)

    def make_cache(self) -> Cache:
        """Returns an empty cache, one entry a layer."""
        return [AttentionCache() for _ in self.layers]
