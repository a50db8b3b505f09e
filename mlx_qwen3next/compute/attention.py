"""The parts of gated attention beside the attention itself, in MLX's own operations."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from .norms import rms_norm
from .rope import Rope, head_factors, wavelengths


def attention_heads(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    eps: float,
    heads: int,
    kv_heads: int,
    rope: Rope,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns attention's q and k, normalised and rotated, and v, from the packed projection.

    Args:
        x: ``[B, L, (2 nh + 2 nkv) hd]``, rows ``[q | k | v | gate]``, head after head.
        q_weight, k_weight: ``[hd]``, effective (1 + w).
        offset: the position of the first token, one or ``[B]``.

    Returns:
        q ``[B, nh, L, hd]``, k and v ``[B, nkv, L, hd]``.
    """
    if rope.attention_factor != 1:  # a rotation may be scaled before it as well
        factors = head_factors(rope, q_weight.shape[0])
        q_weight, k_weight = q_weight * factors, k_weight * factors
    q, k, v = normalised_heads(x, q_weight, k_weight, eps=eps, heads=heads, kv_heads=kv_heads)
    freqs = wavelengths(rope)
    q, k = (
        mx.fast.rope(
            *(y, rope.dims), traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs
        )
        for y in (q, k)
    )
    return q, k, v


def normalised_heads(
    x: mx.array, q_weight: mx.array, k_weight: mx.array, *, eps: float, heads: int, kv_heads: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns q, k and v as :func:`attention_heads`, before the rotation."""
    B, L, _ = x.shape
    ends = [heads, heads + kv_heads, heads + 2 * kv_heads]
    x = x.reshape(B, L, 2 * heads + 2 * kv_heads, -1)
    q, k, v, _ = (y.transpose(0, 2, 1, 3) for y in mx.split(x, ends, axis=2))
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), v


def attention_gate(o: mx.array, x: mx.array, *, kv_heads: int) -> mx.array:
    """Returns attention's output times the sigmoid of its gate.

    Args:
        o: ``[B, nh, L, hd]``. x: as for :func:`attention_heads`.

    Returns:
        ``[B, L, nh hd]``.
    """
    B, nh, L, hd = o.shape
    gate = x[..., (nh + 2 * kv_heads) * hd :]
    return _gated(o.transpose(0, 2, 1, 3).reshape(B, L, nh * hd), gate)


@partial(mx.compile, shapeless=True)
def _gated(x: mx.array, gate: mx.array) -> mx.array:
    return x * mx.sigmoid(gate)
