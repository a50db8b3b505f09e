"""The units that ``--fit`` chooses bits for, and the errors that are expected of them.

A unit is what packing stacks or runs together and therefore has one quantization: a layer's token
mixer, its shared expert, the gates and ups of its experts, their downs, the embedding, the output
matrix. A width costs a unit bytes, and an error: the noise that it adds to the hidden state,
relative to the hidden state, squared. Routers keep 8 bits under every recipe, and the MTP head,
which cannot change the text, the bits that it has under every recipe.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen3next.model import layouts

from .plan import Conversion
from .quantize import BITS, Quantization, dequantize, quantize

COARSE = 128  # the group size of the smallest width, 2.25 bits a weight

_KINDS = (
    (re.compile(r"\.switch_mlp\.(gate|up)_proj$"), "experts' gate and up"),
    (re.compile(r"\.switch_mlp\.down_proj$"), "experts' down"),
    (re.compile(r"\.mlp\.shared_expert\.\w+$"), "shared expert"),
    (re.compile(r"\.(self_attn|linear_attn)\.\w+$"), "mixer"),
    (re.compile(r"\.mlp\.(gate|up|down)_proj$"), "MLP"),
    (re.compile(r"model\.embed_tokens$"), "embedding"),
    (re.compile(r"lm_head$"), "output"),
)
# Expected noise of a unit at a relative error of 1 of its weights, by kind; NOTES.md has the
# measurement.
_WEIGHT = {
    "experts' gate and up": 0.2,
    "experts' down": 0.2,
    "shared expert": 0.15,
    "mixer": 1.0,
    "MLP": 1.0,
    "embedding": 1.0,
    "output": 1.2,
}


class Width(NamedTuple):
    """A quantization that a unit may get; affine."""

    bits: int
    group_size: int

    @property
    def quantization(self) -> Quantization:
        """The arguments of ``mx.quantize``."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


class Unit(NamedTuple):
    """Modules that get one quantization."""

    name: str
    kind: str
    paths: tuple[str, ...]
    widths: tuple[Width, ...]  # that it may get


Errors = dict[str, dict[Width, float]]  # unit's name -> width -> error


def find_units(conversion: Conversion, group_size: int) -> list[Unit]:
    """The units of a conversion, in the order of the model.

    Args:
        conversion: quantized in groups of ``group_size``.
        group_size: of all widths but the smallest, 2 bits in larger groups.
    """
    modules = dict(conversion.model.named_modules())
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in reversed(list(conversion.recipe)):  # MLX lists modules from the last one on
        if layouts.is_mtp(path):
            continue
        for pattern, kind in _KINDS:
            if match := pattern.search(path):
                members[path[: match.start()], kind].append(path)
    found = []
    for (stem, kind), paths in members.items():
        widths = [Width(bits, group_size) for bits in BITS]
        if all(modules[path].weight.shape[-1] % COARSE == 0 for path in paths):
            widths.insert(0, Width(BITS[0], COARSE))
        found.append(Unit(f"{stem} {kind}".strip(), kind, tuple(paths), tuple(widths)))
    return found


def expected_errors(units: Sequence[Unit]) -> Errors:
    """The errors of the units if their weights were normally distributed."""
    return {u.name: {w: _WEIGHT[u.kind] * _normal_error(w) for w in u.widths} for u in units}


@cache
def _normal_error(width: Width) -> float:
    """The squared relative error of normally distributed weights."""
    value = mx.random.normal((64, 1024), key=mx.random.key(0))
    error = (
        dequantize(quantize(value, width.quantization, searched=True), width.quantization) - value
    )
    return (mx.square(error).sum() / mx.square(value).sum()).item()  # type: ignore[return-value]
