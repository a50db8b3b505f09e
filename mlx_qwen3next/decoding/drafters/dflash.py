"""Drafts by a DFlash drafter: a whole block in one pass."""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx

from ...model.qwen3_next import Model
from ..draft_depth import MOST_COPIED, Offer, Shares
from ..sampling import Choose
from . import CATCH_UP, StateDrafter

DEPTHS = (1, 3, 7)  # worth timing besides the deepest; the block takes the same time at all of them


class DFlashDrafter(StateDrafter):
    """Drafts a sequence's next tokens.

    Args:
        model: has a DFlash drafter.
        position: the number of tokens before the first that it will be told of. Of these it knows
            nothing, so that its first drafts may be worse.
        shares: how often drafts were right, by depth; None to begin anew.
    """

    source: ClassVar[str] = "dflash"

    def __init__(self, model: Model, position: int = 0, shares: Shares | None = None):
        super().__init__(shares or new_shares())
        self._model, self._dflash = model, model.dflash
        self.layers = self._dflash.config.target_layer_ids
        self._most = min(self._dflash.config.block_size - 1, MOST_COPIED)
        self._cache, self._before = self._dflash.make_cache(), position
        self._waiting: tuple[mx.array, ...] = ()  # states [1, n, …] that are not in the cache yet

    def offer(self, ahead: bool = False) -> Offer:
        depths = [depth for depth in DEPTHS if depth < self._most]
        return Offer(self.source, self._expected(self._most), [*depths, self._most])

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        self._read()
        config = self._dflash.config
        # Always a whole block, as in training: its tokens see each other.
        masks = mx.full((config.block_size - 1,), config.mask_token_id, token.dtype)
        block = self._model.model.embed(mx.concatenate([token, masks])[None])
        m = self._dflash(block, self._cache, self._position)
        logits = self._model.logits(m[0, 1 : depth + 1])
        drafts: list[mx.array] = []
        for i in range(logits.shape[0]):
            drafts.append(choose(logits[i : i + 1], drafts))
        return drafts

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        self._waiting = (*self._waiting, hidden)
        if sum(states.shape[1] for states in self._waiting) >= CATCH_UP:
            self.settle()

    def settle(self) -> None:
        self._read()
        mx.async_eval([(entry.keys, entry.values) for entry in self._cache if entry.offset])

    @property
    def _position(self) -> int:
        """The number of tokens whose states were read, those before included."""
        return self._before + self._cache[0].offset

    def _read(self) -> None:
        if self._waiting:
            states = mx.concatenate(list(self._waiting), axis=1)
            self._dflash.read(states, self._cache, self._position)
            self._waiting = ()


def new_shares() -> Shares:
    """Returns the first estimates of a drafter's drafts."""
    return Shares(MOST_COPIED)
