"""The model packed for inference: weights of one input stacked, several operations a launch.

Checkpoints, saving and training keep the checkpoint's modules
(:mod:`mlx_qwen3next.model.qwen3_next`, on several ranks :mod:`mlx_qwen3next.model.parallel`);
:func:`pack` puts inference-time layers in their place, one after the other. Rows of weights are
permuted and stacked, quantized or not, which is exact: quantization groups run along the inputs.

- Gated DeltaNet: qkvz and ba become ``in_proj``, whose output is ``[q | k | v | z | b | a]``.
- Attention: q, gate, k and v become ``in_proj``, ``[q | k | v | gate]``.
- Experts: gate and up become ``gate_up_proj``; the shared expert becomes number E, and its gate the
  router's last row.

Modules that cannot be stacked (other bits or group sizes, an adapter's layers) stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from ..compute import operations
from ..compute.cpu_matmul import TransposedLinear, TransposedWeights, transposed
from ..compute.experts import sparse_experts
from ..compute.gated_delta import LayerState, Tape
from ..metal_kernels import Experts
from .gated_delta_net import GatedDeltaNet
from .mtp_head import MTPHead
from .parallel import ExpertParallelMoE, ParallelDecoderLayer, recast
from .qwen3_next import MLP, DecoderLayer, GatedAttention, Model, RMSNorm, SparseMoE
from .tracing import traced


class PackedRMSNorm(RMSNorm):
    """RMSNorm in one launch."""

    @traced
    def __call__(self, x: mx.array) -> mx.array:
        return operations.rms_norm(x, self.weight, self.eps)


class PackedGatedDeltaNet(GatedDeltaNet):
    """Three launches: projection, everything between, projection."""

    mix = operations.gated_delta_step(GatedDeltaNet.mix)  # type: ignore[assignment,has-type]

    def project(self, x: mx.array) -> mx.array:
        return self.in_proj(x) if "in_proj" in self else super().project(x)


class PackedGatedAttention(GatedAttention):
    """Projection, heads, two cache updates, attention, gate, projection."""

    split_heads = operations.attention_heads  # type: ignore[assignment,has-type]
    gate = operations.attention_gate  # type: ignore[assignment,has-type]

    def project(self, x: mx.array) -> mx.array:
        return self.in_proj(x) if "in_proj" in self else super().project(x)


class PackedSparseMoE(SparseMoE):
    """Router, gate and up, down: three launches after the logits', the residual's included."""

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:  # type: ignore[override]
        """Returns ``residual + mixture(x)``; ``x`` and ``residual`` are ``[B, L, H]``."""
        shape = x.shape
        x, residual = x.reshape(-1, shape[-1]), residual.reshape(-1, shape[-1])
        logits = self.gate(x)
        if "shared_expert" in self:
            shared = mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
            residual = residual + shared
        weights = _experts(self.gate_up_proj), _experts(self.down_proj)
        return self.add_experts(x, logits, *weights, residual).reshape(shape)

    def add_experts(
        self,
        x: mx.array,
        logits: mx.array,
        gate_up: Experts | TransposedWeights,
        down: Experts | TransposedWeights,
        residual: mx.array,
    ) -> mx.array:
        """Returns ``residual`` plus the experts' mixture; see :func:`sparse_experts`."""
        for_kernels = isinstance(gate_up, Experts) and isinstance(down, Experts)
        form = operations.sparse_experts if for_kernels else sparse_experts
        return form(x, logits, gate_up, down, residual, **self.router_options)

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
        return sparse_experts(*arguments, own=self.own, **self.router_options)


class PackedDecoderLayer(DecoderLayer):
    """A decoder layer whose residual additions are part of other launches.

    Between the reads and writes of the cache, a step of few rows is traced.
    """

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        if not self.is_linear:
            offset = 0 if cache is None else cache.offset
            row, q, k, v = self.before_attention(x, number=offset)
            return self.after_attention(x, row, self.self_attn.attend(q, k, v, mask, cache))
        before = None if cache is None else cache.layer_state()
        if cache is None or before is None or mask is not None or cache.lengths is not None:
            return self.add_mlp(x, self.linear_attn(self.input_layernorm(x), mask, cache))
        rows, state, tape, keep = before
        arrays = rows, state, *(tape or ())
        y, rows, state, *tape = self.linear_step(x, *arrays, number=keep, flag=cache.recording)
        cache.store(LayerState(rows, state, Tape(*tape) if tape else None), x.shape[1])
        return y

    @traced
    def linear_step(
        self, x: mx.array, rows: mx.array, state: mx.array, *tape: mx.array, number: int, flag: bool
    ) -> tuple[mx.array, ...]:
        """Returns a linear layer's output and its state after the tokens: rows, state and tape.

        Args:
            rows, state, tape, number: a :class:`LayerState`, the last one its ``keep``.
            flag: whether the tokens are a round.
        """
        before = LayerState(rows, state, Tape(*tape) if tape else None, number)
        y, after = self.linear_attn.advance(self.input_layernorm(x), before, recording=flag)
        return self.add_mlp(x, y), after.rows, after.state, *(after.tape or ())

    @traced
    def before_attention(self, x: mx.array, *, number: int | mx.array) -> tuple[mx.array, ...]:
        """Returns :meth:`GatedAttention.heads` of normalised tokens, the first at ``number``."""
        return self.self_attn.heads(self.input_layernorm(x), number)

    @traced
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


def pack(model: Model) -> Model:
    """Packs a model for inference, in place, a layer at a time; returns it.

    A packed model is not for training or saving: its parameters have names of their own. Packing
    again changes nothing.
    """
    stacks = [model.model] if model.mtp is None else [model.model, model.mtp]
    for stack in stacks:
        for i, layer in enumerate(stack.layers):
            stack.layers[i] = _pack_layer(layer)
            mx.eval(stack.layers[i].parameters())
            mx.clear_cache()  # the parts' buffers
        for name, module in stack.children().items():
            if isinstance(module, RMSNorm):
                stack[name] = recast(module, PackedRMSNorm)
    model.packed = True
    return model


def transpose(model: Model) -> None:
    """Transposes the matrices of a packed model where a CPU multiplies them faster that way."""
    # Other layers, such as an adapter's, may look into their parts. No reference to a part is kept,
    # so that its memory is free once it is transposed.
    kinds = GatedDeltaNet, GatedAttention, SparseMoE, MLP, Model, MTPHead
    for module in [m for m in model.modules() if isinstance(m, kinds)]:
        for name in list(module.children()):
            part = module[name]
            if isinstance(part, nn.Module) and (linear := transposed(part)) is not None:
                mx.eval(linear.parameters())
                module[name] = linear
                mx.clear_cache()


def _pack_layer(layer: DecoderLayer) -> DecoderLayer:
    is_parallel = isinstance(layer, ParallelDecoderLayer)
    packed = recast(layer, PackedParallelDecoderLayer if is_parallel else PackedDecoderLayer)
    packed.input_layernorm = recast(layer.input_layernorm, PackedRMSNorm)
    if not layer.is_linear:
        packed.self_attn = _pack_attention(layer.self_attn)
    else:
        packed.linear_attn = _pack_delta_net(layer.linear_attn)
    if isinstance(layer.mlp, SparseMoE):
        packed.mlp = _pack_experts(layer.mlp)
    return packed


def _pack_delta_net(layer: GatedDeltaNet) -> GatedDeltaNet:
    return _stack_inputs(recast(layer, PackedGatedDeltaNet), "in_proj_qkvz", "in_proj_ba")


def _pack_attention(layer: GatedAttention) -> GatedAttention:
    return _stack_inputs(recast(layer, PackedGatedAttention), "q_proj", "k_proj", "v_proj")


def _pack_experts(layer: SparseMoE) -> SparseMoE:
    if isinstance(layer, PackedSparseMoE) or not isinstance(layer.switch_mlp, SwitchGLU):
        return layer
    routed = layer.switch_mlp
    gate_up = _stack([routed.gate_proj, routed.up_proj], axis=1)
    if gate_up is None or not all(_is_plain(part) for part in (gate_up, routed.down_proj)):
        return layer
    has_some = isinstance(layer, ExpertParallelMoE)
    packed = recast(layer, PackedExpertParallelMoE if has_some else PackedSparseMoE)
    packed.gate_up_proj, packed.down_proj = gate_up, routed.down_proj
    del packed["switch_mlp"]
    if "shared_expert" not in layer:  # another rank has it
        return packed

    shared = layer.shared_expert
    router = _stack([layer.gate, layer.shared_expert_gate])
    shared_gate_up = _stack([shared.gate_proj, shared.up_proj])
    if router is None or shared_gate_up is None:
        return packed
    gate_up = _append(gate_up, shared_gate_up)
    down = _append(routed.down_proj, shared.down_proj)
    if gate_up is None or down is None:
        return packed
    packed.gate, packed.gate_up_proj, packed.down_proj = router, gate_up, down
    del packed["shared_expert"], packed["shared_expert_gate"]
    return packed


def _is_plain(module: nn.Module) -> bool:
    """Returns whether a module is a stack of experts that :class:`Experts` can describe."""
    affine = getattr(module, "mode", "affine") == "affine"
    known = isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
    return known and affine and "bias" not in module


def _experts(module: nn.Module) -> Experts | TransposedWeights:
    if isinstance(module, TransposedLinear):
        return module.weights
    if "scales" not in module:
        return Experts(module.weight)
    return Experts(module.weight, module.scales, module.biases, module.group_size, module.bits)


# --- stacking ------------------------------------------------------------------------------------
def _stack_inputs(layer: Any, *names: str) -> Any:
    """Puts ``in_proj`` in the place of the named projections, if they can be stacked."""
    if "in_proj" in layer or (stacked := _stack([layer[name] for name in names])) is None:
        return layer
    sizes = [layer[name].weight.shape[0] for name in names]
    ends = np.cumsum(sizes).tolist()
    rows = layer.arrange(*mx.split(mx.arange(ends[-1]), ends[:-1]))
    for key, value in _parameters(stacked).items():
        stacked[key] = value[rows]
    layer.in_proj = stacked
    for name in names:
        del layer[name]
    return layer


def _stack(modules: Sequence[nn.Module], axis: int = 0) -> Any:
    """Returns one module with the rows of all; None if they are not of one kind."""
    first = modules[0]
    alike = all(_kind(module) == _kind(first) for module in modules) and _has_rows(first)
    if not alike or not isinstance(
        first, (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    ):
        return None
    stacked = copy.copy(first)
    for key in _parameters(first):
        stacked[key] = mx.concatenate([module[key] for module in modules], axis=axis)
    return stacked


def _append(experts: nn.Module, one: nn.Module) -> Any:
    """Returns a stack of experts with one more; None if that is quantized or shaped otherwise."""
    parameters, last = _parameters(experts), _parameters(one)

    def row(values: dict[str, mx.array], start: int) -> dict[str, Any]:
        return {key: (value.shape[start:], value.dtype) for key, value in values.items()}

    if _quantization(experts) != _quantization(one) or row(parameters, 1) != row(last, 0):
        return None
    longer = copy.copy(experts)
    for key, value in parameters.items():
        longer[key] = mx.concatenate([value, last[key][None]])
    return longer


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return {key: value for key, value in module.items() if isinstance(value, mx.array)}


def _quantization(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module, name, None) for name in ("bits", "group_size", "mode"))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Returns the properties that must agree for modules to be stacked."""
    widths = {key: (v.shape[-1], v.dtype) for key, v in _parameters(module).items()}
    return type(module), _quantization(module), widths


def _has_rows(module: nn.Module) -> bool:
    """Returns whether every parameter has one row an output; a whole matrix's scale has none."""
    return all(value.ndim >= 2 for value in _parameters(module).values())
