"""The parts of Gated DeltaNet between its projections, in MLX's own operations.

Every function has its equation in :mod:`mlx_qwen3next.compute.reference`, whose symbols and
argument order it shares; the tests hold the two together.

The delta rule has three forms: token by token (:func:`gated_delta_steps`: decoding, and rounds
that may roll back), MLX's own GPU kernel, and :func:`gated_delta_chunked` in plain MLX operations
for prefill on other devices and for training. :func:`gated_delta_rule` picks one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..metal_kernels import available

# Tokens per chunk of the chunked form, and the length from which it beats the token loop.
# Both measured on the CPU (NOTES.md, "chunk size").
CHUNK = 16
CHUNKED_FROM = 16
# Magnitudes that the chunked form takes for zero: far below a rounding of what they are added to,
# far enough above 1e-38 for their products.
FAINT = 2.0**-60


class DeltaWeights(NamedTuple):
    """The weights of a Gated DeltaNet layer between its projections, by the checkpoint's names."""

    conv1d: mx.array  # [C, K, 1]; tap K-1 meets the current token
    vectors: mx.array  # [A_log | dt_bias | norm], [2 Hv + Dv] float32


class Tape(NamedTuple):
    """The record of a round of n tokens: enough to advance the state by any prefix of them."""

    g: mx.array  # [B, n, Hv] float32, log decay
    k: mx.array  # [B, n, Hk, Dk] float32, normalised keys
    delta: mx.array  # [B, n, Hv, Dv] float32, written errors


class LayerState(NamedTuple):
    """The state of a Gated DeltaNet layer, which its next token meets.

    After a round it is the state before the round, and the round's tape to be replayed.
    """

    rows: mx.array  # [B, K-1 + n, C], inputs of the convolution: K-1, and the round's n
    state: mx.array  # [B, Hv, Dv, Dk] float32, before the round
    tape: Tape | None = None  # of the round
    # How many of the round's tokens are part of the sequence; in a trace [1] int32.
    keep: int = 0

    @classmethod
    def of(cls, arrays: Sequence[mx.array], keep: int) -> LayerState:
        """Makes the state that has such :attr:`arrays`."""
        rows, state, *tape = arrays
        return cls(rows, state, Tape(*tape) if tape else None, keep)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The rows, the state, and after a round the tape's three: a trace returns them faster."""
        return self.rows, self.state, *(self.tape or ())

    @property
    def kept_rows(self) -> mx.array:
        """The last K-1 inputs of the convolution that are part of the sequence."""
        if self.tape is None:
            return self.rows
        taps = self.rows.shape[1] - self.tape.g.shape[1]
        return self.rows[:, self.keep : self.keep + taps]


def causal_conv(rows: mx.array, weight: mx.array) -> mx.array:
    """Returns the depthwise causal convolution of the rows, then SiLU.

    Args:
        rows: ``[B, K-1 + L, C]``, the K-1 inputs before the segment, then the segment.
        weight: ``[C, K, 1]``; tap K-1 meets the current token.

    Returns:
        ``[B, L, C]`` in the dtype of ``rows``.
    """
    C, K, _ = weight.shape
    L = rows.shape[1] - K + 1
    taps = [tap.reshape(C) for tap in mx.split(weight.squeeze(-1).T, K)]
    return _convolved(taps, [rows[:, j : j + L] for j in range(K)])


@partial(mx.compile, shapeless=True)
def _convolved(taps: list[mx.array], shifted: list[mx.array]) -> mx.array:
    y = shifted[0] * taps[0]
    for x, tap in zip(shifted[1:], taps[1:], strict=True):
        y = y + x * tap
    return nn.silu(y)


@partial(mx.compile, shapeless=True)
def decay(a: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    """Returns the log decay ``g = -exp(A_log) softplus(a + dt_bias)``, float32, shape of ``a``."""
    return -mx.exp(A_log.astype(mx.float32)) * nn.softplus(
        a.astype(mx.float32) + dt_bias.astype(mx.float32)
    )


@partial(mx.compile, shapeless=True)
def write_strength(b: mx.array) -> mx.array:
    """Returns ``beta = sigmoid(b)``, float32."""
    return mx.sigmoid(b.astype(mx.float32))


def replayed(before: LayerState) -> tuple[mx.array, mx.array]:
    """Returns the convolution's last K-1 inputs and the state, a round's kept tokens replayed."""
    if before.tape is None:
        return before.rows, before.state
    return before.kept_rows, gated_delta_replay(before.state, *before.tape, before.keep)


def last_rows(rows: mx.array, count: int, lengths: mx.array | None) -> mx.array:
    """Returns the last ``count`` rows of each sequence.

    Args:
        rows: ``[B, count + L, C]``.
        lengths: ``[B]``, how many of the L are tokens, where sequences are padded on the right.
    """
    if lengths is None:
        return mx.contiguous(rows[:, rows.shape[1] - count :])
    ends = mx.clip(lengths, 0, rows.shape[1] - count)
    at = ends[:, None] + mx.arange(count)
    return mx.take_along_axis(rows, at[..., None], axis=1)


def gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Applies the gated delta rule to a segment, in the form that is fastest here.

    Args:
        q, k: ``[B, L, Hk, Dk]``, l2-normalised, q scaled by Dk^-0.5.
        v: ``[B, L, Hv, Dv]``; g (log decay), beta: ``[B, L, Hv]``. A token with ``g = beta = 0``
            leaves the state as it is, which is how padding is masked.
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
    """Applies the rule token by token, for few tokens; arguments as :func:`gated_delta_rule`.

    Returns:
        ``o``, the state after the last token, and ``delta`` ``[B, L, Hv, Dv]``, which with g and k
        is enough to advance the state again by any prefix (:func:`gated_delta_replay`).
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


# Fused, where no tape is kept: a replay must give the bits of the unfused steps.
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
    """Applies the rule chunk by chunk in matrix products (WY form), differentiable.

    Within a chunk, with G the running sum of g, the written errors solve the unit triangular
    system ``(I + A) delta = beta (v - exp(G) S0 k)``, ``A_ij = beta_i exp(G_i - G_j) k_i.k_j`` for
    j < i; the rest is two products with the state and one with ``delta``. Arguments and results
    as :func:`gated_delta_rule`; any length, the last chunk padded with tokens that change nothing.

    A CPU takes a hundred times as long for a number below 1e-38, which products of decays soon are.
    So the factors of products are zero where they are below :data:`FAINT`.

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
    D = _decays(mx.where(lower, G[..., :, None] - G[..., None, :], -mx.inf))  # [..., C, C]
    kT = k.swapaxes(-1, -2)
    A = _without_faint(mx.tril((k @ kT) * D, -1) * beta[..., None])
    T = _unit_lower_inverse(A)
    since_start = _decays(G)
    from_values = T @ (v * beta[..., None])  # [..., C, Dv]
    from_state = _without_faint(T @ (k * (beta * since_start)[..., None]))  # [..., C, Dk]
    scores = (q @ kT) * D
    q = q * since_start[..., None]
    total = G[..., -1:]
    kT = (k * _decays(total - G)[..., None]).swapaxes(-1, -2)
    total = _decays(total)[..., None]

    ST = state.reshape(B, Hk, r, Dv, Dk).swapaxes(-1, -2)
    outputs = []
    for n in range(N):
        delta = from_values[..., n, :, :] - from_state[..., n, :, :] @ ST
        outputs.append(q[..., n, :, :] @ ST + scores[..., n, :, :] @ delta)
        ST = ST * total[..., n, :, :] + kT[..., n, :, :] @ delta
    o = mx.stack(outputs, axis=3)  # [B, Hk, r, N, C, Dv]
    o = o.transpose(0, 3, 4, 1, 2, 5).reshape(B, N * chunk, Hv, Dv)[:, :L]
    return o, ST.swapaxes(-1, -2).reshape(B, Hv, Dv, Dk)


@partial(mx.compile, shapeless=True)
def _decays(log: mx.array) -> mx.array:
    """Returns ``exp(log)``, without the faint ones."""
    return _without_faint(mx.exp(log))


@partial(mx.compile, shapeless=True)
def _without_faint(x: mx.array) -> mx.array:
    return mx.where(mx.abs(x) < FAINT, 0, x)


def _unit_lower_inverse(A: mx.array) -> mx.array:
    """Returns ``(I + A)^-1`` for strictly lower triangular ``A`` ``[..., C, C]``, C a power of two.

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
        below = _without_faint(-(_without_faint(Q @ R) @ P))
        bottom = mx.concatenate([below, Q], axis=-1)
        T = mx.concatenate([top, bottom], axis=-2)
        m *= 2
    return T.reshape(*batch, C, C)
