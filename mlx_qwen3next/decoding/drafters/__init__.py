"""Guessing a sequence's next tokens: the interface, and the drafters that have it."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from ..sampling import Choose


class Drafter(Protocol):
    """Guesses a sequence's next tokens. A wrong guess costs time, nothing else."""

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        """Up to ``depth`` drafts ``[1]`` of what follows ``token`` ``[1]``, the sequence's last."""

    def expect(
        self, tokens: mx.array, hidden: mx.array, token: mx.array, depth: int, choose: Choose
    ) -> None:
        """Announces that ``committed(tokens, hidden)`` and ``propose(token, depth, choose)`` may
        come next, so that their work can be built while the device is busy."""

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        """The sequence grew by ``tokens`` ``[n]``; the trunk's states at them are ``[1, n, H]``."""

    def settle(self) -> None:
        """Brings everything up to date, because decoding has ended."""
