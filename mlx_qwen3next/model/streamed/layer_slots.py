"""The slots of one layer: the experts wanted last stay, the next layer's are read ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...compute.experts import Stored, products
from ...metal_kernels import Experts
from .read_ahead import ReadAhead
from .slots import Slots, StoredExperts, Transfer, passing_at_a_time


def least_many(stack: int) -> int:
    """Returns how many rows sorted by expert MLX's Metal backend multiplies by matrices, with sums
    in another order than those of fewer rows, where the stack has so many quantized experts.
    """
    return max(4 * stack, 16)  # GatherQMM::eval_gpu of MLX 0.32


class Following(NamedTuple):
    """The next sparse layer."""

    likely: Callable[[mx.array], mx.array]  # gives the experts that a residual seems to want
    slots: LayerSlots


class LayerSlots(Slots):
    """The slots of a layer, as :class:`mlx_qwen3next.compute.experts.Slots` describes them.

    The experts that were wanted last stay.

    Args:
        gate_up, down, experts, size: see :class:`Slots`.
        stored: the layer's experts on disk.
        passing: two more sets of slots of the same form, which layers share, for a prompt's experts
            that only pass by.
        ahead: says whether the next layer's experts are read ahead.
        is_first: whether the layer is the first that has experts.

    Attributes:
        following: the next sparse layer, whose experts are read ahead; None for the last.
        hits, misses: how many wanted experts were there, and were not.
        foreseen: how many of the misses were being read already.
        is_rehearsal: whether results are for nobody: each expert is then that of some slot, so that
            nothing is waited for.
    """

    def __init__(
        self,
        gate_up: nn.Module,
        down: nn.Module,
        experts: int,
        size: int,
        stored: StoredExperts,
        passing: dict[tuple[object, ...], tuple[Slots, Slots]],
        ahead: ReadAhead,
        is_first: bool,
    ):
        super().__init__(gate_up, down, experts, size)
        self.table[-1] = size
        self.stored = stored
        if self.form not in passing:
            n = passing_at_a_time(experts)
            passing[self.form] = Slots.like(self, n), Slots.like(self, n)
        self._passing = passing[self.form]
        self._last = np.zeros(size)  # when the expert of each slot was wanted last
        self._clock = self.hits = self.misses = self.foreseen = 0
        self.is_rehearsal = False
        self._ahead, self._is_first = ahead, is_first
        self.following: Following | None = None
        self._guess: mx.array | None = None  # the experts that the next layer may want

    def __repr__(self) -> str:  # they are no part of the traces, which look at attributes
        return "LayerSlots"

    def fill(self) -> None:
        """Reads the first experts, as many as there are slots."""
        self._hold(np.arange(self.size))

    def read_by(self, result: mx.array) -> None:
        if not self.is_rehearsal:
            super().read_by(result)

    def give_up(self, transfer: Transfer) -> None:
        super().give_up(transfer)
        self._last[transfer.slots] = 0  # they are empty

    def _some(self, experts: mx.array) -> mx.array:
        """Returns a slot for each expert, whichever; the shared expert's own."""
        return mx.where(experts < len(self.table) - 1, experts % self.size, self.size)

    def place(self, routing: mx.array) -> mx.array | None:
        if self.is_rehearsal:
            chosen, others = mx.split(routing, [routing.size // 4])
            return mx.concatenate([self._some(chosen).astype(routing.dtype), others])
        self._know(routing)
        words = np.array(routing)
        pairs = len(words) // 4
        distinct = np.count_nonzero(words[3 * pairs : -1] < pairs)  # of where their pairs begin
        experts = words[:distinct]
        routed = experts[experts < len(self.table) - 1]
        if len(routed) > self.size:
            return None
        self._want(routed)
        words[:distinct] = self.table[experts]
        return mx.array(words)

    def products(
        self, rows: mx.array, gate_up: Stored, down: Stored, indices: mx.array, is_sorted: bool
    ) -> mx.array:
        if self.is_rehearsal:
            return products(rows, gate_up, down, self._some(indices), is_sorted)
        self._know(indices)
        experts = np.array(indices)
        wanted, counts = np.unique(experts[experts < len(self.table) - 1], return_counts=True)
        if is_sorted or len(wanted) > self.size:
            return self._sweep(rows, experts, wanted, counts, is_sorted)
        self._want(wanted)
        y = products(rows, gate_up, down, mx.array(self.table[experts].astype(np.uint32)), False)
        self.read_by(y)
        return y

    def look_ahead(self, residual: mx.array) -> None:
        """Has the next layer's experts guessed, which are then read while this layer computes.

        Args:
            residual: this layer's, ``[B, L, H]``, without its routed experts.
        """
        self._guess = None
        if self._ahead.is_on and self.following is not None and not self.is_rehearsal:
            self._guess = self.following.likely(residual)

    def _know(self, wanted: mx.array) -> None:
        """Waits for the numbers of the experts that are wanted, and of those that may be next."""
        self.settle(*(array for array in (wanted, self._guess) if array is not None))

    def _want(self, experts: np.ndarray) -> None:
        """Holds experts of a step, which are timed."""
        self._hold(experts)
        self._ahead.note(len(experts), self._is_first)

    def _hold(self, wanted: np.ndarray) -> None:
        """Reads those of the wanted experts that are not there."""
        self._clock += 1
        awaited = self._receive(wanted)
        slots = self.table[wanted]
        new, here = wanted[slots < 0], slots[slots >= 0]
        self._last[here] = self._clock
        self.hits += len(here)
        self.misses += len(new)
        for transfer in awaited:
            self._last[transfer.slots] = self._clock
            new = new[~np.isin(new, transfer.experts)]
        self.foreseen += len(wanted) - len(here) - len(new)
        if len(new):
            awaited.append(self.start(self.stored, new, self._oldest(len(new))))
        if self.following is not None and self._guess is not None:
            self.following.slots.expect(np.unique(np.array(self._guess)))
        self._guess = None
        for transfer in awaited:
            self.finish(transfer)

    def _oldest(self, n: int) -> np.ndarray:
        """Chooses the n slots whose experts were wanted longest ago, for others."""
        slots = np.argpartition(self._last, n - 1)[:n]
        self._last[slots] = self._clock
        return slots

    def expect(self, experts: np.ndarray) -> None:
        """Starts to read those experts that are not there, since they may be wanted next."""
        self._receive(experts[:0])
        new = experts[self.table[experts] < 0][: self.size // 2]
        if len(new):
            for pair in zip(new[:, None], self._oldest(len(new))[:, None], strict=True):
                self.start(self.stored, *pair)

    def _receive(self, wanted: np.ndarray) -> list[Transfer]:
        """Returns those of the reads under way that bring wanted experts.

        Of the others those count that are done, and the rest is not read.
        """
        found, kept = set(wanted.tolist()), []
        for transfer in [*self._coming]:
            if not transfer.reading.is_sound:
                self.give_up(transfer)
            elif not found.isdisjoint(transfer.experts.tolist()):
                kept.append(transfer)
            elif transfer.reading.is_done:
                self.finish(transfer)
            else:
                self.give_up(transfer)
        return kept

    def _sweep(
        self,
        rows: mx.array,
        experts: np.ndarray,
        wanted: np.ndarray,
        counts: np.ndarray,
        is_sorted: bool,
    ) -> mx.array:
        """Computes many rows, or rows that want more experts than there are slots.

        First come the experts that are there, then the others, each read once. Those that most rows
        want stay.

        Args:
            rows, is_sorted: as for :meth:`products`. experts: its ``indices``.
            wanted, counts: the distinct ones that are routed to, and how often.
        """
        self._clock += 1
        self._guess = None
        for transfer in self._receive(wanted):
            self.finish(transfer)
        pairs, k = experts.ravel(), experts.shape[1]
        there = self.table[wanted] >= 0
        self.hits += int(there.sum())
        self.misses += int((~there).sum())
        order: list[np.ndarray] = []
        done: list[mx.array] = []
        left = np.ones(len(pairs), bool)
        # As the whole stack would be multiplied.
        stack = len(self.table) - 1 + len(self.gate_up.weight) - self.size
        is_quantized = isinstance(self.gate_up, Experts) and self.gate_up.scales is not None
        as_many = is_sorted and is_quantized and len(pairs) >= least_many(stack)
        as_sorted = as_many if is_quantized else is_sorted

        def compute(slots: Slots) -> None:
            numbers = slots.table[pairs]
            which = np.nonzero(left & (numbers >= 0))[0]
            if not len(which):
                return
            which = which[np.argsort(numbers[which], kind="stable")]
            least = least_many(len(slots.gate_up.weight))
            more = max(least - len(which), 0) if as_many else 0
            padded = np.pad(which, (0, more), "edge")
            taken = rows[mx.array((padded // k).astype(np.uint32))]
            chosen = mx.array(numbers[padded].astype(np.uint32))[:, None]
            y = products(taken, slots.gate_up, slots.down, chosen, as_sorted)
            mx.async_eval(y)
            slots.read_by(y)
            left[which] = False
            done.append(y.reshape(len(padded), -1)[: len(which)])
            order.append(which)

        compute(self)
        # The most wanted stay: a slot's last time and, within a sweep, how often.
        times = self._clock + counts / (counts.max() + 1)
        self._last[self.table[wanted[there]]] = times[there]
        new, new_times = wanted[~there], times[~there]
        free, staying = self._exchange(new_times)
        passing = new[~staying]
        groups: list[tuple[Slots, np.ndarray, np.ndarray]] = []
        step = self._passing[0].size
        for i, first in enumerate(range(0, len(passing), step)):
            group = passing[first : first + step]
            groups.append((self._passing[i % 2], group, np.arange(len(group))))
        if staying.any():
            groups.append((self, new[staying], free))
            self._last[free] = new_times[staying]
        self._read_and_compute(groups, compute)
        back = np.empty(len(pairs), np.uint32)
        back[np.concatenate(order)] = np.arange(len(pairs), dtype=np.uint32)
        y = mx.concatenate(done)[mx.array(back)]
        return y.reshape(*experts.shape, 1, y.shape[-1])

    def _exchange(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chooses the slots that experts wanted at these times take from others.

        Returns:
            The slots, and which of the experts take them.
        """
        both = np.concatenate([self._last, times])
        top = np.argsort(-both, kind="stable")[: self.size]
        stays = np.zeros(len(both), bool)
        stays[top] = True
        return np.nonzero(~stays[: self.size])[0], stays[self.size :]

    def _read_and_compute(self, groups, compute) -> None:
        """Reads a group while the one before is computed."""
        for slots in self._passing:
            slots.vacate()  # they may have another layer's

        def start(slots: Slots, experts: np.ndarray, numbers: np.ndarray) -> Transfer:
            return slots.start(self.stored, experts, numbers)

        transfers = [start(*group) for group in groups[:1]]
        for i, (slots, *_) in enumerate(groups):
            transfers += [start(*group) for group in groups[i + 1 : i + 2]]
            slots.finish(transfers[i])
            compute(slots)
        for slots in (self, *self._passing):
            slots.settle()
