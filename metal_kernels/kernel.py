"""A kernel's text, from the ``.metal`` files to MLX's object."""

from __future__ import annotations

import hashlib
import re
import struct
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import mlx.core as mx

LANES = 32  # threads of a simdgroup
THREADGROUP_BYTES = 32768
_DEFINITION = re.compile(r"^\w.*?(?:;\n|\n(?:.*\n)*?};?\n)", re.MULTILINE)
_DEFINED = re.compile(r"^(?!template).*?(\w+)(?:\(| =| {)", re.MULTILINE)
_KERNEL = re.compile(r"^kernel void (\w+)\(\) {\n(.*?)^}\n", re.MULTILINE | re.DOTALL)
_SPACE = re.compile(r"(?<=[\w)\]}]) +(?=\W)|(?<=\W) +(?=[\w({])")
_IF = re.compile(r"^#if (!?)(\w+)\n(.*?)(?:^#else\n(.*?))?^#endif\n", re.MULTILINE | re.DOTALL)


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
        header=needed(definitions(kernel.family), kernel.body),
        source=condensed(kernel.body),
    )


def needed(text: str, body: str) -> str:
    """Returns the definitions of a text that a body needs, condensed.

    MLX copies a kernel's text at each launch or trace. A definition ends with a line ``}`` or
    ``};``, or is one line; it stands before those that use it.
    """
    kept = condensed(body)
    for definition in reversed(_DEFINITION.findall(re.sub(" *//.*", "", text))):
        (name,) = _DEFINED.search(definition).groups()  # type: ignore[union-attr]
        if re.search(rf"\b{name}\b", kept):
            kept = condensed(definition) + kept
    return kept.removesuffix(condensed(body))


def condensed(code: str) -> str:
    """Returns code without comments, empty lines and indentation.

    Of the spaces in a line those between two words stay, and those between two operators.
    """
    lines = (line.strip() for line in re.sub("//.*", "", code).splitlines())
    return "".join(
        (line if line.startswith("#") else _SPACE.sub("", line)) + "\n" for line in lines if line
    )


def definitions(family: str) -> str:
    """Returns the common file's text and the family's, without the bodies in them."""
    return _KERNEL.sub("", text("common") + text(family))


def body_of(family: str, name: str, **symbols: bool) -> str:
    """Returns the body of ``kernel void NAME()`` in the family's file.

    Args:
        symbols: what ``#if SYMBOL … #else … #endif`` and ``#if !SYMBOL …`` choose by; the body has
            the chosen lines only.
    """

    def chosen(found: re.Match[str]) -> str:
        negated, symbol, lines, others = found.groups()
        return lines if symbols[symbol] != bool(negated) else others or ""

    bodies = dict(_KERNEL.findall(text(family)))
    return _IF.sub(chosen, bodies[name])


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
def float_bits(value: float) -> int:
    """Returns the bits of a float32, which a template takes, for ``as_type<float>``."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


@cache
def constant(value: float | int, dtype: mx.Dtype, size: int = 1) -> mx.array:
    """Returns an array of one value, made once, which saves each launch an allocation."""
    return mx.array([value] * size, dtype)
