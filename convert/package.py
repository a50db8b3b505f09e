"""The files of a converted model besides its weights: config, index, tokenizer, model card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token

from mlx_qwen3next.checkpoint.files import INDEX_FILE, MTP_FILE
from mlx_qwen3next.checkpoint.hub import hub_errors
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.storage.replacing import write_text

from .plan import Conversion
from .progress import CALIBRATION
from .source import SMALL_FILES, Source
from .weights import File

CARD = "README.md"
# Files that describe the source's weights, not the converted ones.
_ABOUT_WEIGHTS = ("config.json", "*.index.json", "*quant*config.json", CALIBRATION)


def complete(conversion: Conversion, files: Sequence[File], folder: Path, title: str) -> None:
    """Writes all files besides the weights.

    Args:
        files: the weight files.
        title: the model's name on its card.
    """
    _copy_small_files(folder, conversion.source)
    _write_config(folder, conversion)
    _write_index(folder, [file for file in files if file.path.name.startswith("model")])
    _write_card(folder, conversion, title)


def _write_config(folder: Path, conversion: Conversion) -> None:
    """Writes the source's config in the hub's dialect (mlx-lm reads no other) and the recipe."""
    source = conversion.source
    config = source.config.to_dict()
    raw: dict[str, Any] = {**source.raw_config, "rope_scaling": None, **config}
    for key in ("_name_or_path", "quantization", "quantization_config", "rope_parameters", "dtype"):
        raw.pop(key, None)
    raw["torch_dtype"] = str(conversion.dtype).rpartition(".")[2]
    if interval := _interval(source.config):
        del raw["layer_types"]
        raw["full_attention_interval"] = interval
    if conversion.base is not None:
        exceptions = {
            path: q for path, q in sorted(conversion.recipe.items()) if q != conversion.base
        }
        raw["quantization"] = raw["quantization_config"] = {**conversion.base, **exceptions}
    write_text(folder / "config.json", json.dumps(dict(sorted(raw.items())), indent=2) + "\n")


def _interval(config: Config) -> int | None:
    """The distance between layers with full attention; None if it is not the same throughout."""
    count = config.num_hidden_layers
    interval = next((i + 1 for i in range(count) if not config.is_linear(i)), count + 1)
    regular = all(config.is_linear(i) == bool((i + 1) % interval) for i in range(count))
    return interval if regular else None


def _write_index(folder: Path, trunk: Sequence[File]) -> None:
    """Writes the index of the trunk alone: mlx-lm refuses an MTP head in it."""
    weight_map = {name: file.path.name for file in trunk for name in file.places}
    parameters = {id(p): p for file in trunk for p in file.parameters.values()}
    metadata = {
        "total_size": sum(place.nbytes for file in trunk for place in file.places.values()),
        "total_parameters": sum(math.prod(p.shape) for p in parameters.values()),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _copy_small_files(folder: Path, source: Source) -> None:
    """Copies tokenizer, chat template, generation config and licence, byte for byte."""
    for pattern in SMALL_FILES:
        for file in source.directory.glob(pattern):
            if file.is_file() and not any(map(file.match, (*_ABOUT_WEIGHTS, CARD))):
                copy = folder / file.relative_to(source.directory)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _write_card(folder: Path, conversion: Conversion, title: str) -> None:
    """Writes the model card: the source's metadata (licence, languages), and the conversion."""
    source = conversion.source
    original = source.directory / CARD
    data = ModelCard.load(original).data if original.exists() else ModelCardData()
    data.library_name, data.pipeline_tag = "mlx", "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), "mlx"]))
    origin = source.name
    if source.revision is not None:
        data.base_model = source.name
        origin = f"[{source.name}](https://huggingface.co/{source.name}) at `{source.revision}`"
    head = ""
    if MTP_FILE in conversion.parameters:
        head = " The multi-token-prediction head is in `mtp.safetensors`, which mlx-lm ignores."
    text = _CARD.format(
        title=title,
        origin=origin,
        version=conversion.mark["version"],
        bits=f"{conversion.bits_per_weight:.3f}",
        head=head,
    )
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n{text}")


_CARD = """
# {title}

Converted to MLX from {origin} by mlx_qwen3next {version}: {bits} bits per weight.{head}

```
python -m mlx_qwen3next.generate --model {title} --prompt "hello"
mlx_lm.generate --model {title} --prompt "hello"
```
"""


def check_upload() -> None:
    """Checks, before the work, that its result can be uploaded.

    Raises:
        ValueError: nobody is logged in.
    """
    if get_token() is None:
        raise ValueError("--upload-repo needs a login: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repo: str) -> str:
    """Uploads the folder and returns its address. Files that are there already are not sent again.

    Raises:
        ValueError: the hub refuses or cannot be reached.
    """
    api = HfApi()
    with hub_errors(repo):
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload from mlx_qwen3next"
        )
    return str(url)
