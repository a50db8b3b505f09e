"""Attention over many tokens on a CPU, where MLX's own multiplies with the keys slowly.

MLX's CPU backend computes all scores at once, by a product with a transposed view of the keys. Its
BLAS takes more than twice as long for that as for a product with keys that are stored transposed.
And half of a causal prompt's scores are masked: a piece of the queries needs only the keys that it
can see.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

# Queries in a piece, and the number of queries from which transposing the keys pays (NOTES.md,
# "Causal attention on a CPU").
PIECE = 256
FROM = 16


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
    on_cpu = mx.default_device() == mx.cpu and isinstance(k, mx.array)
    if on_cpu and isinstance(mask, str) and q.shape[2] >= FROM:
        return _in_pieces(q, k, v, scale)
    return scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)


def _in_pieces(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Returns causal attention, computed :data:`PIECE` queries at a time."""
    B, nh, L, hd = q.shape
    nkv, S = k.shape[1:3]
    q = (q * scale).reshape(B, nkv, nh // nkv, L, hd)
    k = mx.contiguous(k.swapaxes(-1, -2))  # [B, nkv, hd, S]
    pieces = []
    for start in range(0, L, PIECE):
        piece = q[:, :, :, start : start + PIECE]
        P = piece.shape[3]
        seen = S - L + start + P
        scores = piece.reshape(B, nkv, -1, hd) @ k[..., :seen]
        scores = scores.reshape(B, nkv, -1, P, seen)
        scores = mx.where(mx.tri(P, seen, seen - P, mx.bool_), scores, -mx.inf)
        weights = mx.softmax(scores, axis=-1, precise=True)
        o = weights.reshape(B, nkv, -1, seen) @ v[:, :, :seen]
        pieces.append(o.reshape(B, nh, P, hd))
    return mx.concatenate(pieces, axis=2)
