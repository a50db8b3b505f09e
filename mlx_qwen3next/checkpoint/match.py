"""Parameters from a checkpoint's tensors: matched exactly or not at all, then read one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model import layouts
from ..model.config import Config
from ..model.layouts import Layout, Origin, Shape
from ..model.packed import packing
from ..model.qwen3_next import Model
from ..model.sharding import Shard, take
from ..storage.safetensors import Tensor, read_part
from . import files

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


def matched(
    parameters: Mapping[str, mx.array],
    tensors: Mapping[str, Tensor],
    config: Config,
    directory: Path,
) -> dict[str, Origin]:
    """The origin of each parameter, after checking that tensors and parameters agree exactly.

    Args:
        parameters: the model's, by path; their values do not matter.
        tensors: the checkpoint's, by name.
        config: the model's.
        directory: the checkpoint's, for messages.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape or dtype.
    """
    origins = find_origins({p: tuple(a.shape) for p, a in parameters.items()}, tensors)
    used: set[str] = set()
    for path, array in parameters.items():
        for name in origins[path].names:
            dtypes = stored_dtypes(array)
            check_tensor(name, tensors, origins[path].shape, dtypes, directory)
            used.add(name)
    refuse_surplus(tensors, used, config)
    return origins


def read(
    origins: Mapping[str, Origin],
    tensors: Mapping[str, Tensor],
    dtype: mx.Dtype,
    part: Shard | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """Reads parameters: the path and the evaluated value of each, one at a time.

    Args:
        origins: by path.
        tensors: the checkpoint's, by name.
        dtype: the model's.
        part: of the model that this rank has; None for all.

    Raises:
        ValueError: a file cannot be read, or a value is NaN or infinite.
    """
    lazy: dict[str, mx.array] = {}
    for file in {tensor.file: None for tensor in tensors.values()}:
        lazy |= {
            name: array
            for name, array in files.open_file(file).items()
            if name in tensors and tensors[name].file == file
        }
    uses = Counter(name for origin in origins.values() for name in origin.names)
    for path, origin in origins.items():
        index = None if part is None else part.index(part.whole_path(path), origin.shape)
        value = None
        if index is not None:
            value = origin.part(lambda name, of: read_part(tensors[name], of), index)
        if value is None:
            value = origin.build([lazy[name] for name in origin.names])
            value = value if index is None else take(value, index)
        value = value.astype(dtype_in_memory(path, value, dtype))
        mx.eval(value)
        # A stored form other than the parameter's must not stay in memory as well.
        uses.subtract(origin.names)
        for name in origin.names:
            if not uses[name]:
                del lazy[name]
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            raise ValueError(_not_finite(path, origin, tensors))
        yield path, value


def _not_finite(path: str, origin: Origin, tensors: Mapping[str, Tensor]) -> str:
    """The message that names the tensor which holds a NaN or an infinity."""
    for name in origin.names:
        if not mx.isfinite(files.open_file(tensors[name].file)[name]).all().item():
            return f"{tensors[name].file}: {name} holds NaN or infinite values"
    file = tensors[origin.names[0]].file
    return f"{file}: {path} overflows in the dtype asked for"
