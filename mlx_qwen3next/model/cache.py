"""The state of a sequence: Gated DeltaNet states beside mlx-lm's KV caches, and rounds on both.

A cache is a list with one entry a layer: :class:`GatedDeltaCache` for linear layers, mlx-lm's
``KVCache`` (or its quantized or batched form) for attention layers. The list works with mlx-lm's
own tools: ``save_prompt_cache``, ``load_prompt_cache``, batching by merge/filter/extend/extract.

A *round* is a forward whose tokens may be taken back, in whole or from some token on::

    with Round(cache, n) as round:
        hidden = model.model(tokens, cache)  # n tokens
        round.commit(keep)  # the first `keep` stay; leaving without commit keeps none

A round copies nothing. Attention caches roll back by their offset. A linear layer does not advance
its state in a round: it keeps the state before it, the convolution's inputs and a tape (decay, keys
and written errors), and the next forward replays the kept prefix first: lazy commit.

A plain forward advances at once; :class:`Undo` takes the last one back.

Keys and values grow one array after the other, so that no step ever holds a second copy of more
than one of them: see :class:`AttentionCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache

from ..compute import operations
from ..compute.gated_delta import LayerState

Cache = list[Any]


class GatedDeltaCache(ArraysCache):
    """One linear layer's convolution rows ``[B, K-1, C]`` and state ``[B, Hv, Dv, Dk]`` float32.

    Extends mlx-lm's ``ArraysCache`` (same saved form, same batching) by rounds.
    """

    # Class attributes, since mlx-lm's from_state() builds an entry without __init__.
    _open = False  # a round has begun and was neither committed nor dropped
    _recorded: LayerState | None = None  # after the forward of the open round
    _pending: LayerState | None = None  # after a committed round, whose tape is not replayed yet

    cache: list[mx.array | None]  # type: ignore[assignment]

    def __init__(self, size: int = 2, left_padding: list[int] | None = None):
        super().__init__(size, left_padding)

    # --- for the layer -------------------------------------------------------------------------
    def arrays(self) -> Sequence[Any] | None:
        """Returns those of the :class:`LayerState` that the next token meets; None at first."""
        self._check_closed()
        if self.left_padding is not None or self.lengths is not None:
            self._settle()  # a pending round has its part in them
        if self._pending is not None:
            return self._pending.arrays
        return None if self.cache[0] is None else self.cache

    @property
    def keep(self) -> int:
        """The ``keep`` of that :class:`LayerState`."""
        return 0 if self._pending is None else self._pending.keep

    @property
    def recording(self) -> bool:
        """Whether the forward belongs to a round, so that a tape is wanted, not a new state."""
        return self._open

    def store(self, arrays: Sequence[mx.array], tokens: int) -> None:
        """Takes over a :class:`LayerState`: that after ``tokens`` more, or a round's record."""
        if len(arrays) > 2:
            changes: dict[str, Any] = {"_recorded": LayerState.of(arrays, 0), "_pending": None}
            if self._pending is not None or self.cache[0] is not None:
                changes["cache"] = [*arrays[:2]]  # commit() cuts the rows if nothing is kept
            self._replayed(changes)
        elif self._pending is self.left_padding is self.lengths is None:
            self.cache = [*arrays]  # nothing else changes, and this takes half as long
        else:
            self._replayed({"cache": [*arrays], "_pending": None}, tokens)

    def _replayed(self, changes: dict[str, Any], more: int = 0) -> None:
        """Takes over the changes of a forward that replayed a pending round and ``more`` tokens."""
        if self.left_padding is not None or self.lengths is not None:
            more += self.keep
            changes |= self._padding_after(more)
        # At once, so that no interrupt comes between; in new arrays, which an Undo may share.
        vars(self).update(changes)

    def _padding_after(self, tokens: int) -> dict[str, mx.array]:
        padding = {"left_padding": self.left_padding, "lengths": self.lengths}
        return {name: of - tokens for name, of in padding.items() if of is not None}

    # --- rounds --------------------------------------------------------------------------------
    def begin(self) -> None:
        """Opens a round: the next forward records instead of advancing."""
        if self._open:
            raise RuntimeError("a round is open already: commit or drop it first")
        self._open = True

    def commit(self, keep: int) -> None:
        """Closes the round; its first ``keep`` tokens become part of the sequence."""
        if not self._open:
            raise RuntimeError("no round is open: call begin() first")
        changes: dict[str, Any] = {"_recorded": None, "_open": False}
        recorded = self._recorded
        if recorded is not None and keep > 0:
            changes["_pending"] = LayerState(*recorded[:3], keep)
        elif recorded is not None and self.cache[0] is not None:
            changes["cache"] = [recorded.kept_rows, recorded.state]
        vars(self).update(changes)

    def settle(self) -> None:
        """Replays a committed tape now, so that rows and state are those of the sequence."""
        self._check_closed()
        self._settle()

    def _settle(self) -> None:
        pending = self._pending
        if pending is None or pending.tape is None:
            return
        rows = mx.contiguous(pending.kept_rows)
        state = operations.gated_delta_replay(pending.state, *pending.tape, pending.keep)
        self._replayed({"cache": [rows, state], "_pending": None})

    def _check_closed(self) -> None:
        if self._recorded is not None:
            raise RuntimeError("a round is open: commit or drop it before using its cache")

    # --- mlx-lm's cache protocol, on settled arrays --------------------------------------------
    @property
    def state(self) -> Any:
        self.settle()
        return super().state

    @state.setter
    def state(self, value: Any) -> None:
        self.cache, self.left_padding, self.lengths = value
        vars(self).update(_open=False, _recorded=None, _pending=None)

    def make_mask(self, N: int) -> mx.array | None:
        if self.left_padding is None and self.lengths is None:
            return None
        self.arrays()  # settles a pending round
        return super().make_mask(N)

    def prepare(self, lengths: Any = None, **options: Any) -> None:
        self.settle()
        super().prepare(lengths, **options)

    def advance(self, N: int) -> None:
        vars(self).update(self._padding_after(N))

    def filter(self, batch_indices: Any) -> None:
        self.settle()
        super().filter(batch_indices)

    def extend(self, other: GatedDeltaCache) -> None:
        self.settle()
        other.settle()
        super().extend(other)

    def extract(self, idx: int) -> GatedDeltaCache:
        self.settle()
        one = GatedDeltaCache()
        one.cache = [None if c is None else mx.contiguous(c[idx : idx + 1]) for c in self.cache]
        return one

    @classmethod
    def merge(cls, caches: list[GatedDeltaCache]) -> GatedDeltaCache:
        for c in caches:
            c.settle()
        return super().merge(caches)

    def empty(self) -> bool:
        return self.cache[0] is None and self._recorded is None and self._pending is None

    @property
    def nbytes(self) -> int:
        held = self._recorded or self._pending
        if held is None:
            return super().nbytes
        return sum(x.nbytes for x in (held.rows, held.state, *(held.tape or ())))


def slots(tokens: int) -> int:
    """Returns for how many tokens there is room in keys and values that hold so many.

    The room grows by mlx-lm's steps of 256, and by at most a sixteenth of the tokens where that is
    more: growing copies what is there.
    """
    step = max(KVCache.step, 1 << max(tokens.bit_length() - 5, 0))
    return -(-tokens // step) * step


def grown(old: mx.array | None, new: mx.array, held: int, tokens: int) -> mx.array:
    """Returns an array like ``new`` ``[B, nkv, n, d]`` with room for so many tokens.

    Args:
        old: begins with the ``held`` tokens that it takes over; None for none.
    """
    shape = (*new.shape[:2], slots(tokens) - (0 if old is None else held), new.shape[3])
    room = mx.zeros(shape, new.dtype)
    return room if old is None else mx.concatenate([old[..., :held, :], room], axis=2)


class _Growing:
    """Makes room in keys and values ``[B, nkv, S, hd]`` before mlx-lm's entries would.

    These append the new room to all arrays of a forward, and evaluate none: on a GPU, whose memory
    is given out while work is queued, old and new arrays of all layers may exist at once.
    """

    keys: Any
    values: Any
    reserved = 0  # tokens for which there will be room at once; on the class, see MTPCache

    def _write(
        self, held: int, end: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Writes keys and values of the tokens from ``held`` to ``end``, and returns all so far."""
        if self.values is None or end > self.values.shape[2]:  # these grow after the keys
            self._make_room(held, end, keys, values)
        # MLX takes up to twice as long for a slice with an Ellipsis.
        self.keys[:, :, held:end] = keys
        self.values[:, :, held:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _make_room(self, held: int, need: int, keys: mx.array, values: mx.array) -> None:
        """Makes room for so many tokens in all, of which ``held`` are there."""
        for name, new in (("keys", keys), ("values", values)):
            old = getattr(self, name)
            if old is not None and need <= old.shape[2]:
                continue
            room = max(need, self.reserved)
            setattr(self, name, grown(old, new, held, room))
            if old is not None:
                del old  # so that evaluating frees it
                mx.eval(getattr(self, name))


class AttentionCache(_Growing, KVCache):
    """One attention layer's keys and values, each ``[1, nkv, S, hd]``."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.offset + keys.shape[2]
        fetched = self._write(self.offset, end, keys, values)
        self.offset = end
        return fetched

    @classmethod
    def merge(cls, caches: list[AttentionCache]) -> BatchAttentionCache:
        return BatchAttentionCache.merge(caches)


class BatchAttentionCache(_Growing, BatchKVCache):
    """The keys and values of several sequences, each ``[B, nkv, S, hd]``.

    A single sequence comes and goes with its arrays. Otherwise they are copied, a layer at a time.
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        tokens = keys.shape[2]
        end = self._idx + tokens
        fetched = self._write(self._idx, end, keys, values)
        self._idx, self.offset = end, self.offset + tokens
        return fetched

    @classmethod
    def merge(cls, caches: list[AttentionCache]) -> BatchAttentionCache:
        batch = cls([0] * len(caches))
        if len(caches) > 1:
            vars(batch).update(vars(BatchKVCache.merge(caches)))
        elif not caches[0].empty():
            one = caches[0]
            # In new objects, since an assignment to a slice changes the object.
            vars(batch).update(keys=one.keys[...], values=one.values[...])
            batch._idx = one.offset
            batch.offset = batch.offset + one.offset
        batch.reserved = max(c.reserved for c in caches)
        return batch._evaluated()

    def extend(self, other: BatchAttentionCache) -> None:
        super().extend(other)
        other.keys = other.values = None
        self._evaluated()

    def filter(self, batch_indices: list[int]) -> None:
        if list(batch_indices) != [*range(self.offset.shape[0])]:
            super().filter(batch_indices)
            self._evaluated()

    def extract(self, idx: int) -> AttentionCache:
        if self.offset.shape[0] > 1 or self.left_padding.any():
            return AttentionCache.from_state(super().extract(idx).state)
        return AttentionCache.from_state((self.keys[...], self.values[...], self._idx))

    def _evaluated(self) -> BatchAttentionCache:
        if self.keys is not None:
            mx.eval(self.keys, self.values)
        return self


class MTPCache(AttentionCache):
    """The MTP head's keys and values, and the trunk's last hidden state ``[1, 1, H]`` or None.

    Position i holds the pair of hidden state h_i and token t_{i+1}, so there is one position less
    than tokens; ``hidden`` waits for the token that comes next.
    """

    hidden: mx.array | None = None  # on the class: mlx-lm's from_state() skips __init__

    @property
    def state(self) -> Any:
        return [*super().state, self.hidden]

    @state.setter
    def state(self, value: Any) -> None:
        self.keys, self.values, self.offset, self.hidden = value


# load_prompt_cache() finds an entry's class by its name in mlx-lm's module.
for _entry in (GatedDeltaCache, AttentionCache, MTPCache):
    setattr(mlx_lm_cache, _entry.__name__, _entry)


class Round:
    """A forward of up to ``n`` tokens on ``cache`` as a transaction (see the module's text).

    Every way out of the ``with`` block, exceptions included, commits or keeps nothing.

    Raises:
        ValueError: ``n`` is less than 1.
        RuntimeError: a round is open on the cache already.
    """

    def __init__(self, cache: Cache, n: int):
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self._cache, self._n = cache, n
        self._lengths: list[int] = []
        self._keep = 0
        self._done = False

    def __enter__(self) -> Round:
        if any(isinstance(c, GatedDeltaCache) and c.recording for c in self._cache):
            raise RuntimeError("a round is open already: commit or drop it first")
        self._lengths = [0 if isinstance(c, GatedDeltaCache) else length(c) for c in self._cache]
        try:
            for c in self._cache:
                if isinstance(c, GatedDeltaCache):
                    c.begin()
        except BaseException:
            self._finish()
            raise
        return self

    def commit(self, keep: int) -> None:
        """Ends the round; its first ``keep`` tokens stay.

        Raises:
            ValueError: ``keep`` is not within 0…n.
        """
        if not 0 <= keep <= self._n:
            raise ValueError(f"keep must be within 0 and {self._n}, got {keep}")
        if self._done:
            raise RuntimeError("the round has ended already")
        self._keep = keep
        self._finish()

    def _finish(self) -> None:
        """Ends the round; may be called again after an interrupt."""
        for c, before in zip(self._cache, self._lengths, strict=True):
            if isinstance(c, GatedDeltaCache):
                if c.recording:
                    c.commit(self._keep)
            elif (extra := length(c) - before - self._keep) > 0:
                c.trim(extra)
        self._done = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._done:
            self._finish()


class Undo:
    """Takes back the plain forward in its ``with`` block: at an exception, or later when called.

    Linear layers keep references to the arrays they had, attention layers roll back by their
    offset: no reference to keys or values is held, which would make MLX copy them.
    """

    def __init__(self, cache: Cache):
        self._cache = cache
        self._before: list[Any] = []

    def __enter__(self) -> Undo:
        self._before = [
            dict(vars(c)) if isinstance(c, GatedDeltaCache) else length(c) for c in self._cache
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self()

    def __call__(self) -> None:
        """Restores the cache, which nothing else has advanced since."""
        for c, before in zip(self._cache, self._before, strict=True):
            if isinstance(before, dict):
                vars(c).clear()
                vars(c).update(before)
            elif (extra := length(c) - before) > 0:
                c.trim(extra)


def reserve(cache: Cache, tokens: int) -> None:
    """Makes the next growth of keys and values large enough for so many tokens in all."""
    for c in cache:
        if hasattr(c, "reserved"):
            c.reserved = max(c.reserved, tokens)


def settle(cache: Cache) -> None:
    """Replays the tapes of committed rounds, before the cache is handed to others."""
    for c in cache:
        if isinstance(c, GatedDeltaCache):
            c.settle()


def length(entry: Any) -> int:
    """Returns the number of positions in an attention layer's cache entry (padding included)."""
    offset = getattr(entry, "offset", None)
    return offset if isinstance(offset, int) else entry.size()


def tokens_held(cache: Cache) -> int:
    """Returns the number of positions in the cache's attention layers, 0 if there are none."""
    return max((length(c) for c in cache if not isinstance(c, ArraysCache)), default=0)
