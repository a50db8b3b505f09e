"""A kernel's text, from the ``.metal`` files to MLX's object."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import mlx.core as mx

LANES = 32  # threads of a simdgroup
THREADGROUP_BYTES = 32768


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
        header=text("common") + text(kernel.family),
        source=kernel.body,
    )


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
