"""A piece of text with the model's keys, values and states for it, apart from any cache.

A :class:`Piece` is some tokens, their keys and values, and perhaps a *checkpoint*: the states of
the linear layers after them. :func:`take_apart` makes one of a cache, :func:`assemble` a cache of
those that follow each other.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..model.cache import AttentionCache, Cache, GatedDeltaCache, MTPCache, length, settle
from ..model.quantized_kv import QuantizedAttentionCache
from ..storage import safetensors
from ..storage.safetensors import Tensor

# By name; in memory as an mx.array, or still in a file as a Stored.
Arrays = dict[str, Any]
Quantization = tuple[int, int]  # group size and bits


@dataclass(frozen=True)
class Stored:
    """An array that is still in its file."""

    tensor: Tensor
    described: str  # the array's name and what the file says of itself, in the checksum as well
    checksum: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes, on disk as in memory."""
        return self.tensor.nbytes

    def read(self) -> mx.array:
        """The array, evaluated.

        Raises:
            ValueError: the file cannot be read, or holds something else.
        """
        array = safetensors.read_rows(self.tensor)
        if checksum(self.described, array) != self.checksum:
            raise ValueError(f"{self.tensor.file} is damaged: its checksums do not agree")
        return array


@dataclass
class Piece:
    """Consecutive tokens of a text, with the model's arrays for them.

    The MTP head's position i belongs to tokens i and i + 1, hence to the piece of the latter: the
    piece that begins a text has one position less than tokens.
    """

    start: int  # position of the first token
    tokens: np.ndarray  # [n] uint32
    # "LAYER.0", "LAYER.1": keys and values [1, nkv, n, hd]. Quantized ones are "LAYER.0" to
    # "LAYER.5": packed numbers, scales and biases of the keys, then of the values.
    kv: Arrays
    head: Arrays  # the MTP head's "0" and "1", likewise; empty if they are not known
    # "LAYER.rows" [1, K-1, C] and "LAYER.state" [1, Hv, Dv, Dk] of the linear layers at the piece's
    # end, and "hidden" [1, 1, H], which the MTP head goes on from, if known; empty without one.
    # A pipeline's rank may have no linear layers: then "end" stands for their states.
    checkpoint: Arrays
    quantization: Quantization | None = None  # of kv

    @property
    def end(self) -> int:
        """The number of tokens of the text up to the piece's end."""
        return self.start + self.tokens.size

    @property
    def nbytes(self) -> int:
        """Size in bytes, whether in memory or not."""
        return self.tokens.nbytes + sum(size(arrays) for arrays in self.parts.values())

    def part(self, start: int, end: int) -> Piece:
        """The piece between two positions of the text, with the checkpoint if that is at its end.

        Its arrays are views of the whole, which :meth:`own` turns into copies.
        """
        if (start, end) == (self.start, self.end):
            return self  # perhaps still in its file
        first, last, less = start - self.start, end - self.start, self.start == 0
        return replace(
            self,
            start=start,
            tokens=self.tokens[first:last].copy(),
            kv={name: x[:, :, first:last] for name, x in self.kv.items()},
            head={
                name: x[:, :, max(first - less, 0) : last - less] for name, x in self.head.items()
            },
            checkpoint=self.checkpoint if end == self.end else {},
        )

    def own(self) -> None:
        """Replaces views of larger arrays by copies, and evaluates the arrays in memory."""
        for arrays in self.parts.values():
            arrays |= {k: mx.contiguous(x) for k, x in arrays.items() if isinstance(x, mx.array)}
            mx.eval([x for x in arrays.values() if isinstance(x, mx.array)])

    def read(self) -> None:
        """Reads the arrays that are still in a file.

        Raises:
            ValueError: the file cannot be read, or is damaged.
        """
        for arrays in self.parts.values():
            read(arrays)

    def contents(self) -> Iterator[tuple[str, mx.array]]:
        """All arrays, by the names that :func:`write_file` gives them in a piece."""
        yield "tokens", mx.array(self.tokens)
        for part, arrays in self.parts.items():
            for name, array in arrays.items():
                yield f"{part}.{name}", array

    @property
    def parts(self) -> dict[str, Arrays]:
        """The piece's arrays, by the names of its attributes."""
        return {"kv": self.kv, "head": self.head, "checkpoint": self.checkpoint}


def size(arrays: Arrays) -> int:
    """The arrays' size in bytes, whether in memory or not."""
    return sum(array.nbytes for array in arrays.values())


def read(arrays: Arrays) -> None:
    """Reads the arrays that are still in a file.

    Raises:
        ValueError: the file cannot be read, or is damaged.
    """
    for name, array in arrays.items():
        if isinstance(array, Stored):
            arrays[name] = array.read()


# --- between a cache's entries and a piece's arrays ----------------------------------------------
def take_apart(tokens: np.ndarray, cache: Cache) -> Piece:
    """Makes a piece of a cache's arrays, as views.

    Args:
        tokens: ids ``[L]`` uint32.
        cache: of exactly these tokens; it is settled.

    Raises:
        ValueError: the cache is empty, or does not hold that many tokens.
    """
    piece = Piece(0, tokens, {}, {}, {})
    n = tokens.size
    trunk = [entry for entry in cache if not isinstance(entry, MTPCache)]
    settle(trunk)
    if n == 0 or not trunk or any(entry.empty() for entry in trunk):
        raise ValueError("the cache is empty: there is nothing to keep")
    for i, entry in enumerate(trunk):
        if isinstance(entry, GatedDeltaCache):
            piece.checkpoint[f"{i}.rows"], piece.checkpoint[f"{i}.state"] = entry.cache
            continue
        if length(entry) != n:
            raise ValueError(f"the cache holds {length(entry)} tokens, not {n}")
        keys, values, _, *quantization = entry.state
        arrays = [*keys, *values] if quantization else [keys, values]
        piece.quantization = tuple(quantization) or None
        piece.kv |= {f"{i}.{j}": x[:, :, :n] for j, x in enumerate(arrays)}
    if not piece.checkpoint:
        piece.checkpoint["end"] = mx.zeros((1,), mx.uint8)
    for head in cache[len(trunk) :]:
        if head.hidden is not None and head.offset == n - 1 > 0:
            piece.head = {str(j): x[:, :, : n - 1] for j, x in enumerate((head.keys, head.values))}
            piece.checkpoint["hidden"] = head.hidden
    return piece


def assemble(path: list[Piece]) -> Cache:
    """The cache at the end of pieces, which follow each other from a text's beginning.

    Args:
        path: the pieces, in memory; the last one has a checkpoint.

    Returns:
        An entry a layer, and the MTP head's if all pieces know it, in evaluated arrays that end
        with the last token.
    """
    n = path[-1].end
    states = {name: mx.array(x) for name, x in path[-1].checkpoint.items()}
    mx.eval(states)
    # A cache is quantized when it has become long, so plain pieces may come before such ones.
    quantization = next((piece.quantization for piece in path if piece.quantization), None)
    kv = _join([_quantized(piece, quantization) for piece in path])
    cache: Cache = []
    layers = {name.partition(".")[0] for name in states.keys() | kv.keys()} - {"hidden", "end"}
    for i in map(str, range(len(layers))):
        if f"{i}.rows" in states:
            entry = GatedDeltaCache()
            entry.cache = [states[f"{i}.rows"], states[f"{i}.state"]]
        elif quantization is None:
            entry = AttentionCache.from_state((kv[f"{i}.0"], kv[f"{i}.1"], n))
        else:
            keys, values = ([kv[f"{i}.{j}"] for j in range(k, k + 3)] for k in (0, 3))
            entry = QuantizedAttentionCache.from_state((keys, values, n, *quantization))
        cache.append(entry)
    if "hidden" in states and all(piece.head for piece in path):
        head = _join([piece.head for piece in path])
        cache.append(MTPCache.from_state((head["0"], head["1"], n - 1, states["hidden"])))
    return cache


def _join(parts: list[Arrays]) -> Arrays:
    joined = {name: mx.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
    mx.eval(joined)
    return joined


def _quantized(piece: Piece, quantization: Quantization | None) -> Arrays:
    """Its keys and values, quantized if wanted: row by row, so in pieces as in the whole."""
    if quantization is None or piece.quantization:
        return piece.kv
    group_size, bits = quantization
    return {
        f"{layer}.{3 * int(j) + k}": part
        for layer, j in (name.split(".") for name in piece.kv)
        for k, part in enumerate(mx.quantize(piece.kv[f"{layer}.{j}"], group_size, bits))
    }


def checksum(described: str, array: mx.array) -> int:
    """The checksum of an array (contiguous), which is evaluated for it, and of its description."""
    return zlib.crc32(data(array), zlib.crc32(described.encode()))


def data(array: mx.array) -> memoryview:
    """The array's bytes, as they are in a file; the array is contiguous."""
    return memoryview(array)  # type: ignore[arg-type]  # it has the buffer protocol
