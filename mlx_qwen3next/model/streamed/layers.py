"""The layers of a packed model whose experts are read from disk when they are wanted.

The router runs as always; then the host learns which experts it chose, has those read that are not
there, and goes on with their slots (:mod:`.slots`). All else is as in
:mod:`mlx_qwen3next.model.packed.layers`, and so are the results, bit for bit.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...compute import operations
from ...compute.experts import Forms, sparse_experts
from ...compute.gated_delta import LayerState
from ...metal_kernels import Experts
from ..cache import GatedDeltaCache
from ..packed.layers import AFTER_ATTENTION, BEFORE_ATTENTION, PackedDecoderLayer, PackedSparseMoE
from ..packed.tracing import MOST_ROWS, is_step, traced
from .layer_slots import LayerSlots

# The parts of a layer that its router's guess does not read.
BEFORE_ROUTER = (
    *("input_layernorm", "linear_attn", "self_attn"),
    *("mlp.shared_expert", "mlp.shared_expert_gate"),
)


class StreamedSparseMoE(PackedSparseMoE):
    """A mixture whose experts are in slots."""

    slots: LayerSlots

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:  # type: ignore[override]
        return self.add(x, *self.before_experts(x, residual))

    def add(self, x: mx.array, logits: mx.array, residual: mx.array) -> mx.array:
        """Returns ``residual`` plus the experts' mixture; waits for the router."""
        slots, shared = self.slots, self.shared
        if x.shape[0] * x.shape[1] <= MOST_ROWS:
            slots.look_ahead(residual)
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

    def likely(self, residual: mx.array) -> mx.array:
        """Returns the experts that the router would choose if this layer's mixer added nothing.

        Args:
            residual: of the layer before, ``[B, L, H]``.

        Returns:
            ``[B, L, top_k]``, in any order.
        """
        if is_step(residual):
            return self.guess_step((residual.shape, residual.dtype), (), residual)
        return self.guess(residual)

    @traced(*BEFORE_ROUTER)
    def guess_step(self, _: tuple[()], residual: mx.array) -> mx.array:
        """Returns :meth:`guess`."""
        return self.guess(residual)

    def guess(self, residual: mx.array) -> mx.array:
        """Returns the top k of the router's logits of a residual."""
        mlp = self.mlp
        logits = mlp.gate(self.post_attention_layernorm(residual))[..., : mlp.num_experts]
        return mx.argpartition(-logits, mlp.top_k - 1)[..., : mlp.top_k]
