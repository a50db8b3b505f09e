"""Constraints on the tokens of an answer: which of them may come next, for instance by a grammar.

A token is chosen among those that its position allows. Drafts are chosen and verified under the
same masks as plain decoding, so they change no token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

BITS = 32  # tokens a word of a mask


class Constraint(ABC):
    """The tokens that may come next in one answer, by how far it has come.

    It is one of mlx-lm's processors, for mlx-lm's batches; it belongs after the others. A
    :class:`~mlx_qwen3next.decoding.sampling.Chooser` takes it out of its processors and asks for
    all positions of a round at once.

    Args:
        begin: the number of tokens before the answer.
    """

    def __init__(self, begin: int):
        self._begin = begin
        self._accepted = 0  # tokens of the answer

    @abstractmethod
    def masks(self, drafts: Sequence[int], start: int = 0) -> np.ndarray:
        """The tokens allowed after the accepted ones and each prefix of the drafts.

        Args:
            start: the length of the first of these prefixes.

        Returns:
            Masks ``[len(drafts) + 1 - start, words]`` uint32, the lowest bit first. All bits are
            set where no token is allowed, such as after a draft that is not.
        """

    @abstractmethod
    def forced(self) -> list[int]:
        """The tokens that have to come next; none if there is a choice."""

    @abstractmethod
    def _accept(self, token: int) -> None:
        """Goes on with a token."""

    @abstractmethod
    def _take_back(self, count: int) -> None:
        """Takes tokens back, the last first."""

    def accept(self, token: int) -> None:
        """Goes on with the token that was chosen.

        Raises:
            RuntimeError: it is not allowed.
        """
        self._accept(token)
        self._accepted += 1

    def follow(self, tokens: np.ndarray | mx.array) -> None:
        """Goes to the end of a sequence ``[n]``, forward or back, from where it stood in it."""
        answered = len(tokens) - self._begin
        if answered < self._accepted:
            self._take_back(self._accepted - answered)
            self._accepted = answered
        new: list[int] = tokens[self._begin + self._accepted :].tolist()  # type: ignore[assignment]
        for token in new:
            self.accept(token)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Leaves the allowed tokens: logits ``[1, vocab]`` after all ``tokens`` ``[n]``."""
        mx.async_eval(logits)  # the device computes them while the masks are made
        self.follow(tokens)
        return allow(logits, self.masks([]))


def allow(logits: mx.array, masks: np.ndarray) -> mx.array:
    """Makes the logits ``[n, vocab]`` of all tokens but those allowed minus infinity.

    Args:
        masks: those of a constraint, ``[n, words]``.
    """
    bits = mx.array(masks)[:, :, None] >> mx.arange(BITS, dtype=mx.uint32)
    allowed = (bits & 1).reshape(len(masks), -1)[:, : logits.shape[-1]]
    return mx.where(allowed.astype(mx.bool_), logits, mx.array(-mx.inf, logits.dtype))
