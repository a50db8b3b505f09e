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


def source_hash(kernels: tuple[Kernel, ...]) -> str:
    """A hash of all text, so that what was learned of another text is not believed."""
    parts = [text("common"), *(text(k.family) + k.body for k in kernels)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


@cache
def constant(value: float | int, dtype: mx.Dtype, size: int = 1) -> mx.array:
    """An array of one value, made once: an allocation less each launch."""
    return mx.array([value] * size, dtype)
