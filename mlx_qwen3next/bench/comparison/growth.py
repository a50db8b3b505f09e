"""Describes in words how the cost grows with the length of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

STEP = 2048  # tokens read at a time
MARKS = [1024 * 2**i for i in range(12)]  # lengths in tokens at which a step is timed

Row = Mapping[str, float]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fits a power law ``y = c x^p``, by least squares of the logarithms, and returns p."""
    xs, ys = ([math.log(v) for v in values] for values in (x, y))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    over = sum((a - mx) * (b - my) for a, b in zip(xs, ys, strict=True))
    return over / sum((a - mx) ** 2 for a in xs)


def fit_quadratic(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Fits ``y = a x + b x^2`` and returns a, b and the largest relative error."""
    n, t = np.array(x), np.array(y)
    rows = np.stack([n, n**2], axis=1) / t[:, None]
    (a, b), *_ = np.linalg.lstsq(rows, np.ones(len(t)))
    return float(a), float(b), float(np.abs(rows @ (a, b) - 1).max())


def in_words(rows: Sequence[Row]) -> list[str]:
    """Describes the growth of time and memory, in one line for each of them.

    Args:
        rows: for each length in tokens, the results of ``Ours.grown`` and the seconds to read it.
    """
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    n = [row["tokens"] for row in rows]
    p = exponent(n, [row["seconds"] for row in rows])
    lines = [f"reading grows as tokens^{p:.2f} (1: every token costs the same)"]
    if len(rows) > 2:
        a, b, error = fit_quadratic(n, [row["seconds"] for row in rows])
        part = max(b * n[-1] / (a + b * n[-1]), 0)
        lines.append(
            f"that is {a * 1e3:.2f} ms a token, and more for attention with each token before it: "
            f"{part:.0%} of all at {n[-1]:.0f} tokens (the fit is within {error:.0%})"
        )
    for kind in ("linear", "attention", "step"):
        if kind in last:
            name = "a whole step" if kind == "step" else f"a {kind} layer"
            name = "an attention layer" if kind == "attention" else name
            more = (last[kind] - first[kind]) / (n[-1] - n[0]) * 1e6 * 1000
            lines.append(
                f"{name} takes {last[kind] / first[kind]:.2f} times as long at {n[-1]:.0f} tokens "
                f"as at {n[0]:.0f} ({more:+.1f} µs for each 1,000 tokens more)"
            )
    worst = max(abs(row["cache"] / row["formula"] - 1) for row in rows)
    lines.append(f"the cache's memory agrees with the formula within {worst:.1%}")
    return lines
