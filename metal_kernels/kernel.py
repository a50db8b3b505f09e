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


def available() -> bool:
    """Whether kernels can run here: on MLX's Metal backend, with the GPU as default device."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@cache
def compiled(kernel: Kernel) -> Any:
    """The kernel as MLX's object, which compiles at its first launch."""
    return mx.fast.metal_kernel(
        name=f"qwen3next_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=text("common") + text(kernel.family),
        source=kernel.body,
    )


@cache
def text(family: str) -> str:
    """What the family's file says."""
    return resources.files(__package__).joinpath(f"{family}.metal").read_text(encoding="utf-8")


@cache
def source_hash() -> str:
    """A hash of the kernels' text and launches: what was learned of others is not believed."""
    files = [
        f for f in resources.files(__package__).iterdir() if f.name.endswith((".metal", ".py"))
    ]
    parts = [f.name.encode() + f.read_bytes() for f in sorted(files, key=lambda f: f.name)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@cache
def constant(value: float | int, dtype: mx.Dtype, size: int = 1) -> mx.array:
    """An array of one value, made once: an allocation less each launch."""
    return mx.array([value] * size, dtype)
