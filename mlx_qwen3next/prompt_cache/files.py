"""Prompt caches on disk: a safetensors file of a piece of text, or of several in a row.

Every array has a checksum that also covers the file's metadata, so that a file is read lazily,
array by array, and no damage goes unnoticed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import uuid
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import IO

import numpy as np

from ..storage import safetensors
from ..storage.replacing import replacing
from .pieces import Arrays, Piece, Stored, checksum, data

_FORMAT = "mlx_qwen3next prompt cache"
_VERSION = "1"  # of the files; another one is not read
_RETRY_SECONDS = 60.0  # until the next attempt after a failed one
_SUFFIX, _UNFINISHED = ".safetensors", ".part"
_LOCK = "lock"

_NOT_KEPT = "The prompt cache in %s is not kept: %s"

logger = logging.getLogger("mlx_qwen3next")


# --- one file ------------------------------------------------------------------------------------
def write_file(file: Path, pieces: Sequence[Piece], fingerprint: str, parent: str = "") -> None:
    """Replaces a file by one of pieces that follow each other.

    Args:
        pieces: their arrays are all in memory.
        fingerprint: the model's, see :func:`mlx_qwen3next.checkpoint.fingerprint.fingerprint`.
        parent: the name of the text before the first piece.

    Raises:
        OSError: the file cannot be written, and is as it was.
    """
    arrays = {f"{i}.{name}": x for i, piece in enumerate(pieces) for name, x in piece.contents()}
    metadata = {
        "format": f"{_FORMAT} {_VERSION}",
        "fingerprint": fingerprint,
        "parent": parent,
        "start": str(pieces[0].start),
        "quantization": json.dumps([piece.quantization for piece in pieces]),
    }
    contents = {name: (x.dtype, x.shape) for name, x in arrays.items()}
    metadata["arrays"] = _digest(
        {name: (safetensors.NAMES[x.dtype], x.shape) for name, x in arrays.items()}
    )
    checksums = {name: checksum(_description(metadata, name), x) for name, x in arrays.items()}
    header, _ = safetensors.lay_out(file, contents, metadata | {"checksums": json.dumps(checksums)})
    ending = f".{uuid.uuid4().hex}{_UNFINISHED}"
    with replacing(file, ending) as unfinished, unfinished.open("wb") as stream:
        stream.write(header)
        for array in arrays.values():
            stream.write(data(array))


def read_file(file: Path, fingerprint: str) -> tuple[str, list[Piece]]:
    """Reads a file of :func:`write_file`.

    Returns:
        The name of the text before the first piece, and the pieces, whose arrays are still in the
        file.

    Raises:
        ValueError: the file is no prompt cache, belongs to another model, or is damaged.
    """
    tensors, metadata = safetensors.read_header(file)
    if metadata.get("format") != f"{_FORMAT} {_VERSION}":
        raise ValueError(f"{file} is not a prompt cache, or one of another version")
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{file} belongs to another model, or to one that was loaded with other options"
        )
    try:
        checksums = json.loads(metadata["checksums"])
        metadata = {key: text for key, text in metadata.items() if key != "checksums"}
        parts: dict[int, dict[str, Arrays]] = {}
        if metadata["arrays"] != _digest({name: (x.dtype, x.shape) for name, x in tensors.items()}):
            raise ValueError
        for name, tensor in tensors.items():
            number, part, *key = name.split(".", 2)
            arrays = parts.setdefault(int(number), {}).setdefault(part, {})
            arrays["".join(key)] = Stored(tensor, _description(metadata, name), checksums[name])
        pieces, start = [], int(metadata["start"])
        for i, quantization in enumerate(json.loads(metadata["quantization"])):
            tokens = np.array(parts[i]["tokens"][""].read())
            kv, head, checkpoint = (parts[i].get(of, {}) for of in ("kv", "head", "checkpoint"))
            quantized = quantization and (quantization[0], quantization[1])
            pieces.append(Piece(start, tokens, kv, head, checkpoint, quantized))
            start += tokens.size
        return metadata["parent"], pieces
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file} is damaged") from None


def is_ours(file: Path) -> bool:
    """Whether a file holds a prompt cache in this module's form, of any version and model.

    mlx-lm's own prompt caches are safetensors files as well.
    """
    try:
        return str(safetensors.read_header(file).metadata.get("format")).startswith(_FORMAT)
    except ValueError:
        return False


def _digest(arrays: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """The digest of the arrays' names, dtypes and shapes."""
    return hashlib.blake2b(json.dumps(arrays, sort_keys=True).encode(), digest_size=16).hexdigest()


def _description(metadata: dict[str, str], name: str) -> str:
    """The text that an array's checksum covers beside the array."""
    return json.dumps([metadata, name], sort_keys=True)


# --- a directory of them -------------------------------------------------------------------------
class Folder:
    """A file for each piece of a tree, in a directory of its own, for one process at a time.

    A piece that cannot be written is tried again later, after one warning; nothing here raises.
    """

    def __init__(self, directory: Path, fingerprint: str, lock: IO):
        self._directory, self._fingerprint = directory, fingerprint
        self._failed = -math.inf  # when writing last failed, in seconds of monotonic()
        self._warned = False
        self.release = weakref.finalize(self, lock.close)

    @classmethod
    def take(cls, directory: Path, fingerprint: str) -> Folder | None:
        """Takes a folder, locked until it is released, unreferenced, or its process ends.

        Logs the folders beside it. Returns None, after a warning, if it cannot be locked.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                lock = stack.enter_context((directory / _LOCK).open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stack.pop_all()
        except OSError as error:
            taken = isinstance(error, BlockingIOError)
            reason = "another process, or another cache in this one, uses it" if taken else error
            logger.warning(_NOT_KEPT, directory, reason)
            return None
        _log_others(directory)
        return cls(directory, fingerprint, lock)

    def read(self) -> dict[str, tuple[str, Piece]]:
        """Name -> parent's name and piece, its arrays still in its file. Removes useless files."""
        found = {}
        try:
            files = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._warn(error)
            return {}
        for file in files:
            if file.suffix == _UNFINISHED:
                self._unlink(file)
            elif file.suffix == _SUFFIX:
                try:
                    parent, (piece,) = read_file(file, self._fingerprint)
                    found[file.stem] = parent, piece
                except ValueError as error:
                    self.reject(file.stem, str(error))
        return found

    def write(self, name: str, parent: str, piece: Piece) -> bool:
        """Writes a piece whose arrays are in memory; returns whether it is written."""
        if monotonic() < self._failed + _RETRY_SECONDS:
            return False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_file(self._file(name), [piece], self._fingerprint, parent)
        except OSError as error:
            self._failed = monotonic()
            self._warn(error)
            return False
        self._warned = False
        return True

    def remove(self, name: str) -> None:
        """Removes a piece's file if there is one."""
        self._unlink(self._file(name))

    def reject(self, name: str, reason: str) -> None:
        """Removes a piece's file, and warns of the reason."""
        logger.warning("Part of the prompt cache is dropped: %s", reason)
        self.remove(name)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}{_SUFFIX}"

    def _unlink(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning(_NOT_KEPT, self._directory, error)
        self._warned = True


def _log_others(directory: Path) -> None:
    """Logs the folders beside this one, such as an update of the model or this package leaves."""
    try:
        folders = sorted(directory.parent.iterdir())
    except OSError:
        return
    others = {f.name: size for f in folders if f != directory and (size := _size(f))}
    if others:
        logger.info(
            "Prompt caches of other models or options: %.1f GB in %s (%s); "
            "remove what is not needed",
            sum(others.values()) / 1e9,
            directory.parent,
            ", ".join(others),
        )


def _size(folder: Path) -> int:
    """The bytes of a folder's files; 0 if any of them is no prompt cache's."""
    try:
        files = [f for f in folder.iterdir() if f.name != _LOCK and f.suffix != _UNFINISHED]
        ours = all(file.suffix == _SUFFIX and is_ours(file) for file in files)
        return sum(file.stat().st_size for file in files) if ours else 0
    except OSError:  # it is a file, say
        return 0
