"""All of a model that is about experts on disk: made at loading, counted while it runs.

The MTP head has its own experts in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from ...storage.reading import Reader
from ...storage.safetensors import Tensor
from ..capacity import GB
from ..packed.tracing import structure_of
from ..parallel import parameters, recast
from ..qwen3_next import Model, SparseMoE, Trunk
from .layer_slots import Following, LayerSlots
from .layers import StreamedDecoderLayer, StreamedSparseMoE
from .read_ahead import ReadAhead
from .slots import Slots, StoredExperts


class Reads(NamedTuple):
    """How wanted experts were found.

    Attributes:
        hits, misses: how many were in memory, and were not.
        foreseen: how many of those that were not were on their way already.
        bytes: that were read. waited: seconds that somebody waited for them.
    """

    hits: int = 0
    misses: int = 0
    foreseen: int = 0
    bytes: int = 0
    waited: float = 0.0

    def since(self, before: Reads) -> Reads:
        """Returns what has come since an earlier count."""
        return Reads._make(now - then for now, then in zip(self, before, strict=True))

    @property
    def wanted(self) -> int:
        """The number of wanted experts."""
        return self.hits + self.misses

    @property
    def foreseen_rate(self) -> float:
        """The share of wanted experts that were on their way; 0 if none was wanted."""
        return self.foreseen / max(self.wanted, 1)

    @property
    def hit_rate(self) -> float:
        """The share of wanted experts that were in memory; 0 if none was wanted."""
        return self.hits / max(self.wanted, 1)

    @property
    def rate(self) -> float:
        """Bytes read in a second of waiting."""
        return self.bytes / max(self.waited, 1e-9)

    def __str__(self) -> str:
        coming = f", {self.foreseen_rate:.1%} on their way" if self.foreseen else ""
        return (
            f"{self.hit_rate:.1%} of {self.wanted} wanted were in memory{coming}; "
            f"{self.bytes / GB:.3f} GB read, waited {self.waited:.3f} s for "
            f"({self.rate / GB:.2f} GB/s)"
        )


class StreamedExperts:
    """All of a model that is about experts on disk.

    Attributes:
        reader: reads them. ahead: says whether they are read before they are wanted.
        slots: of each sparse layer, in their order.
        plan: what was planned when the model was loaded.
    """

    def __init__(self, reader: Reader):
        self.reader, self.ahead = reader, ReadAhead()
        self.slots: list[LayerSlots] = []
        self.plan: Any = None
        self._told = Reads()

    @contextmanager
    def rehearsal(self, model: Model) -> Iterator[Model]:
        """While active, layers wait for nothing and compute with whichever experts there are.

        Yields:
            The model without the layers that are of the same kind as others.
        """
        kinds = {structure_of(layer).kind: layer for layer in reversed(model.layers)}
        short = recast(model, type(model))
        short.model = recast(model.model, type(model.model))
        short.model.layers = [*reversed(kinds.values())]
        all_slots = [of.mlp.slots for of in kinds.values() if isinstance(of, StreamedDecoderLayer)]
        for slots in all_slots:
            slots.fill()
        try:
            for slots in all_slots:
                slots.is_rehearsal = True
            yield short
        finally:
            for slots in all_slots:
                slots.is_rehearsal = False

    def news(self) -> Reads:
        """Returns what has happened since the last call."""
        before, self._told = self._told, self.counts()
        return self._told.since(before)

    def settle(self) -> None:
        """Waits for all that reads slots; to be called in a thread before it ends."""
        for slots in self.slots:
            slots.settle()

    def counts(self) -> Reads:
        """Returns what has happened so far."""
        hits, misses, foreseen = (
            sum(getattr(of, name) for of in self.slots) for name in Reads._fields[:3]
        )
        return Reads(hits, misses, foreseen, self.reader.bytes, self.reader.waited)


def hold(model: Model, size: int, dtype: Callable[[str, mx.array], mx.Dtype]) -> list[str]:
    """Leaves a model, in place, stacks of ``size`` experts, all zeros, which packing then takes.

    Args:
        model: not packed. dtype: gives the dtype in memory of a path's parameter.

    Returns:
        The paths of the mixtures.
    """
    paths = []
    for i, layer in enumerate(model.layers):
        if not isinstance(layer.mlp, SparseMoE):
            continue
        path = f"model.layers.{i}.mlp"
        experts = layer.mlp.switch_mlp
        paths.append(path)
        for name, module in experts.children().items():
            for part, array in parameters(module).items() if "weight" in module else ():
                kind = dtype(f"{path}.switch_mlp.{name}.{part}", array)
                module[part] = mx.zeros((size, *array.shape[1:]), kind)
    return paths


def stream(
    model: Model, size: int, paths: Collection[str], tensors: Mapping[str, Tensor]
) -> StreamedExperts:
    """Makes slots of a packed model's stacks, in place.

    Args:
        model: packed after :func:`hold`. size, paths: its argument and its result.
        tensors: the checkpoint's, by name.

    Raises:
        OSError: a file cannot be opened.
    """
    own = {path: _of(path, tensors) for path in paths}
    reader = Reader({tensor.file for of in own.values() for tensor in of.values()})
    experts = StreamedExperts(reader)
    passing: dict[tuple[object, ...], tuple[Slots, Slots]] = {}
    for i, layer in enumerate(model.layers):
        path = f"model.layers.{i}.mlp"
        if path not in paths:
            continue
        stacks = layer.mlp.gate_up_proj, layer.mlp.down_proj
        on_disk = StoredExperts(own[path], stacks, reader)
        slots = LayerSlots(
            *(*stacks, layer.mlp.num_experts, size, on_disk, passing),
            ahead=experts.ahead,
            is_first=not experts.slots,
        )
        experts.slots.append(slots)
        mixture = recast(layer.mlp, StreamedSparseMoE, slots=slots)
        del mixture["gate_up_proj"], mixture["down_proj"]
        model.layers[i] = recast(layer, StreamedDecoderLayer)
        model.layers[i].mlp = mixture
        if len(experts.slots) > 1:
            experts.slots[-2].following = Following(model.layers[i].likely, slots)
    model.model = recast(model.model, Trunk)  # its layers run one by one, each with a wait in it
    vars(model.model).pop("stretches", None)
    model.streamed = experts
    return experts


def _of(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a mixture's experts, by their names in ``switch_mlp``."""
    prefix = f"{path}.switch_mlp."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
