"""The bundled model in floating point, with weights that lie on no grid of a quantizer.

    python examples/demo_model/off_grid.py DIR

The bundled model has 4 bits. Dequantized, it would be quantized again to 4 bits without a loss, so
that nothing could be learnt about recipes. This program writes another model that computes the same
function: channels are shuffled, and scaled up by a few percent on one side of a product and down on
the other. The weights of a group then come from several groups, and from no common grid. What is
left of the old grids is the zeros, and rows of embedding and output that are shuffled alone; 4 bits
lose less on it than they should. ``build/demo_model/hf`` is the better source where it exists.
"""

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mlx_qwen3next import load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.config import read_json
from mlx_qwen3next.model.qwen3_next import DecoderLayer, Model
from mlx_qwen3next.storage.replacing import write_text

SPREAD = 0.2  # of the logarithms of the scales


def shuffled(model: Model) -> Model:
    """Shuffles and scales the channels of a model in float32, in place; its function stays."""
    random = np.random.default_rng(0)
    H = model.args.hidden_size
    order = mx.array(random.permutation(H))
    model.model.embed_tokens.weight = model.model.embed_tokens.weight[:, order]
    model.lm_head.weight = model.lm_head.weight[:, order]
    for stack in (model.model, model.mtp):
        stack.norm.weight = stack.norm.weight[order]
        for layer in stack.layers:
            _shuffle_hidden(layer, order, random)
            _shuffle_inner(layer, random)
    head = model.mtp
    scales = []
    for norm in (head.pre_fc_norm_embedding, head.pre_fc_norm_hidden):
        scales.append(_scales(random, H))
        norm.weight = norm.weight[order] * scales[-1]
    columns = mx.concatenate([order, H + order])
    head.fc.weight = head.fc.weight[order][:, columns] / mx.concatenate(scales)
    return model


def _shuffle_hidden(layer: DecoderLayer, order: mx.array, random: np.random.Generator) -> None:
    """Reorders the channels that a layer reads and adds to, and scales those that it reads."""
    for norm, part in (
        (layer.input_layernorm, layer.mixer),
        (layer.post_attention_layernorm, layer.mlp),
    ):
        scale = _scales(random, order.size)
        norm.weight = norm.weight[order] * scale
        for path, module in part.named_modules():
            name = path.rpartition(".")[2]
            if name in ("out_proj", "o_proj", "down_proj"):  # writes hidden channels
                module.weight = mx.take(module.weight, order, axis=-2)
            elif "gate" in name or "proj" in name:  # reads them
                module.weight = mx.take(module.weight, order, axis=-1) / scale


def _shuffle_inner(layer: DecoderLayer, random: np.random.Generator) -> None:
    """Reorders and scales the experts' own channels, and scales the mixer's."""
    for part in (layer.mlp.switch_mlp, layer.mlp.shared_expert):
        order = mx.array(random.permutation(part.down_proj.weight.shape[-1]))
        scale = _scales(random, order.size)
        part.gate_proj.weight = mx.take(part.gate_proj.weight, order, axis=-2)
        part.up_proj.weight = mx.take(part.up_proj.weight, order, axis=-2) * scale[:, None]
        part.down_proj.weight = mx.take(part.down_proj.weight, order, axis=-1) / scale
    if layer.is_linear:
        mixer = layer.linear_attn
        scale = _scales(random, mixer.norm.weight.size)
        mixer.norm.weight = mixer.norm.weight * scale
        mixer.out_proj.weight = mixer.out_proj.weight / mx.tile(scale, mixer.Hv)
    else:
        mixer = layer.self_attn
        scale = _scales(random, mixer.v_proj.weight.shape[0])
        mixer.v_proj.weight = mixer.v_proj.weight * scale[:, None]
        per_head = mx.repeat(scale.reshape(mixer.nkv, 1, -1), mixer.nh // mixer.nkv, axis=1)
        mixer.o_proj.weight = mixer.o_proj.weight / per_head.reshape(-1)


def _scales(random: np.random.Generator, count: int) -> mx.array:
    return mx.array(np.exp(random.uniform(-SPREAD, SPREAD, count)).astype(np.float32))


def write(folder: Path) -> Path:
    """Writes the model with its tokenizer to a new folder, in mlx-lm's layout; returns it."""
    model = load_model(dtype=mx.float32, pack=False)
    head = dequantize_model(model.mtp)
    model = dequantize_model(model)
    model.mtp = head
    folder.mkdir(parents=True)
    for file in BUNDLED.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    config = {k: v for k, v in read_json(folder / "config.json").items() if "quant" not in k}
    write_text(folder / "config.json", json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(shuffled(model).parameters()))
    )
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to make")
    write(parser.parse_args().folder)
