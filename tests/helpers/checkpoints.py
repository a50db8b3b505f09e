"""Checkpoints for the tests: the goldens, and these in other layouts."""

import contextlib
import io
import json
from pathlib import Path

import float64
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten

from mlx_qwen3next.model import layouts
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.storage import safetensors

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ["base", "eps", "dense", "permutation"]
INDEX = "model.safetensors.index.json"


def config(case):
    """The golden's config.json as a dict."""
    return json.loads((GOLDENS / case / "config.json").read_text())


def tensors(case):
    """The golden's tensors by name."""
    return mx.load(str(GOLDENS / case / "model.safetensors"))


def expected(case):
    """The results of transformers for the golden, as numpy arrays."""
    return float64.read_safetensors(GOLDENS / case / "expected.safetensors")


def split(weights):
    """(trunk, MTP head) of a dict of tensors."""
    head = {name: w for name, w in weights.items() if name.startswith("mtp.")}
    return {name: w for name, w in weights.items() if name not in head}, head


def transformers5(config):
    """A hub config as transformers 5 writes it."""
    config = dict(config)
    interval = config.pop("full_attention_interval")
    kinds = ["full_attention", *["linear_attention"] * (interval - 1)]
    count = config["num_hidden_layers"]
    config["layer_types"] = [kinds[(i + 1) % interval] for i in range(count)]
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": config.pop("partial_rotary_factor"),
        **(config.pop("rope_scaling") or {}),
    }
    config["dtype"] = config.pop("torch_dtype")
    return config


def fuse(weights):
    """Hub tensors with each layer's experts in two, as transformers 5 writes them."""
    fused = {name: w for name, w in weights.items() if ".experts." not in name}
    for router in [name for name in fused if name.endswith(".mlp.gate.weight")]:
        experts = router.replace("gate.weight", "experts")
        gate, up, down = (
            mx.stack(
                [weights[f"{experts}.{e}.{part}_proj.weight"] for e in range(len(fused[router]))]
            )
            for part in ("gate", "up", "down")
        )
        fused |= {
            f"{experts}.gate_up_proj": mx.concatenate([gate, up], axis=1),
            f"{experts}.down_proj": down,
        }
    return fused


def write(directory, config, files, *, index=False):
    """Writes a model directory and returns it; `files` maps file names to dicts of tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, weights in files.items():
        mx.save_safetensors(str(directory / name), weights, {"format": "pt"})
    if index:
        weight_map = {tensor: name for name, weights in files.items() for tensor in weights}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def parameters(model):
    """The model's parameters by path."""
    return dict(tree_flatten(model.parameters()))


def convert(directory, **quantization):
    """Writes `base` as mlx-lm converts it, quantized by `quantize_model(**quantization)`."""
    model, config = mlx_lm.utils.load_model(GOLDENS / "base")
    if quantization:
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = mlx_lm.utils.quantize_model(model, config, **quantization)
    mlx_lm.utils.save_model(directory, model)
    mlx_lm.utils.save_config(config, directory / "config.json")
    return directory


def in_float32(model):
    """mlx-lm's own model, computing in float32."""
    model.set_dtype(mx.float32)
    embedding = model.model.embed_tokens
    if isinstance(embedding, nn.QuantizedEmbedding):
        # where scales are bytes its rows would be bfloat16, whatever the model's dtype
        table = nn.Embedding(embedding.num_embeddings, embedding.dims)
        table.weight = embedding(mx.arange(embedding.num_embeddings)).astype(mx.float32)
        model.model.embed_tokens = table
    return model


def relative_error(result, expected):
    """Relative L2 distance; MLX or numpy arrays, a batch of one or none."""
    result, expected = np.array(result), np.array(expected)
    return float64.relative_error(result.reshape(expected.shape), expected)


def write_zeros(directory, config, layout):
    """Writes a checkpoint of zeros, which takes no room on disk, in 'hub' or 'fused' layout."""
    model = Model(Config.from_dict(config))
    origins = layouts.origins(model.parameter_shapes(), layout).values()
    shapes = {name: (mx.bfloat16, origin.shape) for origin in origins for name in origin.names}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    file = directory / "model.safetensors"
    header, places = safetensors.lay_out(file, shapes, {})
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(place.nbytes for place in places.values()))
    return directory


FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
NOT_FP8 = ("embed_tokens", "lm_head", "norm", "conv1d", "in_proj_ba", "mlp.gate.", "expert_gate",
           "mtp.fc")  # fmt: skip


def write_fp8(directory, case, scales):
    """Writes the golden as Qwen's FP8 repositories are; the factors' dtype is `scales`."""
    weights, coded = tensors(case), []
    for name, w in list(weights.items()):
        if w.ndim == 2 and not any(part in name for part in NOT_FP8):
            weights[name], weights[f"{name}_scale_inv"] = to_fp8(w, scales)
            coded.append(name)
    raw = config(case) | {"quantization_config": FP8}
    write(directory, raw, {"model.safetensors": weights})
    declare_fp8(directory / "model.safetensors", coded)
    return directory


def to_fp8(w, scales):
    """e4m3 codes as bytes, and the factor of each block of 128 x 128."""
    rows, columns = (-(-n // 128) for n in w.shape)
    margins = [(0, 128 * rows - w.shape[0]), (0, 128 * columns - w.shape[1])]
    blocks = mx.pad(w.astype(mx.float32), margins).reshape(rows, 128, columns, 128)
    scale = (mx.abs(blocks).max(axis=(1, 3)) / 448).astype(scales)
    codes = mx.to_fp8(blocks / scale.astype(mx.float32)[:, None, :, None])
    return codes.reshape(128 * rows, 128 * columns)[: w.shape[0], : w.shape[1]], scale


def declare_fp8(file, names):
    """Names the dtype that MLX saves as bytes."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name in names:
        header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def from_fp8(codes, scales):
    """The numbers of e4m3 codes (bytes) times their blocks' factors, in float32, by numpy."""
    codes = np.array(codes).astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    small, normal = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(codes & 128, -1, 1) * np.where(exponent, normal, small)
    factors = np.kron(np.array(scales.astype(mx.float32)), np.ones((128, 128)))[
        : values.shape[0], : values.shape[1]
    ]
    return values.astype(np.float32) * factors.astype(np.float32)
