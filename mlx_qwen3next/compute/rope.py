"""Rotary position embedding (RoPE): its frequencies, and what YaRN makes of them for longer texts.

Sources: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models";
transformers' ``modeling_rope_utils.py``, whose option names these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Yarn:
    """YaRN's stretching of positions by ``factor``.

    Frequencies that turn more than ``beta_fast`` times within the original length stay as they are,
    those that turn less than ``beta_slow`` times are divided by the factor, and those between are
    mixed. With ``truncate`` the two bounds are moved outwards to whole dimensions.
    ``attention_factor`` multiplies sine and cosine, so that it enters the scores squared, for the
    rotated dimensions alone.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    rope_type: str = "yarn"

    @property
    def length(self) -> int:
        """The number of positions after the stretching."""
        return int(self.factor * self.original_max_position_embeddings)

    def ramp(self, dims: int, base: float) -> np.ndarray:
        """Returns how far each frequency is divided, 0 to 1, ``[dims / 2]`` float64."""

        def dimension(turns: float) -> float:
            """Returns the dimension that turns so often within the original length."""
            wavelength = self.original_max_position_embeddings / (2 * math.pi * turns)
            return dims * math.log(wavelength) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        width = high - low or 0.001
        return np.clip((np.arange(dims // 2) - low) / width, 0, 1)


@dataclass(frozen=True)
class Rope:
    """RoPE of the first ``dims`` dimensions of each head, half-split; ``base`` is rope_theta."""

    dims: int
    base: float
    scaling: Yarn | None = None

    @property
    def attention_factor(self) -> float:
        """The factor of sine and cosine."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor


@cache
def inverse_frequencies(rope: Rope) -> mx.array:
    """Returns the radians a position, ``[dims / 2]`` float32, rounded once."""
    return mx.array(_radians(rope).astype(np.float32))


@cache
def wavelengths(rope: Rope) -> mx.array:
    """Returns the positions a radian, ``[dims / 2]`` float32: the ``freqs`` of mx.fast.rope."""
    return mx.array((1 / _radians(rope)).astype(np.float32))


@cache
def head_factors(rope: Rope, width: int) -> mx.array:
    """Returns the attention factor for the rotated dimensions and 1 for the rest, ``[width]``."""
    factors = np.ones(width, np.float32)
    factors[: rope.dims] = rope.attention_factor
    return mx.array(factors)


def _radians(rope: Rope) -> np.ndarray:
    radians = rope.base ** -(np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    if rope.scaling is None:
        return radians
    ramp = rope.scaling.ramp(rope.dims, rope.base)
    return radians * (1 - ramp) + radians / rope.scaling.factor * ramp
