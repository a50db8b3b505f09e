"""Attention over many tokens on a CPU, block by block, on all cores.

MLX's CPU backend computes all scores at once, on one core, by a product with a transposed view of
the keys. Its BLAS takes more than twice as long for that as for a product with keys that are stored
transposed, and for blocks of keys that leave the cache. Half of a causal prompt's scores are
masked besides. Here a piece of the queries meets the keys that it can see a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from .cpu_streams import in_turn

# Queries in a piece, keys in a block, and the number of queries from which transposing the keys
# pays (NOTES.md, "Causal attention on a CPU").
PIECE, BLOCK = 128, 1024
FROM = 16
# Scores from which on several cores compute them.
MANY = 1 << 22


def attention(
    q: mx.array, k: Any, v: Any, *, scale: float, mask: Any, cache: Any = None
) -> mx.array:
    """Returns ``softmax(scale q k^T) v`` for grouped queries; the arguments are mlx-lm's.

    Args:
        q: ``[B, nh, L, hd]``. k, v: ``[B, nkv, S, hd]``, the last L of them the queries' own, or
            the tuples of a quantized cache.
        mask: None, "causal", or an array.

    Returns:
        ``[B, nh, L, hd]``.
    """
    many = q.shape[2] >= FROM
    if many and not isinstance(k, mx.array):
        # Products with quantized matrices are for few rows.
        size, bits = cache.group_size, cache.bits
        k, v = (mx.dequantize(w, scales, biases, size, bits) for w, scales, biases in (k, v))
        cache = None
    if many and isinstance(mask, str) and mx.default_device() == mx.cpu:
        return _in_pieces(q, k, v, scale)
    return scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)


def _in_pieces(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Returns causal attention, :data:`PIECE` queries of a key head's group at a time."""
    B, nh, L, hd = q.shape
    nkv, S = k.shape[1:3]
    k = mx.contiguous(k.swapaxes(-1, -2))  # [B, nkv, hd, S]
    queries = _of_heads((q * scale).reshape(B, nkv, nh // nkv, L, hd))
    heads = list(zip(queries, _of_heads(k), _of_heads(v), strict=True))
    pieces = [
        partial(_piece, q[:, start : start + PIECE], k, v, S - L + start)
        for start in range(0, L, PIECE)
        for q, k, v in heads
    ]
    results = in_turn(pieces, several=B * nh * L * S >= MANY)
    return mx.concatenate(
        [
            mx.stack(results[i : i + len(heads)]).reshape(B, nh, -1, hd)
            for i in range(0, len(results), len(heads))
        ],
        axis=2,
    )


def _piece(
    q: mx.array, k: mx.array, v: mx.array, offset: int, after: Sequence[mx.array]
) -> mx.array:
    """Returns the causal attention of some heads' queries to one head's keys.

    The softmax is Milakov and Gimelshein's 2018, "Online normalizer calculation for softmax": the
    sums so far are scaled anew whenever a block has a higher score.

    Args:
        q: ``[r, P, hd]``, at the positions from ``offset`` on.
        k: ``[hd, S]``. v: ``[S, hd]``.
        after: arrays to be computed before. MLX would otherwise compute the scores of all blocks
            first, and keep them.

    Returns:
        ``[r, P, hd]``.
    """
    r, P, hd = q.shape
    seen, rows = offset + P, q.reshape(-1, hd).astype(mx.float32)
    top, total, o = mx.array(-mx.inf), mx.array(0.0), mx.array(0.0)
    for start in range(0, seen, BLOCK):
        end = min(start + BLOCK, seen)
        scores = mx.depends(rows, after) @ k[:, start:end].astype(mx.float32)
        if end > offset + 1:  # the first query does not see all
            visible = mx.tri(P, end - start, offset - start, mx.bool_)
            scores = mx.where(visible, scores.reshape(r, P, -1), -mx.inf).reshape(r * P, -1)
        higher = mx.maximum(top, scores.max(axis=-1, keepdims=True))
        weights, shrunk = mx.exp(scores - higher), mx.exp(top - higher)
        total = total * shrunk + weights.sum(axis=-1, keepdims=True)
        o = o * shrunk + weights @ v[start:end].astype(mx.float32)
        top, after = higher, (o, total)
    return (o / total).astype(q.dtype).reshape(q.shape)


def _of_heads(x: mx.array) -> list[mx.array]:
    """Returns views of each head of each sequence; ``x`` is ``[B, nkv, ...]``."""
    return [
        head.squeeze((0, 1))
        for row in mx.split(x, x.shape[0])
        for head in mx.split(row, x.shape[1], 1)
    ]
