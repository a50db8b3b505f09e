"""Makes models of random quantized weights in true shapes, to measure speed without a download.

The models are written as converted ones, so that loading and memory are those of a real model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..checkpoint.files import MTP_FILE
from ..model import capacity, layouts, mtp_head
from ..model.config import Config
from ..model.qwen3_next import Model
from ..storage.safetensors import NAMES, Tensor

GROUP, BITS, ROUTER_BITS = 64, 4, 8
PERIOD = 4  # layers: three linear layers and one attention layer
FULL = 48  # layers of the 80B model
# The size of a layer's output relative to the residual stream. It is small, as in trained models;
# otherwise routers would choose other experts after every rounding.
ADDS = 0.1
# Modules of an MLP whose bits may be others than BITS.
_OWN_BITS = (
    *("gate", "shared_expert_gate"),
    *(f"switch_mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_ADDED = ("out_proj", "o_proj", "down_proj")
ROOM = 0.7  # share of the memory for weights; activations, caches and packing need the rest

# The config of Qwen/Qwen3-Next-80B-A3B-Instruct, without the number of layers.
_80B: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "vocab_size": 151936,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "full_attention_interval": PERIOD,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_SMALL = _80B | {
    "hidden_size": 512,
    "vocab_size": 8192,
    "num_attention_heads": 8,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
SHAPES = {"80b": _80B, "small": _SMALL}


Bits = Callable[[str], int]


def bits_of(path: str, experts: int = BITS) -> int:
    """The bits of the linear layer, or of the experts' stack, that has a path."""
    if layouts.is_router(path):
        return ROUTER_BITS
    return experts if ".switch_mlp." in path else BITS


def layers_that_fit(shape: str, models: int, bits: Bits = bits_of) -> int:
    """The number of layers with which several models fit this machine's memory comfortably.

    It is at least one period, with which the models may fit only one after the other.

    Args:
        shape: a key of ``SHAPES``.
        models: the number of models in memory at the same time.
        bits: those of each module, by its path.

    Raises:
        ValueError: not even one model of one period fits.
    """
    few, more = (size_of(shape, n, bits) for n in (PERIOD, 2 * PERIOD))
    room = capacity.spare() * ROOM
    if room < few:
        raise ValueError(
            f"--shape {shape}: {PERIOD} layers take {few / capacity.GB:.1f} GB, which does not fit "
            "this machine's free memory comfortably; use --shape small"
        )
    periods = 1 + math.floor((room / models - few) / (more - few))
    return min(FULL if shape == "80b" else 2 * PERIOD, max(1, periods) * PERIOD)


def size_of(shape: str, layers: int, bits: Bits = bits_of) -> int:
    """The size of the model on disk in bytes."""
    return sum(tensor.nbytes for tensor in headers(shape, layers, bits).values())


def headers(shape: str, layers: int, bits: Bits = bits_of) -> dict[str, Tensor]:
    """The headers of the tensors that :func:`write` writes, by name."""
    return {
        path: Tensor(Path(name), NAMES[array.dtype], tuple(array.shape))
        for name, parameters in _parts(shape, layers, bits).items()
        for path, array in parameters.items()
    }


def write(directory: Path, shape: str, layers: int, bits: Bits = bits_of) -> None:
    """Writes the model: a file for each layer, one for the rest of the trunk, and the MTP head.

    Raises:
        ValueError: the disk has not enough space.
    """
    need, free = size_of(shape, layers, bits), shutil.disk_usage(directory).free
    if need * 1.02 > free:
        raise ValueError(
            f"--shape {shape}: {layers} layers need {need / capacity.GB:.1f} GB in {directory}, "
            f"which has {free / capacity.GB:.1f} GB; use fewer --layers or another TMPDIR"
        )
    (directory / "config.json").write_text(json.dumps(config(shape, layers, bits), indent=1))
    random = np.random.default_rng(0)
    parts = _parts(shape, layers, bits)
    metadata = {"format": "mlx", layouts.MARK: json.dumps({"made_by": "bench", "shape": shape})}
    for name, parameters in tqdm(
        parts.items(), "random weights", unit="file", disable=None, leave=False
    ):
        tensors = dict(drawn(parameters, random, bits))
        mx.save_safetensors(str(directory / name), tensors, metadata)


def config(shape: str, layers: int, bits: Bits = bits_of) -> dict[str, Any]:
    """The content of the model's config.json."""
    quantization: dict[str, Any] = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    for layer in (*(f"model.layers.{i}" for i in range(layers)), "mtp.layers.0"):
        for path in (f"{layer}.mlp.{name}" for name in _OWN_BITS):
            if bits(path) != BITS:
                exception = {"group_size": GROUP, "bits": bits(path), "mode": "affine"}
                quantization[path] = exception
    return {
        **SHAPES[shape],
        "num_hidden_layers": layers,
        "quantization": quantization,
        "quantization_config": quantization,
    }


def _parts(shape: str, layers: int, bits: Bits) -> dict[str, dict[str, mx.array]]:
    """Maps file names and parameter paths to unevaluated arrays of the right shape and dtype."""
    model = Model(Config.from_dict(config(shape, layers)))
    mtp_head.attach(model)
    quantize(model, bits)
    parts: dict[str, dict[str, mx.array]] = {}
    leaves: Any = tree_flatten(model.parameters())
    for path, array in leaves:
        if layouts.is_mtp(path):
            name = MTP_FILE
        else:
            pieces = path.split(".")
            number = int(pieces[2]) + 2 if pieces[1] == "layers" else 1
            name = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        if mx.issubdtype(array.dtype, mx.floating):
            array = mx.zeros(array.shape, mx.bfloat16)
        parts.setdefault(name, {})[path] = array
    return parts


def quantize(model: nn.Module, bits: Bits = bits_of) -> None:
    """Quantizes the linear layers and the experts' stacks of a model."""

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return hasattr(module, "to_quantized") and {"group_size": GROUP, "bits": bits(path)}

    nn.quantize(model, class_predicate=chosen)


def drawn(
    parameters: dict[str, mx.array], random: np.random.Generator, bits: Bits = bits_of
) -> Iterator[tuple[str, mx.array]]:
    """Draws the values of parameters, scaled so that activations neither grow nor vanish.

    Quantized codes are uniform.
    """
    for path, like in parameters.items():
        module, _, kind = path.rpartition(".")
        shape = like.shape
        if like.dtype == mx.uint32:
            value = mx.array(random.integers(0, 2**32, shape, np.uint32))
        elif kind in ("scales", "biases"):
            top, inputs = 2 ** bits(module) - 1, shape[-1] * GROUP
            # A uniform code's standard deviation is top / sqrt(12), the weights' 1 / sqrt(inputs).
            scale = math.sqrt(12 / inputs) / top
            if module.endswith("embed_tokens"):
                scale *= math.sqrt(inputs)
            elif module.endswith(_ADDED):
                scale *= ADDS
            value = mx.full(shape, scale if kind == "scales" else -scale * top / 2)
        elif kind == "A_log":
            value = mx.log(mx.array(random.uniform(1, 16, shape)))
        elif "conv1d" in path:
            value = mx.array(random.standard_normal(shape)) / 2
        else:  # norms and dt_bias
            value = mx.ones(shape)
        value = value if value.dtype == mx.uint32 else value.astype(mx.bfloat16)
        mx.eval(value)
        yield path, value
