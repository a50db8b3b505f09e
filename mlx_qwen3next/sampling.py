"""Sampling options: what they are, which values make sense, and mlx-lm's transforms for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_lm.sample_utils import LogitsProcessor, Sampler, make_logits_processors, make_sampler


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Names, defaults and meaning are mlx-lm's; ``temp`` 0 is greedy.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20

    def __post_init__(self) -> None:
        def within(name: str, low: float, high: float) -> None:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and low <= value <= high):
                raise ValueError(f"{name} must be within {low:g} and {high:g}, got {value!r}")

        within("temp", 0, 1e6)
        for name in ("top_p", "min_p", "xtc_probability"):
            within(name, 0, 1)
        within("xtc_threshold", 0, 0.5)
        for name, least in (("top_k", 0), ("min_tokens_to_keep", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        if self.repetition_penalty is not None and self.repetition_penalty < 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")

    def sampler(self) -> Sampler:
        """mlx-lm's sampler: log-probabilities ``[B, vocab]`` to tokens ``[B]``."""
        return make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            self.top_k,
            self.xtc_probability,
            self.xtc_threshold,
            list(self.xtc_special_tokens),
        )

    def logits_processors(self) -> list[LogitsProcessor]:
        """mlx-lm's processors for the bias and the penalties."""
        return make_logits_processors(
            dict(self.logit_bias) if self.logit_bias else None,
            self.repetition_penalty,
            self.repetition_context_size,
            self.presence_penalty,
            self.presence_context_size,
            self.frequency_penalty,
            self.frequency_context_size,
        )
