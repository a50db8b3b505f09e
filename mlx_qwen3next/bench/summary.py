"""From samples to medians."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .shapes import FULL
from .sides import Side
from .traffic import Traffic

Sample = Mapping[str, Any]


def of(samples: Sequence[Sample], what: str) -> float:
    """The median of one figure."""
    return median(sample[what] for sample in samples)


def medians(
    raw: Mapping[str, Any], sides: Sequence[Side], traffic: Mapping[str, Traffic]
) -> dict[str, Any]:
    """What the tables show, by side and context.

    Args:
        raw: what :func:`mlx_qwen3next.bench.measure.measure` returned.
        traffic: bytes of a step, by the side's label.

    Returns:
        ``prefill``, ``decode``, ``limit``: tokens a second; ``turns``: seconds; ``speculation``:
        a row a depth.
    """
    result: dict[str, Any] = {"prefill": {}, "decode": {}, "limit": {}}
    for side in sides:
        speed = raw["speed"][side.label]
        result["prefill"][side.label] = {n: n / of(s, "first") for n, s in speed.items()}
        result["decode"][side.label] = {n: 1 / of(s, "further") for n, s in speed.items()}
        moved = traffic[side.label]
        result["limit"][side.label] = {n: raw["bandwidth"] / moved.plain(n) for n in speed}
    result["turns"] = {
        name: {what: of(samples, what) for what in ("first", "second")}
        for name, samples in raw["turns"].items()
    }
    if "speculation" in raw:
        result["speculation"] = _speculation(raw["speculation"]["samples"])
    return result


def _speculation(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    plain = of(samples["off"], "further")
    rows = {}
    for mode, some in samples.items():
        seconds, length = of(some, "further"), of(some, "per_round")
        drafted = Counter[str]()
        for sample in some:
            drafted.update(sample["drafted"])
        rows[mode] = {
            "token": seconds,
            "round": seconds * length,
            "per_round": length,
            "speed": plain / seconds,
            "needs": seconds * length / plain,  # tokens a round to be as fast as plain decoding
            "drafted": dict(drafted),
        }
    return rows


def deepened(seconds: float, fixed: float, layers: int) -> float:
    """Seconds of the 80B model's 48 layers, from those of a few and of what is outside them."""
    return fixed + FULL / layers * max(seconds - fixed, 0.0)
