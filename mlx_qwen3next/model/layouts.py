"""How checkpoints store the model: three layouts of the same tensors, described as data.

- ``hub``: the published repositories; one tensor per expert, convolutions ``[C, 1, K]``, norm
  weights zero-centred (the model wants ``1 + w``).
- ``fused``: transformers 5's ``save_pretrained``; experts in ``gate_up_proj`` ``[E, 2I, H]`` (gate
  first) and ``down_proj`` ``[E, H, I]``, else as ``hub``.
- ``converted``: mlx-lm's; names, shapes and values are the model's own, often quantized.

:func:`plan` says for every parameter of the model which tensors it is made of and how;
loading, checking and error messages all follow from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from .config import Config

Layout = Literal["hub", "fused", "converted"]
Shape = tuple[int, ...]

# Key in the metadata of a safetensors file that this project's converter wrote: a JSON object that
# says from what and how. Such a file is in the layout "converted", whatever its names look like.
MARK = "mlx_qwen3next"

_ZERO_CENTRED = re.compile(
    r"(^|\.)(input_layernorm|post_attention_layernorm|q_norm|k_norm|pre_fc_norm_embedding"
    r"|pre_fc_norm_hidden|model\.norm|mtp\.norm)\.weight$"
)
_FLOAT32 = re.compile(r"(norm|pre_fc_norm_\w+)\.weight$|\.(A_log|dt_bias)$")
_ROUTER = re.compile(r"\.(mlp\.gate|shared_expert_gate)$")
_EXPERTS = re.compile(r"^(?P<moe>.*\.mlp)\.switch_mlp\.(?P<part>gate|up|down)_proj\.weight$")
# Tensors some checkpoints hold that no model needs.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Source:
    """One parameter's origin: the tensors it is made of, their common shape, and how."""

    names: tuple[str, ...]
    shape: Shape
    build: Callable[[list[mx.array]], mx.array]
    stacked: bool = False  # whether each tensor is one row of the parameter
    as_is: bool = False  # whether the parameter is the one tensor there is

    def rows(self, read: Callable[[str, int, int], mx.array], first: int, last: int) -> mx.array:
        """Rows ``first:last`` of the parameter; ``read(name, first, last)`` reads a tensor's.

        Every ``build`` works row by row, so that a parameter can be made in parts.
        """
        if self.stacked:
            return self.build([read(name, 0, self.shape[0]) for name in self.names[first:last]])
        return self.build([read(name, first, last) for name in self.names])

    def part(
        self, read: Callable[[str, tuple[Any, ...]], mx.array], index: tuple[Any, ...]
    ) -> mx.array | None:
        """Some elements, by reading no others; None if it takes all to make any.

        Args:
            read: reads the elements of an index from a tensor.
        """
        if self.as_is:
            return read(self.names[0], index)
        if not self.stacked:
            return None
        which, inner = (slice(None), index) if index[0] is ... else (index[0], index[1:])
        return self.build([read(name, inner) for name in self.names[which]])


def is_zero_centred(path: str) -> bool:
    """Whether a norm weight is stored as w where the model multiplies by 1 + w."""
    return _ZERO_CENTRED.search(path) is not None


def is_float32(path: str) -> bool:
    """Whether a parameter stays float32 whatever the model's dtype (norms, A_log, dt_bias)."""
    return _FLOAT32.search(path) is not None


def is_router(path: str) -> bool:
    """Whether a module path is a router or a shared expert's gate (never below 8 bits)."""
    return _ROUTER.search(path) is not None


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to the MTP head. No config says so; names do."""
    return name.startswith("mtp.")


def is_ignored(name: str, config: Config) -> bool:
    """Whether a tensor may be present although the model has no place for it."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or _IGNORED.search(name) is not None


def detect_layout(shapes: Mapping[str, Shape], undecided: Layout = "hub") -> Layout:
    """The layout of a set of tensors, from their names and the convolutions' shapes.

    An MTP head without experts shows neither; it is taken to be ``undecided``.
    """
    convolutions = [shape for name, shape in shapes.items() if name.endswith("conv1d.weight")]
    if any(".switch_mlp." in name for name in shapes) or (1,) in [c[-1:] for c in convolutions]:
        return "converted"
    if any(".mlp.experts.gate_up_proj" in name for name in shapes):
        return "fused"
    if convolutions or any(".mlp.experts.0." in name for name in shapes):
        return "hub"
    return undecided


def plan(parameters: Mapping[str, Shape], layout: Layout) -> dict[str, Source]:
    """Where each parameter comes from.

    Args:
        parameters: path -> shape of the model's (possibly quantized) parameters.
        layout: how the checkpoint stores them; ``hub`` and ``fused`` are never quantized.
    """
    return {path: _source(path, shape, layout) for path, shape in parameters.items()}


def _source(path: str, shape: Shape, layout: Layout) -> Source:
    if layout == "converted":
        return Source((path,), shape, lambda tensors: tensors[0], as_is=True)
    if path.endswith("conv1d.weight"):
        C, K, _ = shape
        return Source((path,), (C, 1, K), lambda tensors: tensors[0].swapaxes(1, 2))
    if is_zero_centred(path):
        # In float32: 1 + w in bfloat16 would lose up to 3.7e-3 of a weight.
        return Source((path,), shape, lambda tensors: tensors[0].astype(mx.float32) + 1)
    if match := _EXPERTS.match(path):
        E, rows, columns = shape
        moe, part = match["moe"], match["part"]
        if layout == "hub":
            names = tuple(f"{moe}.experts.{e}.{part}_proj.weight" for e in range(E))
            return Source(names, (rows, columns), mx.stack, stacked=True)
        if part == "down":
            return Source((f"{moe}.experts.down_proj",), shape, lambda tensors: tensors[0])
        half = slice(0, rows) if part == "gate" else slice(rows, 2 * rows)
        return Source(
            (f"{moe}.experts.gate_up_proj",),
            (E, 2 * rows, columns),
            lambda tensors: tensors[0][:, half],
        )
    return Source((path,), shape, lambda tensors: tensors[0], as_is=True)


def sanitize(
    weights: Mapping[str, mx.array], parameters: Mapping[str, Shape], config: Config
) -> dict[str, mx.array]:
    """mlx-lm's hook: tensors of any layout under the model's parameter names.

    The MTP head's tensors are left out where the model (``parameters``: path -> shape) has no head.
    Missing and surplus tensors are for the caller to find (``load_weights(strict=True)``).
    """
    merged: dict[str, mx.array] = {}
    layout: Layout = "hub"
    for mtp in sorted({is_mtp(path) for path in parameters}):  # the trunk first
        tensors = {
            name: tensor
            for name, tensor in weights.items()
            if is_mtp(name) == mtp and not is_ignored(name, config)
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        layout = detect_layout(shapes, undecided=layout)
        if layout == "converted":  # perhaps quantized, so the parameters are not the model's yet
            merged |= tensors
            continue
        surplus = dict(tensors)
        for path, source in plan(parameters, layout).items():
            if is_mtp(path) == mtp and all(name in tensors for name in source.names):
                merged[path] = source.build([tensors[name] for name in source.names])
                for name in source.names:
                    surplus.pop(name, None)
        merged |= surplus
    return merged
