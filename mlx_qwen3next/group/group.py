"""The interface of a group of processes, and the group of a process that is alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class Group:
    """Ranks 0 to ``size - 1``. This class itself is the group of one process: it does nothing."""

    rank = 0
    size = 1

    def all_sum(self, x: mx.array) -> mx.array:
        """Returns the sum of all ranks' arrays, on each of them."""
        return x

    def all_gather(self, x: mx.array) -> mx.array:
        """Returns all ranks' arrays, joined along the last axis, on each of them."""
        return x

    def agree(self, x: mx.array) -> mx.array:
        """Returns rank 0's array, on each of them."""
        return x

    def from_before(self, x: mx.array) -> mx.array:
        """Returns the array that the rank before in a pipeline gives; the first has ``x`` itself.

        Args:
            x: of the same shape and dtype.
        """
        return x

    def from_last(self, x: mx.array) -> mx.array:
        """Gives ``x`` to the next rank of a pipeline; returns the last one's array on each."""
        return x

    def decide(self, what: str, value: Any) -> Any:
        """Returns rank 0's value; the others' need not make sense. Rank 0 does not wait for them.

        Args:
            what: the name of the decision; the same on all ranks, or they have lost each other.
        """
        return value

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns all ranks' values, in order; ``what`` as for :meth:`decide`."""
        return [value]

    def leave(self, status: int) -> None:
        """Ends all the others at once, and with them this process."""

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass


ALONE = Group()
