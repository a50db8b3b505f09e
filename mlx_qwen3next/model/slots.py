"""Experts of a layer in memory, each in a slot, and the reading of others in their place.

Slots are rows of the packed stacks, ``gate_up`` ``[S + 1, 2 I, H]`` and ``down`` ``[S + 1, H, I]``,
the shared expert in the last one where it is an expert. So all that runs on stacks of experts runs
on slots: only the numbers differ. The host writes to slots and the device reads them, with nothing
between the two that orders it but the rules here:

- A slot is overwritten after all results that read any slot of its layer have been evaluated.
- It is in the table from the moment that all of its expert is there, and not while it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..compute.cpu_matmul import TransposedLinear, memory, transpose_codes
from ..compute.experts import Stored, products
from ..metal_kernels import Experts
from ..storage.reading import Piece, Reader, Reading
from ..storage.safetensors import DTYPES, Tensor, converted
from .packed import stored as weights_of
from .parallel import parameters, recast

NAMES = ("gate_proj", "up_proj"), ("down_proj",)
PASSING = 1 / 16  # of a layer's experts are read at a time that only pass by


def least_many(stack: int) -> int:
    """Returns how many rows sorted by expert MLX's Metal backend multiplies by matrices, with sums
    in another order than those of fewer rows, where the stack has so many quantized experts.
    """
    return max(4 * stack, 16)  # GatherQMM::eval_gpu of MLX 0.32


def passing_at_a_time(experts: int) -> int:
    """Returns how many of a layer's experts there are in a set of those that only pass by."""
    return max(int(experts * PASSING), 1)


class _Form(NamedTuple):
    """The form of a part of a layer's weights in memory."""

    is_transposed: bool
    dtype: mx.Dtype
    bits: int


class StoredExperts:
    """The experts of a layer on disk.

    Args:
        tensors: by their names in ``switch_mlp``, such as ``gate_proj.weight``; each ``[E, …]``.
        held: the modules of gate and up, and of down, as they are in memory.
        reader: has the files open.

    Attributes:
        as_is: the tensors whose bytes on disk are those of a slot.
    """

    def __init__(self, tensors: Mapping[str, Tensor], held: Sequence[nn.Module], reader: Reader):
        self.tensors, self.reader = tensors, reader
        self.count = tensors["gate_proj.weight"].shape[0]
        modules = {name: module for module, of in zip(held, NAMES, strict=True) for name in of}
        self._forms = {
            name: _Form(
                isinstance(modules[projection], TransposedLinear),
                modules[projection][part].dtype,
                getattr(modules[projection], "bits", 16),
            )
            for name in tensors
            for projection, part in [name.split(".")]
        }
        self.as_is = frozenset(
            name
            for name, form in self._forms.items()
            if not form.is_transposed and DTYPES[tensors[name].dtype] == form.dtype
        )

    def pieces(self, expert: int, slot: Mapping[str, np.ndarray] | None = None) -> list[Piece]:
        """Returns the pieces of an expert.

        Args:
            slot: the memory that takes them, by the tensors' names; None only reads them.
        """
        pieces = []
        for name, tensor in self.tensors.items():
            nbytes = tensor.nbytes // self.count
            start = tensor.start + expert * nbytes
            if slot is not None and name in self.as_is:
                pieces.append(Piece(tensor.file, start, slot[name]))
                continue
            raw = np.empty(nbytes, np.uint8)
            then = None if slot is None else partial(self._put, name, raw, slot[name])
            pieces.append(Piece(tensor.file, start, raw, then))
        return pieces

    def _put(self, name: str, raw: np.ndarray, into: np.ndarray) -> None:
        """Puts a tensor of an expert, whose bytes are there, into a slot's memory."""
        form, tensor = self._forms[name], self.tensors[name]
        shape = tensor.shape[1:]
        if form.dtype == mx.uint32:
            transpose_codes(raw.view(np.uint32).reshape(shape), form.bits, into)
        else:
            floats = converted(raw, tensor.dtype, form.dtype).reshape(shape)
            into[...] = floats.T if form.is_transposed else floats


class Slots:
    """Slots for experts of one layer at a time, in MLX's memory.

    Args:
        gate_up, down: the stacks, whose last row is the shared expert if there is one more than
            ``size``.
        experts: E, of a layer.
        size: the number of slots.

    Attributes:
        gate_up, down: the stacks as :func:`mlx_qwen3next.compute.experts.products` takes them.
        table: the slot of each expert, -1 for those that are not there, ``[E + 1]``; the last is
            the shared expert's, which stays.
    """

    def __init__(self, gate_up: nn.Module, down: nn.Module, experts: int, size: int):
        self._modules = gate_up, down
        self.size = size
        self.table = np.full(experts + 1, -1, np.int64)
        self.owner = np.full(size, -1, np.int64)  # the expert of each slot
        self.gate_up, self.down = weights_of(gate_up), weights_of(down)
        mx.eval(gate_up.parameters(), down.parameters())
        self._views = _projections([gate_up, down])
        self._readers: list[mx.array] = []  # results that read slots, perhaps still to be computed
        self._coming: tuple[StoredExperts, np.ndarray, np.ndarray, Reading] | None = None

    @classmethod
    def like(cls, other: Slots, size: int) -> Slots:
        """Makes slots as others are, without a shared expert."""
        gate_up, down = (recast(module, type(module)) for module in other._modules)
        for module in (gate_up, down):
            for name, array in parameters(module).items():
                module[name] = mx.zeros((size, *array.shape[1:]), array.dtype)
        return cls(gate_up, down, len(other.table) - 1, size)

    @property
    def form(self) -> tuple[object, ...]:
        """The part that is common to slots whose experts have the same form."""
        arrays = [
            (k, a.shape[1:], a.dtype) for m in self._modules for k, a in parameters(m).items()
        ]
        return *map(type, self._modules), *arrays

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        arrays = [a for module in self._modules for a in parameters(module).values()]
        return sum(a.nbytes // a.shape[0] for a in arrays)

    def read_by(self, result: mx.array) -> None:
        """Says that ``result`` reads slots, which stay as they are until it is evaluated."""
        self._readers.append(result)

    def settle(self, *wanted: mx.array) -> None:
        """Waits for the device to have read slots, and to have computed what is wanted."""
        mx.eval(*wanted, *self._readers)
        self._readers.clear()

    def vacate(self) -> None:
        """Forgets all experts but the shared one."""
        self.table[:-1] = -1
        self.owner[:] = -1

    def start(self, stored: StoredExperts, experts: np.ndarray, slots: np.ndarray) -> None:
        """Starts to read experts into slots, whose own experts are gone from now on.

        Raises:
            OSError: an earlier read still writes, and does not end.
        """
        if self._coming is not None:  # nobody waited for it to the end
            self._coming[-1].end()
            self._coming = None
        self.settle()
        before = self.owner[slots]
        self.table[before[before >= 0]] = -1
        self.owner[slots] = -1
        pieces: list[Piece] = []
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            pieces += stored.pieces(expert, {name: of[slot] for name, of in self._views.items()})
        reading = stored.reader.reading(pieces)
        self._coming = stored, experts, slots, reading
        reading.start()

    def finish(self) -> None:
        """Waits for what :meth:`start` started to read.

        Raises:
            OSError: something could not be read; then none of it is there.
        """
        assert self._coming is not None
        _, experts, slots, reading = self._coming
        reading.wait()
        self._coming = None
        self.owner[slots], self.table[experts] = experts, slots


class LayerSlots(Slots):
    """The slots of a layer, as :class:`mlx_qwen3next.compute.experts.Slots` describes them.

    The experts that were wanted last stay.

    Args:
        gate_up, down, experts, size: see :class:`Slots`.
        stored: the layer's experts on disk.
        passing: two more sets of slots of the same form, which layers share, for a prompt's experts
            that only pass by.

    Attributes:
        hits, misses: how many wanted experts were there, and were not.
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
    ):
        super().__init__(gate_up, down, experts, size)
        self.table[-1] = size
        self.stored = stored
        if self.form not in passing:
            n = passing_at_a_time(experts)
            passing[self.form] = Slots.like(self, n), Slots.like(self, n)
        self._passing = passing[self.form]
        self._last = np.zeros(size)  # when the expert of each slot was wanted last
        self._clock = self.hits = self.misses = 0
        self.is_rehearsal = False

    def __repr__(self) -> str:  # they are no part of the traces, which look at attributes
        return "LayerSlots"

    def fill(self) -> None:
        """Reads the first experts, as many as there are slots."""
        self._hold(np.arange(self.size))

    def read_by(self, result: mx.array) -> None:
        if not self.is_rehearsal:
            super().read_by(result)

    def _some(self, experts: mx.array) -> mx.array:
        """Returns a slot for each expert, whichever; the shared expert's own."""
        return mx.where(experts < len(self.table) - 1, experts % self.size, self.size)

    def place(self, routing: mx.array) -> mx.array | None:
        if self.is_rehearsal:
            chosen, others = mx.split(routing, [routing.size // 4])
            return mx.concatenate([self._some(chosen).astype(routing.dtype), others])
        self.settle(routing)
        words = np.array(routing)
        pairs = len(words) // 4
        distinct = np.count_nonzero(words[3 * pairs : -1] < pairs)  # of where their pairs begin
        experts = words[:distinct]
        routed = experts[experts < len(self.table) - 1]
        if len(routed) > self.size:
            return None
        self._hold(routed)
        words[:distinct] = self.table[experts]
        return mx.array(words)

    def products(
        self, rows: mx.array, gate_up: Stored, down: Stored, indices: mx.array, is_sorted: bool
    ) -> mx.array:
        if self.is_rehearsal:
            return products(rows, gate_up, down, self._some(indices), is_sorted)
        self.settle(indices)
        experts = np.array(indices)
        wanted, counts = np.unique(experts[experts < len(self.table) - 1], return_counts=True)
        if is_sorted or len(wanted) > self.size:
            return self._sweep(rows, experts, wanted, counts, is_sorted)
        self._hold(wanted)
        y = products(rows, gate_up, down, mx.array(self.table[experts].astype(np.uint32)), False)
        self.read_by(y)
        return y

    def _hold(self, wanted: np.ndarray) -> None:
        """Reads those of the wanted experts that are not there."""
        self._clock += 1
        slots = self.table[wanted]
        new, here = wanted[slots < 0], slots[slots >= 0]
        self._last[here] = self._clock
        self.hits += len(here)
        self.misses += len(new)
        if len(new):
            slots = np.argpartition(self._last, len(new) - 1)[: len(new)]
            self.start(self.stored, new, slots)
            self.finish()
            self._last[slots] = self._clock

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

        def start(i: int) -> None:
            slots, experts, numbers = groups[i]
            slots.start(self.stored, experts, numbers)

        if groups:
            start(0)
        for i, (slots, *_) in enumerate(groups):
            if i + 1 < len(groups):
                start(i + 1)
            slots.finish()
            compute(slots)
        for slots in (self, *self._passing):
            slots.settle()


def _projections(modules: Sequence[nn.Module]) -> dict[str, np.ndarray]:
    """Returns the memory of stacks, by the names of the tensors whose experts it takes.

    Each is ``[S, outputs, …]``, or ``[S, inputs, outputs]`` where weights are transposed; gate and
    up have a half of the outputs each.
    """
    found: dict[str, np.ndarray] = {}
    for module, names in zip(modules, NAMES, strict=True):
        for part, array in parameters(module).items():
            view, axis = memory(array), 1
            if isinstance(module, TransposedLinear):
                view, axis = view.reshape(len(array), -1, array.shape[-1]), 2
                if array.dtype == mx.uint32:  # outputs of codes are padded
                    view = view[..., : module.scales.shape[-1] * module.bits // 32]
            for name, half in zip(names, np.split(view, len(names), axis), strict=True):
                found[f"{name}.{part}"] = half
    return found
