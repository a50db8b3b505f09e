"""Quantized keys and values, of one sequence and of the sequences of a batch.

A token's keys and values are quantized, and are those that it meets, from a position of the text
on: the tokens before it see plain ones, all others quantized ones. So results depend neither on
the chunks of a prompt nor on rounds, both of which have to end there
(:meth:`KVQuantization.limited`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from .cache import Cache, grown, length, reserve


@dataclass(frozen=True)
class KVQuantization:
    """The quantization of keys and values, in mlx-lm's options of these names."""

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0

    def reserve(self, entries: list[Any], tokens: int) -> None:
        """Makes the next growth of keys and values large enough for so many tokens in all.

        Plain ones get room for those alone that will not be quantized.
        """
        for entry in entries:
            plain = self.kv_bits is not None and isinstance(entry, KVCache)
            reserve([entry], min(tokens, self.quantized_kv_start) if plain else tokens)

    def apply(self, entries: list[Any], reserved: int = 0) -> None:
        """Quantizes, in place, the entries that hold enough tokens; before they get more.

        Args:
            entries: of a cache.
            reserved: tokens for which quantized entries get room.
        """
        if self.kv_bits is None:
            return
        for i, entry in enumerate(entries):
            if isinstance(entry, KVCache) and entry.offset >= self.quantized_kv_start:
                entries[i] = quantized = QuantizedAttentionCache(self.kv_group_size, self.kv_bits)
                quantized.reserved = reserved
                if entry.offset > 0:
                    quantized.update_and_fetch(*entry.keys_and_values())

    def limited(self, tokens: int, held: int) -> int:
        """Returns how many of the next tokens may share a forward, after ``held`` of them."""
        if self.kv_bits is None or held >= self.quantized_kv_start:
            return tokens
        return min(tokens, self.quantized_kv_start - held)

    def itemsize(self, itemsize: int, tokens: int) -> float:
        """Returns the bytes of a number in keys and values of so many tokens, scales included.

        Args:
            itemsize: bytes of a number that is not quantized, and of scales and biases.
        """
        if self.kv_bits is None or tokens < self.quantized_kv_start:
            return itemsize
        return self.kv_bits / 8 + 2 * itemsize / self.kv_group_size


NOT_QUANTIZED = KVQuantization()


class QuantizedAttentionCache(QuantizedKVCache):
    """One attention layer's quantized keys and values ``[1, nkv, S, hd]``.

    Each are three arrays: packed numbers, scales and biases. They grow as
    :class:`mlx_qwen3next.model.cache.AttentionCache` does.
    """

    reserved = 0  # on the class: mlx-lm's from_state() skips __init__

    @property
    def nbytes(self) -> int:
        return 0 if self.empty() else super().nbytes

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        end = self.offset + keys.shape[2]
        for name, new in (("keys", keys), ("values", values)):
            parts = mx.quantize(new, self.group_size, self.bits)
            held: list[Any] = [*(getattr(self, name) or [None] * len(parts))]
            setattr(self, name, held)
            for j, part in enumerate(parts):
                if held[j] is None or held[j].shape[2] < end:
                    room = max(end, self.reserved)
                    held[j] = grown(held[j], part, self.offset, room)
                    if self.offset:
                        mx.eval(held[j])  # one after the other
                held[j][..., self.offset : end, :] = part
        self.offset = end
        return self.keys_and_values()


class AttentionRows:
    """The keys and values of several sequences in one layer, each in an entry of its own.

    mlx-lm moves them as it moves its batched caches, whose methods these are. There is no padding:
    attention takes one sequence after the other, plain or quantized.

    Attributes:
        rows: an entry for each sequence.
    """

    def __init__(self, rows: Sequence[Any], quantization: KVQuantization):
        self.rows, self._quantization = [*rows], quantization

    def ready(self) -> list[Any]:
        """Returns the rows after quantizing those that hold enough tokens, before they get more."""
        self._quantization.apply(self.rows)
        return self.rows

    @property
    def offset(self) -> mx.array:
        return mx.array([row.offset for row in self.rows])

    def make_mask(self, N: int, **_: Any) -> str | None:
        return None if N == 1 else "causal"

    @staticmethod
    def merge(entries: Sequence[AttentionRows]) -> AttentionRows:
        rows = [row for entry in entries for row in entry.rows]
        return AttentionRows(rows, entries[0]._quantization)

    def extend(self, other: AttentionRows) -> None:
        self.rows = self.rows + other.rows

    def filter(self, batch_indices: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in batch_indices]

    def extract(self, idx: int) -> AttentionRows:
        return AttentionRows([self.rows[idx]], self._quantization)

    def __deepcopy__(self, memo: Any) -> AttentionRows:
        # mlx-lm copies a batch to divide it: a row goes on in one of the two.
        return AttentionRows(self.rows, self._quantization)

    def size(self) -> int:
        return max(map(length, self.rows), default=0)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    @property
    def state(self) -> list[Any]:
        return [row.state for row in self.rows]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)


def in_rows(cache: Cache, quantization: KVQuantization) -> Cache:
    """Returns one sequence's cache for a batch, its keys and values as :class:`AttentionRows`."""
    quantized = (KVCache, QuantizedKVCache) if quantization.kv_bits is not None else ()
    return [AttentionRows([c], quantization) if isinstance(c, quantized) else c for c in cache]


def out_of_rows(cache: Cache) -> Cache:
    """Takes :func:`in_rows` back."""
    return [c.rows[0] if isinstance(c, AttentionRows) else c for c in cache]


# load_prompt_cache() finds an entry's class by its name in mlx-lm's module.
setattr(mlx_lm_cache, QuantizedAttentionCache.__name__, QuantizedAttentionCache)
