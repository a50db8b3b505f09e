"""Drafts that a constraint forces: where there is one possibility, it is known for certain."""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx

from ..constraint import Constraint
from ..draft_depth import MOST_COPIED, Offer
from ..sampling import Choose
from . import Drafter
from .lookup import DEPTHS


class ForcedDrafter(Drafter):
    """Drafts the tokens that have to come next.

    Args:
        constraint: of the sequence.
    """

    source: ClassVar[str] = "grammar"
    reads_states: ClassVar[bool] = False

    def __init__(self, constraint: Constraint):
        self._constraint = constraint

    def offer(self, ahead: bool = False) -> Offer:
        drafts = self._constraint.forced()[ahead : ahead + MOST_COPIED]
        return Offer(self.source, [1.0] * len(drafts), DEPTHS, costly=False)

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        return [mx.array([draft], mx.uint32) for draft in self._constraint.forced()[:depth]]
