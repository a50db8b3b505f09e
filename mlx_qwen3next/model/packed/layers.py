"""The layers of a packed model: weights of one input stacked, several operations a launch.

:mod:`mlx_qwen3next.model.packed.packing` puts them in the place of the checkpoint's modules, whose
equations they keep, and says which weights are stacked.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...compute import operations
from ...compute.cpu_matmul import TransposedLinear
from ...compute.experts import SharedExpert, Stored, sparse_experts
from ...compute.gated_delta import DeltaWeights, LayerState
from ...metal_kernels import Experts
from ..gated_delta_net import GatedDeltaNet
from ..parallel import ParallelDecoderLayer
from ..qwen3_next import MLP, DecoderLayer, GatedAttention, RMSNorm, SparseMoE


class PackedRMSNorm(RMSNorm):
    """RMSNorm in one launch."""

    def __call__(self, x: mx.array) -> mx.array:
        return operations.rms_norm(x, self.weight, self.eps)


class PackedGatedDeltaNet(GatedDeltaNet):
    """Three launches: projection, everything between, projection."""

    mix = operations.gated_delta_step(GatedDeltaNet.mix)  # type: ignore[assignment,has-type]

    def project(self, x: mx.array) -> mx.array:
        return self.in_proj(x) if "in_proj" in self else super().project(x)

    @property
    def weights(self) -> DeltaWeights:
        return DeltaWeights(self.conv1d.weight, self.vectors)


class PackedGatedAttention(GatedAttention):
    """Projection, heads, two cache updates, attention, gate, projection."""

    split_heads = operations.attention_heads  # type: ignore[assignment,has-type]
    gate = operations.attention_gate  # type: ignore[assignment,has-type]

    def project(self, x: mx.array) -> mx.array:
        return self.in_proj(x) if "in_proj" in self else super().project(x)


class PackedSharedExpert(MLP):
    """A shared expert whose quantization is another than the others', for their launches."""

    @property
    def stored(self) -> SharedExpert:
        """The weights of gate and up, and of down."""
        return stored(self.gate_up_proj), stored(self.down_proj)


class PackedSparseMoE(SparseMoE):
    """Router, gate and up, down: three launches after the logits', the residual's included."""

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:  # type: ignore[override]
        """Returns ``residual + mixture(x)``; ``x`` and ``residual`` are ``[B, L, H]``."""
        logits, residual = self.before_experts(x, residual)
        weights = stored(self.gate_up_proj), stored(self.down_proj)
        return self.add_experts(x, logits, *weights, residual, self.shared)

    def before_experts(self, x: mx.array, residual: mx.array) -> tuple[mx.array, mx.array]:
        """Returns the router's logits; and the residual, with the shared expert's output if that is
        none of :meth:`add_experts`.
        """
        logits = self.gate(x)
        if "shared_expert_gate" in self:
            residual = residual + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return logits, residual

    @property
    def shared(self) -> SharedExpert | None:
        """The shared expert, if the experts' launches take it beside their stack."""
        apart = "shared_expert" in self and "shared_expert_gate" not in self
        return self.shared_expert.stored if apart else None

    def add_experts(
        self,
        x: mx.array,
        logits: mx.array,
        gate_up: Stored,
        down: Stored,
        residual: mx.array,
        shared: SharedExpert | None,
    ) -> mx.array:
        """Returns ``residual`` plus the experts' mixture; see :func:`sparse_experts`."""
        for_kernels = all(isinstance(w, Experts) for w in (gate_up, down, *(shared or ())))
        form = operations.sparse_experts if for_kernels else sparse_experts
        return form(x, logits, gate_up, down, residual, shared=shared, **self.router_options)

    @property
    def router_options(self) -> dict[str, Any]:
        """The options of :func:`sparse_experts` about the router."""
        return {
            "experts": self.num_experts,
            "top_k": self.top_k,
            "normalise": self.norm_topk_prob,
        }


class PackedExpertParallelMoE(PackedSparseMoE):
    """Packed :class:`ExpertParallelMoE`; no kernel takes a part of the experts."""

    own: range  # the experts that are here

    def add_experts(self, *arguments: Any) -> mx.array:
        *weights, shared = arguments
        return sparse_experts(*weights, shared=shared, own=self.own, **self.router_options)


# The parts of an attention layer before and after its keys and values.
BEFORE_ATTENTION = (
    "input_layernorm",
    *(f"self_attn.{name}" for name in ("in_proj", "q_proj", "k_proj", "v_proj")),
    *("self_attn.q_norm", "self_attn.k_norm"),
)
AFTER_ATTENTION = "self_attn.o_proj", "post_attention_layernorm", "mlp"


class PackedDecoderLayer(DecoderLayer):
    """A decoder layer whose residual additions are part of other launches."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        return self.add_mlp(x, self.mixer(self.input_layernorm(x), mask, cache))

    def advance(
        self, x: mx.array, before: LayerState, mask: mx.array | None, recording: bool
    ) -> tuple[mx.array, LayerState]:
        """Returns a linear layer's output, and its state after the tokens.

        Arguments as :meth:`GatedDeltaNet.advance`.
        """
        x_normed = self.input_layernorm(x)
        y, after = self.linear_attn.advance(x_normed, before, mask=mask, recording=recording)
        return self.add_mlp(x, y), after

    def before_attention(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, ...]:
        """Returns :meth:`GatedAttention.heads` of an attention layer's normalised input."""
        return self.self_attn.heads(self.input_layernorm(x), offset)

    def after_attention(self, x: mx.array, row: mx.array, o: mx.array) -> mx.array:
        """Returns an attention layer's output."""
        return self.add_mlp(x, self.self_attn.output(o, row))

    def add_mlp(self, x: mx.array, y: mx.array) -> mx.array:
        """Adds the mixer's output ``y`` to ``x``, then the MLP's output of both."""
        norm = self.post_attention_layernorm
        x, y = operations.add_rms_norm(x, y, norm.weight, norm.eps)
        if isinstance(self.mlp, PackedSparseMoE):
            return self.mlp(y, x)
        return x + self.mlp(y)


class PackedParallelDecoderLayer(ParallelDecoderLayer):
    """A :class:`PackedDecoderLayer` on several ranks: one sum for the mixer, one for the MLP."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        norm = self.post_attention_layernorm
        y = self.group.all_sum(self.mixer(self.input_layernorm(x), mask, cache))
        x, y = operations.add_rms_norm(x, y, norm.weight, norm.eps)
        if isinstance(self.mlp, PackedSparseMoE):  # one of the summands has the residual
            return self.group.all_sum(self.mlp(y, x if self.group.rank == 0 else mx.zeros_like(x)))
        return x + self.group.all_sum(self.mlp(y))


def stored(module: nn.Module) -> Stored:
    """Returns the weights of a linear layer, or of a stack of them."""
    if isinstance(module, TransposedLinear):
        return module.weights
    if "scales" not in module:
        return Experts(module.weight)
    return Experts(module.weight, module.scales, module.biases, module.group_size, module.bits)
