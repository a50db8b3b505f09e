"""Drafts by a DFlash drafter: a whole block in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ...model.qwen3_next import Model
from ..sampling import Choose

CATCH_UP = 64  # verified tokens whose states wait at most, when nothing is drafted


class DFlashDrafter:
    """Drafts a sequence's next tokens (a :class:`mlx_qwen3next.decoding.drafters.Drafter`).

    Args:
        model: has a DFlash drafter.
        position: the number of tokens before the first that it will be told of. Of these it knows
            nothing, so that its first drafts may be worse.

    Attributes:
        layers: those whose outputs it reads.
    """

    def __init__(self, model: Model, position: int = 0):
        self._model, self._dflash = model, model.dflash
        self.layers: Sequence[int] = self._dflash.config.target_layer_ids
        self._cache, self._before = self._dflash.make_cache(), position
        self._waiting: tuple[mx.array, ...] = ()  # states [1, n, …] that are not in the cache yet

    def propose(self, token: mx.array, depth: int, choose: Choose) -> list[mx.array]:
        """Up to ``depth`` drafts ``[1]`` of what follows ``token`` ``[1]``, the sequence's last."""
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

    def expect(
        self, tokens: mx.array, hidden: mx.array, token: mx.array, depth: int, choose: Choose
    ) -> None:
        """Prepares nothing: a block is built in one pass."""

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        """The sequence grew by ``tokens`` ``[n]``; its layers' outputs there are ``[1, n, …]``."""
        self._waiting = (*self._waiting, hidden)
        if sum(states.shape[1] for states in self._waiting) >= CATCH_UP:
            self.settle()

    def settle(self) -> None:
        """Brings the cache up to date."""
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
