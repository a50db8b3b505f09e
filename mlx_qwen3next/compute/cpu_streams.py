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
    chosen = streams() if several else (mx.default_stream(mx.default_device()),)
    last: list[Sequence[mx.array]] = [()] * len(chosen)
    results = list[mx.array]()
    for i, piece in enumerate(pieces):
        core = i % len(chosen)
        with mx.stream(chosen[core]):
            results.append(piece(last[core]))
        last[core] = results[-1:]
    return results


def cores() -> int:
    """Returns how many pieces are computed at a time."""
    return len(streams())


@cache
def streams() -> tuple[Any, ...]:
    """Returns the streams to compute on, one a core.

    Each has a thread of its own, which stays: so there is one set of them for the process.
    """
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(os.cpu_count() or 1))
