"""Drafts by copying: what followed the last time that the text was as it is at its end.

Texts repeat themselves where files are rewritten, names used again or results quoted. No model is
needed, and a draft costs nothing. Each place of the text is indexed by the two tokens before it.

Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference" (LLMA).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..draft_depth import MOST_COPIED, Offer, Shares
from ..sampling import Choose
from . import Drafter

DEPTHS = (1, 3, 7, 15)  # that are worth timing: with the last token, powers of two
LONGEST = 32  # tokens back that a match is measured
KINDS = (3, 4, 5, 6, 8, 12, 16, 24, LONGEST)  # lengths of matches from which another kind begins
GUESS = 2  # a match of n tokens goes on in n of n + GUESS cases, until more is known


class Copier:
    """A text that grows, and the place in it where it last went on as it may go on now.

    A place that was right is kept; when it is wrong, the last one after the same two tokens is
    taken. Both take the same time however long the text is.

    Attributes:
        length: how many tokens before the place match those at the end, as far as it was measured;
            0 if there is no place.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places: dict[int, int] = {}  # after two tokens, the last time that they came
        self._place, self.length = 0, 0

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, token: int) -> bool | None:
        """Adds a token; returns whether it was the expected one, None if none was expected."""
        expected = self._tokens[self._place] if self.length else None
        self._tokens.append(token)
        n = len(self._tokens)
        found = None
        if n > 1:
            pair = _pair(*self._tokens[-2:])
            found, self._places[pair] = self._places.get(pair), n
        if token == expected:
            self._place, self.length = self._place + 1, self.length + 1
        elif found is None:
            self.length = 0
        else:
            self._place, self.length = found, self._match(found)
        return None if expected is None else token == expected

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds many tokens at once, with one look for a place at the end."""
        if not tokens:
            return
        n = len(self._tokens)
        self._tokens += tokens[:-1]
        added = np.array(self._tokens[max(n - 1, 0) :], np.int64)
        pairs = _pair(added[:-1], added[1:]).tolist()
        self._places.update(zip(pairs, range(max(n, 1) + 1, len(self._tokens) + 1), strict=True))
        self.length = 0
        self.append(tokens[-1])

    def expected(self, count: int) -> list[int]:
        """The next ``count`` tokens, if the text goes on as at the place; none without one."""
        if self.length == 0:
            return []
        copied = self._tokens[self._place : self._place + count]
        while len(copied) < count:  # the copy has reached its own beginning
            copied += copied[: count - len(copied)]
        return copied

    def _match(self, place: int) -> int:
        """How many tokens before a place, at most LONGEST, are those at the end."""
        n, most = 0, min(place, LONGEST)
        while n < most and self._tokens[place - 1 - n] == self._tokens[-1 - n]:
            n += 1
        return n


def _pair(first: Any, second: Any) -> Any:
    """Two tokens as one number, or arrays of them."""
    return first << 32 | second


class LookupDrafter(Drafter):
    """Drafts what came after the last place like the sequence's end.

    It sees whether it would have been right at every token, drafted or not.

    Args:
        shares: how often copies were right, by :func:`kind`; None to begin anew.
    """

    source: ClassVar[str] = "lookup"
    reads_states: ClassVar[bool] = False

    def __init__(self, shares: Shares | None = None):
        self._copier, self._shares = Copier(), shares or new_shares()

    def offer(self, ahead: bool = False) -> Offer:
        n, shares = self._copier.length, list[float]()
        if n:
            lengths = range(n, n + MOST_COPIED + ahead)
            shares = [self._shares.of(_kind(m), m / (m + GUESS)) for m in lengths]
        if n and ahead:
            first, *shares = shares
            shares[0] *= first
        return Offer(self.source, shares, DEPTHS, costly=False)

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        return [mx.array([draft], mx.uint32) for draft in self._copier.expected(depth)]

    def follow(self, tokens: Sequence[int]) -> None:
        self._copier.extend(tokens[len(self._copier) :])

    def extend(self, token: int) -> None:
        kind = _kind(self._copier.length)
        right = self._copier.append(token)
        self._shares.fade()
        if right is not None:
            self._shares.add(kind, right)


def new_shares() -> Shares:
    """Returns the first estimates of copies."""
    return Shares(len(KINDS) + 1)


def _kind(length: int) -> int:
    """The number of a match's kind, by its length."""
    return bisect(KINDS, length)
