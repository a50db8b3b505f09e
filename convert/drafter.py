"""Converting a DFlash drafter: small enough to be quantized in memory and written at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qwen3next.checkpoint.drafters import load_drafter, read_drafter
from mlx_qwen3next.checkpoint.hub import find_file, resolve
from mlx_qwen3next.model.config import read_json
from mlx_qwen3next.storage import safetensors
from mlx_qwen3next.storage.replacing import replacing, write_text

from .quantize import Quantization


def is_drafter(path_or_repo: str, revision: str | None) -> bool:
    """Whether a directory or repository is a DFlash drafter. What cannot be read is none."""
    try:
        config = find_file(path_or_repo, "config.json", revision)
        return config is not None and "dflash_config" in read_json(config)
    except ValueError:
        return False


def convert_drafter(
    path_or_repo: str,
    revision: str | None,
    target: Path,
    partial: Path,
    dtype: mx.Dtype | None,
    base: Quantization | None,
) -> None:
    """Writes a drafter's config and weights, quantized or not.

    Args:
        target, partial: the folder to make, and the one to work in; neither is there yet.
        dtype: of what stays floating point; None for that of the first matrix.
        base: the quantization; None for none.

    Raises:
        ValueError: the drafter cannot be read, or is quantized already.
    """
    source = read_drafter(resolve(path_or_repo, revision))
    stored = source.tensors.get("fc.weight")
    if any(name.endswith(".scales") for name in source.tensors):
        raise ValueError(f"{path_or_repo} is quantized already")
    dtype = dtype or (safetensors.DTYPES.get(stored.dtype) if stored else None) or mx.bfloat16
    dflash = load_drafter(source, dtype)
    raw = read_json(source.directory / "config.json")
    if base is not None:
        group_size = base["group_size"]

        def predicate(path: str, module: nn.Module) -> bool:
            return hasattr(module, "to_quantized") and not module.weight.shape[-1] % group_size

        nn.quantize(dflash, class_predicate=predicate, **base)
        raw["quantization"] = base
    leaves: Any = tree_flatten(dflash.parameters())
    partial.mkdir(parents=True)
    try:
        with replacing(partial / "model.safetensors", ".partial.safetensors") as file:
            mx.save_safetensors(str(file), dict(leaves), {"format": "mlx"})
        write_text(partial / "config.json", json.dumps(raw, indent=2) + "\n")
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
