"""MLX's quantized form of a checkpoint: how each module is quantized, from its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from ..model.qwen3_next import Model
from ..storage.safetensors import Tensor

# (bits, group size) -> mode, where scales are bytes; each mode has one pair.
_SCALED_BY_BYTES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}


def quantization(path: str, weight: Tensor, scales: Tensor, columns: int) -> dict[str, Any]:
    """The quantization of a module. Shapes and dtypes settle it, whatever the config says.

    Args:
        path: the module's, for the message.
        weight, scales: its stored tensors.
        columns: of its weight before it was quantized.

    Returns:
        ``group_size``, ``bits`` and ``mode``, arguments of ``mx.quantize``.

    Raises:
        ValueError: it is quantized in no way that MLX knows.
    """
    try:
        group_size, bits = columns // scales.shape[-1], weight.shape[-1] * 32 // columns
        mode = "affine" if scales.dtype != "U8" else _SCALED_BY_BYTES[bits, group_size]
        if group_size == 0:  # MLX would divide by it
            raise ValueError
        mx.quantize(mx.zeros((1, columns)), group_size, bits, mode)
    except (ValueError, LookupError, ZeroDivisionError):
        raise ValueError(
            f"{scales.file}: {path} is quantized in no way MLX knows: {columns} columns, "
            f"weight {weight.dtype} {list(weight.shape)}, scales {scales.dtype} "
            f"{list(scales.shape)}"
        ) from None
    return {"group_size": group_size, "bits": bits, "mode": mode}


def quantize(model: Model, tensors: Mapping[str, Tensor], dtype: mx.Dtype) -> None:
    """Gives every module whose weights are stored with scales its quantized form.

    Args:
        model: its values do not matter yet.
        tensors: the checkpoint's, by name, in the layout "converted" where there are scales.
        dtype: of the activations.

    Raises:
        ValueError: as for :func:`quantize_modules`.
    """
    quantize_modules(model, tensors)
    table: Any = model.model.embed_tokens
    if getattr(table, "mode", "affine") != "affine":
        embedding = _ByteScaledEmbedding(
            table.num_embeddings, table.dims, table.group_size, table.bits, table.mode
        )
        embedding.dtype = dtype
        model.model.update_modules({"embed_tokens": embedding})


def quantize_modules(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives every module whose weights are stored with scales MLX's quantized form.

    Raises:
        ValueError: scales have no weight beside them, or one that MLX cannot read.
    """

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        scales = tensors.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized"):
            return False
        weight = tensors.get(f"{path}.weight")
        if weight is None:
            raise ValueError(f"{scales.file}: {path}.scales has no {path}.weight beside it")
        params = quantization(path, weight, scales, columns=module.weight.shape[-1])
        if isinstance(module, SwitchLinear) and f"{path}.global_scale" in tensors:
            params["global_scale"] = True
        return params

    nn.quantize(model, class_predicate=predicate)


class _ByteScaledEmbedding(nn.QuantizedEmbedding):
    """MLX's embedding gives bfloat16 where scales are bytes; all activations would follow it."""

    dtype = mx.bfloat16

    def __call__(self, tokens: mx.array) -> mx.array:
        return super().__call__(tokens).astype(self.dtype)
