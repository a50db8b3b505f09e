"""The model packed for inference: weights of one input stacked, several operations a launch.

Checkpoints, saving and training keep the checkpoint's modules
(:mod:`mlx_qwen3next.model.qwen3_next`, on several ranks :mod:`mlx_qwen3next.model.parallel`);
:func:`pack` puts inference-time layers in their place, one after the other. Rows of weights are
permuted and stacked, quantized or not, which is exact: quantization groups run along the inputs.

- Gated DeltaNet: qkvz and ba become ``in_proj``, whose output is ``[q | k | v | z | b | a]``;
  A_log, dt_bias and the norm's weight become ``vectors``, one behind the other.
- Attention: q, gate, k and v become ``in_proj``, ``[q | k | v | gate]``.
- Experts: gate and up become ``gate_up_proj``; the shared expert becomes number E, and its gate the
  router's last row. If the shared expert has other bits, it keeps its own stack, and the same
  launches read that one.

Modules of other bits or group sizes are stacked where the common quantization adds little memory.
Modules that cannot be stacked (an adapter's layers, others) stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from ...compute.cpu_matmul import transposed
from ..gated_delta_net import GatedDeltaNet
from ..mtp_head import MTPHead
from ..parallel import ExpertParallelMoE, ParallelDecoderLayer, PipelineTrunk, parameters, recast
from ..qwen3_next import MLP, DecoderLayer, GatedAttention, Model, RMSNorm, SparseMoE, Trunk
from .layers import (
    PackedDecoderLayer,
    PackedExpertParallelMoE,
    PackedGatedAttention,
    PackedGatedDeltaNet,
    PackedParallelDecoderLayer,
    PackedRMSNorm,
    PackedSharedExpert,
    PackedSparseMoE,
)
from .steps import PackedMTPHead, PackedPipelineTrunk, PackedTrunk, TracedRMSNorm, stretches
from .widening import in_one_quantization

_LINEAR = nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear


def pack(model: Model) -> Model:
    """Packs a model for inference, in place, a layer at a time; returns it.

    A packed model is not for training or saving: its parameters have names of their own. Packing
    again changes nothing.
    """
    stacks = [model.model] if model.mtp is None else [model.model, model.mtp]
    for stack in stacks:
        for i in range(len(stack.layers)):
            pack_layer(stack, i)
        for name, module in stack.children().items():
            if isinstance(module, RMSNorm):
                stack[name] = recast(module, PackedRMSNorm)
    model.model = _pack_trunk(model.model)
    if model.mtp is not None and not isinstance(model.mtp.layers[0], ParallelDecoderLayer):
        model.mtp = recast(model.mtp, PackedMTPHead)
    model.packed = True
    return model


def pack_layer(stack: Any, i: int) -> None:
    """Packs a layer of a trunk or an MTP head for inference, in place, unless it is packed."""
    if isinstance(stack.layers[i], (PackedDecoderLayer, PackedParallelDecoderLayer)):
        return
    packed = packed_layer(stack.layers[i])
    leaves: Any = tree_flatten(packed.parameters())
    for _, array in leaves:
        mx.eval(array)  # one at a time, since each has parts of its own
        mx.clear_cache()
    stack.layers[i] = packed


def transpose(model: nn.Module) -> None:
    """Transposes matrices where a CPU multiplies them faster that way, in place.

    Args:
        model: a packed one, or a layer of one.
    """
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


def _pack_trunk(trunk: Trunk) -> Trunk:
    trunk.norm = recast(trunk.norm, TracedRMSNorm)
    if any(isinstance(layer, ParallelDecoderLayer) for layer in trunk.layers):
        return trunk  # sums over the ranks cannot be traced
    kind = PackedPipelineTrunk if isinstance(trunk, PipelineTrunk) else PackedTrunk
    return recast(trunk, kind, stretches=stretches(trunk.layers))  # type: ignore[arg-type]


def packed_layer(layer: DecoderLayer) -> DecoderLayer:
    """Returns a layer packed for inference, not evaluated; ``layer`` stays as it is."""
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
    packed = recast(layer, PackedGatedDeltaNet)
    packed.vectors = layer.weights.vectors
    del packed["A_log"], packed["dt_bias"], packed["norm"]
    return _stack_inputs(packed, "in_proj_qkvz", "in_proj_ba")


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
    shared_gate_up, shared_down = _stack([shared.gate_proj, shared.up_proj]), shared.down_proj
    if router is None or shared_gate_up is None:
        return packed
    gate_up = _append(packed.gate_up_proj, shared_gate_up)
    down = _append(packed.down_proj, shared_down)
    if gate_up is not None and down is not None:
        packed.gate_up_proj, packed.down_proj = gate_up, down
        del packed["shared_expert"]
    elif _is_one_of(packed.gate_up_proj, shared_gate_up) and _is_one_of(
        packed.down_proj, shared_down
    ):
        packed.shared_expert = recast(shared, PackedSharedExpert)
        packed.shared_expert.gate_up_proj = shared_gate_up
        del packed.shared_expert["gate_proj"], packed.shared_expert["up_proj"]
    else:
        return packed
    packed.gate = router
    del packed["shared_expert_gate"]
    return packed


def _is_one_of(experts: nn.Module, one: nn.Module) -> bool:
    """Returns whether ``one`` is like an expert of the stack in all but its quantization."""
    return _is_plain(one) and _dense(experts) == _dense(one)


def _dense(module: nn.Module) -> tuple[Any, ...]:
    """Returns outputs, inputs and dtype of a linear layer, or of one of a stack."""
    quantized = "scales" in module
    *_, outputs, inputs = module.weight.shape
    inputs = inputs * 32 // module.bits if quantized else inputs
    return outputs, inputs, (module.scales if quantized else module.weight).dtype


def _is_plain(module: nn.Module) -> bool:
    """Returns whether a module has weights that :class:`Experts` can describe."""
    affine = getattr(module, "mode", "affine") == "affine"
    return isinstance(module, _LINEAR) and affine and "bias" not in module


# --- stacking ------------------------------------------------------------------------------------
def _stack_inputs(layer: Any, *names: str) -> Any:
    """Puts ``in_proj`` in the place of the named projections, if they can be stacked."""
    if "in_proj" in layer or (stacked := _stack([layer[name] for name in names])) is None:
        return layer
    sizes = [layer[name].weight.shape[0] for name in names]
    ends = np.cumsum(sizes).tolist()
    rows = layer.arrange(*mx.split(mx.arange(ends[-1]), ends[:-1]))
    for key, value in parameters(stacked).items():
        stacked[key] = value[rows]
    layer.in_proj = stacked
    for name in names:
        del layer[name]
    return layer


def _stack(modules: Sequence[nn.Module], axis: int = 0) -> Any:
    """Returns one module with the rows of all; None if they are not of one kind."""
    if any(_kind(module) != _kind(modules[0]) for module in modules):
        modules = in_one_quantization(modules) or modules
    first = modules[0]
    alike = all(_kind(module) == _kind(first) for module in modules) and _has_rows(first)
    if not alike or not isinstance(first, _LINEAR):
        return None
    stacked = copy.copy(first)
    for key in parameters(first):
        stacked[key] = mx.concatenate([module[key] for module in modules], axis=axis)
    return stacked


def _append(experts: nn.Module, one: nn.Module) -> Any:
    """Returns a stack of experts with one more; None if that is quantized or shaped otherwise."""
    stacked, last = parameters(experts), parameters(one)

    def row(values: dict[str, mx.array], start: int) -> dict[str, Any]:
        return {key: (value.shape[start:], value.dtype) for key, value in values.items()}

    if _quantization(experts) != _quantization(one) or row(stacked, 1) != row(last, 0):
        return None
    longer = copy.copy(experts)
    for key, value in stacked.items():
        longer[key] = mx.concatenate([value, last[key][None]])
    return longer


def _quantization(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module, name, None) for name in ("bits", "group_size", "mode"))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Returns the properties that must agree for modules to be stacked."""
    widths = {key: (v.shape[-1], v.dtype) for key, v in parameters(module).items()}
    return type(module), _quantization(module), widths


def _has_rows(module: nn.Module) -> bool:
    """Returns whether every parameter has one row an output; a whole matrix's scale has none."""
    return all(value.ndim >= 2 for value in parameters(module).values())
