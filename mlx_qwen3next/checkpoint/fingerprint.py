"""Telling models apart without reading all of their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ..storage.safetensors import Tensor
from .adapter import CONFIG_FILE, WEIGHT_FILE
from .files import find_files, read_headers
from .heads import Head

_VERSION = "1"  # of what this package computes from the same files
_SAMPLE_BYTES = 256  # read of each tensor


def fingerprint(directory: Path, *options: str) -> str:
    """Identifies a model, and so the values in its caches: its weights and how they are used.

    It covers the config, and every tensor's name, dtype, shape and first bytes, wherever the files
    are; thousands of tensors take well under a second.

    Args:
        directory: the model's.
        options: all else that matters (dtype, bits of keys and values, :func:`adapter_digest`).

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: the model's files cannot be read, see
            :func:`mlx_qwen3next.checkpoint.files.find_files`.
    """
    tensors = read_headers(find_files(directory))
    try:
        config = (directory / "config.json").read_bytes()
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    return _digest([_VERSION, options, len(config)], config, tensors)


def head_digest(head: Head | None) -> str:
    """The digest of another checkpoint's MTP head, 32 hexadecimal digits; "" without one.

    Raises:
        ValueError: its files cannot be read.
    """
    if head is None:
        return ""
    return _digest([_VERSION, head.config.to_dict()], b"", head.tensors)


def _digest(description: object, config: bytes, tensors: Mapping[str, Tensor]) -> str:
    """Digests a description, and every tensor's name, dtype, shape and first bytes.

    Raises:
        ValueError: a file cannot be read.
    """
    digest = hashlib.blake2b(json.dumps(description).encode() + config, digest_size=16)
    try:
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(file.open("rb", buffering=0))
                for file in {tensor.file for tensor in tensors.values()}
            }
            for name, tensor in sorted(tensors.items()):
                stream = files[tensor.file]
                stream.seek(tensor.start)
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                digest.update(stream.read(min(tensor.nbytes, _SAMPLE_BYTES)))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def adapter_digest(directory: str | Path | None) -> str:
    """The digest of an adapter's files, 128 hexadecimal digits; one of its own without an adapter.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b()
    if directory is not None:
        for name in (CONFIG_FILE, WEIGHT_FILE):
            digest.update((Path(directory) / name).read_bytes())
    return digest.hexdigest()
