"""The model's memory: Gated DeltaNet states beside mlx-lm's KV caches, and rounds on both.

A cache is a list with one entry a layer: :class:`GatedDeltaCache` for linear layers, mlx-lm's
``KVCache`` (or its quantized or batched form) for attention layers. The list works with mlx-lm's
own tools: ``save_prompt_cache``, ``load_prompt_cache``, batching by merge/filter/extend/extract.

A *round* is a forward whose tokens may be taken back, in whole or from some token on::

    with Round(cache, n) as round:
        hidden = model.model(tokens, cache)  # n tokens
        round.commit(keep)  # the first `keep` stay; leaving without commit keeps none

Nothing is copied for it. Attention caches roll back by their offset. A linear layer does not
advance its state in a round: it keeps the state before it and a tape (convolution rows, decay,
keys and written errors), and the next forward replays the kept prefix first: lazy commit.

A plain forward advances at once; :class:`Undo` takes the last one back.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, KVCache

from . import ops

Cache = list[Any]


class Tape(NamedTuple):
    """What a linear layer remembers of a round of n tokens."""

    rows: mx.array  # [B, K-1 + n, C] inputs of the convolution, those before the round first
    g: mx.array  # [B, n, Hv] log decay
    k: mx.array  # [B, n, Hk, Dk] normalised keys
    delta: mx.array  # [B, n, Hv, Dv] written errors


class GatedDeltaCache(ArraysCache):
    """One linear layer's convolution rows ``[B, K-1, C]`` and state ``[B, Hv, Dv, Dk]`` float32.

    Extends mlx-lm's ``ArraysCache`` (same saved form, same batching) by rounds.
    """

    # Class attributes, since mlx-lm's from_state() builds an entry without __init__.
    _open = False  # a round has begun and was neither committed nor dropped
    _tape: Tape | None = None
    _keep = 0  # how much of a committed tape is part of the sequence

    cache: list[mx.array | None]  # type: ignore[assignment]

    def __init__(self, size: int = 2, left_padding: list[int] | None = None):
        super().__init__(size, left_padding)

    # --- what the layer does -------------------------------------------------------------------
    def read(self) -> tuple[mx.array | None, mx.array | None]:
        """The convolution rows and the state the next token meets; None before the first."""
        self.settle()
        return self.cache[0], self.cache[1]

    @property
    def recording(self) -> bool:
        """Whether the forward belongs to a round, so that a tape is wanted, not a new state."""
        return self._open

    def record(self, tape: Tape) -> None:
        """Keeps a round's tape; the state stays as it was."""
        self._tape = tape

    def store(self, rows: mx.array, state: mx.array, tokens: int) -> None:
        """Takes over the rows and state after ``tokens`` more tokens."""
        self.cache = [rows, state]
        self.advance(tokens)

    # --- rounds --------------------------------------------------------------------------------
    def begin(self) -> None:
        """Opens a round: the next forward records instead of advancing."""
        if self._open:
            raise RuntimeError("a round is open already: commit or drop it first")
        self.settle()
        self._open = True

    def commit(self, keep: int) -> None:
        """Closes the round; its first ``keep`` tokens become part of the sequence."""
        if not self._open:
            raise RuntimeError("no round is open: call begin() first")
        tape = self._tape if keep else None
        vars(self).update(_tape=tape, _keep=keep, _open=False)

    def settle(self) -> None:
        """Replays a committed tape now, so that rows and state are those of the sequence."""
        if self._open and self._tape is not None:
            raise RuntimeError("a round is open: commit or drop it before using its cache")
        if self._tape is None:
            return
        tape, keep = self._tape, self._keep
        taps = tape.rows.shape[1] - tape.g.shape[1]  # K - 1
        rows = mx.contiguous(tape.rows[:, keep : keep + taps])
        before = self.cache[1]
        if before is None:
            B, _, Hv, Dv = tape.delta.shape
            before = mx.zeros((B, Hv, Dv, tape.k.shape[-1]))
        state = ops.replay(before, tape.g, tape.k, tape.delta, keep)
        # At once, so that no interrupt comes between.
        vars(self).update(cache=[rows, state], _tape=None)
        self.advance(keep)

    # --- mlx-lm's cache protocol, on settled arrays --------------------------------------------
    @property
    def state(self) -> Any:
        self.settle()
        return super().state

    @state.setter
    def state(self, value: Any) -> None:
        self.cache, self.left_padding, self.lengths = value

    def make_mask(self, N: int) -> mx.array | None:
        self.settle()
        return super().make_mask(N)

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
        return self.cache[0] is None and self._tape is None

    @property
    def nbytes(self) -> int:
        return super().nbytes + (sum(x.nbytes for x in self._tape) if self._tape else 0)


class MTPCache(KVCache):
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
for _entry in (GatedDeltaCache, MTPCache):
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
        """May be called again after an interrupt."""
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
        settle(self._cache)
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


def settle(cache: Cache) -> None:
    """Replays what committed rounds left on their tapes, before handing the cache to others."""
    for c in cache:
        if isinstance(c, GatedDeltaCache):
            c.settle()


def length(entry: Any) -> int:
    """How many positions an attention layer's cache entry holds (padding included)."""
    offset = getattr(entry, "offset", None)
    return offset if isinstance(offset, int) else entry.size()


def tokens_held(cache: Cache) -> int:
    """How many positions the cache's attention layers hold, 0 if there are none."""
    return max((length(c) for c in cache if not isinstance(c, ArraysCache)), default=0)
