"""The parts that drafters of hidden states share: the MTP head's and DFlash's."""

from __future__ import annotations

from ..draft_depth import Shares
from . import Drafter

ACCEPTANCE = 0.8  # the share of first drafts that is expected to be right before anything is known
CATCH_UP = 64  # verified hidden states that wait at most, when nothing is drafted


class StateDrafter(Drafter):
    """A drafter that counts by depth how often its drafts are right.

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
