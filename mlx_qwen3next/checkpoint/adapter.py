"""Adapters made by ``mlx_lm.lora``: reading one, and adding it to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..errors import first_line
from ..model.config import read_json
from ..model.qwen3_next import Model
from ..storage.safetensors import Tensor, read_header
from . import files, match

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapters.safetensors"
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LEAVES = ("lora_a", "lora_b", "m")  # an adapter's parameters in LoRA's and DoRA's layers


class Adapter(NamedTuple):
    """An adapter's files.

    Attributes:
        directory: where they are.
        config: the content of the config file.
        tensors: name -> tensor of the weight file's header.
        weights: name -> value.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, mx.array]


def read_adapter(path: str | Path) -> Adapter:
    """Reads an adapter, after checking all that shows without the model.

    Args:
        path: the directory that ``mlx_lm.lora`` wrote: a LoRA, a DoRA or a full fine-tune.

    Raises:
        ValueError: a file is missing or cannot be read, the adapter is PEFT's, or a weight is not
            finite; the message names the file, and the tensor.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory, as an adapter of mlx_lm.lora is")
    file, config_file = directory / WEIGHT_FILE, directory / CONFIG_FILE
    config = read_json(config_file) if config_file.exists() else {}
    theirs = [name for name in _PEFT_FILES if (directory / name).exists()]
    if "peft_type" in config or (theirs and not file.exists()):
        raise ValueError(
            f"{directory} holds an adapter in PEFT's form "
            f"({theirs[0] if theirs else f'{CONFIG_FILE} has peft_type'}); the form of "
            f"mlx_lm.lora is needed ({WEIGHT_FILE} and its {CONFIG_FILE})"
        )
    for needed in (config_file, file):
        if not needed.exists():
            raise ValueError(f"{directory} holds no usable adapter: {needed.name} is missing")
    tensors = read_header(file).tensors
    if not tensors:
        raise ValueError(f"{file} holds no tensors")
    weights = files.open_file(file)
    for name, value in weights.items():
        if not mx.isfinite(value).all().item():
            raise ValueError(f"{file}: {name} holds NaN or infinite values")
    return Adapter(directory, config, tensors, weights)


def add_adapter(model: Model, adapter: Adapter) -> None:
    """Gives a model an adapter's layers and weights.

    Args:
        model: as it was loaded, not packed.

    Raises:
        ValueError: the adapter's config makes no layers for this model, or a weight has no place
            in them; the message names it.
    """
    directory, config, tensors, weights = adapter
    full = config.get("fine_tune_type") == "full"
    if not full:
        if missing := [key for key in ("num_layers", "lora_parameters") if key not in config]:
            raise ValueError(f"{directory / CONFIG_FILE} lacks {', '.join(missing)}")
        try:
            linear_to_lora_layers(
                model,
                config["num_layers"],
                config["lora_parameters"],
                use_dora=config.get("fine_tune_type") == "dora",
            )
        except Exception as error:  # mlx-lm checks none of the values
            file, reason = directory / CONFIG_FILE, first_line(error)
            raise ValueError(f"{file}: no adapter can be made: {reason}") from error
    parameters: Any = tree_flatten(model.parameters())
    places = {
        path: array for path, array in parameters if full or path.rpartition(".")[2] in _LEAVES
    }
    match.refuse_surplus(tensors, places, model.args)
    # A layer's parameters come together: without its lora_b a lora_a would do nothing.
    layers = {name.rpartition(".")[0] for name in tensors}
    for path, array in places.items():
        if path.rpartition(".")[0] in layers:
            dtypes = match.stored_dtypes(array)
            match.check_tensor(path, tensors, tuple(array.shape), dtypes, directory)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()  # no dropout in the new layers
