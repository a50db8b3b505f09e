"""The safetensors format: headers, rows of tensors, and the layout of a file to be written.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a JSON header,
then the data). The library of that name gives no byte offsets and writes only whole files from
memory. Here a header alone says where every byte is, so that a 45 GB checkpoint with a mistake is
refused before its first weight is read, rows are read without the rest of their tensor, and
:func:`lay_out` settles every byte's place before the first weight is there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

_LONGEST_HEADER = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# safetensors' names of MLX's dtypes. MLX has no FP8; it is read as bytes.
DTYPES = {
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32,
    "U8": mx.uint8, "U32": mx.uint32, "F8_E4M3": mx.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "F8_E4M3"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, as the file's header describes it."""

    file: Path
    dtype: str  # safetensors' name: "BF16", "U32", …
    shape: tuple[int, ...]
    start: int = 0  # of its data, in bytes from the file's beginning
    metadata: Mapping[str, str] = field(
        default_factory=dict, compare=False, repr=False
    )  # the file's

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class Header(NamedTuple):
    """The header of a file: its tensors by name, and the file's metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Reads the header of a file, after checking that it and the file agree.

    Raises:
        ValueError: the file cannot be read, is truncated, or is no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(
                    f"{file} is truncated in its header, or no safetensors file "
                    f"({size} bytes). Download it again."
                )
            raw = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _no_tensors(file) from None
    return parse(file, header, data=8 + length, size=size)


def parse(file: Path, header: Mapping[str, Any], data: int, size: int) -> Header:
    """Checks that a header's JSON and its file agree.

    Args:
        header: name -> ``dtype``, ``shape`` and ``data_offsets``; ``__metadata__`` -> metadata.
        data: where the data begins in the file, in bytes.
        size: of the whole file, in bytes.

    Raises:
        ValueError: they do not agree.
    """
    entries = []
    try:
        metadata = dict(header.get("__metadata__") or {})
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = _sizes(entry["data_offsets"])
            shape = _sizes(entry["shape"])
            tensor = Tensor(file, str(entry["dtype"]), shape, data + start, metadata)
            entries.append((tensor.start, data + end, name, tensor))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _no_tensors(file) from None
    position = data
    for start, end, name, tensor in sorted(entries, key=lambda entry: entry[:3]):
        if tensor.dtype not in _ITEM_BYTES or end - start != tensor.nbytes:
            raise ValueError(
                f"{file}: {name} is {tensor.dtype} {list(tensor.shape)} in {end - start} bytes, "
                "which does not agree"
            )
        if end > size:
            raise ValueError(
                f"{file} is truncated: {name} ends at byte {end}, the file at {size}. "
                "Download it again."
            )
        if start != position:
            raise ValueError(
                f"{file}: {name} begins at byte {start}, the data before it ends at {position}. "
                "Download it again."
            )
        position = end
    if position != size:
        raise ValueError(
            f"{file} has {size} bytes, but its last tensor ends at {position}. Download it again."
        )
    return Header({name: tensor for _, _, name, tensor in entries}, metadata)


def _sizes(value: Any) -> tuple[int, ...]:
    """A list of sizes or offsets as a tuple.

    Raises:
        TypeError: the value is no such list.
    """
    sizes = tuple(value)
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise TypeError(value)
    return sizes


def _no_tensors(file: Path) -> ValueError:
    return ValueError(f"{file} is not a safetensors file: its header says no tensors")


def read_rows(tensor: Tensor, first: int = 0, last: int | None = None) -> mx.array:
    """Reads rows ``first:last`` along the first axis at once (FP8 as bytes).

    Raises:
        ValueError: the file cannot be read or ends too early.
    """
    first, last, _ = slice(first, last).indices(tensor.shape[0])
    row_bytes = tensor.nbytes // tensor.shape[0]
    raw = np.empty((last - first) * row_bytes, np.uint8)
    view, filled = raw.data, 0
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.start + first * row_bytes)
            while filled < raw.nbytes and (count := stream.readinto(view[filled:])):
                filled += count
    except OSError as error:
        raise ValueError(f"{tensor.file} cannot be read: {error.strerror}") from None
    if filled < raw.nbytes:
        raise ValueError(f"{tensor.file} has been truncated since its header was read")
    return from_bytes(raw, tensor.dtype, (last - first, *tensor.shape[1:]))


def read_part(tensor: Tensor, index: tuple[Any, ...]) -> mx.array:
    """Reads the elements of a numpy index at once, and as little else as the file's pages allow.

    Raises:
        ValueError: the file cannot be read.
    """
    item = np.dtype(f"u{_ITEM_BYTES[tensor.dtype]}")
    try:
        whole = np.memmap(tensor.file, item, "r", tensor.start, tensor.shape)
    except (OSError, ValueError) as error:
        raise ValueError(f"{tensor.file} cannot be read: {error}") from None
    part = np.ascontiguousarray(whole[index])
    return from_bytes(part.view(np.uint8).reshape(-1), tensor.dtype, part.shape)


def from_bytes(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """The array of a dtype (safetensors' name; FP8 as bytes) whose data are ``raw`` (uint8)."""
    return mx.array(raw).view(DTYPES[dtype]).reshape(shape)


def converted(raw: np.ndarray, stored: str, dtype: mx.Dtype) -> np.ndarray:
    """Returns floats in another dtype, rounded as MLX rounds them, without MLX.

    Args:
        raw: their bytes. stored: safetensors' name of their dtype, BF16, F16 or F32.
        dtype: float32; or bfloat16 or float16, which come as uint16.
    """
    if DTYPES[stored] == dtype:
        return raw.view(np.float32 if dtype == mx.float32 else np.uint16)
    if stored == "BF16":
        wide = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        wide = raw.view({"F16": np.float16, "F32": np.float32}[stored]).astype(np.float32)
    if dtype == mx.float32:
        return wide
    if dtype == mx.float16:
        with np.errstate(over="ignore"):
            return wide.astype(np.float16).view(np.uint16)
    bits = wide.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def lay_out(
    file: Path,
    contents: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]],
    metadata: dict[str, str],
    alignment: int = 8,
) -> tuple[bytes, dict[str, Tensor]]:
    """The first bytes of a file to be written, and the place of each tensor behind them.

    The format allows no hole between tensors, but spaces behind the header's JSON.

    Args:
        contents: name -> dtype and shape, in the order of the file.
        metadata: the file's own.
        alignment: the data begins at a multiple of so many bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in contents.items():
        start, end = end, end + math.prod(shape) * dtype.size
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % alignment)
    data = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, parse(file, header, data, data + end).tensors
