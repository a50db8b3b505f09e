"""Matching the model's parameters with a checkpoint's tensors: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model import layouts, packing
from ..model.config import Config
from ..model.layouts import Layout, Origin, Shape
from ..model.qwen3_next import Model
from ..storage.safetensors import Tensor

FLOATS = ("BF16", "F16", "F32")  # safetensors' names of the dtypes that weights are computed with


def find_origins(
    parameters: Mapping[str, Shape], tensors: Mapping[str, Tensor]
) -> dict[str, Origin]:
    """The origin of each parameter in a checkpoint, in whatever layout trunk and MTP head are.

    A head that does not show its layout is in the trunk's.

    Args:
        parameters: path -> shape of the model's (possibly quantized) parameters.
        tensors: the checkpoint's, by name.
    """
    origins: dict[str, Origin] = {}
    layout: Layout = "hub"
    for mtp in (False, True):
        part = {path: shape for path, shape in parameters.items() if layouts.is_mtp(path) == mtp}
        stored = {name: x for name, x in tensors.items() if layouts.is_mtp(name) == mtp}
        layout = layouts.detect_layout(stored, undecided=layout)
        origins |= layouts.origins(part, layout)
    return origins


def stored_dtypes(array: mx.array) -> tuple[str, ...]:
    """safetensors' names of the dtypes that a parameter may be stored in."""
    if mx.issubdtype(array.dtype, mx.floating):
        return FLOATS
    return ("U8",) if array.dtype == mx.uint8 else ("U32",)


def dtype_in_memory(path: str, array: mx.array, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype in memory of a parameter of a model of ``dtype``."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array.dtype
    return mx.float32 if layouts.is_float32(path) else dtype


def bytes_in_memory(module: nn.Module, dtype: mx.Dtype) -> dict[str, int]:
    """The bytes in memory of each parameter of a module of ``dtype``, by its path."""
    leaves: Any = tree_flatten(module.parameters())
    return {path: a.size * dtype_in_memory(path, a, dtype).size for path, a in leaves}


def added_by_packing(model: Model, dtype: mx.Dtype) -> int:
    """The bytes that a model of ``dtype`` takes more in memory once it is packed.

    That is where matrices are stacked at the most bits of them; nothing is computed.
    """
    layers = [*model.layers, *(() if model.mtp is None else model.mtp.layers)]
    return sum(
        sum(bytes_in_memory(packing.packed_layer(layer), dtype).values())
        - sum(bytes_in_memory(layer, dtype).values())
        for layer in layers
    )


def check_tensor(
    name: str,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtypes: tuple[str, ...],
    directory: Path,
) -> None:
    """Checks that a checkpoint has a tensor as the model needs it.

    Args:
        tensors: the checkpoint's, by name.
        dtypes: safetensors' names of the dtypes that it may have.
        directory: the checkpoint's, for the message.

    Raises:
        ValueError: the tensor is missing, or of another shape or dtype.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{directory}: the tensor {name} is missing from every file")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{tensor.file}: {name} is {tensor.dtype}, not {' or '.join(dtypes)}")
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
            f"but the config asks for {list(shape)}"
        )


def refuse_surplus(tensors: Mapping[str, Tensor], used: Collection[str], config: Config) -> None:
    """Checks that the model uses every tensor, except those that no model needs.

    Args:
        tensors: the checkpoint's, by name.
        used: names of the tensors that the model uses.

    Raises:
        ValueError: a tensor is left over.
    """
    for name, tensor in tensors.items():
        if name not in used and not layouts.is_ignored(name, config):
            raise ValueError(f"{tensor.file}: the tensor {name} has no place in this model")
