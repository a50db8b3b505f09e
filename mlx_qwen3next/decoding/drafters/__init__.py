"""Guessing a sequence's next tokens: the interface, and the drafters that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from ..sampling import Choose


class Drafter(Protocol):
    """Guesses a sequence's next tokens. A wrong guess costs time, nothing else.

    Attributes:
        layers: numbers of layers. ``hidden`` is their outputs, one after the other, ``[1, n, …]``;
            the trunk's states ``[1, n, H]`` where there are none.
    """

    layers: Sequence[int]

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        """Up to ``depth`` drafts ``[1]`` of what follows ``token`` ``[1]``, the sequence's last."""

    def expect(
        self, tokens: mx.array, hidden: mx.array, token: mx.array, depth: int, choose: Choose
    ) -> None:
        """Announces that ``committed(tokens, hidden)`` and ``propose(token, depth, choose)`` may
        come next, so that their work can be built while the device is busy."""

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        """The sequence grew by ``tokens`` ``[n]``; ``hidden`` belongs to them."""

    def settle(self) -> None:
        """Brings everything up to date, because decoding has ended."""


class Outputs:
    """Collects what a drafter reads during a forward (the trunk's ``between``)."""

    def __init__(self, drafter: Drafter | None):
        self._layers = () if drafter is None else drafter.layers
        self._outputs: dict[int, mx.array] = {}

    def __call__(self, layer: int, x: mx.array) -> None:
        """Takes the output of a layer."""
        if layer in self._layers:
            self._outputs[layer] = x

    def of(self, hidden: mx.array) -> mx.array:
        """The drafter's ``hidden``, where the trunk's states are ``hidden``."""
        if not self._layers:
            return hidden
        return mx.concatenate([self._outputs[layer] for layer in self._layers], axis=-1)
