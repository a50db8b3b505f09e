"""Weights as MLX's CPU multiplies them fastest: what one input contributes to, side by side.

A checkpoint's row holds the weights of one output, and MLX's CPU products add up one output at a
time, each addition waiting for the one before. Where a row holds the weights of one *input*, they
go through many outputs at once. No value changes when a matrix is turned around: of a quantized
one the codes are transposed, and its scales and biases, which belong to groups of inputs, are
applied to the sums over those groups::

    y_n = sum_g ( s_gn sum_{k in g} c_kn x_k  +  b_gn sum_{k in g} x_k )

The inner sums are quantized products of scale 1 and bias 0, one a group.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, reduce
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

UNIT = 64  # outputs in one of MLX's own groups, which run along them here
BITS = (2, 4, 8)  # of which a byte holds a whole number
PIECE = 1 << 22  # codes turned around at a time; measured
SUMS = 1 << 20  # sums over groups that are held at a time; measured
_TOGETHER = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}  # as many bytes


class Columns(NamedTuple):
    """A stack of E matrices, turned around; quantized as MLX does it, or not."""

    weight: mx.array  # [E, inputs, outputs], or codes [E, G, group_size, words]
    scales: mx.array | None = None  # [E, G, outputs]
    biases: mx.array | None = None
    bits: int = 16  # which stands for unquantized


def multiply(x: mx.array, columns: Columns) -> mx.array:
    """``x`` ``[..., inputs]`` float32 times the one matrix there is: ``[..., outputs]``."""
    if columns.scales is None or columns.biases is None:
        return x @ columns.weight.squeeze(0)  # an index would copy
    _, G, size, _ = columns.weight.shape
    rows, sums = x.reshape(-1, G, size), columns.scales.size
    y = _in_pieces(lambda some: _multiplied(some, columns), [rows], sums)
    return y.reshape(*x.shape[:-1], -1)


def _multiplied(rows: mx.array, columns: Columns) -> mx.array:
    """``rows`` ``[R, G, group_size]``: ``[R, outputs]``."""
    assert columns.scales is not None and columns.biases is not None
    sums = _group_sums(rows.swapaxes(0, 1), columns, mx.arange(rows.shape[1], dtype=mx.uint32))
    y = (sums * columns.scales.swapaxes(0, 1)).sum(axis=0)
    return mx.addmm(y, rows.sum(axis=-1), columns.biases.squeeze(0))


def gather(x: mx.array, columns: Columns, indices: mx.array) -> mx.array:
    """Each row times its matrix.

    Args:
        x: ``[R, ..., 1, inputs]`` float32; its axes broadcast with those of ``indices``, but for
            the first.
        indices: ``[R, ...]`` uint32, the matrices' numbers.

    Returns:
        ``[R, ..., 1, outputs]``.
    """
    if columns.scales is None or columns.biases is None:
        return mx.gather_mm(x, columns.weight, rhs_indices=indices)
    _, G, size, _ = columns.weight.shape
    rows = x.reshape(*x.shape[:-2], G, size)
    sums = indices.size // len(indices) * columns.scales.size // len(columns.scales)
    return _in_pieces(lambda some, which: _gathered(some, which, columns), [rows, indices], sums)


def _gathered(rows: mx.array, indices: mx.array, columns: Columns) -> mx.array:
    """``rows`` ``[..., G, group_size]``: ``[..., 1, outputs]``."""
    assert columns.scales is not None and columns.biases is not None
    G = rows.shape[-2]
    groups = indices[..., None] * G + mx.arange(G, dtype=mx.uint32)
    sums = _group_sums(rows[..., None, :], columns, groups).squeeze(-2)  # [..., G, outputs]
    inputs = rows.sum(axis=-1, keepdims=True)
    y = _scaled(sums, columns.scales[indices], inputs, columns.biases[indices])
    return y.sum(axis=-2, keepdims=True)


def _in_pieces(product: Callable[..., mx.array], rows: list[mx.array], sums: int) -> mx.array:
    """A product, of so many rows at a time that their sums, so many a row, stay in the caches."""
    step = max(1, SUMS // sums)
    starts = range(0, len(rows[0]), step)
    if len(starts) <= 1:
        return product(*rows)
    return mx.concatenate([product(*(x[i : i + step] for x in rows)) for i in starts])


@mx.compile
def _scaled(sums: mx.array, scales: mx.array, inputs: mx.array, biases: mx.array) -> mx.array:
    return sums * scales + inputs * biases


def _group_sums(rows: mx.array, columns: Columns, groups: mx.array) -> mx.array:
    """Rows ``[..., R, group_size]`` times the codes of the groups ``[...]`` so numbered:
    ``[..., R, outputs]``."""
    assert columns.scales is not None
    E, G, size, words = columns.weight.shape
    ones, zeros = _units(E * G, size, words * 32 // columns.bits // UNIT)
    sums = mx.gather_qmm(
        *(rows, columns.weight.reshape(E * G, size, words), ones, zeros),
        rhs_indices=groups,
        transpose=False,
        group_size=UNIT,
        bits=columns.bits,
    )
    return sums[..., : columns.scales.shape[-1]]


@cache
def _units(*shape: int) -> tuple[mx.array, mx.array]:
    """Scales of 1 and biases of 0, the same memory for all groups."""
    ones, zeros = (mx.broadcast_to(mx.full(shape[1:], x), shape) for x in (1.0, 0.0))
    mx.eval(ones, zeros)
    return ones, zeros


class ColumnLinear(nn.Module):
    """A linear layer, or a stack of them for :func:`gather`, turned around."""

    def __init__(self, columns: Columns):
        super().__init__()
        self.weight, self.bits = columns.weight, columns.bits
        if columns.scales is not None:
            self.scales, self.biases = columns.scales, columns.biases

    @property
    def columns(self) -> Columns:
        """The weights."""
        return Columns(self.weight, self.get("scales"), self.get("biases"), self.bits)

    def __call__(self, x: mx.array) -> mx.array:
        return multiply(x, self.columns)


def turned(module: nn.Module) -> ColumnLinear | None:
    """A linear layer, or a stack of them, turned around; None if it cannot be or does not pay."""
    kinds = nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear
    if type(module) not in kinds or "bias" in module:
        return None
    bits = module.bits if "scales" in module else None
    dtype = module["weight"].dtype if bits is None else module.scales.dtype
    if getattr(module, "mode", "affine") != "affine" or dtype != mx.float32 or not pays(bits):
        return None
    return turn(module)


def turn(module: nn.Module) -> ColumnLinear:
    """As :func:`turned`, of a float32 layer with BITS."""

    def stack(x: mx.array) -> mx.array:
        return x if x.ndim == 3 else x[None]

    weight = stack(module.weight)
    if "scales" not in module:
        return ColumnLinear(Columns(mx.contiguous(weight.swapaxes(1, 2))))
    scales, biases = (
        mx.contiguous(stack(x).swapaxes(1, 2)) for x in (module.scales, module.biases)
    )
    codes = _turn_codes(weight, module.bits)
    codes = codes.reshape(len(codes), -1, module.group_size, codes.shape[-1])
    return ColumnLinear(Columns(codes, scales, biases, module.bits))


def _turn_codes(weight: mx.array, bits: int) -> mx.array:
    """Codes ``[E, outputs, words]`` as ``[E, inputs, words]``, outputs padded to whole units."""
    E, N, words = weight.shape
    K, outputs, a_byte = words * 32 // bits, -(-N // UNIT) * UNIT, 8 // bits
    if outputs > N:
        weight = mx.pad(weight, [(0, 0), (0, outputs - N), (0, 0)])
    step = max(1, PIECE // (outputs * K))
    pieces = []
    for start in range(0, E, step):
        # A byte has the codes of a few inputs. Once transposed, those of as many outputs are
        # beside each other: code i of each goes to row i.
        turned = mx.contiguous(weight[start : start + step].view(mx.uint8).swapaxes(1, 2))
        together = turned.view(_TOGETHER[a_byte])
        rows = [
            reduce(mx.bitwise_or, (_code(together, i, j, bits) for j in range(a_byte)))
            for i in range(a_byte)
        ]
        rows = [row.astype(mx.uint8) for row in rows]
        pieces.append(mx.stack(rows, axis=2).reshape(-1, K, outputs // a_byte).view(mx.uint32))
        mx.eval(pieces)
    return mx.concatenate(pieces)


def _code(together: mx.array, i: int, j: int, bits: int) -> mx.array:
    """Code i of byte j, where it goes in a byte."""
    return (together >> 8 * j + bits * i & 2**bits - 1) << bits * j


def pays(bits: int | None) -> bool:
    """Whether turned matrices are faster here: measured once. None stands for unquantized."""
    known = bits is None or bits in BITS
    return known and mx.default_device() == mx.cpu and _measure(bits) > 1


@cache
def _measure(bits: int | None) -> float:
    """How many times as fast a turned matrix is."""
    layer: nn.Module = nn.Linear(512, 512, bias=False)
    if bits is not None:
        layer = nn.QuantizedLinear.from_linear(layer, 64, bits)
    forms: list[Callable[[mx.array], mx.array]] = [layer, turn(layer)]
    x = mx.zeros((4, 512))
    seconds: list[list[float]] = [[], []]
    for _ in range(5):
        for form, times in zip(forms, seconds, strict=True):
            start = time.perf_counter()
            mx.eval(form(x))
            times.append(time.perf_counter() - start)
    as_stored, turned_around = map(statistics.median, seconds)
    return as_stored / turned_around
