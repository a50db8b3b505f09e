"""The operations that have a Metal kernel: each picks the kernel or its composition.

A decoded token takes nine launches a linear layer and thirteen an attention layer this way. The
compositions are in :mod:`mlx_qwen3next.ops`, the kernels in :mod:`mlx_qwen3next.metal_kernels`,
and :mod:`mlx_qwen3next.dispatch` chooses; arguments and results are documented there.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import metal_kernels as kernels
from . import ops
from .dispatch import Operation
from .metal_kernels import Experts

Shape = tuple[int, ...]

_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def rows_class(rows: int) -> str:
    """The kind of a step of so many rows: 1, 2, 3-4, 5-8, 9-16, …"""
    last = 1 << (rows - 1).bit_length()
    first = last // 2 + 1
    return f"rows={rows}" if first >= last else f"rows={first}-{last}"


# --- norms ---------------------------------------------------------------------------------------
def _norm_facts(x: mx.array, *rest: Any) -> tuple[Any, ...]:
    return x.shape, x.dtype, rest[-2].dtype  # of the weight


def _norm_kind(shape: Shape, dtype: mx.Dtype, weight: mx.Dtype) -> str | None:
    *before, H = shape
    rows = int(np.prod(before))
    if dtype not in _NAMES or weight != mx.float32 or H < 8 or rows == 0:
        return None
    return f"{_NAMES[dtype]} {rows_class(rows)} H={H}"


rms_norm = Operation("rms_norm", kernels.rms_norm, ops.rms_norm, _norm_facts, _norm_kind)
add_rms_norm = Operation(
    "add_rms_norm", kernels.add_rms_norm, ops.add_rms_norm, _norm_facts, _norm_kind
)


# --- the gated delta step ------------------------------------------------------------------------
def _delta_facts(
    x: mx.array,
    before: mx.array,
    state: mx.array,
    tape: Any,
    keep: int,
    taps: mx.array,
    A_log: mx.array,
    *_: mx.array,
    key_heads: int,
    lazy: bool,
    mask: mx.array | None,
    lengths: mx.array | None,
    **__: Any,
) -> tuple[Any, ...]:
    same = before.dtype == x.dtype and A_log.dtype == mx.float32
    flags = lazy, keep > 0, mask is not None, lengths is not None
    return x.shape, x.dtype, state.shape, key_heads, taps.shape[1], same, *flags


def _delta_kind(
    shape: Shape,
    dtype: mx.Dtype,
    state: Shape,
    Hk: int,
    K: int,
    same: bool,
    lazy: bool,
    replays: bool,
    masked: bool,
    has_lengths: bool,
) -> str | None:
    B, L, _ = shape
    _, Hv, Dv, Dk = state
    if dtype not in _NAMES or not same or has_lengths or not kernels.takes_gated_delta(L, Dk, Dv):
        return None
    sizes = f"B={B} Hk={Hk} Hv={Hv} Dk={Dk} Dv={Dv} K={K}"
    extras = " round" * lazy + " replay" * replays + " masked" * masked
    return f"{_NAMES[dtype]} {rows_class(L)} {sizes}{extras}"


def _delta_kernel(*args: Any, lengths: None = None, **options: Any) -> list[mx.array]:
    return kernels.gated_delta_step(*args, **options)


gated_delta_step = Operation(
    "gated_delta_step", _delta_kernel, ops.gated_delta_step, _delta_facts, _delta_kind
)


def _replay_facts(
    state: mx.array, g: mx.array, k: mx.array, delta: mx.array, keep: int
) -> tuple[Any, ...]:
    return state.shape, k.shape[2], keep


def _replay_kind(state: Shape, Hk: int, keep: int) -> str | None:
    B, Hv, Dv, Dk = state
    if not kernels.takes_gated_delta(1, Dk, Dv):
        return None
    return f"{rows_class(keep)} B={B} Hk={Hk} Hv={Hv} Dk={Dk} Dv={Dv}"


gated_delta_replay = Operation(
    "gated_delta_replay",
    kernels.gated_delta_replay,
    ops.gated_delta_replay,
    _replay_facts,
    _replay_kind,
)


# --- attention -----------------------------------------------------------------------------------
@cache
def inverse_frequencies(rotary_dims: int, base: float) -> mx.array:
    """RoPE's radians a position, ``[rotary_dims / 2]`` float32, rounded once."""
    exponents = np.arange(0, rotary_dims, 2, dtype=np.float64) / rotary_dims
    return mx.array((base**-exponents).astype(np.float32))


@lru_cache(maxsize=8)  # all layers have the same
def _positions(offset: int, B: int) -> mx.array:
    return mx.array([offset] * B, mx.int32)


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
    offsets = _positions(offset, x.shape[0]) if isinstance(offset, int) else offset
    frequencies = inverse_frequencies(rotary_dims, base)
    return kernels.attention_heads(x, q_weight, k_weight, frequencies, offsets, **options)


def _heads_facts(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    heads: int,
    kv_heads: int,
    rotary_dims: int,
    **_: Any,
) -> tuple[Any, ...]:
    positions = mx.int32 if isinstance(offset, int) else offset.dtype
    types = q_weight.dtype, positions
    return x.shape, x.dtype, q_weight.shape[0], heads, kv_heads, rotary_dims, types


def _heads_kind(
    shape: Shape,
    dtype: mx.Dtype,
    hd: int,
    nh: int,
    nkv: int,
    rotary: int,
    types: tuple[mx.Dtype, mx.Dtype],
) -> str | None:
    B, L, _ = shape
    fits = 8 <= hd <= 1024 and types == (mx.float32, mx.int32)
    if dtype not in _NAMES or not fits:
        return None
    return f"{_NAMES[dtype]} {rows_class(L)} B={B} nh={nh} nkv={nkv} hd={hd} rotary={rotary}"


attention_heads = Operation(
    "attention_heads", _heads_kernel, ops.attention_heads, _heads_facts, _heads_kind
)


def _gate_facts(o: mx.array, x: mx.array, *, kv_heads: int) -> tuple[Any, ...]:
    return o.shape, o.dtype, x.dtype == o.dtype, kv_heads


def _gate_kind(shape: Shape, dtype: mx.Dtype, same: bool, nkv: int) -> str | None:
    B, nh, L, hd = shape
    if dtype not in _NAMES or not same:
        return None
    return f"{_NAMES[dtype]} {rows_class(L)} B={B} nh={nh} nkv={nkv} hd={hd}"


attention_gate = Operation(
    "attention_gate", kernels.attention_gate, ops.attention_gate, _gate_facts, _gate_kind
)


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


def _experts_facts(
    x: mx.array,
    logits: mx.array,
    gate_up: Experts,
    down: Experts,
    residual: mx.array,
    *,
    experts: int,
    top_k: int,
    normalise: bool,
) -> tuple[Any, ...]:
    types = [a.dtype for a in (logits, residual)]
    types += [(w.weight if w.scales is None else w.scales).dtype for w in (gate_up, down)]
    stored = [(w.weight.shape, w.bits, w.group_size) for w in (gate_up, down)]
    return x.shape, x.dtype, (*types,), (*stored,), logits.shape[1], experts, top_k


def _experts_kind(
    shape: Shape,
    dtype: mx.Dtype,
    types: tuple[mx.Dtype, ...],
    stored: tuple[tuple[Shape, int, int], ...],
    columns: int,
    E: int,
    top_k: int,
) -> str | None:
    R, H = shape
    taken = (
        dtype in _NAMES
        and all(t == dtype for t in types)
        and kernels.takes_router(R, E, top_k)
        and all(kernels.takes_experts(*of) for of in stored)
    )
    if not taken:
        return None
    bits = ",".join(f"{bits}/{group}" for _, bits, group in stored)
    shared = " shared" * (columns > E)
    sizes = f"E={E} top={top_k} H={H} I={stored[0][0][1] // 2} bits={bits}"
    return f"{_NAMES[dtype]} {rows_class(R)} {sizes}{shared}"


sparse_experts = Operation(
    "sparse_experts", _experts_kernel, ops.sparse_experts, _experts_facts, _experts_kind
)
