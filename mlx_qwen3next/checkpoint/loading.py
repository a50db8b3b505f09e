"""From a checkpoint, in any layout it is published in, to a model ready to run.

Strict: what the headers hold must be exactly what the model needs, and every refusal names the
file and the tensor. Weights are read one parameter at a time, so that peak memory stays near the
model's own size.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_tokenizer
from tqdm import tqdm

from ..errors import first_line
from ..group import ALONE, Group
from ..model import capacity, layouts, mtp_head, packing
from ..model.config import Config
from ..model.qwen3_next import Model
from ..model.sharding import Mode, Shard, take
from ..prompt_cache.files import fingerprint
from . import files

# Context assumed for the memory check where the caller gives none.
DEFAULT_CONTEXT = 8192

BUNDLED = Path(__file__).parents[1] / "bundled"

# (bits, group size) -> mode, where scales are bytes; each mode has one pair.
_SCALED_BY_BYTES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}

_DOWNLOAD = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")


def load(
    path_or_repo: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    context: int = DEFAULT_CONTEXT,
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    pack: bool = True,
    group: Group = ALONE,
    mode: Mode | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Loads a model and its tokenizer.

    Args:
        path_or_repo: a local directory, a hub repository id, or None for the bundled demo model.
        dtype, context, pack, group, mode, layers: see :func:`load_model`.
        revision: branch, tag or commit of a hub repository.
        tokenizer_config: further arguments of transformers' ``AutoTokenizer``.
        adapter_path: the directory of a LoRA, DoRA or full fine-tune made by ``mlx_lm.lora``.

    Raises:
        ValueError: the checkpoint cannot be loaded; the message says what is wrong where.
    """
    directory = resolve(path_or_repo, revision)
    Config.from_file(directory / "config.json")  # what is wrong there is to be said first
    tokenizer = _load_tokenizer(directory, tokenizer_config)
    if adapter_path is None:
        model = load_model(
            directory,
            dtype=dtype,
            context=context,
            pack=pack,
            group=group,
            mode=mode,
            layers=layers,
        )
        return model, tokenizer
    if group.size > 1:
        raise ValueError("an adapter cannot be divided among ranks; fuse it with mlx_lm.fuse first")
    model = load_model(directory, dtype=dtype, context=context, pack=False)
    _load_adapter(model, adapter_path)
    return _for_inference(model) if pack else model, tokenizer


def _load_adapter(model: Model, path: str | Path) -> None:
    try:
        load_adapters(model, str(path))
    except (RuntimeError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{path} holds no usable adapter: {first_line(error)}") from error
    model.eval()  # no dropout in the adapter's new layers


def load_model(
    path_or_repo: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    context: int = DEFAULT_CONTEXT,
    revision: str | None = None,
    pack: bool = True,
    group: Group = ALONE,
    mode: Mode | None = None,
    layers: Sequence[int] | None = None,
) -> Model:
    """Loads a model without a tokenizer; its MTP head is attached if the checkpoint has one.

    Args:
        path_or_repo: as for :func:`load`.
        dtype: of the floating-point weights and activations; None means bfloat16 on a GPU and
            float32 on the CPU (where MLX's bfloat16 is several times slower). Norm weights, A_log
            and dt_bias are float32 always.
        context: tokens the cache is to hold, for the memory check. pack: for inference
        (:func:`mlx_qwen3next.model.packing.pack`). Whoever wants to train, save or
            look into the model with the checkpoint's names says False.
        group, mode, layers: the ranks that divide it, and how: see
            :meth:`mlx_qwen3next.model.qwen3_next.Model.shard`. Each reads and holds its part alone.

    Raises:
        ValueError: as for :func:`load`; or the ranks' files are not the same.
    """
    directory = resolve(path_or_repo, revision)
    config = Config.from_file(directory / "config.json")
    context = min(context, config.max_position_embeddings)
    tensors = files.read_headers(files.find_files(directory))
    dtype = dtype or default_dtype()
    if dtype not in (mx.float32, mx.bfloat16, mx.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")

    try:
        model = Model(config)
        if any(layouts.is_mtp(name) for name in tensors):
            mtp_head.attach(model)
    except OverflowError:
        raise ValueError(f"{directory}: the config's sizes are beyond MLX's arrays") from None
    _quantize(model, tensors, dtype)
    sources = _match(model, tensors, directory)
    if group.size > 1:
        _check_same(directory, group, dtype)
    part = model.shard(group, mode, layers)
    _check_memory(model, dtype, context)

    model.eval()
    own = {path: sources[part.whole_path(path)] for path, _ in _parameters(model)}
    read = _read(own, tensors, dtype, part)
    # Only a large model takes long enough for the bar to appear.
    bar = tqdm(read, "loading", total=len(own), unit="tensor", leave=False, delay=2, disable=None)
    for path, value in bar:
        model.load_weights([(path, value)], strict=False)
    return _for_inference(model) if pack else model


def _for_inference(model: Model) -> Model:
    packing.pack(model)
    packing.transpose(model)
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
    directory, repo = local_directory(path_or_repo), str(path_or_repo)
    if directory is not None:
        return directory
    with hub_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_DOWNLOAD)))


def read_config(path_or_repo: str | Path | None = None) -> Config:
    """The config of a model, of whose repository nothing else is fetched.

    Args:
        path_or_repo: as for :func:`load`.

    Raises:
        ValueError: there is no such model, or it is none that this package runs.
    """
    directory = BUNDLED if path_or_repo is None else local_directory(path_or_repo)
    if directory is None:
        with hub_errors(str(path_or_repo)):
            directory = Path(hf_hub_download(str(path_or_repo), "config.json")).parent
    return Config.from_file(directory / "config.json")


def local_directory(path_or_repo: str | Path) -> Path | None:
    """The model directory of that path; None if there is none and it reads as a repository id.

    Raises:
        ValueError: it is neither.
    """
    repo, path = str(path_or_repo), Path(path_or_repo)
    try:
        path = path.expanduser()
        names = os.listdir(path)
    except FileNotFoundError:
        names = None
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if names is not None:
        if "config.json" not in names:
            raise ValueError(f"{path} is no model directory: it has no config.json")
        return path
    if path.is_absolute() or repo.startswith((".", "~")) or repo.count("/") != 1:
        raise ValueError(f"{repo} does not exist, and is no repository id (owner/name)")
    return None


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into a ValueError of one line.

    Raises:
        ValueError: as it says.
    """
    try:
        yield
    except HFValidationError as error:
        reason = first_line(error)
        raise ValueError(f"{repo} is neither a directory nor a repository id: {reason}") from None
    except Exception as error:  # the hub's client has a dozen unrelated kinds
        reason = first_line(error)
        raise ValueError(f"{repo} is no local directory and cannot be fetched: {reason}") from error


def _load_tokenizer(directory: Path, tokenizer_config: dict[str, Any] | None) -> TokenizerWrapper:
    # Without any of its files transformers makes an empty tokenizer.
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{directory} has no tokenizer.json")
    eos_token_ids = _eos_token_ids(directory)
    try:
        return load_tokenizer(directory, tokenizer_config, eos_token_ids=eos_token_ids)
    except Exception as error:  # the tokenizer libraries raise what they like
        reason = first_line(error)
        raise ValueError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error


def _eos_token_ids(directory: Path) -> list[int] | None:
    """The stop tokens: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.exists():
            continue
        try:
            eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            raise ValueError(f"{file} cannot be read as a JSON object") from None
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return None


class _ByteScaledEmbedding(nn.QuantizedEmbedding):
    """MLX's gives bfloat16 where scales are bytes, and all activations would follow it."""

    dtype = mx.bfloat16

    def __call__(self, tokens: mx.array) -> mx.array:
        return super().__call__(tokens).astype(self.dtype)


def _quantize(model: Model, tensors: dict[str, files.Tensor], dtype: mx.Dtype) -> None:
    """Gives every module whose weights come with scales its quantized form."""

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
    table: Any = model.model.embed_tokens
    if getattr(table, "mode", "affine") != "affine":
        embedding = _ByteScaledEmbedding(
            table.num_embeddings, table.dims, table.group_size, table.bits, table.mode
        )
        embedding.dtype = dtype
        model.model.update_modules({"embed_tokens": embedding})


def quantization(
    path: str, weight: files.Tensor, scales: files.Tensor, columns: int
) -> dict[str, Any]:
    """How a module is quantized: shapes and dtype settle it, whatever the config says of it.

    Raises:
        ValueError: in no way that MLX knows.
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


def _match(
    model: Model, tensors: dict[str, files.Tensor], directory: Path
) -> dict[str, layouts.Source]:
    """Parameter path -> source, after checking that tensors and parameters agree exactly."""
    parameters = _parameters(model)
    sources: dict[str, layouts.Source] = {}
    layout: layouts.Layout = "hub"
    for of_mtp in (False, True):
        part = {p: tuple(a.shape) for p, a in parameters if layouts.is_mtp(p) == of_mtp}
        stored = {n: t for n, t in tensors.items() if layouts.is_mtp(n) == of_mtp}
        layout = detect_layout(stored, undecided=layout)
        sources |= layouts.plan(part, layout)

    used: set[str] = set()
    for path, array in parameters:
        for name in sources[path].names:
            used.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                raise ValueError(f"{directory}: the tensor {name} is missing from every file")
            if tensor.shape != sources[path].shape:
                raise ValueError(
                    f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
                    f"but the config asks for {list(sources[path].shape)}"
                )
            if tensor.dtype not in (allowed := _stored_dtypes(array)):
                raise ValueError(
                    f"{tensor.file}: {name} is {tensor.dtype}, not {' or '.join(allowed)}"
                )
    for name, tensor in tensors.items():
        if name not in used and not layouts.is_ignored(name, model.args):
            raise ValueError(f"{tensor.file}: the tensor {name} has no place in this model")
    return sources


def detect_layout(tensors: Mapping[str, files.Tensor], undecided: layouts.Layout) -> layouts.Layout:
    """The layout of a checkpoint's trunk or head: what its first file is marked as, else by names.

    Raises:
        ValueError: a file cannot be read.
    """
    for tensor in tensors.values():
        if layouts.MARK in files.read_metadata(tensor.file):
            return "converted"
        break
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return layouts.detect_layout(shapes, undecided=undecided)


def _parameters(model: Model) -> list[tuple[str, mx.array]]:
    """Path and array of every parameter."""
    leaves: Any = tree_flatten(model.parameters())
    return leaves


def _stored_dtypes(array: mx.array) -> tuple[str, ...]:
    """What a checkpoint may store a parameter as."""
    if mx.issubdtype(array.dtype, mx.floating):
        return "BF16", "F16", "F32"
    return ("U8",) if array.dtype == mx.uint8 else ("U32",)


def _held_dtype(path: str, array: mx.array, dtype: mx.Dtype) -> mx.Dtype:
    """What a parameter is held as in a model of ``dtype``."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array.dtype
    return mx.float32 if layouts.is_float32(path) else dtype


def _check_memory(model: Model, dtype: mx.Dtype, context: int) -> None:
    weights = sum(a.size * _held_dtype(p, a, dtype).size for p, a in _parameters(model))
    cache = capacity.cache_bytes(
        model.args, context, mtp=model.mtp is not None, itemsize=dtype.size
    )
    capacity.check(weights, cache, context)


def _check_same(directory: Path, group: Group, dtype: mx.Dtype) -> None:
    """Checks that all ranks have the same model, and what runs it.

    Raises:
        ValueError: this one has another than rank 0.
    """
    own = {
        "the files' fingerprint": fingerprint(directory),
        "dtype": str(dtype),
        "mlx": version("mlx"),
        "mlx-qwen3next": version("mlx-qwen3next"),
    }
    for name, value in group.decide("model", own).items():
        if own[name] != value:
            raise ValueError(
                f"{directory} is not run as on rank 0: {name} is {own[name]}, there {value}"
            )


def _read(
    sources: dict[str, layouts.Source],
    tensors: dict[str, files.Tensor],
    dtype: mx.Dtype,
    part: Shard,
) -> Iterator[tuple[str, mx.array]]:
    """Evaluated parameters, one at a time."""
    lazy: dict[str, mx.array] = {}
    for file in {tensor.file: None for tensor in tensors.values()}:
        lazy |= {name: array for name, array in _open(file).items() if tensors[name].file == file}
    uses = Counter(name for source in sources.values() for name in source.names)
    for path, source in sources.items():
        index = part.index(part.whole_path(path), source.shape)
        value = None
        if index is not None:
            value = source.part(lambda name, of: files.read_part(tensors[name], of), index)
        if value is None:
            value = source.build([lazy[name] for name in source.names])
            value = value if index is None else take(value, index)
        value = value.astype(_held_dtype(path, value, dtype))
        mx.eval(value)
        # What was stored in another form than it is held in must not stay in memory as well.
        uses.subtract(source.names)
        for name in source.names:
            if not uses[name]:
                del lazy[name]
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            raise ValueError(_not_finite(path, source, tensors))
        yield path, value


def _open(file: Path) -> dict[str, mx.array]:
    """The file's tensors, read when evaluated."""
    try:
        arrays = mx.load(str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def _not_finite(path: str, source: layouts.Source, tensors: dict[str, files.Tensor]) -> str:
    """Names the tensor that holds a NaN or an infinity."""
    for name in source.names:
        if not mx.isfinite(_open(tensors[name].file)[name]).all().item():
            return f"{tensors[name].file}: {name} holds NaN or infinite values"
    file = tensors[source.names[0]].file
    return f"{file}: {path} overflows in the dtype asked for"
