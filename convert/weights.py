"""Writing the output's weight files, in bounded memory, and able to go on after any stop.

Headers alone settle the place of every byte. The work is then a list of chunks, some rows of one
parameter each, which are read, built, cast, quantized and written to their place. A chunk depends
on nothing but its own rows, so the list can be left after any chunk and taken up there; the same
bytes come out.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_qwen3next.compute import cpu_streams
from mlx_qwen3next.model.layouts import Origin, Shape
from mlx_qwen3next.storage import safetensors
from mlx_qwen3next.storage.safetensors import Tensor

from .progress import Progress
from .quantize import Quantization, dequantize, quantize
from .source import Source

TRUNK = "model.safetensors"
LARGEST_FILE = 5_000_000_000  # bytes
_ENTRY = 500  # bytes, more than a header has for one tensor beside its name
# Apple's page of memory, in bytes: an expert that begins at one can be read past the page cache.
_ALIGNMENT = 16_384
_CHUNK = 2**22  # numbers in a chunk: 16 MB as float32; larger ones were slower
_BATCH = 8  # chunks evaluated together
_RECORD_SECONDS = 5.0


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, its origin and its form in the output."""

    path: str
    shape: Shape
    origin: Origin
    dtype: mx.Dtype  # its own, or that of its scales
    quantization: Quantization | None
    searched: bool = False  # whether its quantization is :func:`quantize`'s searched one

    @property
    def contents(self) -> dict[str, tuple[mx.Dtype, Shape]]:
        """The tensors of the output that hold it: name -> dtype and shape."""
        if self.quantization is None:
            return {self.path: (self.dtype, self.shape)}
        group_size, bits, mode = (self.quantization[k] for k in ("group_size", "bits", "mode"))
        *rows, columns = self.shape
        groups = (*rows, columns // group_size)
        stem = self.path.removesuffix("weight")
        stored: dict[str, tuple[mx.Dtype, Shape]] = {
            self.path: (mx.uint32, (*rows, columns * bits // 32))
        }
        if mode == "affine":
            return stored | {stem + kind: (self.dtype, groups) for kind in ("scales", "biases")}
        return stored | {stem + "scales": (mx.uint8, groups)}

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its :attr:`contents`."""
        return sum(_nbytes(dtype, shape) for dtype, shape in self.contents.values())

    def values(self, source: Source, first: int, last: int) -> tuple[list[mx.array], mx.array]:
        """Makes rows ``first:last`` of its contents, in order; and whether they are all finite."""
        value = self.origin.rows(source.read, first, last).astype(self.dtype)
        finite = _all_finite(value)
        if self.quantization is None:
            return [value], finite
        return list(quantize(value, self.quantization, self.searched)), finite

    def restore(self, contents: Sequence[mx.array]) -> mx.array:
        """Rows of the parameter in float32, made from the same rows of its contents."""
        if self.quantization is None:
            return contents[0].astype(mx.float32)
        return dequantize(contents, self.quantization).astype(mx.float32)


def _nbytes(dtype: mx.Dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.size


def _all_finite(value: mx.array) -> mx.array:
    """Whether there is no NaN or infinity: only their exponent bits are all ones."""
    unsigned, infinity = {
        mx.float32: (mx.uint32, 0x7F800000),
        mx.bfloat16: (mx.uint16, 0x7F80),
        mx.float16: (mx.uint16, 0x7C00),
    }[value.dtype]
    magnitude = value.view(unsigned) & infinity
    return magnitude.max() < infinity


@dataclass(frozen=True)
class File:
    """A file of the output: its header, and the place of each tensor behind it."""

    path: Path
    header: bytes
    parameters: dict[int, Parameter]
    places: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(place.nbytes for place in self.places.values())


def lay_out(
    parameters: Mapping[str, Sequence[Parameter]], folder: Path, metadata: dict[str, str]
) -> list[File]:
    """Lays out the output's files.

    In each the tensors come first whose sizes are multiples of _ALIGNMENT, so that they begin at
    one, as the data does: the format allows no holes between tensors.

    Args:
        parameters: file -> its parameters; ``TRUNK`` stands for as many files as it takes.
        metadata: of every file.
    """
    files = {name: members for name, members in parameters.items() if name != TRUNK}
    if TRUNK in parameters:
        parts = _split(parameters[TRUNK])
        names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, 1 + len(parts))]
        files = dict(zip(names if len(parts) > 1 else [TRUNK], parts, strict=True)) | files
    result = []
    for name, members in files.items():
        contents = {k: v for parameter in members for k, v in parameter.contents.items()}
        order = sorted(contents, key=lambda name: _nbytes(*contents[name]) % _ALIGNMENT != 0)
        contents = {name: contents[name] for name in order}
        header, places = safetensors.lay_out(folder / name, contents, metadata, _ALIGNMENT)
        result.append(File(folder / name, header, dict(enumerate(members)), places))
    return result


def _split(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """The parameters, in order, in parts that make files below LARGEST_FILE."""
    parts: list[list[Parameter]] = []
    size = 0
    for parameter in parameters:
        added = parameter.nbytes + sum(len(name) + _ENTRY for name in parameter.contents)
        if not parts or size + added > LARGEST_FILE:
            parts.append([])
            size = _ENTRY + _ALIGNMENT  # the metadata's, and spaces
        parts[-1].append(parameter)
        size += added
    return parts


@dataclass(frozen=True)
class Chunk:
    """Some rows of a parameter: a unit of work."""

    parameter: Parameter
    places: tuple[Tensor, ...]
    first: int
    last: int
    files: frozenset[Path]  # of the source

    @property
    def size(self) -> int:
        """The number of the parameter's elements in it."""
        return (self.last - self.first) * math.prod(self.parameter.shape[1:])


def chunks(files: Sequence[File], source: Source) -> list[Chunk]:
    """Divides the work into chunks, in the order of the source's files."""
    order = {file: i for i, file in enumerate(source.files())}
    result = []
    for file in files:
        for parameter in file.parameters.values():
            places = tuple(file.places[name] for name in parameter.contents)
            rows = parameter.shape[0]
            # Searching takes more arrays.
            numbers = _CHUNK // 2 if parameter.searched else _CHUNK
            step = max(1, numbers // math.prod(parameter.shape[1:]))
            if len(parameter.shape) == 2:
                step = max(source.row_step, step - step % source.row_step)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                names = parameter.origin.names
                names = names[first:last] if parameter.origin.stacked else names
                needed = frozenset().union(*(source.files_of(name) for name in names))
                result.append(Chunk(parameter, places, first, last, needed))
    return sorted(result, key=lambda chunk: max(order[file] for file in chunk.files))


def peak_source_bytes(work: Sequence[Chunk], sizes: dict[Path, int]) -> int:
    """The most bytes of the source's files that must be there at the same time.

    Args:
        sizes: file -> bytes.
    """
    last = {file: i for i, chunk in enumerate(work) for file in chunk.files}
    present: set[Path] = set()
    most = 0
    for i, chunk in enumerate(work):
        present |= chunk.files
        most = max(most, sum(sizes[file] for file in present))
        present -= {file for file in chunk.files if last[file] == i}
    return most


def write(files: Sequence[File], work: Sequence[Chunk], source: Source, progress: Progress) -> None:
    """Does the work that is left, and records it.

    Args:
        work: all chunks of the files, of which the first ``progress.done`` are finished.

    Raises:
        ValueError: the source cannot be read, or holds NaN or infinite values.
    """
    if progress.done == 0 or not all(is_laid_out(file) for file in files):
        progress.record(0)
        for file in files:
            with file.path.open("wb") as stream:
                stream.write(file.header)
                stream.truncate(file.size)
    device = mx.default_device()
    streams = cpu_streams.streams() if device == mx.cpu else (mx.default_stream(device),)
    last_use = {file: i for i, chunk in enumerate(work) for file in chunk.files}
    bar = tqdm(
        desc="converting",
        total=sum(chunk.size for chunk in work),
        initial=sum(chunk.size for chunk in work[: progress.done]),
        unit="weights",
        unit_scale=True,
    )
    done, recorded = progress.done, time.monotonic()
    with Outputs(files) as outputs, bar:
        try:
            while done < len(work):
                batch = work[done : done + _BATCH]
                for needed in sorted({file for chunk in batch for file in chunk.files}):
                    source.fetch(needed)
                _convert(batch, source, outputs, streams)
                done += len(batch)
                bar.update(sum(chunk.size for chunk in batch))
                finished = {f for chunk in batch for f in chunk.files if last_use[f] < done}
                if finished or time.monotonic() - recorded > _RECORD_SECONDS:
                    outputs.sync()
                    progress.record(done)
                    recorded = time.monotonic()
                for unneeded in finished:
                    source.release(unneeded)
        finally:
            outputs.sync()
            progress.record(done)


def is_laid_out(file: File) -> bool:
    """Whether a file is there with its header and its size, whatever its data."""
    if not file.path.exists() or file.path.stat().st_size != file.size:
        return False
    with file.path.open("rb") as stream:
        return stream.read(len(file.header)) == file.header


def _convert(
    batch: Sequence[Chunk],
    source: Source,
    outputs: Outputs,
    streams: Sequence[Any],
) -> None:
    results = []
    for chunk, stream in zip(batch, itertools.cycle(streams), strict=False):
        with mx.stream(stream):
            results.append(chunk.parameter.values(source, chunk.first, chunk.last))
    mx.eval(results)
    for chunk, (values, finite) in zip(batch, results, strict=True):
        if not finite.item():
            raise ValueError(_not_finite(chunk, source))
        for place, value in zip(chunk.places, values, strict=True):
            outputs.write(place, chunk.first, value)


def _not_finite(chunk: Chunk, source: Source) -> str:
    """The message that names the tensor which holds a NaN or an infinity."""
    origin = chunk.parameter.origin
    if origin.stacked:
        spans = {name: (0, origin.shape[0]) for name in origin.names[chunk.first : chunk.last]}
    else:
        spans = dict.fromkeys(origin.names, (chunk.first, chunk.last))
    for name, rows in spans.items():
        if not _finite(source.read(name, *rows)):
            scales = (part for part in source.parts(name) if part != name)
            at_fault = next((part for part in scales if not _finite(source.peek(part))), name)
            return f"{source.tensors[at_fault].file}: {at_fault} holds NaN or infinite values"
    file = source.tensors[origin.names[0]].file
    dtype = str(chunk.parameter.dtype).rpartition(".")[2]
    return f"{file}: {chunk.parameter.path} overflows in --dtype {dtype}"


def _finite(value: mx.array) -> bool:
    return bool(mx.isfinite(value).all().item())


class Outputs:
    """The open files of the output."""

    def __init__(self, files: Sequence[File]):
        self._descriptors = {file.path: os.open(file.path, os.O_RDWR) for file in files}
        self._changed: set[Path] = set()

    def write(self, place: Tensor, first: int, value: mx.array) -> None:
        """Writes rows of a tensor, from row ``first`` on, to their place.

        Raises:
            OSError: they cannot be written.
        """
        offset = place.start + first * (place.nbytes // place.shape[0])
        data = memoryview(mx.contiguous(value).view(mx.uint8)).cast("B")  # type: ignore[arg-type]
        while data:
            written = os.pwrite(self._descriptors[place.file], data, offset)
            data, offset = data[written:], offset + written
        self._changed.add(place.file)

    def sync(self) -> None:
        """Waits until all written rows are on disk.

        Raises:
            OSError: they cannot be brought there.
        """
        for file in self._changed:
            os.fsync(self._descriptors[file])
        self._changed.clear()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
