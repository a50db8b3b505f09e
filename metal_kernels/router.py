"""The router's kernel, which sorts the pairs of rows and experts for the experts' kernels."""

from __future__ import annotations

import mlx.core as mx

from .kernel import LANES, Kernel

MAX_ROWS = 16  # rows that the router and the experts take at once
ROUTER = Kernel(
    "router",
    "router",
    inputs=("logits",),
    outputs=("routing",),
    body="""
    threadgroup uint keys[PAIRS];
    threadgroup uint sorted[PAIRS];
    threadgroup float pair_weights[PAIRS];
    route<T, E, TOP, SHARED, NORMALISE>(
        logits, routing, routing + 3 * PAIRS, routing + PAIRS,
        reinterpret_cast<device float*>(routing + 2 * PAIRS), keys, sorted, pair_weights,
        thread_index_in_threadgroup, threads_per_threadgroup.x, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
    """,
)

CHOOSE = Kernel(
    "choose",
    "router",
    inputs=("logits",),
    outputs=("experts", "weights"),
    body="""
    choose<T, E, TOP, SHARED, NORMALISE>(
        logits, experts, weights, thread_index_in_simdgroup, thread_position_in_grid.x / 32);
    """,
)


def takes_router(rows: int, experts: int, top_k: int) -> bool:
    """Returns whether the router kernel takes so many rows, experts, and experts a row.

    MLX places inputs of fewer than 8 elements in another address space: logits, or the routing.
    """
    return rows <= MAX_ROWS and takes_choice(rows, experts, top_k) and rows * top_k >= 2


def takes_choice(rows: int, experts: int, top_k: int) -> bool:
    """Returns whether :func:`choose` takes so many rows, experts, and experts a row."""
    return rows * experts >= 8 and top_k <= experts <= 1024 and top_k < LANES


def choose(
    logits: mx.array, *, experts: int, top_k: int, normalise: bool
) -> tuple[mx.array, mx.array]:
    """Returns the top k experts of each row and their weights, in one launch.

    Args:
        logits, normalise: as for :func:`route`; ``[R, E]`` or ``[R, E + 1]``.

    Returns:
        The experts uint32 and their weights T, each ``[R, top_k]`` or ``[R, top_k + 1]``: the best
        first, the shared one last. Ties go to the lowest index. Limits: :func:`takes_choice`.
    """
    R, columns = logits.shape
    shared = columns > experts
    shape = R, top_k + shared
    chosen, weights = CHOOSE.launch(
        inputs=[logits],
        template=[
            *(("T", logits.dtype), ("E", experts), ("TOP", top_k)),
            *(("SHARED", shared), ("NORMALISE", normalise)),
        ],
        grid=(LANES * R, 1, 1),
        threadgroup=(LANES * min(8, R), 1, 1),
        output_shapes=[shape, shape],
        output_dtypes=[mx.uint32, logits.dtype],
    )
    return chosen, weights


def route(logits: mx.array, *, experts: int, top_k: int, normalise: bool) -> mx.array:
    """Returns the top k experts of up to 16 rows and their weights, sorted, in one launch.

    Args:
        logits: ``[..., E]`` or ``[..., E + 1]`` T: the shared expert's gate last, if it is one more
            expert, number E, of weight sigmoid(gate).
        normalise: whether a row's top-k weights sum to one.

    Returns:
        The routing of N pairs (row, expert), sorted by expert, then row: ``[4 N + 1]`` uint32. It
        has N distinct experts, the unused ones 0; the row of each pair; the bits of its weight,
        float32; and N + 1 numbers, where the pairs of each distinct expert begin, N after the
        last. Ties go to the lowest index. Limits: :func:`takes_router`.
    """
    columns = logits.shape[-1]
    R = logits.size // columns
    N = R * (top_k + columns - experts)
    (routing,) = ROUTER.launch(
        inputs=[logits],
        template=[
            *(("T", logits.dtype), ("E", experts), ("TOP", top_k)),
            *(("SHARED", columns > experts), ("NORMALISE", normalise), ("PAIRS", N)),
        ],
        grid=(LANES * R, 1, 1),
        threadgroup=(LANES * R, 1, 1),
        output_shapes=[(4 * N + 1,)],
        output_dtypes=[mx.uint32],
    )
    return routing
