"""Kernels of the experts' products, on weights as they are stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from .kernel import LANES, Kernel, constant

_STORED = ("weight", "scales", "biases")
_SHARED = ("shared_weight", "shared_scales", "shared_biases")
_WEIGHTS = """
    const Weights<T, BITS, G> weights = {(const device uint*)weight, scales, biases};
    const uint N = routing_shape[0] / 4;
    const Routing pairs = {
        routing, routing + N, (const device float*)(routing + 2 * N), routing + 3 * N, N};
"""
_SHARED_STACKED = """
    const Weights<T, BITS, G> shared = weights;
"""
_SHARED_APART = """
    const Weights<T, SHARED_BITS, SHARED_G> shared = {
        (const device uint*)shared_weight, shared_scales, shared_biases};
"""


def _products(name: str, inputs: tuple[str, ...], call: str) -> tuple[Kernel, Kernel]:
    """Returns the kernels of a product: all experts in one stack, and the shared one apart."""
    stacked = Kernel(
        *(name, "experts", ("x", *_STORED, *inputs), ("y",)),
        body=_WEIGHTS + _SHARED_STACKED + call,
    )
    apart = Kernel(
        *(f"{name}_shared", "experts", ("x", *_STORED, *_SHARED, *inputs), ("y",)),
        body=_WEIGHTS + _SHARED_APART + call,
    )
    return stacked, apart


EXPERT_GATE_UP, EXPERT_GATE_UP_SHARED = _products(
    "expert_gate_up",
    ("routing",),
    """
    expert_gate_up<H, I, SG, SHARED>(
        x, weights, shared, pairs, y, threadgroup_position_in_grid.x,
        threadgroup_position_in_grid.y, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
    """,
)
EXPERT_DOWN, EXPERT_DOWN_SHARED = _products(
    "expert_down",
    ("routing", "residual"),
    """
    expert_down<H, I, SG, SHARED>(
        x, weights, shared, pairs, residual, y, residual_shape[0] * residual_shape[1],
        threadgroup_position_in_grid.x, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    """,
)
COMBINE = Kernel(
    "combine",
    "experts",
    inputs=("x", "places", "weights", "residual"),
    outputs=("y",),
    body="""
    combine<H, K>(
        x, places, weights, residual, y, thread_position_in_grid.x * kColumns,
        thread_position_in_grid.y);
    """,
)
OUTPUTS = 4  # kPairs and kOutputs in experts.metal
COLUMNS = 4  # kColumns there
BITS = (2, 3, 4, 5, 6, 8)  # of quantized weights


class Experts(NamedTuple):
    """A stack of linear layers ``[E, outputs, inputs]``, quantized as MLX does it, or not."""

    weight: mx.array  # uint32 words, or the weights themselves
    scales: mx.array | None = None  # [E, outputs, inputs / group_size]
    biases: mx.array | None = None
    group_size: int = 0
    bits: int = 16  # one of BITS; 16 stands for unquantized


def takes_experts(shape: tuple[int, ...], bits: int, group_size: int) -> bool:
    """Returns whether the expert kernels take weights stored in this shape and quantization."""
    *_, outputs, words = shape
    columns = words if bits == 16 else words * 32 // bits
    known = bits == 16 or (bits in BITS and group_size in (32, 64, 128))
    return known and outputs % (2 * OUTPUTS) == 0 and columns % 32 == 0


def expert_gate_up(
    x: mx.array, weights: Experts, routing: mx.array, shared: Experts | None = None
) -> mx.array:
    """Returns ``silu(gate x) up x`` for every pair of the routing, in one launch.

    Args:
        x: ``[..., H]`` T, at most 16 rows.
        weights: ``[E, 2 I, H]``, gate's rows, then up's; scales, biases or unquantized: T.
        routing: made by :func:`mlx_qwen3next.metal_kernels.route` for these rows.
        shared: ``[2 I, H]``, the routing's expert number E if ``weights`` has not got it, quantized
            in its own way.

    Returns:
        ``[N, I]`` T, in the routing's order. A pair's result depends on its row alone, bit for bit.
        Limits: :func:`takes_experts`.
    """
    N, I = routing.size // 4, weights.weight.shape[1] // 2
    groups = min(2, I // OUTPUTS)
    kernel = EXPERT_GATE_UP if shared is None else EXPERT_GATE_UP_SHARED
    (y,) = kernel.launch(
        inputs=[x, *_stored(weights, shared, dtype=x.dtype), routing],
        template=_expert_template(weights, shared, x.dtype, H=x.shape[-1], I=I, groups=groups),
        grid=(LANES * groups * -(-I // (OUTPUTS * groups)), N, 1),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[(N, I)],
        output_dtypes=[x.dtype],
    )
    return y


def expert_down(
    x: mx.array,
    weights: Experts,
    routing: mx.array,
    residual: mx.array,
    shared: Experts | None = None,
) -> mx.array:
    """Adds the weighted sum of ``down x`` over each row's experts to ``residual``, in one launch.

    Args:
        x: ``[N, I]`` T, the result of :func:`expert_gate_up`.
        weights: ``[E, H, I]``. residual: ``[B, L, H]`` T, B L at most 16.
        shared: ``[H, I]``, as for :func:`expert_gate_up`.

    Returns:
        ``[B, L, H]`` T. The order of the sum is that of the experts' numbers. Limits:
        :func:`takes_experts`.
    """
    H = residual.shape[-1]
    groups = min(4, H // OUTPUTS)
    kernel = EXPERT_DOWN if shared is None else EXPERT_DOWN_SHARED
    (y,) = kernel.launch(
        inputs=[x, *_stored(weights, shared, dtype=x.dtype), routing, residual],
        template=_expert_template(weights, shared, x.dtype, H=H, I=x.shape[1], groups=groups),
        grid=(LANES * groups * -(-H // (OUTPUTS * groups)), 1, 1),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[x.dtype],
    )
    return y


def takes_combine(rows: int, k: int, H: int) -> bool:
    """Returns whether the kernel takes so many rows, experts a row, and columns.

    MLX places inputs of fewer than 8 elements in another address space.
    """
    return rows * k >= 8 and rows * H >= 8 and H % COLUMNS == 0


def combine(x: mx.array, places: mx.array, weights: mx.array, residual: mx.array) -> mx.array:
    """Adds the weighted sum of each row's experts to ``residual``, in one launch.

    Args:
        x: ``[N, H]`` T, the results of all pairs of rows and experts, in any order.
        places: ``[R, k]`` uint32, those of each row's pairs in it. weights: ``[R, k]`` T.
        residual: ``[R, H]`` T.

    Returns:
        ``[R, H]`` T, summed in float32 in the order of the k. Limits: :func:`takes_combine`.
    """
    R, H = residual.shape
    threads = H // COLUMNS
    (y,) = COMBINE.launch(
        inputs=[x, places, weights, residual],
        template=[("H", H), ("K", places.shape[1])],
        grid=(threads, R, 1),
        threadgroup=(min(256, threads), 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[x.dtype],
    )
    return y


def _stored(*stacks: Experts | None, dtype: mx.Dtype) -> list[mx.array]:
    none = constant(0, dtype, 8)
    arrays = []
    for one in stacks:
        if one is not None:
            arrays += [one.weight, *(none if a is None else a for a in (one.scales, one.biases))]
    return arrays


def _expert_template(
    weights: Experts, shared: Experts | None, dtype: mx.Dtype, *, H: int, I: int, groups: int
) -> list[tuple[str, Any]]:
    template = [("T", dtype), ("BITS", weights.bits), ("G", weights.group_size or 1)]
    if shared is not None:
        template += [("SHARED_BITS", shared.bits), ("SHARED_G", shared.group_size or 1)]
    number = 0 if shared is None else len(weights.weight)
    return [*template, ("SHARED", number), ("H", H), ("I", I), ("SG", groups)]
