"""The operations that have a Metal kernel: each picks the kernel or its composition.

A decoded token takes nine launches a linear layer and thirteen an attention layer this way. The
compositions are in :mod:`mlx_qwen3next.ops`, the kernels in :mod:`mlx_qwen3next.metal_kernels`,
and :mod:`mlx_qwen3next.dispatch` chooses; arguments and results are documented there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import metal_kernels as kernels
from . import ops
from .dispatch import Operation, rows_class
from .metal_kernels import Experts

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def _dtype(x: mx.array) -> str:
    return str(x.dtype).rpartition(".")[2]


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


# --- norms ---------------------------------------------------------------------------------------
def _norm_kind(x: mx.array, *rest: Any) -> str | None:
    *_, weight, _ = rest
    taken = x.dtype in _FLOATS and weight.dtype == mx.float32 and x.shape[-1] >= 8 and x.size > 0
    return f"{_dtype(x)} {_rows_kind(x)} H={x.shape[-1]}" if taken else None


def _rows_kind(x: mx.array) -> str:
    rows = _rows(x)
    return rows_class(rows) if rows <= kernels.MAX_ROWS else "rows>16"


rms_norm = Operation("rms_norm", kernels.rms_norm, ops.rms_norm, _norm_kind)
add_rms_norm = Operation("add_rms_norm", kernels.add_rms_norm, ops.add_rms_norm, _norm_kind)


# --- the gated delta step ------------------------------------------------------------------------
def _delta_kind(
    x: mx.array,
    before: mx.array,
    state: mx.array,
    tape: Any,
    keep: int,
    taps: mx.array,
    *weights: mx.array,
    key_heads: int,
    lazy: bool,
    mask: mx.array | None,
    lengths: mx.array | None,
    **_: Any,
) -> str | None:
    B, L = x.shape[:2]
    Hv, Dv, Dk = state.shape[1:]
    taken = (
        x.dtype in _FLOATS
        and before.dtype == x.dtype
        and all(w.dtype == mx.float32 for w in weights)
        and lengths is None
        and kernels.takes_gated_delta(L, Dk, Dv)
    )
    if not taken:
        return None
    sizes = f"B={B} Hk={key_heads} Hv={Hv} Dk={Dk} Dv={Dv} K={taps.shape[1]}"
    extras = "".join(
        (" round" if lazy else "", " after a round" if keep else "", " masked" * (mask is not None))
    )
    return f"{_dtype(x)} {rows_class(L)} {sizes}{extras}"


def _delta_kernel(*args: Any, lengths: None = None, **options: Any) -> list[mx.array]:
    return kernels.gated_delta_step(*args, **options)


gated_delta_step = Operation("gated_delta_step", _delta_kernel, ops.gated_delta_step, _delta_kind)


def _replay_kind(
    state: mx.array, g: mx.array, k: mx.array, delta: mx.array, keep: int
) -> str | None:
    B, Hv, Dv, Dk = state.shape
    if not kernels.takes_gated_delta(1, Dk, Dv):
        return None
    return f"{rows_class(keep)} B={B} Hk={k.shape[2]} Hv={Hv} Dk={Dk} Dv={Dv}"


gated_delta_replay = Operation(
    "gated_delta_replay", kernels.gated_delta_replay, ops.gated_delta_replay, _replay_kind
)


# --- attention -----------------------------------------------------------------------------------
@cache
def inverse_frequencies(rotary_dims: int, base: float) -> mx.array:
    """RoPE's radians a position, ``[rotary_dims / 2]`` float32, rounded once."""
    exponents = np.arange(0, rotary_dims, 2, dtype=np.float64) / rotary_dims
    return mx.array((base**-exponents).astype(np.float32))


def _heads_kernel(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    rotary_dims: int,
    base: float,
    **options: Any,
) -> tuple[mx.array, mx.array, mx.array]:
    offsets = mx.array([offset] * x.shape[0], mx.int32) if isinstance(offset, int) else offset
    frequencies = inverse_frequencies(rotary_dims, base)
    return kernels.attention_heads(x, q_weight, k_weight, frequencies, offsets, **options)


def _heads_kind(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    heads: int,
    kv_heads: int,
    rotary_dims: int,
    **_: Any,
) -> str | None:
    hd = q_weight.shape[0]
    taken = (
        x.dtype in _FLOATS
        and q_weight.dtype == k_weight.dtype == mx.float32
        and 8 <= hd <= 1024
        and x.shape[1] <= kernels.MAX_ROWS
        and (isinstance(offset, int) or (offset.ndim == 1 and offset.dtype == mx.int32))
    )
    if not taken:
        return None
    sizes = f"B={x.shape[0]} nh={heads} nkv={kv_heads} hd={hd} rotary={rotary_dims}"
    return f"{_dtype(x)} {rows_class(x.shape[1])} {sizes}"


attention_heads = Operation("attention_heads", _heads_kernel, ops.attention_heads, _heads_kind)


def _gate_kind(o: mx.array, x: mx.array, *, kv_heads: int) -> str | None:
    B, nh, L, hd = o.shape
    if o.dtype not in _FLOATS or x.dtype != o.dtype or L > kernels.MAX_ROWS:
        return None
    return f"{_dtype(o)} {rows_class(L)} B={B} nh={nh} nkv={kv_heads} hd={hd}"


attention_gate = Operation("attention_gate", kernels.attention_gate, ops.attention_gate, _gate_kind)


# --- sparse experts ------------------------------------------------------------------------------
def _experts_kernel(
    x: mx.array,
    logits: mx.array,
    gate_up: Experts,
    down: Experts,
    residual: mx.array,
    **options: Any,
) -> mx.array:
    plan = kernels.router(logits, **options)
    y = kernels.expert_gate_up(x, gate_up, plan)
    return kernels.expert_down(y, down, plan, residual)


def _experts_kind(
    x: mx.array,
    logits: mx.array,
    gate_up: Experts,
    down: Experts,
    residual: mx.array,
    *,
    experts: int,
    top_k: int,
    normalise: bool,
) -> str | None:
    R, H = x.shape
    floats = [x, logits, residual, *(a for w in (gate_up, down) for a in _floats(w))]
    taken = (
        x.dtype in _FLOATS
        and all(a.dtype == x.dtype for a in floats)
        and kernels.takes_router(R, experts, top_k)
        and kernels.takes_experts(gate_up, down)
    )
    if not taken:
        return None
    I = gate_up.weight.shape[1] // 2
    bits = f"bits={gate_up.bits}/{gate_up.group_size},{down.bits}/{down.group_size}"
    shared = " shared" if logits.shape[1] > experts else ""
    return f"{_dtype(x)} {rows_class(R)} E={experts} top={top_k} H={H} I={I} {bits}{shared}"


def _floats(weights: Experts) -> list[mx.array]:
    stored = (weights.weight, weights.scales, weights.biases)
    return [a for a in stored if a is not None and mx.issubdtype(a.dtype, mx.floating)]


sparse_experts = Operation("sparse_experts", _experts_kernel, ops.sparse_experts, _experts_kind)
