"""The weight files of a model directory, and the tensors in them, from the files' headers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from ..storage.safetensors import Tensor, read_header

GENERATION_CONFIG = "generation_config.json"  # transformers' defaults: stop tokens, sampling
INDEX_FILE = "model.safetensors.index.json"  # lists the trunk's files where there are several
MTP_FILE = "mtp.safetensors"  # the MTP head of a converted model
# Exact norm weights of a converted model: those among the trunk's files are rounded to the dtype
# that mlx-lm is to compute in.
NORMS_FILE = "norms.safetensors"


def find_files(directory: Path) -> list[Path]:
    """The weight files of a directory: the trunk's, then the MTP head's and the norms' if any.

    Raises:
        ValueError: there are none, or the index is none or names a file that is missing.
    """
    index = directory / INDEX_FILE
    if index.exists():
        files = [directory / name for name in read_index(index)]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; {INDEX_FILE} lists it. Download it again.")
    else:
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{directory} has no model*.safetensors")
    beside = [directory / name for name in (MTP_FILE, NORMS_FILE)]
    return files + [file for file in beside if file.exists() and file not in files]


def read_index(index: Path) -> list[str]:
    """The names of the files that an index lists, sorted.

    Raises:
        ValueError: the index cannot be read or lists none.
    """
    return sorted(set(read_weight_map(index).values()))


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of its file, as an index says.

    Raises:
        ValueError: the index cannot be read or lists none.
    """
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except OSError as error:
        raise ValueError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is not a safetensors index") from None
    if not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} is not a safetensors index: its weight_map lists no files")
    return files


def read_headers(files: list[Path]) -> dict[str, Tensor]:
    """Name -> tensor over all files. A tensor of :data:`NORMS_FILE` replaces another file's.

    Raises:
        ValueError: a file is truncated or no safetensors file, or two hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).tensors.items():
            if name in tensors and file.name != NORMS_FILE:
                raise ValueError(f"{name} is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    return tensors


def open_file(file: Path) -> dict[str, mx.array]:
    """The tensors of a file, which are read when they are evaluated.

    Raises:
        ValueError: MLX cannot read it.
    """
    try:
        arrays = mx.load(str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays
