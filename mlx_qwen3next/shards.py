"""The safetensors files of a model directory: which there are and what their headers say.

Headers alone answer most questions (is it whole, does it fit the model, does it fit the machine),
so that a 45 GB checkpoint with a mistake is refused before its first weight is read.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a JSON header,
then the data).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_INDEX = "model.safetensors.index.json"
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
        count = 1
        for n in self.shape:
            count *= n
        return count * _ITEM_BYTES[self.dtype]


def find_files(directory: Path) -> list[Path]:
    """The directory's weight files: the trunk's, and ``mtp.safetensors`` if it is there.

    Raises:
        ValueError: there are none, or the index names a file that is missing.
    """
    index = directory / _INDEX
    if index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is not a safetensors index") from None
        files = [directory / name for name in names]
        for file in files:
            if not file.exists():
                raise ValueError(f"{file} is missing; {_INDEX} lists it. Download it again.")
    else:
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{directory} has no model*.safetensors")
    sidecar = directory / "mtp.safetensors"
    return files + ([sidecar] if sidecar.exists() and sidecar not in files else [])


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
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is truncated in its header ({size} bytes). Download it again."
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            spans = {name: entry["data_offsets"] for name, entry in header.items()}
            tensors = {
                name: Tensor(file, entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is not a safetensors file: its header is no JSON") from None
    for name, tensor in tensors.items():
        start, end = spans[name]
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
    return tensors
