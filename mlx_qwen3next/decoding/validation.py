"""Checks of generation's arguments: prompts, caches, lengths.

All raise a ValueError that says what came and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from ..errors import ContextLengthError
from ..model.cache import AttentionCache, Cache, GatedDeltaCache, MTPCache, settle, tokens_held
from ..model.config import Config
from ..model.quantized_kv import QuantizedAttentionCache
from ..model.qwen3_next import Model
from .sampling import check_integer

KV_BITS = (2, 3, 4, 5, 6, 8)  # what mx.quantize takes
KV_GROUP_SIZES = (32, 64, 128)


def check_kv_quantization(
    head_dim: int, kv_bits: int | None, kv_group_size: int, quantized_kv_start: int
) -> None:
    """Checks the quantization of keys and values.

    Raises:
        ValueError: MLX or the model cannot do that.
    """
    if kv_bits is None:
        return
    check_integer("quantized_kv_start", quantized_kv_start, least=0)
    if kv_bits not in KV_BITS:
        raise ValueError(f"kv_bits must be one of {KV_BITS}, got {kv_bits!r}")
    if kv_group_size not in KV_GROUP_SIZES or head_dim % kv_group_size:
        raise ValueError(
            f"kv_group_size must be one of {KV_GROUP_SIZES} and divide this model's head_dim "
            f"({head_dim}), got {kv_group_size!r}"
        )


def check_max_tokens(max_tokens: int) -> int:
    """Returns ``max_tokens`` if it is a positive integer or -1.

    Raises:
        ValueError: it is something else.
    """
    if max_tokens != -1:
        check_integer("max_tokens (-1 for no limit)", max_tokens, least=1)
    return max_tokens


def check_prompt(prompt: mx.array | Sequence[int], model: Model) -> mx.array:
    """A prompt's tokens ``[L]`` uint32.

    Raises:
        ValueError: it is empty, not one sequence, or has tokens that the model does not know.
    """
    vocab = model.args.vocab_size
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # ragged, or bfloat16
        raise ValueError("the prompt must be one sequence of token ids") from None
    if tokens.size == 0:
        raise ValueError("the prompt is empty")
    if tokens.ndim != 1:
        raise ValueError(
            f"the prompt must be one sequence of token ids, got shape {list(tokens.shape)}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"the prompt must be token ids (integers), got {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"the prompt holds a token id outside 0…{vocab - 1}")
    return mx.array(tokens.astype(np.uint32))  # the dtype of mx.argmax


def held_by(model: Model, cache: Cache) -> int:
    """The number of tokens in a cache; in a pipeline some ranks have no layer that knows it."""
    return max(model.group.gather("held", tokens_held(cache)))


def check_cache(cache: Cache, model: Model) -> Cache:
    """Returns ``cache``, with entries that mlx-lm's own model made replaced by ours in place.

    Raises:
        ValueError: it does not fit the model.
    """
    layers = model.layers
    lengths = (len(layers), len(layers) + (model.mtp is not None))
    if not isinstance(cache, list) or len(cache) not in lengths:
        got = f"{len(cache)} entries" if isinstance(cache, list) else repr(cache)
        raise ValueError(
            f"prompt_cache must be a list with an entry for each of the model's {len(layers)} "
            f"layers, as model.make_cache() makes it, got {got}"
        )
    ours: dict[type, Any] = {
        ArraysCache: GatedDeltaCache,
        KVCache: AttentionCache,
        QuantizedKVCache: QuantizedAttentionCache,
    }
    own = [ours[type(c)].from_state(c.state) if type(c) in ours else c for c in cache]
    settle(own)
    fits = [_fits_linear if layer.is_linear else _fits_attention for layer in layers]
    for i, entry in enumerate(own):
        if not (fits[i] if i < len(fits) else _fits_head)(entry, model.args):
            whose = f"layer {i}" if i < len(fits) else "the MTP head"
            raise ValueError(
                f"prompt_cache[{i}] ({type(entry).__name__}) does not fit {whose} of this model; "
                "use what its make_cache() made"
            )
    held = held_by(model, own[: len(fits)])
    for head in own[len(fits) :]:
        if head.hidden is not None and head.offset + 1 != held:
            head.offset, head.hidden = 0, None  # of another text: drafts begin anew
    cache[:] = own
    return cache


def _fits_linear(entry: Any, c: Config) -> bool:
    rows = (1, c.linear_conv_kernel_dim - 1, c.linear_conv_dim)
    state = (1, c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
    return isinstance(entry, GatedDeltaCache) and (
        entry.empty() or [x.shape for x in entry.cache if x is not None] == [rows, state]
    )


def _fits_attention(entry: Any, c: Config) -> bool:
    quantized = isinstance(entry, QuantizedKVCache)
    if not quantized and not isinstance(entry, KVCache):
        return False
    if entry.empty():
        return True
    keys = entry.keys[1] if quantized else entry.keys  # [1]: the scales, one a group
    B, nkv, _, columns = keys.shape
    hd = columns * entry.group_size if quantized else columns
    return (B, nkv, hd) == (1, c.num_key_value_heads, c.head_dim)


def _fits_head(entry: Any, c: Config) -> bool:
    return (
        isinstance(entry, MTPCache)
        and _fits_attention(entry, c)
        and (entry.hidden is None or entry.hidden.shape == (1, 1, c.hidden_size))
    )


def token_budget(model: Model, positions: int, max_tokens: int) -> int:
    """The number of tokens to generate after ``positions`` of prompt and cache.

    Args:
        max_tokens: the most that are asked for; -1 for as many as the context takes.

    Raises:
        ContextLengthError: the prompt is longer than the context.
        ValueError: ``max_tokens`` is no number of tokens.
    """
    limit = model.args.max_position_embeddings
    check_max_tokens(max_tokens)
    if positions > limit:
        raise ContextLengthError(
            f"the prompt is {positions} tokens long (cached ones included), but this model's "
            f"max_position_embeddings is {limit}; shorten it",
            positions,
            limit,
        )
    room = max(1, limit - positions)
    return room if max_tokens == -1 else min(max_tokens, room)
