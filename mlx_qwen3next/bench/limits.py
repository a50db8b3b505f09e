"""What is left out because it would take too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Samples = Sequence[Mapping[str, Any]]  # what Side.generate of the worker returned


def predicted(before: Mapping[int, Samples], context: int, tokens: int) -> float:
    """Seconds that a side will take, from the longest shorter context it was measured at.

    Args:
        before: samples by context.
        context: tokens of the prompt.
        tokens: how many are decoded after it.

    Returns:
        0 where nothing is known.
    """
    known = [n for n, samples in before.items() if samples and n <= context]
    if not known:
        return 0.0
    n = max(known)
    last = before[n][-1]
    return last["first"] * context / n + last["further"] * tokens


def another(spent: Sequence[float], limit: float) -> bool:
    """Whether one more turn stays within the limit; the first one is always taken."""
    return not spent or sum(spent) + sum(spent) / len(spent) <= limit
