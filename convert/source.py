"""The checkpoint to convert: floating-point tensors by name, in whatever form they are stored.

FP8 follows DeepSeek-V3's block scaling, as Qwen's FP8 repositories do: ``X.weight`` in e4m3 and
``X.weight_scale_inv`` with one factor for every 128 x 128 block, ``w * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen3next.checkpoint import foreign, heads, match
from mlx_qwen3next.checkpoint.files import find_files, read_headers
from mlx_qwen3next.checkpoint.quantized import quantization
from mlx_qwen3next.model import layouts
from mlx_qwen3next.model.config import Config, read_json
from mlx_qwen3next.model.layouts import Origin, Shape
from mlx_qwen3next.storage import safetensors
from mlx_qwen3next.storage.safetensors import Tensor

from .quantize import dequantize

# The files of a model besides its weights.
SMALL_FILES = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt"),
    *("README.md", "LICENSE*", "tokenizer.model"),
)
_FP8 = "F8_E4M3"


class Source:
    """A local directory.

    Attributes:
        name: for messages and the model card: the directory's name, or the repository's.
        revision: a repository's commit.
        directory: where config, tokenizer and the other small files are.
        raw_config, config: config.json, and the model's config made of it.
        tensors: name -> stored tensor, from the headers alone.
    """

    name: str
    revision: str | None = None

    def __init__(self, directory: Path):
        self.name = directory.resolve().name
        self._open(directory, read_headers(find_files(directory)))

    def _open(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        self.directory, self.tensors = directory, tensors
        self.raw_config = read_json(directory / "config.json")
        self.config = Config.from_file(directory / "config.json")
        foreign.refuse_foreign(tensors, directory)
        self._block = (1, 1)
        if foreign.find_fp8(tensors) is not None:
            self._block = _fp8_block(self.raw_config, directory)
        self._quantization: dict[str, dict[str, Any]] = {}

    @property
    def has_head(self) -> bool:
        """Whether there is an MTP head."""
        return any(layouts.is_mtp(name) for name in self.tensors)

    @property
    def head_config(self) -> Config:
        """The config that the MTP head, which there is, computes with."""
        return heads.head_config(self.tensors, self.config, trunk=self.config)

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is in MLX's quantized form."""
        return any(name.endswith(".scales") for name in self.tensors)

    @property
    def contents(self) -> list[Any]:
        """JSON values that change when the weights change, without reading them."""
        stats = {file: file.stat() for file in self.files()}
        return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()]

    def files(self) -> list[Path]:
        """The weight files, in their order."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def find_origins(self, parameters: Mapping[str, Shape]) -> dict[str, Origin]:
        """The origin of each of the model's (unquantized) parameters, whose tensors are checked.

        Args:
            parameters: path -> shape.

        Raises:
            ValueError: a tensor is missing, or of another shape or dtype.
        """
        origins = match.find_origins(parameters, self.tensors)
        for origin in origins.values():
            for name in origin.names:
                self._check(name, origin.shape)
        return origins

    def refuse_surplus(self, origins: Mapping[str, Origin]) -> None:
        """Checks that no tensor is left over of trunk or head, whichever the origins are of.

        Raises:
            ValueError: a tensor is.
        """
        names = {name for origin in origins.values() for name in origin.names}
        used = {part for name in names for part in self.parts(name)}
        converted = {layouts.is_mtp(path) for path in origins}
        tensors = {
            n: tensor for n, tensor in self.tensors.items() if layouts.is_mtp(n) in converted
        }
        match.refuse_surplus(tensors, used, self.config)

    def _check(self, name: str, shape: Shape) -> None:
        """Checks that a tensor is there and gives floating-point numbers of that shape."""
        tensor = self.tensors.get(name)
        stem = name.removesuffix("weight")
        scales = self.tensors.get(stem + "scales")
        if tensor is not None and scales is not None and tensor.dtype == "U32":
            *rows, columns = shape
            self._quantization[name] = params = quantization(name, tensor, scales, columns)
            self._check_stored(name, (*rows, columns * params["bits"] // 32), ("U32",))
            for part in ("scales", "biases") if params["mode"] == "affine" else ("scales",):
                groups = (*rows, columns // params["group_size"])
                self._check_stored(stem + part, groups, (scales.dtype,))
        elif tensor is not None and tensor.dtype == _FP8 and len(shape) > 1:
            blocks = (-(-n // b) for n, b in zip(shape[-2:], self._block, strict=True))
            self._check_stored(name, shape, (_FP8,))
            self._check_stored(name + "_scale_inv", (*shape[:-2], *blocks), match.FLOATS)
        else:
            self._check_stored(name, shape, match.FLOATS)

    def _check_stored(self, name: str, shape: Shape, dtypes: tuple[str, ...]) -> None:
        match.check_tensor(name, self.tensors, shape, dtypes, self.directory)

    def parts(self, name: str) -> Iterator[str]:
        """The stored tensors that a tensor's numbers are made from."""
        yield name
        if name in self._quantization:
            stem = name.removesuffix("weight")
            yield from (part for part in (stem + "scales", stem + "biases") if part in self.tensors)
        elif self.tensors[name].dtype == _FP8:
            yield name + "_scale_inv"

    def files_of(self, name: str) -> set[Path]:
        """The files that must be there for a tensor to be read."""
        return {self.tensors[part].file for part in self.parts(name)}

    @property
    def row_step(self) -> int:
        """The multiple of rows at which reading a part of a matrix may begin."""
        return self._block[0]

    def read(self, name: str, first: int, last: int) -> mx.array:
        """Reads rows ``first:last`` of a tensor that :meth:`find_origins` has checked.

        FP8 gives float32, quantized tensors the dtype of their scales or bfloat16.
        """
        rows = slice(first, last)
        if params := self._quantization.get(name):
            return dequantize([self._rows(part, rows) for part in self.parts(name)], params)
        value = self._rows(name, rows)
        if self.tensors[name].dtype == _FP8:
            if value.ndim == 2:
                rows = slice(first // self._block[0], -(-last // self._block[0]))
            scale = self._rows(name + "_scale_inv", rows).astype(mx.float32)
            for axis, block in zip((-2, -1), self._block, strict=True):
                scale = mx.repeat(scale, min(block, value.shape[axis]), axis)
            scale = scale[..., : value.shape[-2], : value.shape[-1]]
            return mx.from_fp8(value, dtype=mx.float32) * scale
        return value

    def _rows(self, name: str, rows: slice) -> mx.array:
        return safetensors.read_rows(self.tensors[name], rows.start, rows.stop)

    def peek(self, name: str) -> mx.array:
        """Reads a whole (small) tensor as it is stored, without fetching its file."""
        return safetensors.read_rows(self.tensors[name])

    def fetch(self, file: Path) -> None:
        """Makes sure that a weight file is there, as in every local directory."""

    def release(self, file: Path) -> None:
        """Lets a weight file go that is not needed any more. A local directory keeps its files."""


def _fp8_block(raw: Mapping[str, Any], directory: Path) -> tuple[int, int]:
    """The rows and columns of FP8 weights that share a factor; 1 x 1 if the config is silent.

    Raises:
        ValueError: the config says something else.
    """
    fp8 = raw.get("quantization_config")
    if not fp8:
        return 1, 1
    method = fp8.get("quant_method") if isinstance(fp8, Mapping) else fp8
    block = fp8.get("weight_block_size") if method == "fp8" else None
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config has quant_method {method!r} and "
            f"weight_block_size {block!r}; the FP8 weights beside it need 'fp8' and blocks such "
            "as [128, 128]"
        )
    return block[0], block[1]
