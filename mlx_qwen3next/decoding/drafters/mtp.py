"""Drafts by the model's own multi-token-prediction head.

The head's keys and values cover the whole sequence. They are made from verified hidden states
alone: whatever recursion wrote for drafts is overwritten.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import mlx.core as mx

from ...model.cache import Cache, MTPCache
from ...model.packed.tracing import MOST_ROWS
from ...model.qwen3_next import Model
from ..draft_depth import MAX_DEPTH, Offer, Shares
from ..sampling import Choose
from . import CATCH_UP, StateDrafter


class MTPDrafter(StateDrafter):
    """Drafts a sequence's next tokens.

    Verified hidden states wait until there is a use for them, so that the head catches up with
    those of a round in the same call that gives the next first draft.

    Args:
        model: has an MTP head.
        cache: made by ``model.mtp.make_cache()``; drafting goes on from there. None for a new one.
        shares: how often drafts were right, by depth; None to begin anew.
    """

    source: ClassVar[str] = "mtp"

    def __init__(self, model: Model, cache: Cache | None = None, shares: Shares | None = None):
        super().__init__(shares or new_shares())
        self._head, self._logits = model.mtp, model.logits
        self._cache = cache = model.mtp.make_cache() if cache is None else cache
        self._entry: MTPCache = cache[0]
        # Pairs (h_i, t_{i+1}) that are not in the cache yet: [1, n, H] and [1, n] each, in order.
        self._waiting: tuple[tuple[mx.array, mx.array], ...] = ()
        # Whether the last hidden state, too, waits or is in the cache, with the token proposed to.
        self._paired = False
        self._ready: list[mx.array] = []  # drafts to propose next
        # The number of committed tokens that was expected, and the state that belongs to it.
        self._ahead: tuple[int, dict[str, Any]] | None = None

    def offer(self, ahead: bool = False) -> Offer:
        return Offer(self.source, self._expected(MAX_DEPTH), range(1, MAX_DEPTH + 1))

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        if self._ready:
            ready, self._ready = self._ready[:depth], []
            return ready
        if self._entry.hidden is None:
            return []
        self._wait((self._entry.hidden, token[None]))
        self._paired = True
        hidden, tokens = self._joined()
        if tokens.size > MOST_ROWS:  # more than a round leaves
            # Nobody looks at the result, so only keys and values are made.
            self._read(hidden[:, :-1], tokens[:, :-1])
            hidden, tokens = hidden[:, -1:], tokens[:, -1:]
            self._waiting = ((hidden, tokens),)
        m = self._read(hidden, tokens)[:, -1:]
        self._waiting = ()
        verified = self._entry.offset
        drafts: list[mx.array] = []
        try:
            for _ in range(depth):
                if drafts:
                    m = self._head(m, drafts[-1][None], self._cache)
                drafts.append(choose(self._logits(m)[:, -1], drafts))
        finally:
            self._entry.trim(self._entry.offset - verified)
        return drafts

    def expect(
        self, tokens: mx.array, hidden: mx.array, token: mx.array, depth: int, choose: Choose
    ) -> None:
        """Prepares for ``committed(tokens, hidden)`` and ``propose(token, depth, choose)``.

        Their work is built while the device is busy, and used if exactly these calls come.
        """
        before = self._state()
        try:
            self.committed(tokens, hidden)
            ready = self.propose(token, depth, choose)
            ahead = tokens.size, self._state() | {"_ready": ready}
        finally:
            self._restore(before)
        self._ahead = ahead

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        ahead, self._ahead, self._ready = self._ahead, None, []
        if ahead is not None and ahead[0] == tokens.size:
            self._restore(ahead[1])
            return
        last = self._entry.hidden
        if last is not None and not self._paired:
            self._wait((last, tokens[None, :1]))
        if tokens.size > 1:
            self._wait((hidden[:, :-1], tokens[None, 1:]))
        self._entry.hidden, self._paired = hidden[:, -1:], False
        if sum(t.size for _, t in self._waiting) >= CATCH_UP:
            self.settle()

    def settle(self) -> None:
        self._ahead, self._ready = None, []
        if self._paired:  # with a token that did not come to stay
            if self._waiting:
                self._waiting = self._waiting[:-1]
            else:
                self._entry.trim(1)
            self._paired = False
        if self._waiting:
            self._read(*self._joined())
            self._waiting = ()
        mx.async_eval([x for x in self._entry.state if isinstance(x, mx.array)])

    def _state(self) -> dict[str, Any]:
        # Assigning to rows changes the array object, so a copy of it is kept; the memory is shared,
        # and free to be reused once nobody refers to the copy.
        entry = {name: copy.copy(value) for name, value in vars(self._entry).items()}
        return {"_waiting": self._waiting, "_paired": self._paired, "_ready": [], "_entry": entry}

    def _restore(self, state: dict[str, Any]) -> None:
        vars(self._entry).update(state["_entry"])
        vars(self).update(state, _entry=self._entry)

    def _wait(self, pair: tuple[mx.array, mx.array]) -> None:
        self._waiting = (*self._waiting, pair)

    def _read(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        before = self._entry.offset
        try:
            return self._head(hidden, tokens, self._cache)
        except BaseException:
            self._entry.trim(self._entry.offset - before)
            raise

    def _joined(self) -> tuple[mx.array, mx.array]:
        hidden, tokens = zip(*self._waiting, strict=True)
        return mx.concatenate(list(hidden), axis=1), mx.concatenate(list(tokens), axis=1)


def new_shares() -> Shares:
    """Returns the first estimates of the head's drafts."""
    return Shares(MAX_DEPTH)
