"""Steps of few tokens in a packed model, of which all but the attention itself is traced.

The number of keys and values grows from step to step, so they are read and written outside of the
traces. Between two attentions lies a :class:`Stretch`: the rest of an attention layer, the linear
layers that follow, and the next attention layer as far as its queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

from ...compute.gated_delta import LayerState
from ..cache import Cache, GatedDeltaCache
from ..mtp_head import MTPHead
from ..parallel import PipelineTrunk
from ..qwen3_next import Trunk, masks
from .layers import AFTER_ATTENTION, BEFORE_ATTENTION, PackedDecoderLayer, PackedRMSNorm
from .tracing import is_step, traced


class Stretch(nn.Module):
    """The layers, or their parts, between two updates of keys and values; traced as a whole.

    Args:
        first: the attention layer whose part after attention begins the stretch, or None.
        linear: the linear layers that follow.
        last: the attention layer whose part before attention ends the stretch, or None.
    """

    def __init__(
        self,
        first: PackedDecoderLayer | None,
        linear: list[PackedDecoderLayer],
        last: PackedDecoderLayer | None,
    ):
        super().__init__()
        self.linear = linear
        for name, layer in (("first", first), ("last", last)):
            if layer is not None:
                self[name] = layer

    @traced(
        *(f"first.{path}" for path in BEFORE_ATTENTION),
        *(f"last.{path}" for path in AFTER_ATTENTION),
    )
    def run(
        self,
        numbers: tuple[Any, Any],
        x: mx.array,
        attended: Sequence[mx.array],
        before: Sequence[Sequence[mx.array]],
        mask: mx.array | None,
        recording: bool,
    ) -> tuple[list[mx.array], list[Sequence[mx.array]], Sequence[mx.array]]:
        """Runs the stretch.

        Args:
            numbers: the position of the first token, one or ``[B]``, and ``keep`` of the states.
            x: ``[B, L, H]``, the input of its first layer.
            attended: the first layer's row of projections and its attention's output.
            before: the arrays of each linear layer's :class:`LayerState`.
            mask, recording: see :meth:`GatedDeltaNet.mix`.

        Returns:
            The outputs of the layers that end here, the arrays of each linear layer's state after
            the tokens, and :meth:`GatedAttention.heads` of the last layer.
        """
        outputs: list[mx.array] = []
        after: list[Sequence[mx.array]] = []
        offset, keep = numbers
        if "first" in self:
            x = self.first.after_attention(x, *attended)
            outputs.append(x)
        for layer, arrays in zip(self.linear, before, strict=True):
            x, advanced = layer.advance(x, LayerState.of(arrays, keep), mask, recording)
            outputs.append(x)
            after.append(advanced.arrays)
        return outputs, after, self.last.before_attention(x, offset) if "last" in self else ()


def stretches(layers: Sequence[PackedDecoderLayer]) -> tuple[Stretch, ...]:
    """Returns the stretches of a trunk's packed layers, in order."""
    found: list[Stretch] = []
    first: PackedDecoderLayer | None = None
    linear: list[PackedDecoderLayer] = []
    for layer in layers:
        if layer.is_linear:
            linear.append(layer)
        else:
            found.append(Stretch(first, linear, layer))
            first, linear = layer, []
    return *found, Stretch(first, linear, None)


class TracedRMSNorm(PackedRMSNorm):
    """The norm of a trunk's hidden states after its last layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.run((x.shape, x.dtype), (), x) if is_step(x) else super().__call__(x)

    @traced()
    def run(self, _: tuple[()], x: mx.array) -> mx.array:
        return super().__call__(x)


class PackedTrunk(Trunk):
    """A trunk whose steps run stretch by stretch."""

    stretches: tuple[Stretch, ...]

    def run_layers(
        self,
        x: mx.array,
        cache: Cache | None = None,
        between: Callable[[int, mx.array], None] | None = None,
    ) -> mx.array:
        if cache is None or not is_step(x):
            return super().run_layers(x, cache, between)
        linear: list[Any] = []
        full: list[Any] = []
        for entry in cache:
            (linear if isinstance(entry, GatedDeltaCache) else full).append(entry)
        states = [s for c in linear if c.lengths is None and (s := c.arrays()) is not None]
        if len(states) < len(linear):
            return super().run_layers(x, cache, between)

        linear_mask, attention_mask = masks(x, next(iter(linear), None), next(iter(full), None))
        recording = bool(linear) and linear[0].recording
        replays, keep = (len(states[0]) > 2, linear[0].keep) if states else (False, 0)
        facts = x.shape, str(x.dtype), recording, replays, linear_mask is None
        tokens, begin, finished = x.shape[1], 0, 0
        attended: Sequence[mx.array] = ()
        # Parts by subscript: as attributes they take 0.6 µs each.
        for stretch, entry in zip(self.stretches, [*full, None], strict=True):
            end = begin + len(stretch["linear"])
            numbers = 0 if entry is None else entry.offset, keep
            outputs, after, heads = stretch.run(
                facts, numbers, x, attended, states[begin:end], linear_mask, recording
            )
            for c, arrays in zip(linear[begin:end], after, strict=True):
                c.store(arrays, tokens)
            begin = end
            if entry is not None:
                row, q, k, v = heads
                o = stretch["last"]["self_attn"].attend(q, k, v, attention_mask, entry)
                attended = row, o
            for x in outputs:
                finished += 1
                if between is not None and finished < len(self.layers):
                    between(finished - 1, x)
        return x


class PackedPipelineTrunk(PipelineTrunk, PackedTrunk):
    """A :class:`PackedTrunk` with some of the layers."""


class PackedMTPHead(MTPHead):
    """An MTP head whose steps are traced but for the attention itself."""

    def __call__(
        self, hidden: mx.array, next_tokens: mx.array, cache: Cache | None = None
    ) -> mx.array:
        if cache is None or not is_step(hidden):
            return super().__call__(hidden, next_tokens, cache)
        (layer,), (entry,) = self.layers, cache
        mask, facts = create_attention_mask(hidden, entry), (hidden.shape, hidden.dtype)
        embedding = self.embed(next_tokens)
        x, row, q, k, v = self.before_attention(facts, (entry.offset,), embedding, hidden)
        o = layer.self_attn.attend(q, k, v, mask, entry)
        return self.after_attention(facts, (), x, row, o)

    @traced("norm", *(f"layers.0.{path}" for path in AFTER_ATTENTION))
    def before_attention(
        self, numbers: tuple[Any], embedding: mx.array, hidden: mx.array
    ) -> tuple[mx.array, ...]:
        """Returns the decoder layer's input, and its :meth:`GatedAttention.heads`.

        Args:
            numbers: the position of the first token.
        """
        x = self.joined(embedding, hidden)
        return x, *self.layers[0].before_attention(x, *numbers)

    @traced(
        *("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
        *(f"layers.0.{path}" for path in BEFORE_ATTENTION),
    )
    def after_attention(self, _: tuple[()], x: mx.array, row: mx.array, o: mx.array) -> mx.array:
        """Returns m, the head's result."""
        return self.norm(self.layers[0].after_attention(x, row, o))
