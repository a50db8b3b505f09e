"""Sampling options: what they are, which values make sense, and mlx-lm's transforms for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_lm.sample_utils import LogitsProcessor, Sampler, make_logits_processors, make_sampler

# The least and largest value of each option that is a number; penalties may also be None.
_RANGES = {
    "temp": (0, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}
# The least value of each option that counts tokens. A context size of 0 is the whole sequence.
_LEAST = {
    "top_k": 0,
    "min_tokens_to_keep": 1,
    "repetition_context_size": 0,
    "presence_context_size": 0,
    "frequency_context_size": 0,
}


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
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name.endswith("_penalty"):
                continue
            if not (isinstance(value, (int, float)) and low <= value <= high):
                raise ValueError(f"{name} must be within {low:g} and {high:g}, got {value!r}")
        for name, least in _LEAST.items():
            check_integer(name, getattr(self, name), least)
        bias = self.logit_bias
        if bias is not None and not (
            isinstance(bias, Mapping)
            and all(isinstance(x, (int, float)) and x < math.inf for x in bias.values())
        ):
            raise ValueError(f"logit_bias must map token ids to numbers, got {bias!r}")

    def check_vocabulary(self, size: int) -> None:
        """Checks the options against the vocabulary's size: MLX indexes without bounds.

        Raises:
            ValueError: an option names a token that does not exist, or keeps more than there are.
        """
        for name in ("logit_bias", "xtc_special_tokens"):
            for token in getattr(self, name) or ():
                if not isinstance(token, int) or not 0 <= token < size:
                    raise ValueError(f"{name} holds {token!r}, no token id within 0…{size - 1}")
        for name in ("top_k", "min_tokens_to_keep"):
            if (value := getattr(self, name)) >= size:
                raise ValueError(
                    f"{name} must be less than the {size} tokens there are, got {value}"
                )

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


def check_integer(name: str, value: int, least: int) -> None:
    """Checks an argument that counts something.

    Raises:
        ValueError: ``value`` is no integer, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
