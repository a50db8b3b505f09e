"""A packed model whose experts are read from disk when they are wanted.

The router runs as always; then the host learns which experts it chose, has those read that are not
there, and goes on with their slots (:mod:`mlx_qwen3next.model.slots`). All else is as in
:mod:`mlx_qwen3next.model.packed`, and so are the results, bit for bit. The MTP head has its own
experts in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from ..compute import operations
from ..compute.experts import Forms, sparse_experts
from ..compute.gated_delta import LayerState
from ..metal_kernels import Experts
from ..storage.reading import Reader
from ..storage.safetensors import Tensor
from .cache import GatedDeltaCache
from .capacity import GB
from .packed import AFTER_ATTENTION, BEFORE_ATTENTION, PackedDecoderLayer, PackedSparseMoE
from .parallel import parameters, recast
from .qwen3_next import Model, SparseMoE, Trunk
from .slots import LayerSlots, Slots, StoredExperts
from .tracing import is_step, structure_of, traced


class StreamedSparseMoE(PackedSparseMoE):
    """A mixture whose experts are in slots."""

    slots: LayerSlots

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:  # type: ignore[override]
        return self.add(x, *self.before_experts(x, residual))

    def add(self, x: mx.array, logits: mx.array, residual: mx.array) -> mx.array:
        """Returns ``residual`` plus the experts' mixture; waits for the router."""
        slots, shared = self.slots, self.shared
        arrays = x, logits, slots.gate_up, slots.down, residual
        options = {"shared": shared, **self.router_options}
        if all(isinstance(w, Experts) for w in (slots.gate_up, slots.down, *(shared or ()))):
            return operations.sparse_experts_in_slots(*arrays, slots=slots, **options)
        return sparse_experts(*arrays, forms=Forms(products=slots.products), **options)


class StreamedDecoderLayer(PackedDecoderLayer):
    """A decoder layer whose steps are traced as far as the router."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        if cache is None or not is_step(x):
            return super().__call__(x, mask, cache)
        facts: tuple[Any, ...] = x.shape, x.dtype
        if not self.is_linear:
            row, q, k, v = self.attention_heads(facts, (cache.offset,), x)
            o = self.self_attn.attend(q, k, v, mask, cache)
            return self.mlp.add(*self.attention_step(facts, (), x, row, o))
        before = cache.arrays() if isinstance(cache, GatedDeltaCache) else None
        if before is None or cache.lengths is not None:
            return super().__call__(x, mask, cache)
        recording = cache.recording
        facts = *facts, recording, len(before) > 2, mask is None
        arguments, after = self.linear_step(facts, (cache.keep,), x, before, mask, recording)
        cache.store(after, x.shape[1])
        return self.mlp.add(*arguments)

    @traced()
    def linear_step(
        self, numbers: tuple[Any], x: mx.array, before: Any, mask: Any, recording: bool
    ) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Returns :meth:`to_router` of a linear layer, and its state's arrays after the tokens.

        Args:
            numbers: ``keep`` of the state. before: its arrays.
            x, mask, recording: see :meth:`GatedDeltaNet.advance`.
        """
        met = LayerState.of(before, *numbers)
        y, after = self.linear_attn.advance(
            self.input_layernorm(x), met, mask=mask, recording=recording
        )
        return self.to_router(x, y), after.arrays

    @traced(*AFTER_ATTENTION)
    def attention_heads(self, numbers: tuple[Any], x: mx.array) -> tuple[mx.array, ...]:
        """Returns :meth:`before_attention`; ``numbers`` is the position of the first token."""
        return self.before_attention(x, *numbers)

    @traced(*BEFORE_ATTENTION)
    def attention_step(
        self, _: tuple[()], x: mx.array, row: mx.array, o: mx.array
    ) -> tuple[mx.array, ...]:
        """Returns :meth:`to_router` of an attention layer."""
        return self.to_router(x, self.self_attn.output(o, row))

    def to_router(self, x: mx.array, y: mx.array) -> tuple[mx.array, ...]:
        """Returns the arguments of :meth:`StreamedSparseMoE.add` after the mixer's output."""
        norm = self.post_attention_layernorm
        x, y = operations.add_rms_norm(x, y, norm.weight, norm.eps)
        return y, *self.mlp.before_experts(y, x)


class Reads(NamedTuple):
    """How wanted experts were found.

    Attributes:
        hits, misses: how many were in memory, and were not.
        bytes: that were read. waited: seconds that somebody waited for them.
    """

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    waited: float = 0.0

    def since(self, before: Reads) -> Reads:
        """Returns what has come since an earlier count."""
        return Reads._make(now - then for now, then in zip(self, before, strict=True))

    @property
    def hit_rate(self) -> float:
        """The share of wanted experts that were in memory; 0 if none was wanted."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def rate(self) -> float:
        """Bytes read in a second of waiting."""
        return self.bytes / max(self.waited, 1e-9)

    def __str__(self) -> str:
        return (
            f"{self.hit_rate:.1%} of {self.hits + self.misses} wanted were in memory; "
            f"{self.bytes / GB:.3f} GB read, waited {self.waited:.3f} s for "
            f"({self.rate / GB:.2f} GB/s)"
        )


class StreamedExperts:
    """All of a model that is about experts on disk.

    Attributes:
        reader: reads them.
        slots: of each sparse layer, in their order.
        plan: what was planned when the model was loaded.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
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
        hits, misses = (sum(getattr(of, name) for of in self.slots) for name in ("hits", "misses"))
        return Reads(hits, misses, self.reader.bytes, self.reader.waited)


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
        slots = LayerSlots(*stacks, layer.mlp.num_experts, size, on_disk, passing)
        experts.slots.append(slots)
        mixture = recast(layer.mlp, StreamedSparseMoE, slots=slots)
        del mixture["gate_up_proj"], mixture["down_proj"]
        model.layers[i] = recast(layer, StreamedDecoderLayer)
        model.layers[i].mlp = mixture
    model.model = recast(model.model, Trunk)  # its layers run one by one, each with a wait in it
    vars(model.model).pop("stretches", None)
    model.streamed = experts
    return experts


def _of(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a mixture's experts, by their names in ``switch_mlp``."""
    prefix = f"{path}.switch_mlp."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
