"""Work in pieces on all cores of a CPU.

MLX's CPU backend computes the operations of a stream one after the other, on one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeAlias

import mlx.core as mx

Piece: TypeAlias = Callable[[Sequence[mx.array]], mx.array]


def in_turn(pieces: Iterable[Piece], several: bool = True) -> list[mx.array]:
    """Returns the results of pieces of work, which the cores take in turn.

    A piece is called with the arrays to be computed before its own (``mx.depends``), which are the
    result of the piece before it on its core. MLX would otherwise compute the first operations of
    many pieces before the others, and keep all that they give.

    Args:
        several: whether several cores are worth their waiting for each other.
    """
    streams = _streams() if several else (mx.default_stream(mx.default_device()),)
    last: list[Sequence[mx.array]] = [()] * len(streams)
    results = list[mx.array]()
    for i, piece in enumerate(pieces):
        core = i % len(streams)
        with mx.stream(streams[core]):
            results.append(piece(last[core]))
        last[core] = results[-1:]
    return results


def cores() -> int:
    """Returns how many pieces are computed at a time."""
    return len(_streams())


@cache
def _streams() -> tuple[Any, ...]:
    """The streams to compute on, one a core; each has a thread of its own."""
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(os.cpu_count() or 1))
