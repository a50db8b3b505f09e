"""What the model computes, in MLX's own operations, in the fastest right form for this device.

Every function here has its equation in :mod:`mlx_qwen3next.compute.reference`; the tests hold the
two together. Symbols and argument order are the reference's. Those that
:mod:`mlx_qwen3next.compute.operations` has Metal kernels for are what a kernel is measured against.

The delta rule has three forms: token by token (:func:`gated_delta_steps`: decoding, and rounds
that may roll back), MLX's own GPU kernel, and :func:`gated_delta_chunked` in plain MLX ops for
prefill on other devices and for training. :func:`gated_delta` picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import precise_swiglu, swiglu

from ..metal_kernels import Experts, available
from . import cpu_matmul
from .cpu_matmul import Columns
from .proof import set_kernels as set_kernels

L2_EPS = 1e-6  # fixed in the reference implementation; not rms_norm_eps

# Tokens per chunk of the chunked form, and the length from which it beats the token loop.
# Both measured on the CPU (NOTES.md, "chunk size").
CHUNK = 16
CHUNKED_FROM = 16

MANY = 64  # rows times experts from which on they are sorted, as in mlx-lm


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm with the effective float32 weight (1 + w); float32 inside, dtype of ``x`` out."""
    return _rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def _rms_norm(x: mx.array, weight: mx.array | float, eps: float) -> mx.array:
    """``weight x / sqrt(mean(x^2) + eps)``, float32.

    MLX's own takes eight operations on a CPU, here it is three.
    """
    if mx.default_device() == mx.cpu:
        squares = mx.square(x).sum(axis=-1, keepdims=True)
        return _divided(x, squares, weight, 1 / x.shape[-1], eps)
    if isinstance(weight, mx.array):
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
    """The residual stream after a layer's part, ``x + y``, and its :func:`rms_norm`."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def gated_rms_norm(x: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """``weight norm(x) silu(z)``: ``x`` ``[..., Dv]`` float32, result in the dtype of ``z``."""
    y = _rms_norm(x, weight.astype(mx.float32), eps)
    return precise_swiglu(z, z, y)


def l2norm(x: mx.array, scale: float = 1.0) -> mx.array:
    """``scale x rsqrt(sum(x^2) + 1e-6)`` over the last axis, float32."""
    D = x.shape[-1]  # the mean of squares is their sum over D
    return _rms_norm(x.astype(mx.float32), scale * D**-0.5, L2_EPS / D)


def causal_conv(rows: mx.array, weight: mx.array) -> mx.array:
    """Depthwise causal convolution and SiLU.

    Args:
        rows: ``[B, K-1 + L, C]``, the K-1 inputs before the segment, then the segment.
        weight: ``[C, K, 1]``; tap K-1 meets the current token.

    Returns:
        ``[B, L, C]`` in the dtype of ``rows``.
    """
    K = weight.shape[1]
    taps = weight.squeeze(-1).T  # [K, C]
    L = rows.shape[1] - K + 1
    if L == 1:
        return nn.silu((rows * taps).sum(axis=1, keepdims=True))
    y = rows[:, :L] * taps[0]
    for j in range(1, K):
        y = y + rows[:, j : j + L] * taps[j]
    return nn.silu(y)


@partial(mx.compile, shapeless=True)
def decay(a: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    """The log decay ``g = -exp(A_log) softplus(a + dt_bias)``, float32, shape of ``a``."""
    return -mx.exp(A_log.astype(mx.float32)) * nn.softplus(
        a.astype(mx.float32) + dt_bias.astype(mx.float32)
    )


def route(logits: mx.array, top_k: int, normalise: bool) -> tuple[mx.array, mx.array]:
    """The top k experts of each token and their weights; of equal ones the lowest index.

    Args:
        logits: ``[..., E]``.

    Returns:
        ``(experts, weights)``, each ``[..., top_k]``; weights float32, softmax over all experts,
        summing to one if ``normalise``.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    experts = mx.argsort(-probabilities, axis=-1)[..., :top_k]
    experts = mx.stop_gradient(experts)
    weights = mx.take_along_axis(probabilities, experts, axis=-1)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts, weights


def only_own(experts: mx.array, weights: mx.array, own: range) -> tuple[mx.array, mx.array]:
    """Those of a token's experts that are in ``own``, counted from its start, and their weights.

    The others are the first, with weight 0.
    """
    here = (experts >= own.start) & (experts < own.stop)
    return mx.where(here, experts - own.start, 0), mx.where(here, weights, 0)


def sparse_experts(
    x: mx.array,
    logits: mx.array,
    gate_up: Experts | Columns,
    down: Experts | Columns,
    residual: mx.array,
    *,
    experts: int,
    top_k: int,
    normalise: bool,
    own: range | None = None,
) -> mx.array:
    """``residual`` plus the mixture of experts, on packed weights.

    Args:
        x, residual: ``[R, H]``.
        logits: ``[R, E]``, or ``[R, E + 1]`` where the shared expert is number E, its gate last.
        gate_up: ``[E, 2 I, H]``, gate's rows first; down: ``[E, H, I]``.
        experts: E; top_k, normalise: as for :func:`route`.
        own: the experts that ``gate_up`` and ``down`` have, if not all.

    Returns:
        ``[R, H]``.
    """
    indices, weights = route(logits[:, :experts], top_k, normalise)
    if own is not None:
        indices, weights = only_own(indices, weights, own)
    if logits.shape[1] > experts:
        shared = mx.full((x.shape[0], 1), len(own or range(experts)), indices.dtype)
        indices = mx.concatenate([indices, shared], axis=1)
        gate = mx.sigmoid(logits[:, experts:].astype(mx.float32))
        weights = mx.concatenate([weights, gate], axis=1)
    if indices.size < MANY:
        y = _mixed(x[:, None, None], gate_up, down, indices, is_sorted=False)  # [R, k, 1, H]
        return residual + (y.squeeze(-2) * weights[..., None].astype(y.dtype)).sum(axis=-2)
    # Sorted by expert, so that MLX reads an expert's weights once.
    k, indices, weights = indices.shape[1], indices.flatten(), weights.flatten()
    if own is None:
        order = mx.argsort(indices)
        y = _mixed(x[order // k, None, None], gate_up, down, indices[order, None], is_sorted=True)
        y = y[mx.argsort(order)].reshape(-1, k, x.shape[-1])
        return residual + (y * weights.reshape(-1, k, 1).astype(y.dtype)).sum(axis=-2)
    # Those without weight are others'; how many are not has to be known here.
    here = weights > 0
    order = mx.argsort(mx.where(here, indices, experts))
    order = order[: int(cast(int, here.sum().item()))]
    if order.size == 0:
        return residual
    rows = order // k
    y = _mixed(x[rows, None, None], gate_up, down, indices[order, None], is_sorted=True)
    y = y.reshape(-1, x.shape[-1]) * weights[order, None].astype(y.dtype)
    return residual.at[rows].add(y)


def _mixed(
    rows: mx.array,
    gate_up: Experts | Columns,
    down: Experts | Columns,
    indices: mx.array,
    is_sorted: bool,
) -> mx.array:
    """Each row through its experts: ``rows`` ``[R, 1, 1, H]``, ``indices`` ``[R, k]``."""
    gate, up = mx.split(_gather(rows, gate_up, indices, is_sorted), 2, axis=-1)
    return _gather(swiglu(gate, up), down, indices, is_sorted)


def _gather(
    x: mx.array, weights: Experts | Columns, indices: mx.array, is_sorted: bool
) -> mx.array:
    if isinstance(weights, Columns):
        return cpu_matmul.gather(x, weights, indices)
    if weights.scales is None:
        return mx.gather_mm(
            x, weights.weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted
        )
    return mx.gather_qmm(
        *(x, weights.weight, weights.scales, weights.biases),
        rhs_indices=indices,
        transpose=True,
        group_size=weights.group_size,
        bits=weights.bits,
        sorted_indices=is_sorted,
    )


def attention_heads(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    eps: float,
    heads: int,
    kv_heads: int,
    rotary_dims: int,
    base: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention's q and k, normalised and rotated, and v, from the packed projection.

    Args:
        x: ``[B, L, (2 nh + 2 nkv) hd]``, rows ``[q | k | v | gate]``, head after head.
        q_weight, k_weight: ``[hd]``, effective (1 + w).
        offset: the position of the first token, one or ``[B]``.
        base: rope_theta, for the first ``rotary_dims`` of each head.

    Returns:
        q ``[B, nh, L, hd]``, k and v ``[B, nkv, L, hd]``.
    """
    q, k, v = normalised_heads(x, q_weight, k_weight, eps=eps, heads=heads, kv_heads=kv_heads)
    q, k = (
        mx.fast.rope(y, rotary_dims, traditional=False, base=base, scale=1.0, offset=offset)
        for y in (q, k)
    )
    return q, k, v


def normalised_heads(
    x: mx.array, q_weight: mx.array, k_weight: mx.array, *, eps: float, heads: int, kv_heads: int
) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`attention_heads` before the rotation."""
    B, L, _ = x.shape
    ends = [heads, heads + kv_heads, heads + 2 * kv_heads]
    x = x.reshape(B, L, 2 * heads + 2 * kv_heads, -1)
    q, k, v, _ = (y.transpose(0, 2, 1, 3) for y in mx.split(x, ends, axis=2))
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), v


def attention_gate(o: mx.array, x: mx.array, *, kv_heads: int) -> mx.array:
    """Attention's output times the sigmoid of its gate.

    Args:
        o: ``[B, nh, L, hd]``. x: as for :func:`attention_heads`.

    Returns:
        ``[B, L, nh hd]``.
    """
    B, nh, L, hd = o.shape
    gate = x[..., (nh + 2 * kv_heads) * hd :]
    return o.transpose(0, 2, 1, 3).reshape(B, L, nh * hd) * mx.sigmoid(gate)


def gated_delta_step(
    x: mx.array,
    before: mx.array,
    state: mx.array,
    tape: Sequence[mx.array],
    keep: int,
    taps: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    *,
    eps: float,
    key_heads: int,
    mask: mx.array | None,
    lazy: bool,
    lengths: mx.array | None = None,
) -> list[mx.array]:
    """A Gated DeltaNet layer between its projections, for any number of tokens.

    Arguments and results are those of :func:`mlx_qwen3next.metal_kernels.gated_delta_step`.

    Args:
        lengths: ``[B]``, of sequences padded on the right: the convolution's inputs returned are
            those before each one's end.
    """
    B, L, _ = x.shape
    Hk, (Hv, Dv, Dk) = key_heads, state.shape[1:]
    C, K = taps.shape[:2]
    if tape:
        written_g, written_k, delta = tape
        state = gated_delta_replay(state, written_g, written_k, delta, keep)
        before = before[:, keep : keep + K - 1]
    qkv, z, b, a = mx.split(x, [C, C + Hv * Dv, C + Hv * Dv + Hv], axis=-1)
    beta = mx.sigmoid(b.astype(mx.float32))
    g = decay(a, A_log, dt_bias)
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
        beta = mx.where(mask[..., None], beta, 0)
        g = mx.where(mask[..., None], g, 0)

    rows = mx.concatenate([before, qkv], axis=1)  # [B, K-1 + L, C]
    q, k, v = mx.split(causal_conv(rows, taps), [Hk * Dk, 2 * Hk * Dk], axis=-1)
    q = l2norm(q.reshape(B, L, Hk, Dk), scale=Dk**-0.5)
    k = l2norm(k.reshape(B, L, Hk, Dk))
    v = v.reshape(B, L, Hv, Dv)
    written: list[mx.array]
    if lazy:
        o, _, delta = gated_delta_steps(q, k, v, g, beta, state)
        written = [state, rows, g, k, delta]
    else:
        o, state = gated_delta(q, k, v, g, beta, state)
        written = [state, _last_rows(rows, K - 1, lengths)]
    o = gated_rms_norm(o, z.reshape(B, L, Hv, Dv), norm_weight, eps)
    return [o.reshape(B, L, Hv * Dv), *written]


def _last_rows(rows: mx.array, count: int, lengths: mx.array | None) -> mx.array:
    """The last rows of each sequence; ``lengths`` if padded on the right."""
    if lengths is None:
        return mx.contiguous(rows[:, rows.shape[1] - count :])
    ends = mx.clip(lengths, 0, rows.shape[1] - count)
    at = ends[:, None] + mx.arange(count)
    return mx.take_along_axis(rows, at[..., None], axis=1)


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The gated delta rule over a segment, in the form that is fastest here.

    Args:
        q, k: ``[B, L, Hk, Dk]``, l2-normalised, q scaled by Dk^-0.5.
        v: ``[B, L, Hv, Dv]``; g (log decay), beta: ``[B, L, Hv]``. A token with ``g = beta = 0``
            leaves the state as it is: that is how padding is masked.
        state: ``[B, Hv, Dv, Dk]`` float32.

    Returns:
        ``o`` ``[B, L, Hv, Dv]`` float32 and the state after the segment.
    """
    if available() and k.shape[3] % 32 == 0:  # MLX's kernel asks for that
        v = v.astype(mx.float32)
        o, state = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state)
        return o, state
    if k.shape[1] < CHUNKED_FROM:
        o, state, _ = _fused_steps(q, k, v, g, beta, state)
        return o, state
    return gated_delta_chunked(q, k, v, g, beta, state)


def gated_delta_steps(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The rule token by token, for few tokens. Arguments as :func:`gated_delta`.

    Returns:
        ``o``, the state after the last token, and ``delta`` ``[B, L, Hv, Dv]``: with g and k it
        is all that is needed to advance the state again by any prefix (:func:`gated_delta_replay`).
    """
    B, L, Hk, Dk = k.shape
    Hv, Dv = v.shape[2:]
    r = Hv // Hk

    def steps(x: mx.array, *shape: int) -> list[mx.array]:
        return list(mx.split(x.astype(mx.float32).reshape(B, L, *shape), L, axis=1))

    # Value heads in their key head's group: a broadcast axis r instead of repeated keys. The time
    # axis stays, of length 1.
    S = state.reshape(B, 1, Hk, r, Dv, Dk)
    outputs, deltas = [], []
    for q_t, k_t, v_t, gamma_t, beta_t in zip(
        steps(q, Hk, 1, 1, Dk),
        steps(k, Hk, 1, 1, Dk),
        steps(v, Hk, r, Dv),
        steps(mx.exp(g), Hk, r, 1, 1),
        steps(beta, Hk, r, 1),
        strict=True,
    ):
        S = S * gamma_t
        delta = beta_t * (v_t - (S * k_t).sum(axis=-1))  # [B, 1, Hk, r, Dv]
        S = S + delta[..., None] * k_t
        outputs.append((S * q_t).sum(axis=-1))
        deltas.append(delta)
    o = mx.concatenate(outputs, axis=1).reshape(B, L, Hv, Dv)
    delta = mx.concatenate(deltas, axis=1).reshape(B, L, Hv, Dv)
    return o, S.reshape(B, Hv, Dv, Dk), delta


# Fused, for whoever keeps no tape: a replay must give the bits of the unfused steps.
_fused_steps = mx.compile(gated_delta_steps)


def gated_delta_replay(
    state: mx.array, g: mx.array, k: mx.array, delta: mx.array, keep: int
) -> mx.array:
    """Advances the state by the first ``keep`` tokens of a tape, exactly as the steps did.

    Args:
        state: ``[B, Hv, Dv, Dk]`` before the round.
        g: ``[B, L, Hv]``; k: ``[B, L, Hk, Dk]``; delta: ``[B, L, Hv, Dv]``.
    """
    Hv, Hk = g.shape[2], k.shape[2]
    k = mx.repeat(k[:, :keep].astype(mx.float32), Hv // Hk, axis=2)
    for t in range(keep):
        state = state * mx.exp(g[:, t])[..., None, None]
        state = state + delta[:, t, :, :, None] * k[:, t, :, None, :]
    return state


def gated_delta_chunked(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """The rule chunk by chunk in matrix products (WY form), differentiable.

    Within a chunk, with G the running sum of g, the written errors solve the unit triangular
    system ``(I + A) delta = beta (v - exp(G) S0 k)``, ``A_ij = beta_i exp(G_i - G_j) k_i.k_j`` for
    j < i; the rest is two products with the state and one with ``delta``. Arguments and results
    as :func:`gated_delta`; any length, the last chunk padded with tokens that change nothing.

    Follows Yang et al. 2024, "Gated Delta Networks", section 3.3, and "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length", section 3.2.
    """
    B, L, Hk, Dk = k.shape
    Hv, Dv = v.shape[2:]
    r = Hv // Hk
    N = -(-L // chunk)

    def chunks(x: mx.array, *heads: int) -> mx.array:  # [B, L, H, ...] -> [B, *heads, N, C, ...]
        x = x.astype(mx.float32)
        pad = [(0, 0), (0, N * chunk - L)] + [(0, 0)] * (x.ndim - 2)
        x = mx.pad(x, pad).reshape(B, N, chunk, *heads, *x.shape[3:])
        order = [0, *range(3, 3 + len(heads)), 1, 2, *range(3 + len(heads), x.ndim)]
        return x.transpose(order)

    q, k = chunks(q, Hk, 1), chunks(k, Hk, 1)  # [B, Hk, 1, N, C, Dk]
    v = chunks(v, Hk, r)  # [B, Hk, r, N, C, Dv]
    g, beta = chunks(g, Hk, r), chunks(beta, Hk, r)  # [B, Hk, r, N, C]

    G = mx.cumsum(g, axis=-1)
    lower = mx.tril(mx.ones((chunk, chunk), dtype=mx.bool_))
    # The mask comes before exp: above the diagonal G_i - G_j is positive and may overflow.
    D = mx.exp(mx.where(lower, G[..., :, None] - G[..., None, :], -mx.inf))  # [..., C, C]
    kT = k.swapaxes(-1, -2)
    A = mx.tril((k @ kT) * D, -1) * beta[..., None]
    T = _unit_lower_inverse(A)
    from_values = T @ (v * beta[..., None])  # [..., C, Dv]
    from_state = T @ (k * (beta * mx.exp(G))[..., None])  # [..., C, Dk]
    scores = (q @ kT) * D
    q = q * mx.exp(G)[..., None]
    total = G[..., -1:]
    k = k * mx.exp(total - G)[..., None]
    total = mx.exp(total)[..., None]

    S = state.reshape(B, Hk, r, Dv, Dk)
    outputs = []
    for n in range(N):
        ST = S.swapaxes(-1, -2)
        delta = from_values[..., n, :, :] - from_state[..., n, :, :] @ ST
        outputs.append(q[..., n, :, :] @ ST + scores[..., n, :, :] @ delta)
        S = S * total[..., n, :, :] + delta.swapaxes(-1, -2) @ k[..., n, :, :]
    o = mx.stack(outputs, axis=3)  # [B, Hk, r, N, C, Dv]
    o = o.transpose(0, 3, 4, 1, 2, 5).reshape(B, N * chunk, Hv, Dv)[:, :L]
    return o, S.reshape(B, Hv, Dv, Dk)


def _unit_lower_inverse(A: mx.array) -> mx.array:
    """``(I + A)^-1`` for strictly lower triangular ``A`` ``[..., C, C]``, C a power of two.

    By halves: ``[[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]``, from 1x1 blocks up. As
    stable as substitution; the product ``(I - A)(I + A^2)(I + A^4)…`` is not, its powers grow
    like binomials when keys repeat.
    """
    C = A.shape[-1]
    batch = A.shape[:-2]
    T = mx.ones((*batch, C, 1, 1))  # the inverses of the diagonal blocks, [..., C / m, m, m]
    m = 1
    while m < C:
        pairs = C // (2 * m)
        P, Q = T[..., 0::2, :, :], T[..., 1::2, :, :]
        blocks = A.reshape(*batch, pairs, 2, m, pairs, 2, m)[..., :, 1, :, :, 0, :]
        R = mx.diagonal(blocks, axis1=-4, axis2=-2)  # [..., m, m, pairs]
        R = mx.moveaxis(R, -1, -3)
        top = mx.concatenate([P, mx.zeros_like(P)], axis=-1)
        bottom = mx.concatenate([-(Q @ R @ P), Q], axis=-1)
        T = mx.concatenate([top, bottom], axis=-2)
        m *= 2
    return T.reshape(*batch, C, C)
