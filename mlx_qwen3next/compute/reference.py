"""The equations of the hybrid stack, one token at a time, in float32. Never optimised.

This is the oracle: the rest of this room must compute the same values, whatever form it takes.
Symbols: B batch, L tokens, Hk/Hv linear key/value heads, Dk/Dv their widths, r = Hv / Hk, E
experts, K convolution taps. Argument order is ``(q, k, v, g, beta, state)``.

Sources: Yang et al. 2024, "Gated Delta Networks" (eq. 10), and transformers'
``modeling_qwen3_next.py`` (``torch_recurrent_gated_delta_rule``, ``Qwen3NextRMSNormGated``,
``Qwen3NextTopKRouter``).
"""

from __future__ import annotations

import mlx.core as mx


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Applies the gated delta rule: ``S = S exp(g); d = beta (v - S k); S = S + d k^T; o = S q``.

    Args:
        q, k: ``[B, L, Hk, Dk]``, already normalised and scaled (see :func:`l2norm`).
        v: ``[B, L, Hv, Dv]``. Key head j serves value heads ``j r … j r + r - 1``.
        g: ``[B, L, Hv]``, the logarithm of the decay, at most 0.
        beta: ``[B, L, Hv]`` in (0, 1), how much of the prediction error is written.
        state: ``[B, Hv, Dv, Dk]`` or None for zeros.

    Returns:
        ``o`` ``[B, L, Hv, Dv]`` and the state after the last token, both float32.
    """
    q, k, v, g, beta = (x.astype(mx.float32) for x in (q, k, v, g, beta))
    B, L, Hv, Dv = v.shape
    Hk, Dk = k.shape[2:]
    q = mx.repeat(q, Hv // Hk, axis=2)
    k = mx.repeat(k, Hv // Hk, axis=2)
    S = mx.zeros((B, Hv, Dv, Dk)) if state is None else state.astype(mx.float32)
    outputs = []
    for t in range(L):
        S = S * mx.exp(g[:, t])[..., None, None]
        predicted = (S * k[:, t, :, None, :]).sum(axis=-1)  # [B, Hv, Dv]
        delta = beta[:, t, :, None] * (v[:, t] - predicted)
        S = S + delta[..., None] * k[:, t, :, None, :]
        outputs.append((S * q[:, t, :, None, :]).sum(axis=-1))
    return mx.stack(outputs, axis=1), S


def causal_conv(x: mx.array, weight: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """Applies the depthwise causal convolution, then SiLU; tap K-1 meets the current token.

    Args:
        x: ``[B, L, C]``. weight: ``[C, K, 1]`` (MLX's layout). state: ``[B, K-1, C]``, the inputs
            before ``x``.

    Returns:
        ``[B, L, C]`` and the new state (the last K-1 inputs), both float32.
    """
    K = weight.shape[1]
    rows = mx.concatenate([state, x], axis=1).astype(mx.float32)
    taps = weight[:, :, 0].astype(mx.float32)
    outputs = []
    for t in range(x.shape[1]):
        y = mx.zeros_like(rows[:, 0])
        for j in range(K):
            y = y + rows[:, t + j] * taps[:, j]
        outputs.append(y * mx.sigmoid(y))
    return mx.stack(outputs, axis=1), rows[:, x.shape[1] :]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Returns ``x rsqrt(mean(x^2) + eps) weight`` in float32; weight is 1 + w of a checkpoint."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(mx.float32)


def gated_rms_norm(x: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Returns ``weight norm(x) silu(z)`` in float32, norm first; the weight has no ``+ 1``."""
    z = z.astype(mx.float32)
    return rms_norm(x, weight, eps) * z * mx.sigmoid(z)


def l2norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """Returns ``x rsqrt(sum(x^2) + eps)`` in float32. The eps is not ``rms_norm_eps``."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + eps)


def decay(a: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    """Returns the log decay ``g = -exp(A_log) softplus(a + dt_bias)``, float32, as ``a``."""
    a = a.astype(mx.float32) + dt_bias.astype(mx.float32)
    return -mx.exp(A_log.astype(mx.float32)) * mx.logaddexp(a, mx.array(0.0))


def route(logits: mx.array, top_k: int, normalise: bool) -> tuple[mx.array, mx.array]:
    """Routes by a softmax over all experts in float32: top k, largest first, ties by lowest index.

    Args:
        logits: ``[..., E]``.

    Returns:
        ``(experts, weights)``, each ``[..., top_k]``: int32 and float32; the weights sum to one
        if ``normalise``.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    experts = mx.argsort(-probabilities, axis=-1)[..., :top_k].astype(mx.int32)
    weights = mx.take_along_axis(probabilities, experts, axis=-1)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts, weights
