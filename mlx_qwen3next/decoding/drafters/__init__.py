"""Guessing a sequence's next tokens: the interface, and the drafters that have it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import mlx.core as mx

from ..draft_depth import Offer, Shares
from ..sampling import Choose

ACCEPTANCE = 0.8  # the share of first drafts that is expected to be right before anything is known
CATCH_UP = 64  # verified hidden states that wait at most, when nothing is drafted


class Drafter:
    """Guesses a sequence's next tokens. A wrong guess costs time, nothing else.

    A drafter learns of every token twice: as a number, by :meth:`follow` and :meth:`extend`, when
    the host knows it, and by :meth:`committed`, when the trunk's hidden state at it stays. It
    overrides what concerns it.

    Attributes:
        source: names its drafts in statistics.
        reads_states: whether it works on hidden states, which have to be computed for it then.
        layers: those whose outputs it reads, one after the other ``[1, n, …]``, where these are not
            the trunk's states.
    """

    source: ClassVar[str] = ""
    reads_states: ClassVar[bool] = True
    layers: Sequence[int] = ()

    def offer(self, ahead: bool = False) -> Offer:
        """Returns its offer after the sequence's last token.

        Args:
            ahead: whether that token is still on its way; then the offer reckons with the one
                that is expected.
        """
        raise NotImplementedError

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        """Up to ``depth`` drafts ``[1]`` of what follows ``token`` ``[1]``, the sequence's last."""
        raise NotImplementedError

    def judged(self, drafted: int, accepted: int) -> None:
        """So many of the drafts proposed last were right."""

    def expect(
        self, tokens: mx.array, hidden: mx.array, token: mx.array, depth: int, choose: Choose
    ) -> None:
        """Announces that ``committed(tokens, hidden)`` and ``propose(token, depth, choose)`` may
        come next, so that their work can be built while the device is busy."""

    def follow(self, tokens: Sequence[int]) -> None:
        """The sequence begins with these tokens, and went on from those that were known before."""

    def extend(self, token: int) -> None:
        """The sequence has one more token."""

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        """The trunk's states at the next ``tokens`` ``[n]`` are ``[1, n, H]``; they stay.

        If a drafter of the sequence reads layers, ``hidden`` is their outputs for all of them.
        """

    def settle(self) -> None:
        """Brings everything up to date, because decoding has ended."""


class StateDrafter(Drafter):
    """A drafter of hidden states, which counts by depth how often its drafts are right.

    Args:
        shares: what was counted before.
    """

    def __init__(self, shares: Shares):
        self._shares = shares

    def judged(self, drafted: int, accepted: int) -> None:
        for depth in range(min(accepted + 1, drafted)):
            self._shares.add(depth, depth < accepted)

    def extend(self, token: int) -> None:
        self._shares.fade()

    def _expected(self, count: int) -> list[float]:
        """The shares of the first ``count`` drafts, as :class:`Offer` takes them."""
        shares = [ACCEPTANCE]
        for depth in range(count):  # one of which little is known is as good as the one before
            shares.append(self._shares.of(depth, shares[-1]))
        return shares[1:]


class Outputs:
    """Collects what drafters read during a forward; the trunk calls it between layers.

    Args:
        drafters: those of a sequence, or of a batch, of whom no two read different layers.
    """

    def __init__(self, drafters: Iterable[Drafter]):
        self._layers = next((drafter.layers for drafter in drafters if drafter.layers), ())
        self._outputs: dict[int, mx.array] = {}

    def __call__(self, layer: int, x: mx.array) -> None:
        """Takes the output of a layer."""
        if layer in self._layers:
            self._outputs[layer] = x

    def of(self, hidden: mx.array) -> mx.array:
        """Returns the states that the drafters read, where the trunk's states are ``hidden``."""
        if not self._layers:
            return hidden
        return mx.concatenate([self._outputs[layer] for layer in self._layers], axis=-1)
