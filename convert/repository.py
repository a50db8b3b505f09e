"""A repository of the hub as a source: headers come first, weight files when needed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from tqdm.contrib.concurrent import thread_map

from mlx_qwen3next.checkpoint.files import INDEX_FILE, MTP_FILE, NORMS_FILE, read_index
from mlx_qwen3next.checkpoint.hub import hub_errors, local_directory
from mlx_qwen3next.storage import safetensors
from mlx_qwen3next.storage.safetensors import Tensor

from .source import SMALL_FILES, Source


class Repository(Source):
    """A repository of the hub.

    Attributes:
        streamed: the folder in which a weight file is kept only as long as it is needed; None if
            all are kept in the hub's cache.
    """

    def __init__(self, repo: str, revision: str | None = None, streamed: Path | None = None):
        """Reads all headers.

        Args:
            revision: branch, tag or commit.
            streamed: as the attribute.

        Raises:
            ValueError: the repository cannot be read or holds no model.
        """
        self.streamed = streamed
        self._api = HfApi()
        with hub_errors(repo):
            info = self._api.model_info(repo, revision=revision, files_metadata=True)
            self.name, self.revision = info.id, info.sha
            directory = Path(
                snapshot_download(self.name, revision=info.sha, allow_patterns=list(SMALL_FILES))
            )
        self._remote = {sibling.rfilename: sibling for sibling in info.siblings or []}
        if "config.json" not in self._remote:
            raise ValueError(f"{repo} is no model repository: it has no config.json")
        where = streamed or directory
        headers = thread_map(self._header, self._files(directory), desc="headers", leave=False)
        tensors: dict[str, Tensor] = {}
        for file, header, data, size in headers:
            tensors |= safetensors.parse(where / file, header, data, size).tensors
        self._fetched: set[Path] = set()
        self._open(directory, tensors)

    def _files(self, directory: Path) -> list[str]:
        if INDEX_FILE in self._remote:
            files = read_index(directory / INDEX_FILE)
        else:
            files = sorted(
                name
                for name in self._remote
                if name.startswith("model") and name.endswith(".safetensors")
            )
        files += [name for name in (MTP_FILE, NORMS_FILE) if name in self._remote]
        if missing := [name for name in files if name not in self._remote]:
            raise ValueError(f"{self.name} has no {missing[0]}, which its index lists")
        if not files:
            raise ValueError(f"{self.name} has no model*.safetensors")
        return list(dict.fromkeys(files))

    def _header(self, file: str) -> tuple[str, dict[str, Any], int, int]:
        """A weight file's name, header, beginning of the data and size."""
        with hub_errors(self.name):
            metadata = self._api.parse_safetensors_file_metadata(
                self.name, file, revision=self.revision
            )
        tensors: dict[str, Any] = {
            name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for name, t in metadata.tensors.items()
        }
        size = self._remote[file].size or 0
        data = size - max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        return file, {"__metadata__": metadata.metadata, **tensors}, data, size

    @property
    def contents(self) -> list[Any]:
        return [self.name, self.revision]

    def peek(self, name: str) -> mx.array:
        tensor = self.tensors[name]
        if tensor.file.exists():
            return super().peek(name)
        with hub_errors(self.name):
            raw = HfFileSystem(skip_instance_cache=True).cat_file(
                f"{self.name}@{self.revision}/{tensor.file.name}",
                start=tensor.start,
                end=tensor.start + tensor.nbytes,
                cache_type="none",  # any other reads megabytes ahead
            )
        return safetensors.from_bytes(np.frombuffer(raw, np.uint8), tensor.dtype, tensor.shape)

    @property
    def sizes(self) -> dict[Path, int]:
        """Weight file -> its size in bytes."""
        return {file: self._remote[file.name].size or 0 for file in self.files()}

    def missing_bytes(self) -> int:
        """Bytes that are still to be downloaded."""
        return sum(size for file, size in self.sizes.items() if not file.exists())

    def fetch(self, file: Path) -> None:
        if file in self._fetched:
            return
        try:
            with hub_errors(self.name):
                hf_hub_download(
                    self.name, file.name, revision=self.revision, local_dir=self.streamed
                )
        except ValueError as error:
            raise ValueError(f"{error}; the same command goes on from there") from None
        lfs = self._remote[file.name].lfs
        with file.open("rb") as stream:
            if lfs and hashlib.file_digest(stream, "sha256").hexdigest() != lfs.sha256:
                for path in {file.resolve(), file}:
                    path.unlink()
                raise ValueError(
                    f"{file.name} arrived altered: it is not what {self.name} announces. It was "
                    "deleted; the same command fetches it again."
                )
        headers = safetensors.read_header(file).tensors
        if headers != {n: t for n, t in self.tensors.items() if t.file == file}:
            raise ValueError(f"{file} has not the tensors that its header had before")
        self._fetched.add(file)

    def release(self, file: Path) -> None:
        if self.streamed is not None:
            file.unlink(missing_ok=True)
            self._fetched.discard(file)


def open_source(
    path_or_repo: str | Path, revision: str | None = None, streamed: Path | None = None
) -> Source:
    """A local directory or a hub repository, as :func:`mlx_qwen3next.load` tells them apart.

    Args:
        revision, streamed: see :class:`Repository`.

    Raises:
        ValueError: it cannot be read.
    """
    directory = local_directory(path_or_repo)
    if directory is None:
        return Repository(str(path_or_repo), revision, streamed)
    return Source(directory)
