"""Gated DeltaNet, the token mixer of Qwen3-Next's linear layers.

For a value head with the state S ``[Dv, Dk]``, where q and k are its key head's::

    [q | k | v | z | b | a] = in_proj_qkvz(x), in_proj_ba(x)
    q, k, v = silu(conv1d(q, k, v));    q = q / |q| / sqrt(Dk);    k = k / |k|
    beta = sigmoid(b);                  g = -exp(A_log) softplus(a + dt_bias)
    S = exp(g) S;                       S = S + beta (v - S k) k^T
    y = out_proj(norm(S q) silu(z))

The symbols are those of :mod:`mlx_qwen3next.model.qwen3_next`. Source: Yang et al. 2024, "Gated
Delta Networks", eq. 10, and transformers' ``modeling_qwen3_next.py``.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from ..compute.gated_delta import (
    DeltaWeights,
    LayerState,
    Tape,
    causal_conv,
    decay,
    gated_delta_rule,
    gated_delta_steps,
    last_rows,
    replayed,
    write_strength,
)
from ..compute.norms import gated_rms_norm, l2norm
from .cache import GatedDeltaCache
from .config import Config


@cache
def _query_scale(Dk: int) -> mx.array:
    """The factors of normalised queries and keys, ``[2, 1, 1]``."""
    return mx.array([Dk**-0.5, 1.0]).reshape(2, 1, 1)


class RMSNormGated(nn.Module):
    """The weight of ``weight norm(x) silu(z)`` over one value head; it has no ``+ 1``.

    :meth:`GatedDeltaNet.mix` applies it.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.weight = mx.ones((dims,))


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule: a fixed-size state instead of a growing cache."""

    def __init__(self, config: Config):
        super().__init__()
        H, self.eps = config.hidden_size, config.rms_norm_eps
        self.Hk, self.Dk = config.linear_num_key_heads, config.linear_key_head_dim
        self.Hv, self.Dv = config.linear_num_value_heads, config.linear_value_head_dim
        self.K, C = config.linear_conv_kernel_dim, config.linear_conv_dim
        key_dim, value_dim = config.linear_key_dim, config.linear_value_dim
        self.in_proj_qkvz = nn.Linear(H, 2 * key_dim + 2 * value_dim, bias=False)
        self.in_proj_ba = nn.Linear(H, 2 * self.Hv, bias=False)
        # Holds the weight [C, K, 1], which `mix` applies.
        self.conv1d = nn.Conv1d(C, C, self.K, groups=C, bias=False)
        self.A_log = mx.log(mx.random.uniform(0.01, 16, (self.Hv,)))
        self.dt_bias = mx.ones((self.Hv,))
        self.norm = RMSNormGated(self.Dv)
        self.out_proj = nn.Linear(value_dim, H, bias=False)

    def project(self, x: mx.array) -> mx.array:
        """Returns ``[q | k | v | z | b | a]``, head after head, ``[B, L, C + Hv Dv + 2 Hv]``."""
        return self.arrange(self.in_proj_qkvz(x), self.in_proj_ba(x))

    def arrange(self, qkvz: mx.array, ba: mx.array) -> mx.array:
        """Returns the projections' results, or their rows, head after head, not per key head.

        Args:
            qkvz, ba: ``[..., n]``; per key head q Dk, k Dk, v r Dv, z r Dv; b r, a r.
        """
        shape, Hk, Dk, rDv = qkvz.shape[:-1], self.Hk, self.Dk, self.Hv // self.Hk * self.Dv
        parts = mx.split(qkvz.reshape(*shape, Hk, -1), [Dk, 2 * Dk, 2 * Dk + rDv], axis=-1)
        parts += mx.split(ba.reshape(*shape, Hk, -1), 2, axis=-1)
        return mx.concatenate([y.reshape(*shape, -1) for y in parts], axis=-1)

    def __call__(
        self, x: mx.array, mask: mx.array | None = None, cache: GatedDeltaCache | None = None
    ) -> mx.array:
        """Returns ``[B, L, H]``, as ``x``; ``mask`` ``[B, L]`` is False at padding."""
        if cache is None:
            return self.advance(x, None, mask=mask)[0]
        arrays = cache.arrays()  # first, since it may settle a round, which the lengths count
        before = None if arrays is None else LayerState.of(arrays, cache.keep)
        recording, lengths = cache.recording, cache.lengths
        y, after = self.advance(x, before, mask=mask, recording=recording, lengths=lengths)
        cache.store(after.arrays, x.shape[1])
        return y

    def advance(
        self,
        x: mx.array,
        before: LayerState | None,
        *,
        mask: mx.array | None = None,
        recording: bool = False,
        lengths: mx.array | None = None,
    ) -> tuple[mx.array, LayerState]:
        """Returns the layer's output ``[B, L, H]`` and its state after the tokens.

        Args:
            x: ``[B, L, H]``.
            before: the state that the first token meets; None at the beginning of sequences.
            mask, recording, lengths: see :meth:`mix`.
        """
        projected = self.project(x)
        if before is None:
            before = self.first_state(x.shape[0], projected.dtype)
        o, after = self.mix(
            projected,
            before,
            self.weights,
            eps=self.eps,
            key_heads=self.Hk,
            mask=mask,
            recording=recording,
            lengths=lengths,
        )
        return self.out_proj(o), after

    @property
    def weights(self) -> DeltaWeights:
        """The weights of :meth:`mix`."""
        vectors = mx.concatenate([self.A_log, self.dt_bias, self.norm.weight])
        return DeltaWeights(self.conv1d.weight, vectors)

    def first_state(self, B: int, dtype: mx.Dtype) -> LayerState:
        """Returns the state before the first token of ``B`` sequences."""
        rows = mx.zeros((B, self.K - 1, self.conv1d.weight.shape[0]), dtype)
        return LayerState(rows, mx.zeros((B, self.Hv, self.Dv, self.Dk)))

    @staticmethod
    def mix(
        projected: mx.array,
        before: LayerState,
        weights: DeltaWeights,
        *,
        eps: float,
        key_heads: int,
        mask: mx.array | None,
        recording: bool,
        lengths: mx.array | None = None,
    ) -> tuple[mx.array, LayerState]:
        """Mixes tokens: convolution, gates, delta rule and gated norm, between the projections.

        Args:
            projected: ``[B, L, C + Hv Dv + 2 Hv]``, rows ``[q | k | v | z | b | a]``.
            eps: of the gated norm. key_heads: Hk.
            mask: ``[B, L]``, False at padding, or None.
            recording: whether the tokens are a round, so that a tape is wanted, not a new state.
            lengths: ``[B]``, of sequences padded on the right, or None.

        Returns:
            ``o`` ``[B, L, Hv Dv]`` in the dtype of ``projected``, and the layer's state after the
            tokens, or of a round with its tape.
        """
        B, L, _ = projected.shape
        Hk, (Hv, Dv, Dk) = key_heads, before.state.shape[1:]
        C, K, _ = weights.conv1d.shape
        rows, state = replayed(before)
        qkv, z, b, a = mx.split(projected, [C, C + Hv * Dv, C + Hv * Dv + Hv], axis=-1)
        beta = write_strength(b)
        A_log, dt_bias, norm = mx.split(weights.vectors, [Hv, 2 * Hv])
        g = decay(a, A_log, dt_bias)
        if mask is not None:
            qkv, beta, g = (mx.where(mask[..., None], y, 0) for y in (qkv, beta, g))

        rows = mx.concatenate([rows, qkv], axis=1)  # [B, K-1 + L, C]
        qk, v = mx.split(causal_conv(rows, weights.conv1d), [2 * Hk * Dk], axis=-1)
        qk = l2norm(qk.reshape(B, L, 2, Hk, Dk), scale=_query_scale(Dk))
        q, k = qk[:, :, 0], qk[:, :, 1]
        v = v.reshape(B, L, Hv, Dv)
        if recording:
            o, _, delta = gated_delta_steps(q, k, v, g, beta, state)
            after = LayerState(rows, state, Tape(g, k, delta))
        else:
            o, state = gated_delta_rule(q, k, v, g, beta, state)
            after = LayerState(last_rows(rows, K - 1, lengths), state)
        o = gated_rms_norm(o, z.reshape(B, L, Hv, Dv), norm, eps)
        return o.reshape(B, L, Hv * Dv), after
