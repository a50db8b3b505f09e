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
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...compute.cpu_matmul import TransposedLinear, memory, transpose_codes
from ...storage.reading import Piece, Reader, Reading
from ...storage.safetensors import DTYPES, Tensor, converted
from ..packed.layers import stored as weights_of
from ..parallel import parameters, recast

NAMES = ("gate_proj", "up_proj"), ("down_proj",)
PASSING = 1 / 16  # of a layer's experts are read at a time that only pass by


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


@dataclass(eq=False)
class Transfer:
    """Experts that are being read into slots."""

    stored: StoredExperts
    experts: np.ndarray
    slots: np.ndarray
    reading: Reading


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
        self._coming: list[Transfer] = []

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
        """Forgets all experts but the shared one, and reads no more."""
        for transfer in [*self._coming]:
            self.give_up(transfer)
        self.table[:-1] = -1
        self.owner[:] = -1

    def start(self, stored: StoredExperts, experts: np.ndarray, slots: np.ndarray) -> Transfer:
        """Starts to read experts into slots, whose own experts are gone from now on."""
        self.settle()
        before = self.owner[slots]
        self.table[before[before >= 0]] = -1
        self.owner[slots] = -1
        pieces: list[Piece] = []
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            pieces += stored.pieces(expert, {name: of[slot] for name, of in self._views.items()})
        transfer = Transfer(stored, experts, slots, stored.reader.reading(pieces))
        self._coming.append(transfer)
        transfer.reading.start()
        return transfer

    def finish(self, transfer: Transfer) -> None:
        """Waits for what :meth:`start` started to read.

        Raises:
            OSError: something could not be read; then none of it is there.
        """
        transfer.reading.wait()
        self._coming.remove(transfer)
        self.owner[transfer.slots], self.table[transfer.experts] = transfer.experts, transfer.slots

    def give_up(self, transfer: Transfer) -> None:
        """Reads no more of what :meth:`start` started to read; none of it is there.

        Raises:
            OSError: it still writes, and does not end.
        """
        transfer.reading.give_up()
        self._coming.remove(transfer)


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
