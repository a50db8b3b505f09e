"""The quantization of each module.

The recipes are mlx_lm.convert's. On top of every one: routers and shared-expert gates have 8 bits,
norms, convolutions, A_log and dt_bias stay floating point, and the MTP head has bits of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import mixed_quant_predicate_builder

from mlx_qwen3next.model import layouts
from mlx_qwen3next.model.qwen3_next import Model

Quantization = dict[str, Any]  # group_size, bits, mode: mx.quantize's arguments
Predicate = Callable[[str, nn.Module], bool | Quantization]

# mode -> default group size and bits, as in mlx_lm.convert.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
ROUTER_BITS = 8
# The MTP head's default; NOTES.md has the table it was chosen by.
MTP_BITS = 4
UNQUANTIZED = 16
BITS = (2, 3, 4, 5, 6, 8)
_RANGES = (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # shares of the whole range, searched
_MOST_SEARCHED = 4  # bits; with more, clipping gains nothing
HEAD_BITS = (*BITS, UNQUANTIZED)


def base_quantization(mode: str, bits: int | None, group_size: int | None) -> Quantization:
    """The quantization of the modules that no rule treats otherwise.

    Args:
        bits, group_size: None for the mode's default.

    Raises:
        ValueError: MLX has no such combination.
    """
    default_group_size, default_bits = DEFAULTS[mode]
    group_size = default_group_size if group_size is None else group_size
    bits = default_bits if bits is None else bits
    quantization: Quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    try:
        if group_size < 1 or bits not in BITS:  # MLX would divide by the first
            raise ValueError
        mx.quantize(mx.zeros((1, 512)), **quantization)
    except (ValueError, RuntimeError, TypeError):
        raise ValueError(
            f"--q-mode {mode} has no --q-bits {bits} with --q-group-size {group_size}: affine has "
            "2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128; the other modes need neither flag"
        ) from None
    return quantization


def recipe(
    model: Model,
    base: Quantization | None,
    predicate: str | Predicate | None = None,
    mtp_bits: int | None = None,
) -> dict[str, Quantization]:
    """Module path -> quantization of every module that is to be quantized.

    Args:
        base: see :func:`base_quantization`; None leaves the trunk unquantized.
        predicate: a mixed recipe's name, or a function as mlx_lm.convert takes it.
        mtp_bits: bits of the MTP head, ``UNQUANTIZED`` for none; None means ``MTP_BITS`` with a
            quantized trunk, else unquantized.

    Raises:
        ValueError: the head cannot have that many bits.
    """
    if mtp_bits is None:
        mtp_bits = MTP_BITS if base else UNQUANTIZED
    head = None if mtp_bits == UNQUANTIZED else base_quantization("affine", mtp_bits, None)
    if head and base and base["mode"] == "affine":
        head["group_size"] = base["group_size"]
    choose = _predicate(model, base, predicate)

    chosen: dict[str, Quantization] = {}
    for path, module in model.named_modules():
        default = head if layouts.is_mtp(path) else base
        if default is None or not hasattr(module, "to_quantized"):
            continue
        answer: bool | Quantization = True
        if layouts.is_router(path):
            answer = {"group_size": 64, "bits": ROUTER_BITS, "mode": "affine"}
        elif not layouts.is_mtp(path):
            answer = choose(path, module)
        quantization = default
        if isinstance(answer, dict):
            quantization = base_quantization(**(default | answer))
        if answer and module.weight.shape[-1] % quantization["group_size"] == 0:
            chosen[path] = quantization
    return chosen


def _predicate(
    model: Model, base: Quantization | None, predicate: str | Predicate | None
) -> Predicate:
    if predicate is None:
        return lambda path, module: True
    if base is None:
        raise ValueError("--quant-predicate needs -q")
    if callable(predicate):
        return predicate
    if base["mode"] != "affine":
        raise ValueError(f"--quant-predicate {predicate} needs --q-mode affine, not {base['mode']}")
    mixed: Any = mixed_quant_predicate_builder(predicate, model, base["group_size"])
    return mixed


def quantize(
    value: mx.array, quantization: Quantization, searched: bool = False
) -> tuple[mx.array, ...]:
    """``mx.quantize(value, **quantization)``, whose inverse is :func:`dequantize`.

    MLX lets the range of a group's codes reach from its least weight to its greatest. With few
    bits a narrower one has a smaller error in sum, although it clips both.

    Args:
        searched: whether each group gets the one of several ranges that has the smallest squared
            error.
    """
    if not searched or quantization["mode"] != "affine" or quantization["bits"] > _MOST_SEARCHED:
        return tuple(mx.quantize(value, **quantization))
    groups = value.reshape(-1, quantization["group_size"])
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    best, least = groups, mx.full(low.shape, math.inf)
    for share in _RANGES:
        # One after the other, or the arrays of all of them would be in memory together.
        groups, low, high = mx.depends([groups, low, high], [best, least])
        clipped = mx.clip(groups, (share * low).astype(low.dtype), (share * high).astype(low.dtype))
        result = dequantize(mx.quantize(clipped, **quantization), quantization)
        error = mx.square((result - groups).astype(mx.float32)).sum(axis=-1, keepdims=True)
        best, least = mx.where(error < least, clipped, best), mx.minimum(error, least)
    return tuple(mx.quantize(best.reshape(value.shape), **quantization))


def dequantize(parts: Sequence[mx.array], quantization: Quantization) -> mx.array:
    """The inverse of ``mx.quantize(value, **quantization)``, which gave ``parts``."""
    weight, scales, *biases = parts
    return mx.dequantize(weight, scales, biases[0] if biases else None, **quantization)
