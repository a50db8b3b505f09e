"""Kernels of gated attention before and after the attention itself."""

from __future__ import annotations

import mlx.core as mx

from .kernel import LANES, Kernel, float_bits

ATTENTION_HEADS = Kernel(
    "attention_heads",
    "attention",
    inputs=("x", "q_weight", "k_weight", "inverse_frequencies", "offsets"),
    outputs=("q", "k", "v"),
    body="""
    threadgroup float shared[D];
    attention_heads<T, NQ, NKV, D, RD>(
        x, q_weight, k_weight, as_type<float>(EPS), inverse_frequencies,
        as_type<float>(ATTENTION_FACTOR), offsets, q, k, v, shared,
        x_shape[1], threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.z, thread_index_in_simdgroup);
    """,
)
ATTENTION_GATE = Kernel(
    "attention_gate",
    "attention",
    inputs=("o", "x"),
    outputs=("y",),
    body="""
    attention_gate<T, NQ, NKV, D>(
        o, x, y, x_shape[1], thread_position_in_grid.x, thread_position_in_grid.y,
        thread_position_in_grid.z);
    """,
)


def attention_heads(
    x: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    inverse_frequencies: mx.array,
    offsets: mx.array,
    *,
    eps: float,
    attention_factor: float,
    heads: int,
    kv_heads: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns q and k normalised and rotated, and v, in one launch.

    Args:
        x: ``[B, L, (2 nh + 2 nkv) hd]`` T, rows ``[q | k | v | gate]``, head after head.
        q_weight, k_weight: ``[hd]`` float32, hd at least 8.
        inverse_frequencies: ``[rotary / 2]`` float32, radians a position.
        offsets: ``[B]`` int32, the position of each sequence's first token.
        attention_factor: of sine and cosine, 1 without YaRN.

    Returns:
        q ``[B, nh, L, hd]``, k and v ``[B, nkv, L, hd]``, all T.
    """
    B, L, _ = x.shape
    hd = q_weight.shape[0]
    q, k, v = ATTENTION_HEADS.launch(
        inputs=[x, q_weight, k_weight, inverse_frequencies, offsets],
        template=[
            *(("T", x.dtype), ("NQ", heads), ("NKV", kv_heads), ("D", hd)),
            *(("RD", 2 * inverse_frequencies.size), ("EPS", float_bits(eps))),
            ("ATTENTION_FACTOR", float_bits(attention_factor)),
        ],
        grid=(LANES * (heads + 2 * kv_heads), L, B),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(B, n, L, hd) for n in (heads, kv_heads, kv_heads)],
        output_dtypes=[x.dtype] * 3,
    )
    return q, k, v


def attention_gate(o: mx.array, x: mx.array, *, kv_heads: int) -> mx.array:
    """Returns attention's output times the sigmoid of its gate, in one launch.

    Args:
        o: ``[B, nh, L, hd]`` T. x: as for :func:`attention_heads`.

    Returns:
        ``[B, L, nh hd]`` T.
    """
    B, nh, L, hd = o.shape
    (y,) = ATTENTION_GATE.launch(
        inputs=[o, x],
        template=[("T", x.dtype), ("NQ", nh), ("NKV", kv_heads), ("D", hd)],
        grid=(nh * hd, L, B),
        threadgroup=(min(256, nh * hd), 1, 1),
        output_shapes=[(B, L, nh * hd)],
        output_dtypes=[x.dtype],
    )
    return y
