"""Planning a conversion: all of it is settled before the first weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen3next.checkpoint.files import MTP_FILE, NORMS_FILE
from mlx_qwen3next.checkpoint.heads import HEAD_CONFIG
from mlx_qwen3next.model import layouts, mtp_head
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.storage import safetensors

from . import weights
from .quantize import Predicate, Quantization, recipe
from .source import Source
from .weights import TRUNK, File, Parameter

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Conversion:
    """A source and the weight files that it is converted to.

    Attributes:
        source: the checkpoint.
        model: the model that the source describes, unquantized, with random weights.
        dtype: of the tensors that stay floating point.
        base: quantization of the modules that no rule treats otherwise; None for none.
        recipe: module path -> quantization.
        parameters: file -> its parameters; ``TRUNK`` stands for as many files as the trunk takes.
        mark: the value of :data:`layouts.MARK` in the files' metadata.
    """

    source: Source
    model: Model
    dtype: mx.Dtype
    base: Quantization | None
    recipe: Mapping[str, Quantization]
    parameters: Mapping[str, Sequence[Parameter]]
    mark: Mapping[str, Any]

    def files(self, folder: Path) -> list[File]:
        """The weight files as they will be in ``folder``."""
        metadata = {"format": "mlx", layouts.MARK: json.dumps(self.mark)}
        return weights.lay_out(self.parameters, folder, metadata)

    @property
    def by_path(self) -> dict[str, Parameter]:
        """The parameters by their paths; a norm's exact one, whose file comes last."""
        return {p.path: p for ps in self.parameters.values() for p in ps}

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights in memory: the norms of ``NORMS_FILE`` take others' places."""
        files = self.parameters.items()
        return sum(p.nbytes for name, ps in files if name != NORMS_FILE for p in ps)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all parameters, scales included."""
        parameters = [p for name, ps in self.parameters.items() if name != NORMS_FILE for p in ps]
        return 8 * self.resident_bytes / sum(p.size for p in parameters)


def plan_conversion(
    source: Source,
    *,
    dtype: mx.Dtype | None = None,
    base: Quantization | None = None,
    predicate: str | Predicate | None = None,
    trunk: bool = True,
    head: bool = True,
    mtp_bits: int | None = None,
    searched: bool = False,
) -> Conversion:
    """Plans a conversion, after checking everything that headers show.

    Args:
        dtype: None for the one in the source's config.
        base: see :class:`Conversion`.
        predicate, mtp_bits: see :func:`quantize.recipe`.
        trunk, head: whether to convert them.
        searched: see :func:`quantize.quantize`.

    Raises:
        ValueError: the source is not whole, or an argument does not suit it.
    """
    head = head and source.has_head
    if mtp_bits is not None and not head:
        raise ValueError(f"--mtp-bits: there is no MTP head to convert in {source.name}")
    dtype = dtype or _dtype_of(source)
    try:
        model = Model(source.config)
        if head:
            mtp_head.attach(model, source.head_config)
    except OverflowError:
        raise ValueError(
            f"{source.directory}: the config's sizes are beyond MLX's arrays"
        ) from None
    shapes = {
        path: shape
        for path, shape in model.parameter_shapes().items()
        if (head if layouts.is_mtp(path) else trunk)
    }
    origins = source.find_origins(shapes)
    source.refuse_surplus(origins)
    chosen = {
        path: quantization
        for path, quantization in recipe(model, base, predicate, mtp_bits).items()
        if f"{path}.weight" in shapes
    }

    parameters = _parameters(source, origins, shapes, chosen, dtype, searched)
    stored = [
        [p.path, str(p.dtype), p.quantization] for members in parameters.values() for p in members
    ]
    mark: dict[str, Any] = {
        "version": version("mlx-qwen3next"),
        "source": source.name,
        "revision": source.revision,
        "norm_weights": "1 + w",
        "quantization": base,
        "recipe": _digest(stored),
        "contents": _digest([source.contents, source.raw_config]),
    }
    if searched:
        mark["ranges"] = "searched"
    if head and (not trunk or source.head_config != source.config):
        mark[HEAD_CONFIG] = source.head_config.to_dict()  # the trunk beside it may have another
    return Conversion(source, model, dtype, base, chosen, parameters, mark)


def _parameters(
    source: Source,
    origins: Mapping[str, layouts.Origin],
    shapes: Mapping[str, layouts.Shape],
    chosen: Mapping[str, Quantization],
    dtype: mx.Dtype,
    searched: bool,
) -> dict[str, list[Parameter]]:
    """File -> its parameters."""
    parameters: dict[str, list[Parameter]] = {TRUNK: [], MTP_FILE: [], NORMS_FILE: []}
    for path, shape in shapes.items():
        file = MTP_FILE if layouts.is_mtp(path) else TRUNK
        stored_dtype = dtype
        if path.endswith(("A_log", "dt_bias")):
            stored_dtype = safetensors.DTYPES[source.tensors[path].dtype]
        elif layouts.is_float32(path):
            # The head's norms are exact. mlx-lm reads the trunk's as well, and would compute all
            # activations in their dtype.
            exact = Parameter(path, shape, origins[path], mx.float32, None)
            if file == MTP_FILE or dtype == mx.float32:
                stored_dtype = mx.float32
            else:
                parameters[NORMS_FILE].append(exact)
        quantization = chosen.get(path.removesuffix(".weight"))
        parameter = Parameter(path, shape, origins[path], stored_dtype, quantization, searched)
        parameters[file].append(parameter)
    return {name: members for name, members in parameters.items() if members}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _dtype_of(source: Source) -> mx.Dtype:
    """The dtype that the config names, else the embedding's."""
    named = source.raw_config.get("torch_dtype") or source.raw_config.get("dtype")
    if str(named) in DTYPES:
        return DTYPES[str(named)]
    embedding = source.tensors.get("model.embed_tokens.weight")
    dtype = safetensors.DTYPES.get(embedding.dtype) if embedding is not None else None
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"{source.name} does not say what dtype it has; give --dtype")
    return dtype
