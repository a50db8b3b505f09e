"""The safetensors files of a model directory: which there are and what their headers say.

Headers alone answer most questions (is it whole, does it fit the model, does it fit the machine),
so that a 45 GB checkpoint with a mistake is refused before its first weight is read.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a JSON header,
then the data).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    file: Path
    dtype: str  # safetensors' name: "BF16", "U32", …
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def find_files(directory: Path) -> list[Path]:
    """The directory's weight files: the trunk's, and ``mtp.safetensors`` if it is there.

    Raises:
        ValueError: there are none, or the index is none or names a file that is missing.
    """
    index = directory / _INDEX
    if index.exists():
        files = [directory / name for name in _indexed(index)]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; {_INDEX} lists it. Download it again.")
    else:
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{directory} has no model*.safetensors")
    sidecar = directory / "mtp.safetensors"
    return files + ([sidecar] if sidecar.exists() and sidecar not in files else [])


def _indexed(index: Path) -> list[str]:
    """The files an index lists."""
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
    """Name -> tensor over all files.

    Raises:
        ValueError: a file is truncated or no safetensors file, or two hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise ValueError(f"{name} is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    return tensors


def _read_header(file: Path) -> dict[str, Tensor]:
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
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            start, end = _sizes(entry["data_offsets"])
            tensor = Tensor(file, str(entry["dtype"]), _sizes(entry["shape"]))
            entries[name] = (tensor, start, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} is not a safetensors file: its header says no tensors") from None
    for name, (tensor, start, end) in entries.items():
        if tensor.dtype not in _ITEM_BYTES or end - start != tensor.nbytes:
            raise ValueError(
                f"{file}: {name} is {tensor.dtype} {list(tensor.shape)} in {end - start} bytes, "
                "which does not agree"
            )
        if 8 + length + end > size:
            raise ValueError(
                f"{file} is truncated: {name} ends at byte {8 + length + end}, the file at {size}. "
                "Download it again."
            )
    return {name: tensor for name, (tensor, _, _) in entries.items()}


def _sizes(value: Any) -> tuple[int, ...]:
    """A list of sizes or offsets.

    Raises:
        TypeError: it is none.
    """
    sizes = tuple(value)
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise TypeError(value)
    return sizes
