"""Computes medians from the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..shapes import FULL
from ..traffic import Traffic
from .sides import Side

Sample = Mapping[str, Any]


def median_of(samples: Sequence[Sample], key: str) -> float:
    """The median of one figure of the samples."""
    return median(sample[key] for sample in samples)


def medians(
    raw: Mapping[str, Any], sides: Sequence[Side], traffic: Mapping[str, Traffic]
) -> dict[str, Any]:
    """Computes the figures of the tables, by side and context.

    Args:
        raw: the result of :func:`mlx_qwen3next.bench.comparison.measure.measure`.
        sides: the sides that were measured.
        traffic: the bytes of a step, by the label of the side.

    Returns:
        ``prefill``, ``decode``, ``limit``: tokens a second; ``turns``: seconds; ``speculation``:
        a row for each depth.
    """
    result: dict[str, Any] = {"prefill": {}, "decode": {}, "limit": {}}
    for side in sides:
        speed = raw["speed"][side.label]
        result["prefill"][side.label] = {n: n / median_of(s, "first") for n, s in speed.items()}
        result["decode"][side.label] = {n: 1 / median_of(s, "further") for n, s in speed.items()}
        moved = traffic[side.label]
        result["limit"][side.label] = {n: raw["bandwidth"] / moved.plain(n) for n in speed}
    result["turns"] = {
        name: {key: median_of(samples, key) for key in ("first", "second")}
        for name, samples in raw["turns"].items()
    }
    if "speculation" in raw:
        result["speculation"] = _speculation(raw["speculation"]["samples"])
    return result


def _speculation(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    plain = median_of(samples["off"], "further")
    rows = {}
    for mode, some in samples.items():
        seconds, length = median_of(some, "further"), median_of(some, "per_round")
        drafted = Counter[str]()
        for sample in some:
            drafted.update(sample["drafted"])
        rows[mode] = {
            "token": seconds,
            "round": seconds * length,
            "per_round": length,
            "speed": plain / seconds,
            "needs": seconds * length / plain,  # tokens a round to break even with plain decoding
            "drafted": dict(drafted),
        }
    return rows


def extrapolated(seconds: float, fixed: float, layers: int) -> float:
    """Extrapolates the time of a model with fewer layers to the 48 layers of the 80B model.

    Args:
        seconds: the time with ``layers`` layers.
        fixed: the part of it that is spent outside the layers.
        layers: the number of layers.
    """
    return fixed + FULL / layers * max(seconds - fixed, 0.0)
