"""Transposed weights, which MLX's CPU multiplies fastest: one row an input, not one an output.

A checkpoint's row holds the weights of one output, and MLX's CPU products add up one output at a
time, each addition waiting for the one before. Where a row holds the weights of one *input*, they
go through many outputs at once. Transposing a matrix changes no value: the codes of a quantized one
are transposed, and its scales and biases, which belong to groups of inputs, are applied to the sums
over those groups::

    y_n = sum_g ( s_gn sum_{k in g} c_kn x_k  +  b_gn sum_{k in g} x_k )

The inner sums are quantized products of scale 1 and bias 0, one a group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .cpu_streams import cores, in_turn

UNIT = 64  # outputs in one of MLX's own groups, which run along them here
BITS = (2, 4, 8)  # a byte holds a whole number of such codes
PIECE = 1 << 19  # bytes of codes transposed at a time; measured
SUMS = 1 << 20  # sums over groups that a core holds at a time; measured
MANY = 1 << 19  # sums over groups from which on several cores compute them; measured
PRODUCTS = 8 * 4 * SUMS  # bytes that a core takes for products beside their results; measured
# The lower halves of 64 bits, by the width of a half.
_LOWER = {n: np.uint64(sum((2**n - 1) << i for i in range(0, 64, 2 * n))) for n in (2, 4, 8, 16)}


class TransposedWeights(NamedTuple):
    """A stack of E transposed matrices; quantized as MLX does it, or not."""

    weight: mx.array  # [E, inputs, outputs], or codes [E, G, group_size, words]
    scales: mx.array | None = None  # [E, G, outputs]
    biases: mx.array | None = None
    bits: int = 16  # which stands for unquantized


def multiply(x: mx.array, weights: TransposedWeights) -> mx.array:
    """Returns ``x`` ``[..., inputs]`` float32 times a single matrix: ``[..., outputs]``."""
    if weights.scales is None or weights.biases is None:
        return x @ weights.weight.squeeze(0)  # an index would copy
    _, G, size, _ = weights.weight.shape
    rows, sums = x.reshape(-1, G, size), weights.scales.size
    y = _in_pieces(lambda some: _multiplied(some, weights), [rows], sums)
    return y.reshape(*x.shape[:-1], -1)


def _multiplied(rows: mx.array, weights: TransposedWeights) -> mx.array:
    """Returns the product of ``rows`` ``[R, G, group_size]``: ``[R, outputs]``."""
    assert weights.scales is not None and weights.biases is not None
    sums = _group_sums(rows.swapaxes(0, 1), weights, mx.arange(rows.shape[1], dtype=mx.uint32))
    y = (sums * weights.scales.swapaxes(0, 1)).sum(axis=0)
    return mx.addmm(y, rows.sum(axis=-1), weights.biases.squeeze(0))


def gather(x: mx.array, weights: TransposedWeights, indices: mx.array) -> mx.array:
    """Returns each row times its matrix.

    Args:
        x: ``[R, ..., 1, inputs]`` float32; its axes broadcast with those of ``indices``, but for
            the first.
        indices: ``[R, ...]`` uint32, the matrices' numbers.

    Returns:
        ``[R, ..., 1, outputs]``.
    """
    if weights.scales is None or weights.biases is None:
        return mx.gather_mm(x, weights.weight, rhs_indices=indices)
    _, G, size, _ = weights.weight.shape
    rows = x.reshape(*x.shape[:-2], G, size)
    sums = indices.size // len(indices) * weights.scales.size // len(weights.scales)
    return _in_pieces(lambda some, which: _gathered(some, which, weights), [rows, indices], sums)


def _gathered(rows: mx.array, indices: mx.array, weights: TransposedWeights) -> mx.array:
    """Returns the product of ``rows`` ``[..., G, group_size]``: ``[..., 1, outputs]``."""
    assert weights.scales is not None and weights.biases is not None
    G = rows.shape[-2]
    groups = indices[..., None] * G + mx.arange(G, dtype=mx.uint32)
    sums = _group_sums(rows[..., None, :], weights, groups).squeeze(-2)  # [..., G, outputs]
    inputs = rows.sum(axis=-1, keepdims=True)
    y = _scaled(sums, weights.scales[indices], inputs, weights.biases[indices])
    return y.sum(axis=-2, keepdims=True)


def _in_pieces(product: Callable[..., mx.array], rows: list[mx.array], sums: int) -> mx.array:
    """Returns a product, made of few enough rows at a time that their sums stay in the caches.

    Args:
        sums: the number of sums that a row takes.
    """
    total = len(rows[0]) * sums
    if total < MANY or len(rows[0]) == 1:
        return product(*rows)
    turns = -(-total // (SUMS * cores()))
    step = -(-len(rows[0]) // (turns * cores()))
    starts = range(0, len(rows[0]), step)

    def piece(start: int, after: Sequence[mx.array]) -> mx.array:
        some = [x[start : start + step] for x in rows]
        return product(*mx.depends(some, list(after)))

    return mx.concatenate(in_turn(partial(piece, start) for start in starts))


@partial(mx.compile, shapeless=True)
def _scaled(sums: mx.array, scales: mx.array, inputs: mx.array, biases: mx.array) -> mx.array:
    return sums * scales + inputs * biases


def _group_sums(rows: mx.array, weights: TransposedWeights, groups: mx.array) -> mx.array:
    """Returns rows ``[..., R, group_size]`` times the codes of the numbered groups ``[...]``.

    The result is ``[..., R, outputs]``.
    """
    assert weights.scales is not None
    E, G, size, words = weights.weight.shape
    ones, zeros = _units(E * G, size, words * 32 // weights.bits // UNIT)
    sums = mx.gather_qmm(
        *(rows, weights.weight.reshape(E * G, size, words), ones, zeros),
        rhs_indices=groups,
        transpose=False,
        group_size=UNIT,
        bits=weights.bits,
    )
    return sums[..., : weights.scales.shape[-1]]


@cache
def _units(*shape: int) -> tuple[mx.array, mx.array]:
    """Returns scales of 1 and biases of 0, the same memory for all groups."""
    ones, zeros = (mx.broadcast_to(mx.full(shape[1:], x), shape) for x in (1.0, 0.0))
    mx.eval(ones, zeros)
    return ones, zeros


class TransposedLinear(nn.Module):
    """A linear layer, or a stack of them for :func:`gather`, with transposed weights."""

    def __init__(self, weights: TransposedWeights):
        super().__init__()
        self.weight, self.bits = weights.weight, weights.bits
        if weights.scales is not None:
            self.scales, self.biases = weights.scales, weights.biases

    @property
    def weights(self) -> TransposedWeights:
        """The weights in one tuple."""
        return TransposedWeights(self.weight, self.get("scales"), self.get("biases"), self.bits)

    def __call__(self, x: mx.array) -> mx.array:
        return multiply(x, self.weights)


def transposed(module: nn.Module) -> TransposedLinear | None:
    """Returns a linear layer, or a stack of them, transposed; or None if that does not pay."""
    kinds = nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear
    if type(module) not in kinds or "bias" in module:
        return None
    bits = module.bits if "scales" in module else None
    dtype = module["weight"].dtype if bits is None else module.scales.dtype
    if getattr(module, "mode", "affine") != "affine" or dtype != mx.float32 or not pays(bits):
        return None
    return transpose(module)


def transpose(module: nn.Module) -> TransposedLinear:
    """Returns a float32 layer, unquantized or with one of BITS, transposed."""

    def stack(x: mx.array) -> mx.array:
        return x if x.ndim == 3 else x[None]

    weight = stack(module.weight)
    if "scales" not in module:
        return TransposedLinear(TransposedWeights(mx.contiguous(weight.swapaxes(1, 2))))
    scales, biases = (
        mx.contiguous(stack(x).swapaxes(1, 2)) for x in (module.scales, module.biases)
    )
    E, N, words = weight.shape
    outputs = -(-N // UNIT) * UNIT
    codes = mx.zeros((E, words * 32 // module.bits, outputs * module.bits // 32), mx.uint32)
    mx.eval(weight, codes)
    for matrix, into in zip(memory(weight), memory(codes), strict=True):
        whole = np.pad(matrix, [(0, outputs - N), (0, 0)]) if outputs > N else matrix
        transpose_codes(whole, module.bits, into)
    codes = codes.reshape(E, -1, module.group_size, codes.shape[-1])
    return TransposedLinear(TransposedWeights(codes, scales, biases, module.bits))


def memory(array: mx.array) -> np.ndarray:
    """Returns an array's memory as numpy sees it, to be written, too; 16-bit floats as uint16."""
    is_half = array.dtype in (mx.bfloat16, mx.float16)
    return np.array(array.view(mx.uint16) if is_half else array, copy=False)


def transpose_codes(codes: np.ndarray, bits: int, into: np.ndarray) -> None:
    """Transposes a matrix of codes, some of its rows at a time, which stay in the caches meanwhile.

    Squares of codes, a word wide, are transposed by halves (Warren, Hacker's Delight, 7-3): of
    every two rows the codes off the diagonal change places, then of every two pairs of rows the
    pairs of codes, and so on. A square's words then go to the same place of as many rows.

    Args:
        codes: ``[outputs, words]`` uint32; the outputs fill whole words.
        bits: of a code, one of BITS.
        into: ``[inputs, words]`` uint32, which takes the result.
    """
    outputs, words = codes.shape
    side = 32 // bits
    squares = into.reshape(words, side, outputs // side)
    step = max(PIECE // (4 * words * side), 1) * side
    for start in range(0, outputs, step):
        piece = codes[start : start + step].copy()
        pairs = piece.view(np.uint64)
        for width in (n for n in _LOWER if n >= bits):
            rows = width // bits
            first, second = np.moveaxis(pairs.reshape(-1, 2, rows, words // 2), 1, 0)
            shift = np.uint64(width)
            moved = (first >> shift ^ second) & _LOWER[width]
            second ^= moved
            moved <<= shift
            first ^= moved
        place = slice(start // side, (start + len(piece)) // side)
        squares[:, :, place] = piece.reshape(-1, side, words).transpose(2, 1, 0)


def pays(bits: int | None) -> bool:
    """Returns whether transposed matrices are faster here; None stands for unquantized."""
    known = bits is None or bits in BITS
    return known and mx.default_device() == mx.cpu and _measure(bits) > 1


@cache
def _measure(bits: int | None) -> float:
    """Measures how many times as fast a transposed matrix is."""
    layer: nn.Module = nn.Linear(512, 512, bias=False)
    if bits is not None:
        layer = nn.QuantizedLinear.from_linear(layer, 64, bits)
    forms: list[Callable[[mx.array], mx.array]] = [layer, transpose(layer)]
    x = mx.zeros((4, 512))
    seconds: list[list[float]] = [[], []]
    for _ in range(5):
        for form, times in zip(forms, seconds, strict=True):
            start = time.perf_counter()
            mx.eval(form(x))
            times.append(time.perf_counter() - start)
    stored_as_is, stored_transposed = map(min, seconds)  # others' work only adds to a time
    return stored_as_is / stored_transposed
