"""Quantized weights of several quantizations in one, with the values that they have.

A code of few bits is a code of more bits too, and a group's scale and bias are those of its halves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

# The bytes that a common quantization may add: a share of the weights, or what a GPU reads in the
# time of a launch.
SHARE, FEW = 1 / 8, 1 << 20
PIECE = 1 << 22  # words that are recoded at a time


def in_one_quantization(modules: Sequence[Any]) -> list[Any] | None:
    """Returns linear layers at the most bits and in the smallest groups that any of them has.

    None if they are not all quantized by scales and biases, or if that would add much memory.
    """
    if not all(
        isinstance(module, (nn.QuantizedLinear, QuantizedSwitchLinear)) and module.mode == "affine"
        for module in modules
    ):
        return None
    bits = max(module.bits for module in modules)
    group_size = min(module.group_size for module in modules)
    wide = [_widened(module, bits, group_size) for module in modules]
    before, after = map(_size, (modules, wide))
    return wide if after - before <= max(SHARE * before, FEW) else None


def _size(modules: Sequence[nn.Module]) -> int:
    return sum(module[name].nbytes for module in modules for name in ("weight", "scales", "biases"))


def _widened(module: Any, bits: int, group_size: int) -> Any:
    wide = copy.copy(module)
    rows = max(1, PIECE // module.weight[0].size)
    pieces = range(0, len(module.weight), rows)
    wide.weight = mx.concatenate(
        [_recoded(module.weight[i : i + rows], module.bits, bits) for i in pieces]
    )
    for name in ("scales", "biases"):
        wide[name] = mx.repeat(module[name], module.group_size // group_size, axis=-1)
    wide.bits, wide.group_size = bits, group_size
    return wide


def _recoded(weight: mx.array, bits: int, more: int) -> mx.array:
    """Returns codes ``[..., words]`` uint32 of some bits at more bits; eight at a time."""
    codes = weight.view(mx.uint8).reshape(*weight.shape[:-1], -1, bits)
    fill = [(0, 0)] * (codes.ndim - 1) + [(0, 8 - bits)]
    eight = mx.pad(codes, fill).view(mx.uint64)
    wide = reduce(
        mx.bitwise_or,
        (((eight >> bits * i) & (2**bits - 1)) << more * i for i in range(8)),
    )
    codes = mx.contiguous(wide.view(mx.uint8)[..., :more])
    return codes.reshape(*weight.shape[:-1], -1).view(mx.uint32)
