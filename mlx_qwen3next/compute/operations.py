"""The operations that have a Metal kernel: each picks the kernel or its composition.

A decoded token takes nine launches a linear layer and thirteen an attention layer this way. The
kernels are in :mod:`mlx_qwen3next.metal_kernels`, the compositions beside this file, and
:mod:`mlx_qwen3next.compute.proof` chooses. Only a whole Gated DeltaNet layer's composition is the
model's own, since it is the layer's equations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from .. import metal_kernels as kernels
from ..metal_kernels import Experts
from . import attention, experts, gated_delta, norms
from .experts import Slots
from .gated_delta import DeltaWeights, LayerState, Tape
from .proof import Operation
from .rope import Rope, inverse_frequencies

Shape = tuple[int, ...]

_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def rows_class(rows: int) -> str:
    """Returns the class of a step by its rows: 1, 2, 3-4, 5-8, 9-16, …"""
    last = 1 << (rows - 1).bit_length()
    first = last // 2 + 1
    return f"rows={rows}" if first >= last else f"rows={first}-{last}"


# --- norms ---------------------------------------------------------------------------------------
def _norm_facts(x: mx.array, *rest: Any) -> tuple[Any, ...]:
    return x.shape, x.dtype, *(a.dtype for a in rest[:-1])


def _norm_kind(shape: Shape, dtype: mx.Dtype, *others: mx.Dtype) -> str | None:
    *y, weight = others
    *before, H = shape
    rows = int(np.prod(before))
    fits = weight == mx.float32 and all(t == dtype for t in y) and H >= 8 and rows > 0
    return f"{_NAMES[dtype]} {rows_class(rows)} H={H}" if dtype in _NAMES and fits else None


rms_norm = Operation("rms_norm", kernels.rms_norm, norms.rms_norm, _norm_facts, _norm_kind)
add_rms_norm = Operation(
    "add_rms_norm", kernels.add_rms_norm, norms.add_rms_norm, _norm_facts, _norm_kind
)


# --- the gated delta step ------------------------------------------------------------------------
def _delta_facts(
    projected: mx.array,
    before: LayerState,
    weights: DeltaWeights,
    *,
    key_heads: int,
    recording: bool,
    mask: mx.array | None,
    lengths: mx.array | None,
    **__: Any,
) -> tuple[Any, ...]:
    x, (conv1d, *others) = projected, weights
    same = before.rows.dtype == x.dtype
    same = same and all(a.dtype == mx.float32 for a in (before.state, *others))
    flags = recording, before.tape is not None, mask is not None, lengths is not None
    return x.shape, x.dtype, before.state.shape, key_heads, conv1d.shape[1], same, *flags


def _delta_kind(
    shape: Shape,
    dtype: mx.Dtype,
    state: Shape,
    Hk: int,
    K: int,
    same: bool,
    recording: bool,
    replays: bool,
    masked: bool,
    has_lengths: bool,
) -> str | None:
    B, L, _ = shape
    _, Hv, Dv, Dk = state
    if dtype not in _NAMES or not same or has_lengths or not kernels.takes_gated_delta(L, Dk, Dv):
        return None
    sizes = f"B={B} Hk={Hk} Hv={Hv} Dk={Dk} Dv={Dv} K={K}"
    extras = " round" * recording + " replay" * replays + " masked" * masked
    return f"{_NAMES[dtype]} {rows_class(L)} {sizes}{extras}"


def _delta_kernel(
    projected: mx.array,
    before: LayerState,
    weights: DeltaWeights,
    *,
    lengths: None = None,
    **options: Any,
) -> tuple[mx.array, LayerState]:
    rows, state, tape, keep = before
    o, state, rows, *written = kernels.gated_delta_step(
        *(projected, rows, state, tape or (), keep, *weights), **options
    )
    return o, LayerState(rows, state, Tape(*written) if written else None)


def gated_delta_step(composition: Callable[..., tuple[mx.array, LayerState]]) -> Operation:
    """Returns the operation of a whole Gated DeltaNet layer between its projections.

    Args:
        composition: the layer's equations, which are the model's:
            :meth:`mlx_qwen3next.model.gated_delta_net.GatedDeltaNet.mix`.
    """
    return Operation("gated_delta_step", _delta_kernel, composition, _delta_facts, _delta_kind)


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
    gated_delta.gated_delta_replay,
    _replay_facts,
    _replay_kind,
)


# --- attention -----------------------------------------------------------------------------------
@lru_cache(maxsize=8)  # all layers have the same
def _positions(offset: int, B: int) -> mx.array:
    return mx.array([offset] * B, mx.int32)


def _heads_kernel(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    rope: Rope,
    **options: Any,
) -> tuple[mx.array, mx.array, mx.array]:
    B = x.shape[0]
    offsets = _positions(offset, B) if isinstance(offset, int) else mx.broadcast_to(offset, (B,))
    return kernels.attention_heads(
        *(x, q_weight, k_weight, inverse_frequencies(rope), offsets),
        attention_factor=rope.attention_factor,
        **options,
    )


def _heads_facts(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    heads: int,
    kv_heads: int,
    rope: Rope,
    **_: Any,
) -> tuple[Any, ...]:
    positions = mx.int32 if isinstance(offset, int) else offset.dtype
    types = q_weight.dtype, k_weight.dtype, positions
    return x.shape, x.dtype, q_weight.shape[0], heads, kv_heads, rope.dims, types


def _heads_kind(
    shape: Shape,
    dtype: mx.Dtype,
    hd: int,
    nh: int,
    nkv: int,
    rotary: int,
    types: tuple[mx.Dtype, ...],
) -> str | None:
    B, L, _ = shape
    fits = 8 <= hd <= 1024 and types == (mx.float32, mx.float32, mx.int32)
    if dtype not in _NAMES or not fits or B * L == 0:
        return None
    return f"{_NAMES[dtype]} {rows_class(L)} B={B} nh={nh} nkv={nkv} hd={hd} rotary={rotary}"


def _exact_heads(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    offset: int | mx.array,
    *,
    rope: Rope,
    **options: Any,
) -> tuple[mx.array, mx.array, mx.array]:
    """Computes the composition with angles from exact frequencies; MLX's RoPE is less exact."""
    q, k, v = attention.normalised_heads(x, q_weight, k_weight, **options)
    positions = mx.array(offset).reshape(-1, 1, 1, 1) + mx.arange(x.shape[1])[:, None]
    angles = positions.astype(mx.float32) * inverse_frequencies(rope)
    cos, sin = (rope.attention_factor * f(angles) for f in (mx.cos, mx.sin))  # [B, 1, L, dims / 2]

    def rotated(y: mx.array) -> mx.array:
        first, second, rest = mx.split(y, [rope.dims // 2, rope.dims], axis=-1)
        parts = [first * cos - second * sin, second * cos + first * sin, rest]
        return mx.concatenate(parts, axis=-1)

    return rotated(q), rotated(k), v


attention_heads = Operation(
    *("attention_heads", _heads_kernel, attention.attention_heads, _heads_facts, _heads_kind),
    exact=_exact_heads,
)


def _gate_facts(o: mx.array, x: mx.array, *, kv_heads: int) -> tuple[Any, ...]:
    return o.shape, o.dtype, x.dtype == o.dtype, kv_heads


def _gate_kind(shape: Shape, dtype: mx.Dtype, same: bool, nkv: int) -> str | None:
    B, nh, L, hd = shape
    if dtype not in _NAMES or not same or B * L == 0:
        return None
    return f"{_NAMES[dtype]} {rows_class(L)} B={B} nh={nh} nkv={nkv} hd={hd}"


attention_gate = Operation(
    "attention_gate", kernels.attention_gate, attention.attention_gate, _gate_facts, _gate_kind
)


# --- sparse experts ------------------------------------------------------------------------------
def _choose_kernel(logits: mx.array, like: mx.array, **options: Any) -> tuple[mx.array, mx.array]:
    return kernels.choose(logits, **options)


def _choose_facts(
    logits: mx.array, like: mx.array, *, experts: int, top_k: int, normalise: bool
) -> tuple[Any, ...]:
    return *logits.shape, logits.dtype, like.dtype == logits.dtype, experts, top_k, normalise


def _choose_kind(
    R: int, columns: int, dtype: mx.Dtype, same: bool, E: int, top_k: int, normalise: bool
) -> str | None:
    """A few rows go through the kernels below, so for their composition nothing is proved."""
    many = R * (top_k + columns - E) >= experts.MANY
    if dtype not in _NAMES or not same or not many or not kernels.takes_choice(R, E, top_k):
        return None
    extras = " shared" * (columns > E) + " normalised" * normalise
    return f"{_NAMES[dtype]} {rows_class(R)} E={E} top={top_k}{extras}"


choose = Operation("choose", _choose_kernel, experts.choose, _choose_facts, _choose_kind)

PROVED_ROWS = 1024  # of a prompt at most: with all of them, a proof would need three times as much


def _combine_facts(
    y: mx.array, places: mx.array, weights: mx.array, residual: mx.array
) -> tuple[Any, ...]:
    same = weights.dtype == residual.dtype == y.dtype and places.dtype == mx.uint32
    return *places.shape, y.shape[1], y.dtype, same


def _combine_kind(R: int, k: int, H: int, dtype: mx.Dtype, same: bool) -> str | None:
    if dtype not in _NAMES or not same or not kernels.takes_combine(R, k, H):
        return None
    return f"{_NAMES[dtype]} {rows_class(min(R, PROVED_ROWS))} k={k} H={H}"


def _combine_proof(
    y: mx.array, places: mx.array, weights: mx.array, residual: mx.array
) -> tuple[mx.array, ...]:
    """Takes the first rows, without the residual, which would hide an error."""
    R, k = min(len(places), PROVED_ROWS), places.shape[1]
    places = mx.argsort(places[:R].flatten()).reshape(R, k)  # of as many pairs, as mixed
    return y[: R * k], places, weights[:R], mx.zeros_like(residual[:R])


combine = Operation(
    *("combine", kernels.combine, experts.combine, _combine_facts, _combine_kind),
    proof=_combine_proof,
)


def _experts_kernel(
    x: mx.array,
    logits: mx.array,
    gate_up: Experts,
    down: Experts,
    residual: mx.array,
    shared: tuple[Experts | None, Experts | None] | None = None,
    **options: Any,
) -> mx.array:
    shared_gate_up, shared_down = shared or (None, None)
    routing = kernels.route(logits, **options)
    y = kernels.expert_gate_up(x, gate_up, routing, shared_gate_up)
    return kernels.expert_down(y, down, routing, residual, shared_down)


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
    shared: tuple[Experts, Experts] | None = None,
) -> tuple[Any, ...]:
    types = [a.dtype for a in (logits, residual)]
    all_weights = gate_up, down, *(shared or ())
    for w in all_weights:
        types += [a.dtype for a in (w.scales, w.biases) if a is not None] or [w.weight.dtype]
    stored = [(w.weight.shape, w.bits, w.group_size) for w in all_weights]
    return x.shape, x.dtype, (*types,), (*stored,), logits.shape[-1], experts, top_k, normalise


def _experts_kind(
    shape: Shape,
    dtype: mx.Dtype,
    types: tuple[mx.Dtype, ...],
    stored: tuple[tuple[Shape, int, int], ...],
    columns: int,
    E: int,
    top_k: int,
    normalise: bool,
) -> str | None:
    *before, H = shape
    R = int(np.prod(before))
    taken = (
        dtype in _NAMES
        and len(before) == 2
        and all(t == dtype for t in types)
        and kernels.takes_router(R, E, top_k)
        and all(kernels.takes_experts(*of) for of in stored)
    )
    if not taken:
        return None
    bits = ",".join(f"{bits}/{group}" for _, bits, group in stored)
    extras = " shared" * (columns > E) + " normalised" * normalise
    sizes = f"E={E} top={top_k} H={H} I={stored[0][0][1] // 2} bits={bits}"
    return f"{_NAMES[dtype]} rows={R} {sizes}{extras}"


def _without_residual(
    x: mx.array, logits: mx.array, gate_up: Experts, down: Experts, residual: mx.array
) -> tuple[Any, ...]:
    """Replaces the residual by zeros: it would hide an error of the mixture."""
    return x, logits, gate_up, down, mx.zeros_like(residual)


sparse_experts = Operation(
    "sparse_experts",
    _experts_kernel,
    partial(experts.sparse_experts, forms=experts.Forms(choose, combine=combine)),
    _experts_facts,
    _experts_kind,
    exact=experts.sparse_experts,
    proof=_without_residual,
)


# --- sparse experts in slots ---------------------------------------------------------------------
def _slots_kernel(
    x: mx.array,
    logits: mx.array,
    gate_up: Experts,
    down: Experts,
    residual: mx.array,
    *,
    slots: Slots,
    shared: tuple[Experts | None, Experts | None] | None = None,
    **options: Any,
) -> mx.array:
    shared_gate_up, shared_down = shared or (None, None)
    routing = slots.place(kernels.route(logits, **options))
    if routing is not None:
        y = kernels.expert_gate_up(x, gate_up, routing, shared_gate_up)
        y = kernels.expert_down(y, down, routing, residual, shared_down)
        slots.read_by(y)
        return y
    # These rows want more experts than there are slots. A row's result depends on that row alone.
    rows = [a.reshape(1, -1, a.shape[-1]) for a in (x, logits, residual)]
    options |= {"slots": slots, "shared": shared}
    halves = []
    for half in zip(*(mx.split(a, [a.shape[1] // 2], axis=1) for a in rows), strict=True):
        halves.append(_slots_kernel(half[0], half[1], gate_up, down, half[2], **options))
    return mx.concatenate(halves, axis=1).reshape(residual.shape)


def _slots_composition(*arrays: Any, slots: Slots, **options: Any) -> mx.array:
    forms = experts.Forms(choose, slots.products, combine)
    return experts.sparse_experts(*arrays, forms=forms, **options)


def _exact_slots(*arrays: Any, slots: Slots, **options: Any) -> mx.array:
    forms = experts.Forms(products=slots.products)
    return experts.sparse_experts(*arrays, forms=forms, **options)


def _slots_facts(*arrays: Any, slots: Slots, **options: Any) -> tuple[Any, ...]:
    return _experts_facts(*arrays, **options)


# The kind, and with it the finding, is that of the operation on stacks: both run the same kernels.
sparse_experts_in_slots = Operation(
    *("sparse_experts", _slots_kernel, _slots_composition, _slots_facts, _experts_kind),
    exact=_exact_slots,
    proof=_without_residual,
)
