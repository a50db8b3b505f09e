"""Finding a model: a local directory, a repository of the Hugging Face hub, or the bundled one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from ..errors import first_line
from ..model.config import Config, read_json
from . import foreign
from .files import INDEX_FILE, read_weight_map

BUNDLED = Path(__file__).parents[1] / "bundled"  # the demo model's directory

_DOWNLOAD = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")


def resolve(path_or_repo: str | Path | None, revision: str | None = None) -> Path:
    """The local directory of a path or of a hub repository, which is downloaded if needed.

    Args:
        path_or_repo: None for the bundled model.
        revision: branch, tag or commit of a repository.

    Raises:
        ValueError: there is no such directory or repository, or it cannot be read.
    """
    if path_or_repo is None:
        return BUNDLED
    directory, repo = local_directory(path_or_repo), str(path_or_repo)
    if directory is not None:
        return directory
    with hub_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_DOWNLOAD)))


def read_config(path_or_repo: str | Path | None = None, revision: str | None = None) -> Config:
    """The config of a model. No weights of a repository are fetched.

    Args:
        path_or_repo, revision: as for :func:`resolve`.

    Raises:
        ValueError: there is no such model, or it is none that this package runs.
    """
    directory = BUNDLED if path_or_repo is None else local_directory(path_or_repo)
    if directory is not None:
        return Config.from_file(directory / "config.json")
    repo = str(path_or_repo)
    with hub_errors(repo):
        file = hf_hub_download(repo, "config.json", revision=revision)
    config, raw = Config.from_file(file), read_json(file)
    if raw.get("quantization_config") and not raw.get("quantization"):
        foreign.refuse_unloadable_names(repo, _fetch_names(repo, revision), raw)
    return config


def _fetch_names(repo: str, revision: str | None) -> list[str]:
    """The names of the tensors that a repository's index lists; none where it has no index."""
    index = find_file(repo, INDEX_FILE, revision)
    return [] if index is None else list(read_weight_map(index))


def find_file(
    path_or_repo: str | Path | None, name: str, revision: str | None = None
) -> Path | None:
    """The local path of a small file of a model, which is fetched alone from a repository.

    Args:
        path_or_repo, revision: as for :func:`resolve`.
        name: the file's.

    Returns:
        None if the model has no such file, or if the hub cannot be asked and the file is not here.

    Raises:
        ValueError: there is no such model.
    """
    directory = BUNDLED if path_or_repo is None else local_directory(path_or_repo)
    if directory is not None:
        file = directory / name
        return file if file.exists() else None
    repo = str(path_or_repo)
    with hub_errors(repo):
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except EntryNotFoundError:  # the hub's, or the cache's where the hub is out of reach
            return None


def local_directory(path_or_repo: str | Path) -> Path | None:
    """The model directory of a path; None if there is none and the path reads as a repository id.

    Raises:
        ValueError: it is neither.
    """
    repo, path = str(path_or_repo), Path(path_or_repo)
    try:
        path = path.expanduser()
        names = os.listdir(path)
    except FileNotFoundError:
        names = None
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if names is not None:
        if "config.json" not in names:
            raise ValueError(f"{path} is no model directory: it has no config.json")
        return path
    if path.is_absolute() or repo.startswith((".", "~")) or repo.count("/") != 1:
        raise ValueError(f"{repo} does not exist, and is no repository id (owner/name)")
    return None


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns every error of the hub's client into a ValueError of one line.

    Raises:
        ValueError: the block failed.
    """
    try:
        yield
    except HFValidationError as error:
        reason = first_line(error)
        raise ValueError(f"{repo} is neither a directory nor a repository id: {reason}") from None
    except Exception as error:  # the hub's client has a dozen unrelated kinds
        reason = first_line(error)
        raise ValueError(f"{repo} is no local directory and cannot be fetched: {reason}") from error
