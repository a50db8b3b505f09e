"""Loading a checkpoint, in any layout it is published in, as a model ready to run.

The tensors in the files' headers must be exactly those that the model needs, and every refusal
names the file and the tensor. Weights are read one parameter at a time, so that peak memory stays
near the model's own size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from ..errors import first_line
from ..group import ALONE, Group
from ..model import capacity, layouts, mtp_head
from ..model.config import Config, read_json
from ..model.packed import packing
from ..model.parallel import divide
from ..model.qwen3_next import Model
from ..model.sharding import Mode
from ..model.streamed import experts as streamed
from . import files, foreign, match, streaming
from .adapter import add_adapter, read_adapter
from .drafters import Drafter, attach_drafter, find_drafter
from .fingerprint import fingerprint, head_digest
from .heads import Head, find_head, head_config
from .hub import read_config, resolve
from .quantized import quantize
from .streaming import ExpertsInMemory, Plan, check_options

# Context assumed for the memory check where the caller gives none.
DEFAULT_CONTEXT = 8192


def load(
    path_or_repo: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    context: int = DEFAULT_CONTEXT,
    revision: str | None = None,
    mtp_from: str | Path | None = None,
    draft_model: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    pack: bool = True,
    group: Group = ALONE,
    mode: Mode | None = None,
    layers: Sequence[int] | None = None,
    experts_in_memory: ExpertsInMemory = "all",
) -> tuple[Model, TokenizerWrapper]:
    """Loads a model and its tokenizer.

    Args:
        path_or_repo: a local directory, a hub repository id, or None for the bundled demo model.
        dtype, context, mtp_from, draft_model, rope_scaling, pack, group, mode, layers,
        experts_in_memory: see :func:`load_model`.
        revision: branch, tag or commit of a hub repository.
        tokenizer_config: further arguments of transformers' ``AutoTokenizer``.
        adapter_path: the directory of a LoRA, DoRA or full fine-tune made by ``mlx_lm.lora``.

    Raises:
        ValueError: the checkpoint cannot be loaded; the message names the file and the fault.
    """
    held = check_options(experts_in_memory, pack=pack, group=group, adapter=adapter_path)
    drafts = _find_drafts(mtp_from, draft_model, path_or_repo, revision, group)
    directory = resolve(path_or_repo, revision)
    _read_config(directory, rope_scaling)  # its errors come before the tokenizer's
    tokenizer = _load_tokenizer(directory, tokenizer_config)
    if adapter_path is None:
        return _load(
            directory, drafts, rope_scaling, dtype, context, pack, group, mode, layers, held
        ), tokenizer
    if group.size > 1:
        raise ValueError("an adapter cannot be divided among ranks; fuse it with mlx_lm.fuse first")
    adapter = read_adapter(adapter_path)  # a fault in it shows before the model is read
    model = _load(directory, drafts, rope_scaling, dtype, context, pack=False)
    add_adapter(model, adapter)
    return _for_inference(model) if pack else model, tokenizer


def load_model(
    path_or_repo: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    context: int = DEFAULT_CONTEXT,
    revision: str | None = None,
    mtp_from: str | Path | None = None,
    draft_model: str | Path | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    pack: bool = True,
    group: Group = ALONE,
    mode: Mode | None = None,
    layers: Sequence[int] | None = None,
    experts_in_memory: ExpertsInMemory = "all",
) -> Model:
    """Loads a model without a tokenizer; its MTP head is attached if the checkpoint has one.

    Args:
        path_or_repo: as for :func:`load`.
        dtype: of the floating-point weights and activations; None means bfloat16 on a GPU and
            float32 on the CPU (where MLX's bfloat16 is several times slower). Norm weights, A_log
            and dt_bias are float32 always.
        context: tokens the cache is to hold, for the memory check.
        revision: as for :func:`load`.
        mtp_from: another checkpoint, a directory or a hub repository, whose MTP head a model
            without one is to draft with, such as Instruct's for Coder-Next. The tokens do not
            change; drafts are less often right than a head's that was trained with this model.
        draft_model: a DFlash drafter trained for this model, a directory or a hub repository. It
            drafts instead of an MTP head. The tokens do not change.
        rope_scaling: instead of the config's, as it stands in a config file; for example
            ``{"rope_type": "yarn", "factor": 4.0}`` for four times the original length. It holds
            for the MTP head as well, but not for a DFlash drafter.
        pack: whether to pack the weights for inference (see
            :func:`mlx_qwen3next.model.packed.packing.pack`). To train, save or inspect the model
            under the checkpoint's names, pass False.
        group, mode, layers: the ranks that divide the model, and the way to divide it: see
            :func:`mlx_qwen3next.model.parallel.divide`. Each rank reads and holds its part
            alone.
        experts_in_memory: "all"; or the GB that the trunk's experts may take, where the others are
            read from disk when they are wanted, which changes the speed, not the results; or "auto"
            to hold all where they fit, and otherwise as many as do. ``model.streamed`` tells of it.

    Raises:
        ValueError: as for :func:`load`; or the ranks' files are not the same.
    """
    held = check_options(experts_in_memory, pack=pack, group=group, adapter=None)
    drafts = _find_drafts(mtp_from, draft_model, path_or_repo, revision, group)
    directory = resolve(path_or_repo, revision)
    return _load(directory, drafts, rope_scaling, dtype, context, pack, group, mode, layers, held)


class _Drafts(NamedTuple):
    """Drafting parts from other checkpoints than the model's own."""

    head: Head | None = None
    drafter: Drafter | None = None


def _find_drafts(
    mtp_from: str | Path | None,
    draft_model: str | Path | None,
    path_or_repo: str | Path | None,
    revision: str | None,
    group: Group,
) -> _Drafts:
    """Finds them, so that a fault in them shows before the model is fetched.

    Raises:
        ValueError: as for :func:`load`.
    """
    if mtp_from is None and draft_model is None:
        return _Drafts()
    if mtp_from is not None and draft_model is not None:
        raise ValueError("mtp_from and draft_model exclude each other: one of them drafts")
    if draft_model is not None and group.size > 1:
        raise ValueError("draft_model is not supported on several machines; use the MTP head")
    config = read_config(path_or_repo, revision)
    if mtp_from is not None:
        return _Drafts(head=find_head(mtp_from, config))
    return _Drafts(drafter=find_drafter(cast(Any, draft_model), config))


def _load(
    directory: Path,
    drafts: _Drafts,
    rope_scaling: Mapping[str, Any] | None,
    dtype: mx.Dtype | None,
    context: int,
    pack: bool,
    group: Group = ALONE,
    mode: Mode | None = None,
    layers: Sequence[int] | None = None,
    experts_in_memory: ExpertsInMemory = "all",
) -> Model:
    """Loads a model from a directory, and what drafts from another if one is given."""
    head = drafts.head
    config = _read_config(directory, rope_scaling)
    context = min(context, config.max_position_embeddings)
    tensors = files.read_headers(files.find_files(directory))
    foreign.refuse_foreign(tensors, directory)
    foreign.refuse_fp8(tensors)
    has_head = any(layouts.is_mtp(name) for name in tensors)
    if head is not None and has_head:
        raise ValueError(f"{directory} has an MTP head of its own; mtp_from is for models without")
    dtype = dtype or default_dtype()
    if dtype not in (mx.float32, mx.bfloat16, mx.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")

    try:
        model = Model(config)
        if head is not None:
            mtp_head.attach(model, head.config)
        elif has_head:
            mtp_head.attach(model, head_config(tensors, config, trunk=config))
    except OverflowError:
        raise ValueError(f"{directory}: the config's sizes are beyond MLX's arrays") from None
    stored = tensors if head is None else tensors | head.tensors
    quantize(model, stored, dtype)
    parameters = dict(_parameters(model))
    if head is None:
        origins = match.matched(parameters, tensors, config, directory)
    else:
        of_head = {path: parameters.pop(path) for path in [*parameters] if layouts.is_mtp(path)}
        origins = match.matched(parameters, tensors, config, directory)
        origins |= match.matched(of_head, head.tensors, head.config, head.directory)
    if group.size > 1:
        _check_same(directory, head, group, dtype, config)
    part = divide(model, group, mode, layers)
    plan = streaming.plan(model, tensors, experts_in_memory, dtype, context, directory)
    _check_memory(model, dtype, context, plan, pack)

    model.eval()
    own = {
        path: origins[part.whole_path(path)]
        for path, _ in sorted(_parameters(model), key=_when_to_read)
        if not streaming.is_streamed(path, plan)
    }
    mixtures: list[str] = []
    if plan is not None:
        mixtures = streamed.hold(model, plan.size, lambda p, a: match.dtype_in_memory(p, a, dtype))
    read = match.read(own, stored, dtype, part)
    # Only a large model takes long enough for the bar to appear.
    bar = tqdm(read, "loading", total=len(own), unit="tensor", leave=False, delay=2, disable=None)
    for layer, values in groupby(bar, lambda read: _layer_of(read[0])):
        for path, value in values:
            model.load_weights([(path, value)], strict=False)
            del value
        if pack and layer is not None:
            _pack_layer(model, *layer)
    if drafts.drafter is not None:
        attach_drafter(model, drafts.drafter, dtype)
    if pack:
        _for_inference(model)
    if plan is not None:
        experts = streamed.stream(model, plan.size, mixtures, tensors)
        experts.plan = streaming.measured(plan, experts)
    return model


def _layer_of(path: str) -> tuple[bool, int] | None:
    """Returns whether a parameter's layer is the MTP head's, and its number; None for others."""
    found = re.match(r"(?:model|mtp)\.layers\.(\d+)\.", path)
    return None if found is None else (layouts.is_mtp(path), int(found[1]))


def _when_to_read(parameter: tuple[str, mx.array]) -> tuple[int, int]:
    """Returns the place of a parameter in the order of reading, which is layer by layer.

    Each layer is packed once it is there, with its parts beside it. The head's come first, which
    may be the largest, and what is in no layer comes last.
    """
    layer = _layer_of(parameter[0])
    return (2, 0) if layer is None else (int(not layer[0]), layer[1])


def _pack_layer(model: Model, is_mtp: bool, number: int) -> None:
    stack = cast(Any, model.mtp if is_mtp else model.model)
    packing.pack_layer(stack, number)
    packing.transpose(stack.layers[number])


def _read_config(directory: Path, rope_scaling: Mapping[str, Any] | None) -> Config:
    config = Config.from_file(directory / "config.json")
    return config if rope_scaling is None else config.with_rope_scaling(rope_scaling)


def _for_inference(model: Model) -> Model:
    packing.pack(model)
    packing.transpose(model)
    return model


def default_dtype() -> mx.Dtype:
    """The dtype of a model unless another is asked for: bfloat16 on a GPU, float32 on the CPU."""
    return mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32


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
    for name in (files.GENERATION_CONFIG, "config.json"):
        file = directory / name
        eos = read_json(file).get("eos_token_id") if file.exists() else None
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return None


def _parameters(model: Model) -> list[tuple[str, mx.array]]:
    """Path and array of every parameter."""
    leaves: Any = tree_flatten(model.parameters())
    return leaves


def _check_memory(
    model: Model, dtype: mx.Dtype, context: int, plan: Plan | None, pack: bool
) -> None:
    sizes = match.bytes_in_memory(model, dtype).items()
    weights = sum(size for path, size in sizes if not streaming.is_streamed(path, plan))
    weights += match.added_by_packing(model, dtype) if pack else 0
    weights += 0 if plan is None else plan.memory
    cache = capacity.cache_bytes(
        model.args, context, mtp=model.mtp is not None, itemsize=dtype.size
    )
    capacity.check(weights, cache, context)


def _check_same(
    directory: Path, head: Head | None, group: Group, dtype: mx.Dtype, config: Config
) -> None:
    """Checks that this rank has the same model, options and packages as rank 0.

    Raises:
        ValueError: it does not.
    """
    own = {
        "the files' fingerprint": fingerprint(directory),
        "the head's digest": head_digest(head),
        "dtype": str(dtype),
        "rope_scaling": str(config.rope_scaling),
        "mlx": version("mlx"),
        "mlx-qwen3next": version("mlx-qwen3next"),
    }
    for name, value in group.decide("model", own).items():
        if own[name] != value:
            raise ValueError(
                f"{directory} is not run as on rank 0: {name} is {own[name]}, there {value}"
            )
