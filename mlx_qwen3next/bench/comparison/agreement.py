"""Checks that the sides compute the same; without that the bench gives no figures.

Greedy tokens may differ at a tie, where two tokens are almost equally probable and rounding
decides. Two tokens count as tied if their logits are no further apart than a few times the typical
difference between the logits of the two sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

EXACT, ROUNDED = 1e-4, 0.1  # bounds of the logits' relative error (L2)
TIES = 8.0  # gap between two tied logits, at most, in typical differences of the logits


class Disagreement(Exception):
    """Two ways to compute the same result disagree."""


def error_of(ours: np.ndarray, other: np.ndarray) -> float:
    """The relative error (L2) of logits ``[vocab]`` from those of the other side."""
    norm = float(np.linalg.norm(other.astype(np.float64)))
    return float(np.linalg.norm(ours.astype(np.float64) - other)) / max(norm, 1e-30)


def check_logits(name: str, error: float, bound: float) -> None:
    """Checks the relative error of logits.

    Raises:
        Disagreement: the error exceeds the bound, or is NaN.
    """
    if not error <= bound:
        raise Disagreement(
            f"the logits of {name} differ: relative error {error:.1e}, at most {bound:.0e} expected"
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens in which two texts agree before their first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def check_tie(name: str, at: int, logits: np.ndarray, pair: tuple[int, int], error: float) -> None:
    """Checks that two tokens are tied.

    Args:
        at: the position of the tokens, for the message.
        logits: this package's logits ``[vocab]`` at that position.
        pair: the two tokens.
        error: the typical relative error between the logits of the two ways.

    Raises:
        Disagreement: one token is clearly more probable.
    """
    gap = abs(float(logits[pair[0]]) - float(logits[pair[1]]))
    typical = error * float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))
    if not gap <= TIES * typical:
        raise Disagreement(
            f"the tokens of {name} differ at position {at}: {pair[0]} and {pair[1]}, whose logits "
            f"are {gap:.2g} apart, while the logits typically differ by {typical:.1g}"
        )
