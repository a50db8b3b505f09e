"""Whether the sides compute the same, without which no figure is given.

Tokens may differ where two are all but equally likely, since rounding then decides: where the
logits of the two tokens, at the first difference, are no further apart than a few times what the
sides' logits differ by anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

EXACT, ROUNDED = 1e-4, 0.1  # bounds of the logits' relative error (L2)
TIES = 8.0  # how many times the typical difference of the logits counts as a tie


class Disagreement(Exception):
    """Two ways that have to agree do not."""


def error_of(ours: np.ndarray, other: np.ndarray) -> float:
    """The relative error (L2) of logits ``[vocab]`` beside others."""
    norm = float(np.linalg.norm(other.astype(np.float64)))
    return float(np.linalg.norm(ours.astype(np.float64) - other)) / max(norm, 1e-30)


def check_logits(name: str, error: float, bound: float) -> None:
    """
    Raises:
        Disagreement: the error is beyond the bound, or is none.
    """
    if not error <= bound:
        raise Disagreement(
            f"the logits of {name} differ: relative error {error:.1e}, at most {bound:.0e} expected"
        )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def check_tie(name: str, at: int, logits: np.ndarray, pair: tuple[int, int], error: float) -> None:
    """Checks that two tokens are all but equally likely.

    Args:
        at: the position of the first difference, for the message.
        logits: ``[vocab]``, of this package, there.
        pair: the two tokens.
        error: the relative error of logits that the two ways have anyway.

    Raises:
        Disagreement: one is clearly likelier.
    """
    gap = abs(float(logits[pair[0]]) - float(logits[pair[1]]))
    typical = error * float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))
    if not gap <= TIES * typical:
        raise Disagreement(
            f"the tokens of {name} differ at position {at}: {pair[0]} and {pair[1]}, whose logits "
            f"are {gap:.2g} apart, while logits differ by {typical:.1g} otherwise"
        )
