"""Experts on disk: whether they have to be, how many a layer memory holds, what speed to expect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..group import Group
from ..model import capacity, layouts
from ..model.capacity import GB
from ..model.qwen3_next import Model, SparseMoE
from ..model.reading import Reading
from ..model.streamed.experts import StreamedExperts
from ..model.streamed.slots import passing_at_a_time
from ..storage.reading import Piece
from ..storage.safetensors import Tensor
from . import match

ExpertsInMemory = Literal["auto", "all"] | float  # GB

# For the passing results of a prompt's chunk, in bytes.
RESERVE = 1.5 * GB
# Seconds of a token apart from reading, a layer: the middle of what others' engines need on Apple
# hardware, 30 to 45 ms for 48 layers, most of it the wait in each of them.
SECONDS_A_LAYER = 0.0008
# Share of a layer's experts in memory -> share of the wanted ones that are there: measured with
# LRU, experts wanted by Zipf's law.
HELD = (0.0, 0.25, 0.5, 0.75, 1.0)
HITS = (0.0, 0.67, 0.83, 0.93, 1.0)

_ROUTED = ".switch_mlp."


@dataclass(frozen=True)
class Plan:
    """How many experts a layer are held, and what that promises.

    Attributes:
        size: experts of a layer that are in memory. experts: of a layer. layers: that have experts.
        wanted: experts of a layer that a token wants.
        nbytes: of an expert on disk. memory: bytes of all that is held.
        total: bytes that the model takes at most, with its cache of ``context`` tokens and what
            reading a prompt takes, where one text is answered at a time.
        rate: bytes a second that the disk gives; 0 while that is not measured.
    """

    size: int
    experts: int
    layers: int
    wanted: int
    nbytes: int
    memory: int
    total: int
    context: int
    rate: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of the wanted experts that is expected to be there."""
        return float(np.interp(self.size / self.experts, HELD, HITS))

    @property
    def bytes_a_token(self) -> float:
        """Bytes that are expected to be read for a token."""
        return self.layers * self.wanted * self.nbytes * (1 - self.hit_rate)

    @property
    def tokens_a_second(self) -> float:
        """The speed of decoding that is expected on a Mac, without drafts."""
        return 1 / (self.layers * SECONDS_A_LAYER + self.bytes_a_token / self.rate)

    def __str__(self) -> str:
        return (
            f"experts on disk: {self.size} of {self.experts} a layer in memory "
            f"({self.memory / GB:.3g} GB; {self.total / GB:.3g} GB in all, for "
            f"{self.context} tokens), about {self.bytes_a_token / GB:.2g} GB read a token; "
            f"the disk gives {self.rate / GB:.2g} GB/s, so about {self.tokens_a_second:.1f} "
            "tokens a second on a Mac, without drafts"
        )


def check_options(
    asked: ExpertsInMemory, *, pack: bool, group: Group, adapter: Any
) -> ExpertsInMemory:
    """Checks ``experts_in_memory`` beside the other options of loading.

    Returns:
        It; "all" in place of "auto" where nothing else is possible.

    Raises:
        ValueError: it is not usable, or not with them.
    """
    if not (asked in ("auto", "all") or (isinstance(asked, (int, float)) and asked > 0)):
        raise ValueError(f"experts_in_memory must be 'auto', 'all' or a number of GB, got {asked}")
    others = {
        "an adapter": adapter is not None,
        "pack=False": not pack,
        "several machines": group.size > 1,
    }
    found = [name for name, is_given in others.items() if is_given]
    if found and not isinstance(asked, str):
        raise ValueError(f"experts_in_memory={asked:g} does not go with {found[0]}: use 'all'")
    return "all" if found else asked


def plan(
    model: Model,
    tensors: Mapping[str, Tensor],
    asked: ExpertsInMemory,
    dtype: mx.Dtype,
    context: int,
    directory: Path,
) -> Plan | None:
    """Plans how many experts a layer are to be in memory.

    Args:
        model: in its quantized form; values do not matter yet.
        tensors: the checkpoint's, by name.
        dtype, context: see :func:`mlx_qwen3next.load`.

    Returns:
        The plan; None if all experts are to be held.

    Raises:
        ValueError: that is too little memory, or the experts cannot be read from disk as they are.
    """
    layers = [layer.mlp for layer in model.layers if isinstance(layer.mlp, SparseMoE)]
    if asked == "all" or not layers:
        return None
    sizes = match.bytes_in_memory(model, dtype)
    routed = sum(size for path, size in sizes.items() if _is_routed(path))
    others = sum(sizes.values()) - routed + match.added_by_packing(model, dtype)
    mtp = model.mtp is not None
    others += capacity.cache_bytes(model.args, context, mtp=mtp, itemsize=dtype.size)
    spare = capacity.spare()
    if asked == "auto":
        if routed + others <= spare:
            return None
        room = spare - others - RESERVE
    else:
        room = asked * GB
    experts, wanted = layers[0].num_experts, layers[0].top_k
    row = routed / experts  # bytes of an expert in each layer
    forms = {str(_kinds(layer)): layer.switch_mlp for layer in layers}
    stacks = (match.bytes_in_memory(stack, dtype) for stack in forms.values())
    a_form = sum(sum(stack.values()) for stack in stacks) / experts
    passing = 2 * passing_at_a_time(experts) * a_form
    size = int((room - passing) // row)
    if size >= experts:
        return None
    if fault := _fault(layers, tensors):
        if asked == "auto":  # then all have to be in memory, whether they fit it well or not
            return None
        raise ValueError(f"{directory} {fault}")
    if size < wanted:
        raise ValueError(
            f"{directory}: {max(room, 0) / GB:.3g} GB for experts are too little: a token wants "
            f"{wanted} of {experts} in each of {len(layers)} layers, which take "
            f"{_rounded_up((wanted * row + passing) / GB)} GB"
        )
    stored = sum(t.nbytes for name, t in tensors.items() if _is_routed(name))
    nbytes = stored // experts // len(layers)
    held = int(size * row + passing)
    left = spare - others - held
    chunk = Reading.beside(model.args, dtype.size, left).most_memory(context)
    # Decoding has three sets of states: the newest, those before it and those for an undo.
    states = capacity.cache_bytes(model.args, 0, mtp=False, itemsize=dtype.size)
    total = held + others + chunk + 2 * states
    return Plan(size, experts, len(layers), wanted, nbytes, held, total, context)


def measured(planned: Plan, experts: StreamedExperts) -> Plan:
    """Returns the plan with the disk's rate, which takes a second.

    Raises:
        OSError: a file cannot be read.
    """

    def pieces() -> Iterator[Piece]:
        """Yields those of the experts in a random order."""
        layers = len(experts.slots)
        for number in np.random.default_rng(0).permutation(layers * planned.experts).tolist():
            stored = experts.slots[number % layers].stored
            yield from stored.pieces(number // layers)

    return replace(planned, rate=experts.reader.rate(pieces()))


def is_streamed(path: str, planned: Plan | None) -> bool:
    """Returns whether a parameter stays on disk."""
    return planned is not None and _is_routed(path)


def _rounded_up(gb: float) -> float:
    """Rounds to three digits."""
    unit = 10.0 ** (math.floor(math.log10(gb)) - 2)
    return float(f"{math.ceil(gb / unit) * unit:.3g}")


def _is_routed(name: str) -> bool:
    return _ROUTED in name and not layouts.is_mtp(name)


def _fault(layers: Sequence[SparseMoE], tensors: Mapping[str, Tensor]) -> str:
    """Returns why experts cannot be read one by one as they are stored; nothing if they can."""
    trunk = {name: tensor for name, tensor in tensors.items() if not layouts.is_mtp(name)}
    if (layout := layouts.detect_layout(trunk)) != "converted":
        return (
            f"is in the {layout} layout, whose experts cannot be read from disk one by one: "
            "convert it first (python -m mlx_qwen3next.convert)"
        )
    for layer in layers:
        gate, up, down = _kinds(layer)
        modes = {kind[0] for kind in (gate, up, down)}
        if modes != {"affine"} or gate != up:
            return (
                f"has experts in the quantization {', '.join(sorted(modes))}, of {gate[1]}, "
                f"{up[1]} and {down[1]} bits, which cannot be read from disk one by one: it has to "
                "be affine, gate and up alike"
            )
    return ""


def _kinds(layer: SparseMoE) -> list[tuple[str, int, int]]:
    """Returns mode, bits and group size of gate, up and down."""
    parts = [getattr(layer.switch_mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    return [
        (getattr(p, "mode", "affine"), getattr(p, "bits", 16), getattr(p, "group_size", 0))
        for p in parts
    ]
