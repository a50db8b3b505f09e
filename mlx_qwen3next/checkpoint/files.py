"""The safetensors files of a model directory: which there are, what their headers say, their rows.

Headers alone answer most questions (is it whole, does it fit the model, does it fit the machine),
so that a 45 GB checkpoint with a mistake is refused before its first weight is read. The same
holds for writing: :func:`lay_out` settles every byte's place before the first weight is there.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a JSON header,
then the data).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

# The trunk's shards; what else there may be beside them is below.
INDEX = "model.safetensors.index.json"
HEAD = "mtp.safetensors"  # the MTP head of a converted model
# Exact norm weights of a converted model: what is in the shards is rounded to its dtype, which
# mlx-lm needs to compute in that dtype.
NORMS = "norms.safetensors"

_LONGEST_HEADER = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


# safetensors' names of MLX's dtypes; FP8 has none there and is read as bytes.
DTYPES = {
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32,
    "U8": mx.uint8, "U32": mx.uint32, "F8_E4M3": mx.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "F8_E4M3"}


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    file: Path
    dtype: str  # safetensors' name: "BF16", "U32", …
    shape: tuple[int, ...]
    start: int = 0  # of its data, in bytes from the file's beginning

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def find_files(directory: Path) -> list[Path]:
    """The directory's weight files: the trunk's, and those beside them that are there.

    Raises:
        ValueError: there are none, or the index is none or names a file that is missing.
    """
    index = directory / INDEX
    if index.exists():
        files = [directory / name for name in read_index(index)]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; {INDEX} lists it. Download it again.")
    else:
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{directory} has no model*.safetensors")
    beside = [directory / name for name in (HEAD, NORMS)]
    return files + [file for file in beside if file.exists() and file not in files]


def read_index(index: Path) -> list[str]:
    """The files an index lists.

    Raises:
        ValueError: it cannot be read or lists none.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except OSError as error:
        raise ValueError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is not a safetensors index") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} is not a safetensors index: its weight_map lists no files")
    return sorted(names)


def read_headers(files: list[Path]) -> dict[str, Tensor]:
    """Name -> tensor over all files; where :data:`NORMS` has a tensor, that one.

    Raises:
        ValueError: a file is truncated or no safetensors file, or two hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_header(file)[0].items():
            if name in tensors and file.name != NORMS:
                raise ValueError(f"{name} is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What the file says of itself.

    Raises:
        ValueError: as for :func:`read_headers`.
    """
    return _read_header(file)[1]


def _read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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
        metadata = dict(header.pop("__metadata__", None) or {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _no_tensors(file) from None
    return parse(file, header, data=8 + length, size=size), metadata


def parse(file: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, Tensor]:
    """The tensors of a header, after checking that they and the file agree.

    Args:
        header: name -> ``dtype``, ``shape`` and ``data_offsets``.
        data: where the data begins in the file.
        size: of the whole file in bytes.

    Raises:
        ValueError: they do not agree.
    """
    entries = []
    try:
        for name, entry in header.items():
            start, end = _sizes(entry["data_offsets"])
            tensor = Tensor(file, str(entry["dtype"]), _sizes(entry["shape"]), data + start)
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
    return {name: tensor for _, _, name, tensor in entries}


def _no_tensors(file: Path) -> ValueError:
    return ValueError(f"{file} is not a safetensors file: its header says no tensors")


def read_rows(tensor: Tensor, first: int = 0, last: int | None = None) -> mx.array:
    """Rows ``first:last`` along the first axis, read now (FP8 as bytes).

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
    """Some elements, read now: of the file as little as its pages allow.

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
    """The array that ``raw`` (bytes) holds (FP8 as bytes)."""
    return mx.array(raw).view(DTYPES[dtype]).reshape(shape)


def lay_out(
    file: Path, contents: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, Tensor]]:
    """A file to be: its first bytes, and where each tensor goes behind them.

    Args:
        contents: name -> dtype and shape, in the order of the file.
        metadata: what the file is to say of itself.
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
    raw += b" " * (-len(raw) % 8)
    del header["__metadata__"]
    data = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, parse(file, header, data, data + end)


def _sizes(value: Any) -> tuple[int, ...]:
    """A list of sizes or offsets.

    Raises:
        TypeError: it is none.
    """
    sizes = tuple(value)
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise TypeError(value)
    return sizes
