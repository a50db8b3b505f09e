"""The arrays that the ranks of a group exchange, by MLX's collectives."""

from __future__ import annotations

import mlx.core as mx

from .group import Group


class Collectives(Group):
    """The arrays' part of a group of several.

    Ranks may have other graphs (one has the shared expert), and MLX runs operations that do not
    depend on each other in any order. So each collective is made to depend on the one before.
    """

    def __init__(self, engine: mx.distributed.Group):
        self._engine, self.rank, self.size = engine, engine.rank(), engine.size()
        self._previous: mx.array | None = None  # the last collective's result

    def _after_previous(self, x: mx.array) -> mx.array:
        return x if self._previous is None else mx.depends(x, self._previous)

    def all_sum(self, x: mx.array) -> mx.array:
        self._previous = mx.distributed.all_sum(self._after_previous(x), group=self._engine)
        return self._previous

    def all_gather(self, x: mx.array) -> mx.array:
        parts = mx.distributed.all_gather(self._after_previous(x[None]), group=self._engine)
        self._previous = parts  # [size, …, n]
        return mx.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)

    def agree(self, x: mx.array) -> mx.array:
        return self.all_sum(x if self.rank == 0 else mx.zeros_like(x))

    def from_before(self, x: mx.array) -> mx.array:
        if self.rank == 0:
            return x
        if self._previous is not None:
            mx.async_eval(self._previous)  # a receipt cannot be made to depend on it
        self._previous = mx.distributed.recv_like(x, self.rank - 1, group=self._engine)
        return self._previous

    def from_last(self, x: mx.array) -> mx.array:
        if self.rank < self.size - 1:
            sent = mx.distributed.send(self._after_previous(x), self.rank + 1, group=self._engine)
            self._previous, x = sent, mx.depends(mx.zeros_like(x), sent)
        x = self.all_sum(x)
        # Others wait for the array sent here, even if the result is not looked at here.
        mx.async_eval(x)
        return x
