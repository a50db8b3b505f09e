"""Choosing tokens: the options and the samplers for them, position by position.

The random numbers that choose a token belong to its position in the sequence. Plain decoding, a
draft and the draft's verification all draw with the same numbers there. So a draft is right
exactly if it is the token that plain decoding would have chosen: speculation changes no token at
any temperature, and the distribution is the sampler's by construction. Drafts agree often because
similar distributions choose alike from the same number: it is a point on the line of all tokens'
probabilities, in the order of their ids (NOTES.md compares this with accepting by min(1, p/q)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    LogitsProcessor,
    Sampler,
    greedy_sampler,
    make_logits_processors,
    make_sampler,
)

from ..group import ALONE, Group
from . import random_numbers
from .constraint import Constraint, allow
from .top_k import MOST, TopKSampler

# Takes logits [1, vocab] and the drafts [1] before; gives a draft [1], by the rules of the tokens.
Choose = Callable[[mx.array, list[mx.array]], mx.array]

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
    """The rules by which a token is drawn. Names, defaults and meaning are mlx-lm's; ``temp`` 0 is
    greedy.

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
        """The sampler: log-probabilities ``[B, vocab]`` to tokens ``[B]``.

        It is mlx-lm's, or draws what that draws for a row without sorting the vocabulary.
        """
        is_plain = self.xtc_probability == 0 and (self.min_p == 0 or self.min_tokens_to_keep == 1)
        if self.temp > 0 and 0 < self.top_k <= MOST and is_plain:
            return TopKSampler(self.temp, self.top_p, self.min_p, self.top_k)
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


class Chooser:
    """Chooses the tokens of one sequence from their logits.

    Args:
        sampler: log-probabilities ``[1, vocab]`` to a token ``[1]``. Draws from ``mx.random`` if it
            is random.
        processors: mlx-lm's: ``(tokens [n], logits [1, vocab])`` to logits; they see the prompt and
            what was chosen after it, drafts included. One of them may be a constraint, which then
            comes after the others.
        prompt: the tokens ``[n]`` uint32 before the first choice.
        key: seeds the random numbers, together with a position; None draws one.
        position: how many tokens were chosen with that key before.
        group: the processes that run the model; rank 0 chooses for all.

    Attributes:
        constraint: among the processors, if there is one; it has accepted what was chosen.
    """

    def __init__(
        self,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        prompt: mx.array,
        key: int | None = None,
        position: int = 0,
        group: Group = ALONE,
    ):
        self._sampler, self._group = sampler, group
        self._processors = [p for p in processors if not isinstance(p, Constraint)]
        self.constraint = next((p for p in processors if isinstance(p, Constraint)), None)
        self._tokens = np.array(prompt)
        if self.constraint is not None:
            self.constraint.follow(self._tokens)
        self._greedy = sampler is greedy_sampler and not self._processors
        self._position = position
        self._key = 0 if self._greedy else draw_key() if key is None else key

    def choose(self, logits: mx.array, after: Sequence[mx.array] = ()) -> tuple[mx.array, mx.array]:
        """The next token ``[1]``, and its log-probabilities ``[1, vocab]``.

        Args:
            logits: ``[1, vocab]``.
            after: tokens ``[1]`` between the last that was given to :meth:`extend` and the choice.
        """
        masks = self._masks(logits, after, len(after))
        token, logprobs = self._choose(self._process(logits, after, masks), len(after))
        return self._group.agree(token), logprobs

    def choose_all(self, logits: mx.array, drafts: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """The choice after each prefix of n drafts ``[1]``.

        Args:
            logits: ``[n + 1, vocab]``.

        Returns:
            Tokens ``[n + 1]``, and log-probabilities ``[n + 1, vocab]``.
        """
        masks = self._masks(logits, drafts, 0)

        def processed(i: int) -> mx.array:
            row = None if masks is None else masks[i : i + 1]
            return self._process(logits[i : i + 1], drafts[:i], row)

        rows = range(len(drafts) + 1)
        if self._greedy or isinstance(self._sampler, TopKSampler):
            if self._processors:
                logits = mx.concatenate([processed(i) for i in rows])
            elif masks is not None:
                logits = allow(logits, masks)
            tokens, logprobs = self._choose(logits, 0)
        else:
            chosen = [self._choose(processed(i), i) for i in rows]
            tokens, logprobs = (mx.concatenate(list(parts)) for parts in zip(*chosen, strict=True))
        return self._group.agree(tokens), logprobs

    def _masks(self, logits: mx.array, after: Sequence[mx.array], start: int) -> np.ndarray | None:
        """The constraint's masks after tokens on their way, made while the device is busy."""
        if self.constraint is None:
            return None
        mx.async_eval(logits)
        known: list[int] = mx.concatenate([*after]).tolist() if after else []  # type: ignore
        return self.constraint.masks(known, start)

    def _process(
        self, logits: mx.array, after: Sequence[mx.array], masks: np.ndarray | None
    ) -> mx.array:
        """Applies the processors, and the constraint's masks, to the logits of one row."""
        self._seed(len(after))
        if self._processors:
            tokens = mx.concatenate([mx.array(self._tokens), *after])
            for processor in self._processors:
                logits = processor(tokens, logits)
        return logits if masks is None else allow(logits, masks)

    def _choose(self, logits: mx.array, ahead: int) -> tuple[mx.array, mx.array]:
        """Chooses at positions one after the other, the first so many ahead."""
        if isinstance(self._sampler, TopKSampler):
            numbers = _uniform(self._key, self._position + ahead, len(logits))
            return self._sampler.choose(logits, numbers)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self._sampler(logprobs), logprobs

    def extend(self, token: int) -> None:
        """Takes over the token that was chosen."""
        self._position += 1
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._processors:
            self._tokens = np.append(self._tokens, np.asarray(token, self._tokens.dtype))

    def close(self) -> None:
        """Leaves the global random state where it depends on the tokens' number alone."""
        self._seed(0)

    def _seed(self, ahead: int) -> None:
        if not self._greedy:
            random_numbers.seed(self._key, self._position + ahead)


class SeededSampler:
    """A sampler that draws, call after call, the tokens that a :class:`Chooser` with its key draws.

    Args:
        key, position, group: the chooser's.
    """

    def __init__(self, sampler: Sampler, key: int, position: int = 0, group: Group = ALONE):
        self.sampler, self.key, self.position, self._group = sampler, key, position, group

    def chooser(self, processors: Sequence[LogitsProcessor], tokens: mx.array) -> Chooser:
        """A chooser that goes on where this sampler stands; arguments as the chooser's."""
        group = self._group
        return Chooser(self.sampler, processors, tokens, self.key, self.position, group)

    def __call__(self, logprobs: mx.array) -> mx.array:
        position, self.position = self.position, self.position + 1
        if isinstance(self.sampler, TopKSampler):
            token = self.sampler.draw(logprobs, _uniform(self.key, position, 1))
        else:
            random_numbers.seed(self.key, position)
            token = self.sampler(logprobs)
        return self._group.agree(token)


def draw_key() -> int:
    """A :class:`Chooser`'s key, from the global random state, so that its seed decides."""
    return cast(int, mx.random.randint(0, 2**31 - 1, ()).item())


def _uniform(key: int, position: int, count: int) -> mx.array:
    """The numbers ``[count, 1]`` of positions one after the other."""
    return mx.array([[random_numbers.uniform(key, position + i)] for i in range(count)])


def check_integer(name: str, value: int, least: int) -> None:
    """Checks an argument that counts something.

    Raises:
        ValueError: ``value`` is no integer, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
