"""A kernel's text, from the ``.metal`` files to MLX's object."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import mlx.core as mx

LANES = 32  # threads of a simdgroup
THREADGROUP_BYTES = 32768
_DEFINITION = re.compile(r"^\w.*?(?:;\n|\n(?:.*\n)*?};?\n)", re.MULTILINE)
_DEFINED = re.compile(r"^(?!template).*?(\w+)(?:\(| =| {)", re.MULTILINE)
_PUNCTUATION = re.compile(r" *([{}()\[\];,=?<>]) *")


class Kernel(NamedTuple):
    """A kernel's name, its family's file, the names of its arguments, and its body."""

    name: str
    family: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str

    def launch(self, **arguments: Any) -> list[mx.array]:
        """Queues one launch; ``arguments`` are those of MLX's object, :func:`compiled`."""
        return compiled(self)(**arguments)


def available() -> bool:
    """Returns whether kernels can run here: MLX has Metal, and the GPU is the default device."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@cache
def compiled(kernel: Kernel) -> Any:
    """Returns the kernel as MLX's object, which compiles at its first launch."""
    return mx.fast.metal_kernel(
        name=f"qwen3next_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=needed(text("common") + text(kernel.family), kernel.body),
        source=condensed(kernel.body),
    )


def needed(text: str, body: str) -> str:
    """Returns the definitions of a text that a body needs, condensed.

    MLX copies and hashes a kernel's text at each launch. A definition ends with a line ``}`` or
    ``};``, or is one line; it stands before those that use it.
    """
    definitions = _DEFINITION.findall(re.sub(" *//.*", "", text))
    kept = condensed(body)
    for definition in reversed(definitions):
        (name,) = _DEFINED.search(definition).groups()  # type: ignore[union-attr]
        if re.search(rf"\b{name}\b", kept):
            kept = condensed(definition) + kept
    return kept.removesuffix(condensed(body))


def condensed(code: str) -> str:
    """Returns code without comments, empty lines, indentation, and spaces beside punctuation."""
    lines = (line.strip() for line in re.sub("//.*", "", code).splitlines())
    return "".join(_PUNCTUATION.sub(r"\1", line) + "\n" for line in lines if line)


@cache
def text(family: str) -> str:
    """Returns the text of the family's file."""
    return resources.files(__package__).joinpath(f"{family}.metal").read_text(encoding="utf-8")


@cache
def source_hash() -> str:
    """Returns a hash of the kernels' text and launches; findings hold for one hash alone."""
    files = [
        f for f in resources.files(__package__).iterdir() if f.name.endswith((".metal", ".py"))
    ]
    parts = [f.name.encode() + f.read_bytes() for f in sorted(files, key=lambda f: f.name)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@cache
def constant(value: float | int, dtype: mx.Dtype, size: int = 1) -> mx.array:
    """Returns an array of one value, made once, which saves each launch an allocation."""
    return mx.array([value] * size, dtype)
