"""From a checkpoint, in any layout it is published in, to a model ready to run.

Strict: what the headers hold must be exactly what the model needs, and every refusal names the
file and the tensor. Weights are read a layer at a time, so that peak memory stays near the
model's own size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from . import checkpoint, memory, mtp, shards
from .config import Config
from .model import Model

# Context assumed for the memory check where the caller gives none.
DEFAULT_CONTEXT = 8192

BUNDLED = Path(__file__).parent / "bundled"

_DOWNLOAD = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")


def load(
    path_or_repo: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    context: int = DEFAULT_CONTEXT,
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Loads a model and its tokenizer.

    Args:
        path_or_repo: a local directory, a hub repository id, or None for the bundled demo model.
        dtype, context: see :func:`load_model`.
        revision: branch, tag or commit of a hub repository.
        tokenizer_config: further arguments of transformers' ``AutoTokenizer``.

    Raises:
        ValueError: the checkpoint cannot be loaded; the message says what is wrong where.
    """
    directory = resolve(path_or_repo, revision)
    model = load_model(directory, dtype=dtype, context=context)
    try:
        tokenizer = load_tokenizer(
            directory, tokenizer_config, eos_token_ids=_eos_token_ids(directory)
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory}: the tokenizer cannot be loaded: {error}") from error
    return model, tokenizer


def load_model(
    path_or_repo: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    context: int = DEFAULT_CONTEXT,
    revision: str | None = None,
) -> Model:
    """Loads a model without a tokenizer; its MTP head is attached if the checkpoint has one.

    Args:
        path_or_repo: as for :func:`load`.
        dtype: of the floating-point weights and activations; None means bfloat16 on a GPU and
            float32 on the CPU (where MLX's bfloat16 is several times slower). Norm weights, A_log
            and dt_bias are float32 always.
        context: tokens the cache is to hold, for the memory check.

    Raises:
        ValueError: as for :func:`load`.
    """
    directory = resolve(path_or_repo, revision)
    config = Config.from_file(directory / "config.json")
    tensors = shards.read_headers(shards.find_files(directory))
    dtype = dtype or default_dtype()

    model = Model(config)
    if any(checkpoint.is_mtp(name) for name in tensors):
        mtp.attach(model)
    if config.quantization is not None:
        _quantize(model, config.quantization, tensors)
    sources = _match(model, tensors, config)
    _check_memory(model, sources, tensors, dtype, context)

    model.eval()
    for weights in _read(sources, tensors, dtype):
        model.load_weights(weights, strict=False)
    return model


def default_dtype() -> mx.Dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    return mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32


def resolve(path_or_repo: str | Path | None, revision: str | None = None) -> Path:
    """The local directory of a path or hub repository (downloaded if needed).

    Raises:
        ValueError: there is no such directory or repository, or it cannot be read.
    """
    if path_or_repo is None:
        return BUNDLED
    path = Path(path_or_repo).expanduser()
    try:
        if (path / "config.json").is_file():
            next(path.iterdir())  # readable at all?
            return path
        if path.exists():
            raise ValueError(f"{path} is no model directory: it has no config.json")
    except PermissionError as error:
        raise ValueError(f"no permission to read {error.filename or path}") from None
    repo = str(path_or_repo)
    if path.is_absolute() or repo.startswith((".", "~")) or repo.count("/") != 1:
        raise ValueError(f"{repo} does not exist, and is no repository id (owner/name)")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_DOWNLOAD)))
    except HFValidationError as error:
        raise ValueError(f"{repo} is neither a directory nor a repository id: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{repo} is no local directory and cannot be fetched: {reason}") from None


def _eos_token_ids(directory: Path) -> list[int] | None:
    """The stop tokens: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if file.exists() and (eos := json.loads(file.read_text()).get("eos_token_id")) is not None:
            return eos if isinstance(eos, list) else [eos]
    return None


def _quantize(model: Model, quantization: Any, tensors: dict[str, shards.Tensor]) -> None:
    """Gives every module whose weights come with scales its quantized form, bits as stored."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        scales = tensors.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized"):
            return False
        weight = tensors.get(f"{path}.weight")
        if weight is None:
            raise ValueError(f"{scales.file}: {path}.scales has no {path}.weight beside it")
        columns = module.weight.shape[-1]
        entry = quantization.get(path)
        mode = (entry if isinstance(entry, dict) else quantization).get("mode", "affine")
        # Shapes settle bits and group size for every mode, also where the config names neither.
        return {
            "group_size": columns // scales.shape[-1],
            "bits": weight.shape[-1] * 32 // columns,
            "mode": mode,
        }

    try:
        nn.quantize(model, class_predicate=predicate)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the quantization {dict(quantization)} cannot be applied: {error}"
        ) from None


def _match(
    model: Model, tensors: dict[str, shards.Tensor], config: Config
) -> dict[str, checkpoint.Source]:
    """Parameter path -> source, after checking that tensors and parameters agree exactly."""
    parameters = model.parameter_shapes()
    sources: dict[str, checkpoint.Source] = {}
    for of_mtp in (False, True):
        part = {
            path: shape for path, shape in parameters.items() if checkpoint.is_mtp(path) == of_mtp
        }
        shapes = {n: t.shape for n, t in tensors.items() if checkpoint.is_mtp(n) == of_mtp}
        sources |= checkpoint.plan(part, checkpoint.detect_layout(shapes))

    used: set[str] = set()
    home = next(iter(tensors.values())).file.parent
    for source in sources.values():
        for name in source.names:
            used.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                raise ValueError(f"{home}: the tensor {name} is missing from every file")
            if tensor.shape != source.shape:
                raise ValueError(
                    f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
                    f"but the config asks for {list(source.shape)}"
                )
    for name, tensor in tensors.items():
        if name not in used and not checkpoint.is_ignored(name, config):
            raise ValueError(f"{tensor.file}: the tensor {name} has no place in this model")
    return sources


def _check_memory(
    model: Model,
    sources: dict[str, checkpoint.Source],
    tensors: dict[str, shards.Tensor],
    dtype: mx.Dtype,
    context: int,
) -> None:
    weights = 0
    for path, shape in model.parameter_shapes().items():
        stored = tensors[sources[path].names[0]].dtype
        weights += math.prod(shape) * _cast(path, stored, dtype).size
    cache = memory.cache_bytes(model.args, context, mtp=model.mtp is not None, itemsize=dtype.size)
    memory.check(weights, cache, context)


def _cast(path: str, stored: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype a parameter is held in."""
    if not stored.startswith(("F", "BF")):
        return {"U32": mx.uint32, "U8": mx.uint8}.get(stored, mx.uint32)
    return mx.float32 if checkpoint.is_float32(path) else dtype


def _read(
    sources: dict[str, checkpoint.Source], tensors: dict[str, shards.Tensor], dtype: mx.Dtype
) -> Iterator[list[tuple[str, mx.array]]]:
    """Evaluated parameters, a layer at a time."""
    lazy: dict[str, mx.array] = {}
    for file in {tensor.file: None for tensor in tensors.values()}:
        lazy |= _open(file)
    for _, paths in groupby(sources, key=lambda path: path.split(".")[:3]):
        weights: list[tuple[str, mx.array]] = []
        finite: dict[str, mx.array] = {}
        layer = list(paths)
        for path in layer:
            names = sources[path].names
            value = sources[path].build([lazy[name] for name in names])
            if mx.issubdtype(value.dtype, mx.floating):
                value = value.astype(_cast(path, tensors[names[0]].dtype, dtype))
                finite[path] = mx.isfinite(value).all()
            weights.append((path, value))
        mx.eval([value for _, value in weights], finite)
        for path, ok in finite.items():
            if not ok.item():
                raise ValueError(_not_finite(path, sources[path], tensors))
        yield weights
        # What was stored in another form than it is held in must not stay in memory as well.
        for path in layer:
            for name in sources[path].names:
                lazy.pop(name, None)


def _open(file: Path) -> dict[str, mx.array]:
    """The file's tensors, read when evaluated."""
    try:
        arrays = mx.load(str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def _not_finite(path: str, source: checkpoint.Source, tensors: dict[str, shards.Tensor]) -> str:
    """Names the tensor that holds a NaN or an infinity."""
    for name in source.names:
        if not mx.isfinite(_open(tensors[name].file)[name]).all().item():
            return f"{tensors[name].file}: {name} holds NaN or infinite values"
    return f"{path} overflows in the dtype asked for"
