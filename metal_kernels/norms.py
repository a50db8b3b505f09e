"""RMSNorm kernels, alone and with the residual addition before it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .kernel import LANES, Kernel, float_bits

_NORM_BODY = """
    threadgroup float shared[SG];
    rms_norm<T, H, SG, %s>(
        x, %s, weight, as_type<float>(EPS), %s, normed, shared, threadgroup_position_in_grid.x,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    """
RMS_NORM = Kernel(
    *("rms_norm", "norms", ("x", "weight"), ("normed",)),
    body=_NORM_BODY % ("false", "x", "normed"),
)
ADD_RMS_NORM = Kernel(
    *("add_rms_norm", "norms", ("x", "y", "weight"), ("sum", "normed")),
    body=_NORM_BODY % ("true", "y", "sum"),
)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Returns RMSNorm, in one launch.

    Args:
        x: ``[..., H]`` T. weight: ``[H]`` float32, H at least 8.

    Returns:
        ``[..., H]`` T.
    """
    (normed,) = RMS_NORM.launch(inputs=[x, weight], **_norm_launch(x, eps, outputs=1))
    return normed


def add_rms_norm(
    x: mx.array, y: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Returns ``x + y`` and its RMSNorm, in one launch; arguments as :func:`rms_norm`."""
    total, normed = ADD_RMS_NORM.launch(inputs=[x, y, weight], **_norm_launch(x, eps, outputs=2))
    return total, normed


def _norm_launch(x: mx.array, eps: float, outputs: int) -> dict[str, Any]:
    H = x.shape[-1]
    groups = min(8, -(-H // LANES))
    return {
        "template": [("T", x.dtype), ("H", H), ("SG", groups), ("EPS", float_bits(eps))],
        "grid": (x.size // H * LANES * groups, 1, 1),
        "threadgroup": (LANES * groups, 1, 1),
        "output_shapes": [x.shape] * outputs,
        "output_dtypes": [x.dtype] * outputs,
    }
