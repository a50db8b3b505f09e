"""Kernels of a whole Gated DeltaNet layer between its projections, and of a round's replay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from .kernel import LANES, THREADGROUP_BYTES, Kernel, body_of, constant, float_bits

_TAPE = ("tape_g", "tape_k", "tape_delta", "keep")


def _step(name: str, *, recording: bool, replays: bool) -> Kernel:
    """Returns the kernel of a layer's step.

    Args:
        recording: whether it is for a round, which writes a tape.
        replays: whether it is for steps after a round, whose tape it reads.
    """
    inputs = "x before taps vectors mask state"
    return Kernel(
        name,
        "gated_delta",
        inputs=(*inputs.split(), *(_TAPE if replays else ())),
        outputs=(
            *("o", "state_out", "rows_out"),
            *(("g_out", "k_out", "delta_out") if recording else ()),
        ),
        body=body_of("gated_delta", "gated_delta_step", RECORDING=recording, REPLAYS=replays),
    )


GATED_DELTA_STEP = _step("gated_delta_step", recording=False, replays=False)
GATED_DELTA_ROUND = _step("gated_delta_round", recording=True, replays=False)
GATED_DELTA_STEP_AFTER_ROUND = _step("gated_delta_step_after", recording=False, replays=True)
GATED_DELTA_ROUND_AFTER_ROUND = _step("gated_delta_round_after", recording=True, replays=True)
GATED_DELTA_REPLAY = Kernel(
    "gated_delta_replay",
    "gated_delta",
    inputs=("state", *_TAPE),
    outputs=("state_out",),
    body=body_of("gated_delta", "gated_delta_replay"),
)


def takes_gated_delta(L: int, Dk: int, Dv: int) -> bool:
    """Returns whether the kernels take a step of L tokens with heads of these widths."""
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
    keep: int | mx.array,
    taps: mx.array,
    vectors: mx.array,
    *,
    eps: float,
    key_heads: int,
    mask: mx.array | None,
    recording: bool,
) -> list[mx.array]:
    """Runs a Gated DeltaNet layer between its projections, for any number of tokens, in one launch.

    It is for steps of few tokens; they go one after the other, eight staged at a time.

    Args:
        x: ``[B, L, P]`` T, rows ``[q | k | v | z | b | a]``, each head after head.
        before: ``[B, K-1 + n, C]`` T, the convolution's inputs: those before a round of n tokens
            and the round's (n is 0 if there was none).
        state: ``[B, Hv, Dv, Dk]`` float32, before that round.
        tape: the round's record: g ``[B, n, Hv]``, k ``[B, n, Hk, Dk]``, delta
            ``[B, n, Hv, Dv]``, float32; empty if n is 0.
        keep: the number of the round's tokens that are part of the sequence, or ``[1]`` int32.
        taps: ``[C, K, 1]``, of any dtype. vectors: ``[2 Hv + Dv]`` float32, ``[A_log | dt_bias |
            norm.weight]``.
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
    outputs = [((B, L, Hv * Dv), x.dtype), (state.shape, mx.float32)]
    outputs.append(((B, K - 1 + L if recording else K - 1, C), x.dtype))
    if recording:
        widths = ((Hv,), (key_heads, Dk), (Hv, Dv))
        outputs += [((B, L, *width), mx.float32) for width in widths]
    inputs = [
        *(x, before, taps, vectors),
        *(constant(1, mx.bool_, 8) if mask is None else mask, state),
    ]
    if tape:
        inputs += [*tape, keep if isinstance(keep, mx.array) else constant(keep, mx.int32)]
        kernel = GATED_DELTA_ROUND_AFTER_ROUND if recording else GATED_DELTA_STEP_AFTER_ROUND
    else:
        kernel = GATED_DELTA_ROUND if recording else GATED_DELTA_STEP
    return kernel.launch(
        inputs=inputs,
        template=[
            *(("T", x.dtype), ("W", taps.dtype), ("Hk", key_heads), ("Hv", Hv), ("Dk", Dk)),
            *(("Dv", Dv), ("K", K), ("SG", groups), ("Chunk", chunk)),
            *(("Masked", mask is not None), ("EPS", float_bits(eps))),
        ],
        grid=(LANES * groups, Hv, B),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


def gated_delta_replay(
    state: mx.array, g: mx.array, k: mx.array, delta: mx.array, keep: int
) -> mx.array:
    """Returns the state after the first ``keep`` tokens of a tape, with the bits of the round.

    Arguments as :func:`gated_delta_step`.
    """
    B, Hv, Dv, Dk = state.shape
    groups = _simdgroups(Dk, Dv)
    (after,) = GATED_DELTA_REPLAY.launch(
        inputs=[state, g, k, delta, constant(keep, mx.int32)],
        template=[("Hk", k.shape[2]), ("Hv", Hv), ("Dk", Dk), ("Dv", Dv), ("SG", groups)],
        grid=(LANES * groups, Hv, B),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[state.shape],
        output_dtypes=[mx.float32],
    )
    return after


@cache
def _simdgroups(Dk: int, Dv: int) -> int:
    """Returns the simdgroups of a head, which share its rows evenly; 0 if no number fits.

    16 where they can hold the state in 32 registers a lane: threads that need more registers may
    not be as many as 1,024 in a threadgroup.
    """
    shares = [n for n in range(1, 33) if Dv % n == 0 and Dv // n * Dk <= 32 * LANES]
    return next((n for n in shares if n >= 16), shares[-1] if shares else 0)
