"""Loading a DFlash drafter, as published (``z-lab/…-DFlash``) or quantized by MLX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..model import layouts
from ..model.config import Config
from ..model.dflash import DFlash, DFlashConfig
from ..model.qwen3_next import Model
from ..storage.safetensors import Tensor
from . import files, match
from .hub import resolve
from .quantized import quantize_modules


@dataclass(frozen=True)
class Drafter:
    """A drafter on disk.

    Attributes:
        directory: the checkpoint's.
        config: its config.
        tensors: name -> stored tensor.
    """

    directory: Path
    config: DFlashConfig
    tensors: dict[str, Tensor]


def find_drafter(path_or_repo: str | Path, target: Config) -> Drafter:
    """Finds a drafter for a model, after fetching it if it is a repository of the hub.

    Raises:
        ValueError: it cannot be read, or is no DFlash drafter, or drafts for another model.
    """
    drafter = read_drafter(resolve(path_or_repo))
    config = drafter.config
    pairs = {
        "hidden_size": (config.hidden_size, target.hidden_size),
        "vocab_size": (config.vocab_size, target.vocab_size),
        "num_target_layers": (config.num_target_layers, target.num_hidden_layers),
    }
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"{path_or_repo} drafts for another model: {key} is {theirs}, but this model has "
                f"{ours}"
            )
    return drafter


def read_drafter(directory: Path) -> Drafter:
    """Reads a drafter's config and the headers of its files.

    Raises:
        ValueError: they cannot be read, or it is no DFlash drafter.
    """
    config = DFlashConfig.from_file(directory / "config.json")
    return Drafter(directory, config, files.read_headers(files.find_files(directory)))


def attach_drafter(model: Model, drafter: Drafter, dtype: mx.Dtype) -> None:
    """Loads a drafter and gives it to a model, which drafts with it from now on.

    Raises:
        ValueError: as for :func:`load_drafter`.
    """
    # Not as a part of the model, whose parameters are the checkpoint's.
    vars(model)["dflash"] = load_drafter(drafter, dtype)


def load_drafter(drafter: Drafter, dtype: mx.Dtype) -> DFlash:
    """Loads a drafter.

    Args:
        dtype: of the floating-point weights; norm weights are float32 always.

    Raises:
        ValueError: its tensors are not those of its config; the message names the file.
    """
    dflash = DFlash(drafter.config)
    quantize_modules(dflash, drafter.tensors)
    leaves: Any = tree_flatten(dflash.parameters())
    for path, array in leaves:
        dtypes = match.stored_dtypes(array)
        match.check_tensor(path, drafter.tensors, tuple(array.shape), dtypes, drafter.directory)
    if surplus := drafter.tensors.keys() - {path for path, _ in leaves}:
        name = min(surplus)
        raise ValueError(f"{drafter.tensors[name].file}: the tensor {name} has no place in it")
    origins = layouts.origins({path: tuple(a.shape) for path, a in leaves}, "converted")
    for path, value in match.read(origins, drafter.tensors, dtype):
        dflash.load_weights([(path, value)], strict=False)
    dflash.eval()
    return dflash
