"""The drafters of a batch's sequences, which mlx-lm moves together with their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...decoding.drafters import Drafter, Outputs
from ...decoding.speculative import handing_over
from ...model.cache import Cache, settle
from ...model.quantized_kv import out_of_rows
from ...model.qwen3_next import Model


@dataclass
class DrafterRow:
    """A sequence's drafters, and the cache that one of them keeps up to date."""

    drafters: list[Drafter]
    cache: Cache


class Drafters:
    """The drafters of a batch's sequences, as one more entry of its cache.

    mlx-lm then moves them together with their sequences; the methods are those of its caches.
    """

    def __init__(self, rows: list[DrafterRow]):
        self.rows = rows
        self._hidden: mx.array | None = None
        self._lengths: list[int] | None = None

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        """Tells each row's drafters that their sequence grew.

        Args:
            tokens: ``[B, L]``, of which a row may be shorter if :meth:`prepare` said so.
            hidden: ``[B, L, …]``, as the drafters read it.
        """
        L = tokens.shape[1]
        for i, row in enumerate(self.rows):
            n = L if self._lengths is None else min(L, self._lengths[i])
            for drafter in row.drafters if n > 0 else ():
                drafter.committed(tokens[i, :n], hidden[i : i + 1, :n])
        if self._lengths is not None:
            self._lengths = [max(n - L, 0) for n in self._lengths]
        self._hidden = hidden

    def prepare(self, lengths: Sequence[int], **_: Any) -> None:
        self._lengths = list(lengths)

    def finalize(self) -> None:
        self._lengths = None

    @staticmethod
    def merge(entries: Sequence[Drafters]) -> Drafters:
        return Drafters([row for entry in entries for row in entry.rows])

    def extend(self, other: Drafters) -> None:
        self.rows = self.rows + other.rows

    def filter(self, batch_indices: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in batch_indices]

    def extract(self, idx: int) -> Drafters:
        return Drafters([self.rows[idx]])

    def __deepcopy__(self, memo: Any) -> Drafters:
        # mlx-lm copies a batch to divide it: a row goes on in one of the two.
        return Drafters(self.rows)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate: those of drafters must not refer to keys and values."""
        arrays = [x for row in self.rows for c in row.cache for x in c.state]
        return [x for x in (*arrays, self._hidden) if isinstance(x, mx.array)]

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for row in self.rows for c in row.cache)


class InformingModel:
    """The model for mlx-lm's batch: tells the drafters, the last entry, of the hidden states."""

    def __init__(self, model: Model):
        self._model = model

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        *trunk, drafts = cache
        outputs = Outputs(drafter for row in drafts.rows for drafter in row.drafters)
        hidden = self._model.model(tokens, trunk, handing_over(tokens.size, outputs))
        drafts.committed(tokens, outputs.of(hidden))
        return self._model.logits(hidden)


def without_drafters(cache: Cache) -> Cache:
    """One sequence's cache for others: settled, the head's own entry last if it is kept."""
    *trunk, drafts = out_of_rows(cache)
    settle(trunk)
    (row,) = drafts.rows
    for drafter in row.drafters:
        drafter.settle()
    return [*trunk, *row.cache]
