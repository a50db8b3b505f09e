"""Metal kernels for what MLX has no single launch for, and one function a kernel to launch it.

The only place that touches ``mx.fast.metal_kernel``. The ``.metal`` files hold the kernels' text,
one file a family, with ``common.metal`` before each; the bodies below only call into it. Each
function says what shapes and dtypes it takes and what its limits are; whether a kernel is used at
all is for :mod:`mlx_qwen3next.compute.proof` to decide. T is the activations' dtype: float32,
bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .kernel import LANES, THREADGROUP_BYTES, Kernel, available, compiled, constant, source_hash

__all__ = ["Kernel", "available", "source_hash"]

MAX_ROWS = 16  # that the router and the experts take at once


def launch(kernel: Kernel, **arguments: Any) -> list[mx.array]:
    """Queues one launch; ``arguments`` are those of a kernel made by ``mx.fast.metal_kernel``."""
    return compiled(kernel)(**arguments)


# --- norms ---------------------------------------------------------------------------------------
_NORM_BODY = """
    threadgroup float shared[SG];
    rms_norm<T, H, SG, %s>(
        x, %s, weight, eps, %s, normed, shared, threadgroup_position_in_grid.x,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    """
RMS_NORM = Kernel(
    *("rms_norm", "norms", ("x", "weight", "eps"), ("normed",)),
    body=_NORM_BODY % ("false", "x", "normed"),
)
ADD_RMS_NORM = Kernel(
    *("add_rms_norm", "norms", ("x", "y", "weight", "eps"), ("sum", "normed")),
    body=_NORM_BODY % ("true", "y", "sum"),
)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm in one launch.

    Args:
        x: ``[..., H]`` T. weight: ``[H]`` float32, H at least 8.

    Returns:
        ``[..., H]`` T.
    """
    (normed,) = launch(
        RMS_NORM, inputs=[x, weight, constant(eps, mx.float32)], **_norm_launch(x, outputs=1)
    )
    return normed


def add_rms_norm(
    x: mx.array, y: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """``x + y`` and its RMSNorm in one launch; arguments as :func:`rms_norm`."""
    total, normed = launch(
        ADD_RMS_NORM, inputs=[x, y, weight, constant(eps, mx.float32)], **_norm_launch(x, 2)
    )
    return total, normed


def _norm_launch(x: mx.array, outputs: int) -> dict[str, Any]:
    H = x.shape[-1]
    groups = min(8, -(-H // LANES))
    return {
        "template": [("T", x.dtype), ("H", H), ("SG", groups)],
        "grid": (x.size // H * LANES * groups, 1, 1),
        "threadgroup": (LANES * groups, 1, 1),
        "output_shapes": [x.shape] * outputs,
        "output_dtypes": [x.dtype] * outputs,
    }


# --- the gated delta step ------------------------------------------------------------------------
_DELTA_INPUTS = (
    "x before taps A_log dt_bias norm_weight eps mask state tape_g tape_k tape_delta keep"
)
_DELTA_BODY = """
    threadgroup float shared[CHUNK * (2 * DK + 2 * DV + 2)];
    const Tape tape = %s;
    const Place at = {
        threadgroup_position_in_grid.y, threadgroup_position_in_grid.z,
        thread_index_in_threadgroup, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup};
    gated_delta_step<T, W, HK, HV, DK, DV, K, SG, CHUNK, %s, MASKED>(
        x, before, taps, A_log, dt_bias, norm_weight, eps, mask, state, tape_g, tape_k,
        tape_delta, x_shape[1], before_shape[1], keep[0], o, state_out, rows_out, tape, shared,
        at);
    """
GATED_DELTA_STEP = Kernel(
    "gated_delta_step",
    "gated_delta",
    inputs=tuple(_DELTA_INPUTS.split()),
    outputs=("o", "state_out", "rows_out"),
    body=_DELTA_BODY % ("{nullptr, nullptr, nullptr}", "false"),
)
GATED_DELTA_ROUND = Kernel(
    "gated_delta_round",
    "gated_delta",
    inputs=tuple(_DELTA_INPUTS.split()),
    outputs=("o", "state_out", "rows_out", "g_out", "k_out", "delta_out"),
    body=_DELTA_BODY % ("{g_out, k_out, delta_out}", "true"),
)
GATED_DELTA_REPLAY = Kernel(
    "gated_delta_replay",
    "gated_delta",
    inputs=("state", "tape_g", "tape_k", "tape_delta", "keep"),
    outputs=("state_out",),
    body="""
    const Place at = {
        threadgroup_position_in_grid.y, threadgroup_position_in_grid.z,
        thread_index_in_threadgroup, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup};
    gated_delta_replay<HK, HV, DK, DV, SG>(
        state, tape_g, tape_k, tape_delta, tape_k_shape[1], keep[0], state_out, at);
    """,
)


def takes_gated_delta(L: int, Dk: int, Dv: int) -> bool:
    """Whether the gated delta kernels take a step of L tokens with heads of these widths."""
    return (
        L >= 1
        and Dk % LANES == 0
        and Dv >= 8
        and _simdgroups(Dk, Dv) > 0
        and 4 * (2 * Dk + 2 * Dv + 2) <= THREADGROUP_BYTES
    )


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
    recording: bool,
) -> list[mx.array]:
    """A Gated DeltaNet layer between its projections, for any number of tokens, in one launch.

    Meant for a step of few; the tokens go one after the other, eight staged at a time.

    Args:
        x: ``[B, L, P]`` T, rows ``[q | k | v | z | b | a]``, each head after head.
        before: ``[B, K-1 + n, C]`` T, the convolution's inputs: those before a round of n tokens
            and the round's (n is 0 if there was none).
        state: ``[B, Hv, Dv, Dk]`` float32, before that round.
        tape: what the round wrote: g ``[B, n, Hv]``, k ``[B, n, Hk, Dk]``, delta
            ``[B, n, Hv, Dv]``, float32; empty if n is 0.
        keep: how many of the round's tokens are part of the sequence.
        taps: ``[C, K, 1]``, of any dtype. A_log, dt_bias: ``[Hv]`` float32. norm_weight: ``[Dv]``
            float32.
        mask: ``[B, L]`` bool, False at padding, which changes nothing; or None.
        recording: whether this is a round, whose tokens may be taken back.

    Returns:
        ``o`` ``[B, L, Hv Dv]`` T; the state after the new tokens, or of a round the one before them
        (and after the replay); the convolution's last K-1 inputs, or of a round all K-1 + L; and of
        a round the new tape g, k, delta. A token's results do not depend on L, bit for bit. Limits:
        :func:`takes_gated_delta`.
    """
    B, L, _ = x.shape
    Hv, Dv, Dk = state.shape[1:]
    C, K = taps.shape[:2]
    groups = _simdgroups(Dk, Dv)
    chunk = min(8, THREADGROUP_BYTES // (4 * (2 * Dk + 2 * Dv + 2)))
    none = constant(0, mx.float32, 8)
    outputs = [((B, L, Hv * Dv), x.dtype), (state.shape, mx.float32)]
    outputs.append(((B, K - 1 + L if recording else K - 1, C), x.dtype))
    if recording:
        widths = ((Hv,), (key_heads, Dk), (Hv, Dv))
        outputs += [((B, L, *width), mx.float32) for width in widths]
    return launch(
        GATED_DELTA_ROUND if recording else GATED_DELTA_STEP,
        inputs=[
            *(x, before, taps, A_log, dt_bias, norm_weight, constant(eps, mx.float32)),
            constant(1, mx.bool_, 8) if mask is None else mask,
            *(state, *(tape or (none, none, none)), constant(keep, mx.int32)),
        ],
        template=[
            *(("T", x.dtype), ("W", taps.dtype), ("HK", key_heads), ("HV", Hv), ("DK", Dk)),
            *(("DV", Dv), ("K", K), ("SG", groups), ("CHUNK", chunk)),
            ("MASKED", mask is not None),
        ],
        grid=(LANES * groups, Hv, B),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


def gated_delta_replay(
    state: mx.array, g: mx.array, k: mx.array, delta: mx.array, keep: int
) -> mx.array:
    """The state after the first ``keep`` tokens of a tape: the bits that the round would give.

    Arguments as :func:`gated_delta_step`.
    """
    B, Hv, Dv, Dk = state.shape
    groups = _simdgroups(Dk, Dv)
    (after,) = launch(
        GATED_DELTA_REPLAY,
        inputs=[state, g, k, delta, constant(keep, mx.int32)],
        template=[("HK", k.shape[2]), ("HV", Hv), ("DK", Dk), ("DV", Dv), ("SG", groups)],
        grid=(LANES * groups, Hv, B),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[state.shape],
        output_dtypes=[mx.float32],
    )
    return after


@cache
def _simdgroups(Dk: int, Dv: int) -> int:
    """Simdgroups a head, which share its rows evenly; 0 if none of these numbers will do.

    16 where they can hold the state in 32 registers a lane: threads that need more registers may
    not be as many as 1,024 in a threadgroup.
    """
    shares = [n for n in range(1, 33) if Dv % n == 0 and Dv // n * Dk <= 32 * LANES]
    return next((n for n in shares if n >= 16), shares[-1] if shares else 0)


# --- attention -----------------------------------------------------------------------------------
ATTENTION_HEADS = Kernel(
    "attention_heads",
    "attention",
    inputs=("x", "q_weight", "k_weight", "eps", "inverse_frequencies", "offsets"),
    outputs=("q", "k", "v"),
    body="""
    threadgroup float shared[D];
    attention_heads<T, NQ, NKV, D, RD>(
        x, q_weight, k_weight, eps, inverse_frequencies, offsets, q, k, v, shared, x_shape[1],
        threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
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
    heads: int,
    kv_heads: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """q and k normalised and rotated, and v, as attention wants them, in one launch.

    Args:
        x: ``[B, L, (2 nh + 2 nkv) hd]`` T, rows ``[q | k | v | gate]``, head after head.
        q_weight, k_weight: ``[hd]`` float32, hd at least 8.
        inverse_frequencies: ``[rotary / 2]`` float32, radians a position.
        offsets: ``[B]`` int32, the position of each sequence's first token.

    Returns:
        q ``[B, nh, L, hd]``, k and v ``[B, nkv, L, hd]``, all T.
    """
    B, L, _ = x.shape
    hd = q_weight.shape[0]
    q, k, v = launch(
        ATTENTION_HEADS,
        inputs=[
            *(x, q_weight, k_weight, constant(eps, mx.float32)),
            *(inverse_frequencies, offsets),
        ],
        template=[
            *(("T", x.dtype), ("NQ", heads), ("NKV", kv_heads), ("D", hd)),
            ("RD", 2 * inverse_frequencies.size),
        ],
        grid=(LANES * (heads + 2 * kv_heads), L, B),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(B, n, L, hd) for n in (heads, kv_heads, kv_heads)],
        output_dtypes=[x.dtype] * 3,
    )
    return q, k, v


def attention_gate(o: mx.array, x: mx.array, *, kv_heads: int) -> mx.array:
    """Attention's output times the sigmoid of its gate, in one launch.

    Args:
        o: ``[B, nh, L, hd]`` T. x: as for :func:`attention_heads`.

    Returns:
        ``[B, L, nh hd]`` T.
    """
    B, nh, L, hd = o.shape
    (y,) = launch(
        ATTENTION_GATE,
        inputs=[o, x],
        template=[("T", x.dtype), ("NQ", nh), ("NKV", kv_heads), ("D", hd)],
        grid=(nh * hd, L, B),
        threadgroup=(min(256, nh * hd), 1, 1),
        output_shapes=[(B, L, nh * hd)],
        output_dtypes=[x.dtype],
    )
    return y


# --- sparse experts ------------------------------------------------------------------------------
ROUTER = Kernel(
    "router",
    "router",
    inputs=("logits",),
    outputs=("experts", "starts", "rows", "weights"),
    body="""
    threadgroup uint keys[PAIRS];
    threadgroup uint sorted[PAIRS];
    threadgroup float pair_weights[PAIRS];
    route<T, E, TOP, SHARED, NORMALISE>(
        logits, experts, starts, rows, weights, keys, sorted, pair_weights, logits_shape[0],
        thread_index_in_threadgroup, threads_per_threadgroup.x, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
    """,
)
EXPERT_GATE_UP = Kernel(
    "expert_gate_up",
    "experts",
    inputs=("x", "weight", "scales", "biases", "experts", "starts", "rows"),
    outputs=("y",),
    body="""
    const Weights<T> weights = {(const device uint*)weight, scales, biases};
    expert_gate_up<T, BITS, G, H, I, SG>(
        x, weights, experts, starts, rows, y, threadgroup_position_in_grid.x,
        threadgroup_position_in_grid.y, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
    """,
)
EXPERT_DOWN = Kernel(
    "expert_down",
    "experts",
    inputs=(
        *("x", "weight", "scales", "biases", "experts", "starts", "rows", "pair_weights"),
        "residual",
    ),
    outputs=("y",),
    body="""
    const Weights<T> weights = {(const device uint*)weight, scales, biases};
    expert_down<T, BITS, G, H, I, SG>(
        x, weights, experts, starts, rows, pair_weights, residual, y, x_shape[0],
        residual_shape[0], threadgroup_position_in_grid.x, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
    """,
)
OUTPUTS = 4  # kPairs and kOutputs in experts.metal


class Plan(NamedTuple):
    """Which rows go to which experts: N pairs (row, expert), sorted by expert, then row."""

    experts: mx.array  # [N] uint32, the distinct ones
    starts: mx.array  # [N + 1] uint32, where each one's pairs begin; N after the last
    rows: mx.array  # [N] uint32, of each pair
    weights: mx.array  # [N] float32, of each pair


class Experts(NamedTuple):
    """A stack of linear layers ``[E, outputs, inputs]``, quantized as MLX does it, or not."""

    weight: mx.array  # uint32 words, or the weights themselves
    scales: mx.array | None = None  # [E, outputs, inputs / group_size]
    biases: mx.array | None = None
    group_size: int = 0
    bits: int = 16  # 4 or 8; 16 stands for unquantized


def takes_router(rows: int, experts: int, top_k: int) -> bool:
    """Whether the router kernel takes so many rows, experts, and experts a row.

    MLX places inputs of fewer than 8 elements in another address space.
    """
    fits = 1 <= rows <= MAX_ROWS and top_k <= experts <= 1024 and top_k < LANES
    return fits and rows * experts >= 8


def router(logits: mx.array, *, experts: int, top_k: int, normalise: bool) -> Plan:
    """Top-k, weights and a plan for the experts, for up to 16 rows, in one launch.

    Args:
        logits: ``[R, E]`` or ``[R, E + 1]`` T: the shared expert's gate last, if it is one more
            expert, number E, of weight sigmoid(gate).
        normalise: whether a row's top-k weights are to sum to one.

    Ties go to the lowest index. Limits: :func:`takes_router`.
    """
    R, columns = logits.shape
    N = R * (top_k + columns - experts)
    outputs = launch(
        ROUTER,
        inputs=[logits],
        template=[
            *(("T", logits.dtype), ("E", experts), ("TOP", top_k)),
            *(("SHARED", columns > experts), ("NORMALISE", normalise), ("PAIRS", N)),
        ],
        grid=(LANES * R, 1, 1),
        threadgroup=(LANES * R, 1, 1),
        output_shapes=[(N,), (N + 1,), (N,), (N,)],
        output_dtypes=[mx.uint32, mx.uint32, mx.uint32, mx.float32],
    )
    return Plan(*outputs)


def takes_experts(shape: tuple[int, ...], bits: int, group_size: int) -> bool:
    """Whether the expert kernels take weights stored in this shape and quantization."""
    _, outputs, words = shape
    columns = words if bits == 16 else words * 32 // bits
    known = bits == 16 or (bits in (4, 8) and group_size in (32, 64, 128))
    return known and outputs % (2 * OUTPUTS) == 0 and columns % 32 == 0


def expert_gate_up(x: mx.array, weights: Experts, plan: Plan) -> mx.array:
    """``silu(gate x) up x`` for every pair of the plan, in one launch.

    Args:
        x: ``[R, H]`` T, R at most 16.
        weights: ``[E, 2 I, H]``, gate's rows, then up's; scales, biases or unquantized: T.

    Returns:
        ``[N, I]`` T, in the plan's order. A pair's result depends on its row alone, bit for bit.
        Limits: :func:`takes_experts`.
    """
    N, I = plan.rows.size, weights.weight.shape[1] // 2
    groups = min(2, I // OUTPUTS)
    (y,) = launch(
        EXPERT_GATE_UP,
        inputs=[x, *_stored(weights, x.dtype), plan.experts, plan.starts, plan.rows],
        template=_expert_template(weights, x.dtype, H=x.shape[1], I=I, groups=groups),
        grid=(LANES * groups * -(-I // (OUTPUTS * groups)), N, 1),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[(N, I)],
        output_dtypes=[x.dtype],
    )
    return y


def expert_down(x: mx.array, weights: Experts, plan: Plan, residual: mx.array) -> mx.array:
    """``residual`` plus the weighted sum of ``down x`` over each row's experts, in one launch.

    Args:
        x: ``[N, I]`` T, what :func:`expert_gate_up` gave.
        weights: ``[E, H, I]``. residual: ``[R, H]`` T, R at most 16.

    Returns:
        ``[R, H]`` T. The order of the sum is that of the experts' numbers. Limits:
        :func:`takes_experts`.
    """
    H = residual.shape[1]
    groups = min(4, H // OUTPUTS)
    (y,) = launch(
        EXPERT_DOWN,
        inputs=[
            *(x, *_stored(weights, x.dtype), plan.experts, plan.starts, plan.rows),
            *(plan.weights, residual),
        ],
        template=_expert_template(weights, x.dtype, H=H, I=x.shape[1], groups=groups),
        grid=(LANES * groups * -(-H // (OUTPUTS * groups)), 1, 1),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[x.dtype],
    )
    return y


def _stored(weights: Experts, dtype: mx.Dtype) -> list[mx.array]:
    none = constant(0, dtype, 8)
    if weights.scales is None or weights.biases is None:
        return [weights.weight, none, none]
    return [weights.weight, weights.scales, weights.biases]


def _expert_template(
    weights: Experts, dtype: mx.Dtype, *, H: int, I: int, groups: int
) -> list[tuple[str, Any]]:
    return [
        *(("T", dtype), ("BITS", weights.bits), ("G", weights.group_size or 1)),
        *(("H", H), ("I", I), ("SG", groups)),
    ]
