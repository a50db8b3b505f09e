"""The parts of a model in memory one at a time, from the source's weights or from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen3next.checkpoint.loading import default_dtype
from mlx_qwen3next.checkpoint.match import dtype_in_memory

from .plan import Conversion

Reader = Callable[[str], mx.array]  # a parameter's path to its value
Module = TypeVar("Module", bound=nn.Module)


def in_model_dtype(path: str, value: mx.array) -> mx.array:
    """A parameter's value in the dtype that it has in a loaded model."""
    return value.astype(dtype_in_memory(path, value, default_dtype()))


def reader(conversion: Conversion) -> Reader:
    """Reads the parameters from the source, whose files must be there."""
    parameters = conversion.by_path

    def read(path: str) -> mx.array:
        parameter = parameters[path]
        value = parameter.origin.rows(conversion.source.read, 0, parameter.shape[0])
        value = in_model_dtype(path, value)
        mx.eval(value)  # so that its tensors go before the next one's come
        return value

    return read


def load_part(conversion: Conversion, read: Reader, module: Module, prefix: str) -> Module:
    """Gives a module its parameters, those of the model below ``prefix``; returns it."""
    paths = [path for path in conversion.model.parameter_shapes() if path.startswith(prefix)]
    module.load_weights([(path.removeprefix(prefix), read(path)) for path in paths])
    return module
