"""The layouts of checkpoints: three forms of the same tensors, described as data.

- ``hub``: the published repositories; one tensor per expert, convolutions ``[C, 1, K]``, norm
  weights zero-centred (the model wants ``1 + w``).
- ``fused``: transformers 5's ``save_pretrained``; experts in ``gate_up_proj`` ``[E, 2I, H]`` (gate
  first) and ``down_proj`` ``[E, H, I]``, the rest as in ``hub``.
- ``converted``: mlx-lm's; names, shapes and values are the model's own, often quantized.

:func:`origins` gives every parameter of the model its :class:`Origin`, the tensors it is made
of and how. Loading, converting, checking and error messages all follow from that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from ..storage.safetensors import Tensor
from .config import Config

Layout = Literal["hub", "fused", "converted"]
Shape = tuple[int, ...]

# Key in the metadata of a safetensors file that this project's converter wrote; its value is a JSON
# object about the source and the conversion. Such a file is in the layout "converted".
MARK = "mlx_qwen3next"

_ZERO_CENTRED = re.compile(
    r"(^|\.)(input_layernorm|post_attention_layernorm|q_norm|k_norm|pre_fc_norm_embedding"
    r"|pre_fc_norm_hidden|model\.norm|mtp\.norm)\.weight$"
)
_FLOAT32 = re.compile(r"(norm|pre_fc_norm_\w+)\.weight$|\.(A_log|dt_bias|vectors)$")
_ROUTER = re.compile(r"\.(mlp\.gate|shared_expert_gate)$")
_EXPERTS = re.compile(r"^(?P<moe>.*\.mlp)\.switch_mlp\.(?P<part>gate|up|down)_proj\.weight$")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # in some checkpoints, but needed by no model


@dataclass(frozen=True)
class Origin:
    """The stored tensors that a parameter is made of, their common shape, and how it is made."""

    names: tuple[str, ...]
    shape: Shape
    build: Callable[[list[mx.array]], mx.array]
    stacked: bool = False  # whether each tensor is one row of the parameter
    as_is: bool = False  # whether the parameter equals its only tensor

    def rows(self, read: Callable[[str, int, int], mx.array], first: int, last: int) -> mx.array:
        """Makes rows ``first:last`` of the parameter.

        Every ``build`` works row by row, so that a parameter can be made in parts.

        Args:
            read: ``read(name, first, last)`` gives those rows of a tensor.
        """
        if self.stacked:
            return self.build([read(name, 0, self.shape[0]) for name in self.names[first:last]])
        return self.build([read(name, first, last) for name in self.names])

    def part(
        self, read: Callable[[str, tuple[Any, ...]], mx.array], index: tuple[Any, ...]
    ) -> mx.array | None:
        """Makes some elements of the parameter from the same elements of its tensors.

        Args:
            read: ``read(name, index)`` gives the elements of an index from a tensor.
            index: of the elements, as in numpy.

        Returns:
            The elements, or None if the whole tensors are needed to make any.
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
    """Whether a parameter stays float32 whatever the model's dtype.

    Those are the norms' weights, A_log and dt_bias, and the vectors that packing makes of them.
    """
    return _FLOAT32.search(path) is not None


def is_router(path: str) -> bool:
    """Whether a module path is a router or a shared expert's gate (never below 8 bits)."""
    return _ROUTER.search(path) is not None


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to the MTP head. No config tells; names do."""
    return name.startswith("mtp.")


def is_ignored(name: str, config: Config) -> bool:
    """Whether a tensor may be present although the model has no place for it."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or _IGNORED.search(name) is not None


def detect_layout(tensors: Mapping[str, Tensor | mx.array], undecided: Layout = "hub") -> Layout:
    """The layout of a trunk or of an MTP head.

    Tensors in a file with :data:`MARK` are converted; other layouts show in the tensors' names and
    the convolutions' shapes.

    Args:
        tensors: by name, stored in a file or in memory.
        undecided: the layout where nothing shows it, as in an MTP head without experts.
    """
    first = next(iter(tensors.values()), None)
    if isinstance(first, Tensor) and MARK in first.metadata:
        return "converted"
    convolutions = [x.shape for name, x in tensors.items() if name.endswith("conv1d.weight")]
    if any(".switch_mlp." in name for name in tensors) or (1,) in [c[-1:] for c in convolutions]:
        return "converted"
    if any(".mlp.experts.gate_up_proj" in name for name in tensors):
        return "fused"
    if convolutions or any(".mlp.experts.0." in name for name in tensors):
        return "hub"
    return undecided


def origins(parameters: Mapping[str, Shape], layout: Layout) -> dict[str, Origin]:
    """The origin of each parameter, by its path.

    Args:
        parameters: path -> shape of the model's (possibly quantized) parameters.
        layout: the checkpoint's; ``hub`` and ``fused`` are never quantized.
    """
    return {path: _origin(path, shape, layout) for path, shape in parameters.items()}


def _origin(path: str, shape: Shape, layout: Layout) -> Origin:
    if layout == "converted":
        return Origin((path,), shape, lambda tensors: tensors[0], as_is=True)
    if path.endswith("conv1d.weight"):
        C, K, _ = shape
        return Origin((path,), (C, 1, K), lambda tensors: tensors[0].swapaxes(1, 2))
    if is_zero_centred(path):
        # In float32: 1 + w in bfloat16 would lose up to 3.7e-3 of a weight.
        return Origin((path,), shape, lambda tensors: tensors[0].astype(mx.float32) + 1)
    if match := _EXPERTS.match(path):
        E, rows, columns = shape
        moe, part = match["moe"], match["part"]
        if layout == "hub":
            names = tuple(f"{moe}.experts.{e}.{part}_proj.weight" for e in range(E))
            return Origin(names, (rows, columns), mx.stack, stacked=True)
        if part == "down":
            return Origin((f"{moe}.experts.down_proj",), shape, lambda tensors: tensors[0])
        half = slice(0, rows) if part == "gate" else slice(rows, 2 * rows)
        return Origin(
            (f"{moe}.experts.gate_up_proj",),
            (E, 2 * rows, columns),
            lambda tensors: tensors[0][:, half],
        )
    return Origin((path,), shape, lambda tensors: tensors[0], as_is=True)


def sanitize(
    weights: Mapping[str, mx.array], parameters: Mapping[str, Shape], config: Config
) -> dict[str, mx.array]:
    """Gives tensors of any layout the model's parameter names; mlx-lm's hook.

    The MTP head's tensors are left out where the model has no head. Missing and surplus tensors are
    for the caller to find (``load_weights(strict=True)``).

    Args:
        weights: the tensors by their stored names.
        parameters: path -> shape of the model's parameters.
    """
    merged: dict[str, mx.array] = {}
    layout: Layout = "hub"
    for mtp in sorted({is_mtp(path) for path in parameters}):  # the trunk first
        tensors = {
            name: tensor
            for name, tensor in weights.items()
            if is_mtp(name) == mtp and not is_ignored(name, config)
        }
        layout = detect_layout(tensors, undecided=layout)
        if layout == "converted":  # perhaps quantized, so the parameters are not the model's yet
            merged |= tensors
            continue
        surplus = dict(tensors)
        for path, origin in origins(parameters, layout).items():
            if is_mtp(path) == mtp and all(name in tensors for name in origin.names):
                merged[path] = origin.build([tensors[name] for name in origin.names])
                for name in origin.names:
                    surplus.pop(name, None)
        merged |= surplus
    return merged
