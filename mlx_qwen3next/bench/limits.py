"""Decides which measurements are left out because they would take too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Samples = Sequence[Mapping[str, Any]]  # results of the worker's ``generate``


def predicted(before: Mapping[int, Samples], context: int, tokens: int) -> float:
    """Predicts the seconds of a measurement from the longest context measured so far that is not
    longer.

    Args:
        before: the samples so far, by context.
        context: the length of the prompt in tokens.
        tokens: the number of tokens decoded after it.

    Returns:
        The seconds; 0 if there is no such context.
    """
    known = [n for n, samples in before.items() if samples and n <= context]
    if not known:
        return 0.0
    n = max(known)
    last = before[n][-1]
    return last["first"] * context / n + last["further"] * tokens


def fits_another(spent: Sequence[float], limit: float) -> bool:
    """Whether one more repeat stays within the limit; the first one always does.

    Args:
        spent: the seconds of the repeats so far.
        limit: the seconds for all repeats together.
    """
    return not spent or sum(spent) + sum(spent) / len(spent) <= limit
