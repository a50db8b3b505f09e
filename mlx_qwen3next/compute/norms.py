"""RMSNorm, its gated form and the l2 norm, in MLX's own operations; float32 inside.

The equations are in :mod:`mlx_qwen3next.compute.reference`, and the tests hold the two together.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx_lm.models.activations import precise_swiglu

L2_EPS = 1e-6  # fixed in the reference implementation; not rms_norm_eps


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Returns RMSNorm with the effective float32 weight (1 + w), in the dtype of ``x``."""
    return _rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def _rms_norm(x: mx.array, weight: mx.array | float, eps: float) -> mx.array:
    """Returns ``weight x / sqrt(mean(x^2) + eps)``, float32.

    MLX's own function takes eight operations on a CPU; this form takes three.
    """
    if mx.default_device() == mx.cpu:
        squares = mx.square(x).sum(axis=-1, keepdims=True)
        return _divided(x, squares, weight, 1 / x.shape[-1], eps)
    if isinstance(weight, mx.array) and weight.ndim == 1:
        return mx.fast.rms_norm(x, weight, eps)
    return mx.fast.rms_norm(x, None, eps) * weight


@partial(mx.compile, shapeless=True)
def _divided(
    x: mx.array, squares: mx.array, weight: mx.array | float, share: float, eps: float
) -> mx.array:
    return x * mx.rsqrt(squares * share + eps) * weight


def add_rms_norm(
    x: mx.array, y: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Returns the residual stream after a layer's part, ``x + y``, and its :func:`rms_norm`."""
    total, exact = _sum(x, y)
    return total, _rms_norm(exact, weight, eps).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _sum(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """Returns the sum, and the same in float32."""
    total = x + y
    return total, total.astype(mx.float32)


def gated_rms_norm(x: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Returns ``weight norm(x) silu(z)``: ``x`` ``[..., Dv]`` float32, in the dtype of ``z``."""
    y = _rms_norm(x, weight.astype(mx.float32), eps)
    return precise_swiglu(z, z, y)


def l2norm(x: mx.array, scale: mx.array | float = 1.0) -> mx.array:
    """Returns ``scale x rsqrt(sum(x^2) + 1e-6)`` over the last axis, float32.

    Args:
        scale: one, or an array ``[..., 1]``.
    """
    D = x.shape[-1]  # the mean of squares is their sum over D
    return _rms_norm(x.astype(mx.float32), scale * D**-0.5, L2_EPS / D)
