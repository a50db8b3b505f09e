"""``--fit``: the bits of each part of a model, so that all of it stays in a Mac's memory.

Each width costs a unit (:mod:`convert.units`) bytes and an error. Errors are measured
(:mod:`convert.calibration`), or expected: those of normally distributed weights. The choice is the
one of the least sum of errors within the bytes, found greedily: every unit starts at its smallest
width; then the step that takes away most error a byte is made, again and again.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.nn as nn

from mlx_qwen3next.checkpoint.files import MTP_FILE
from mlx_qwen3next.checkpoint.loading import DEFAULT_CONTEXT
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.capacity import GB, GPU_SHARE

from . import report, weights
from .calibration import Calibration, default_text, read_text
from .plan import Conversion
from .progress import Progress, saying_how_to_go_on
from .quantize import Predicate, Quantization
from .units import COARSE, Errors, Unit, Width, expected_errors, find_units
from .weights import Parameter

# The part of what the GPU may keep that is left for activations and freed buffers.
WORKING_SHARE = 1 / 32
_SHARE = GPU_SHARE * (1 - WORKING_SHARE) * 2**30  # bytes of a GB of memory for weights and cache
NO_TEXT = "none"  # the value of --calibration for expected errors


@dataclass(frozen=True)
class Fit:
    """A choice of widths.

    Attributes:
        widths: unit -> its width.
        measured: whether it goes by measured errors.
    """

    widths: Mapping[Unit, Width]
    measured: bool

    @property
    def predicate(self) -> Predicate:
        """The choice as mlx_lm.convert's ``quant_predicate``."""
        by_path = {path: width for unit, width in self.widths.items() for path in unit.paths}

        def choose(path: str, module: nn.Module) -> bool | Quantization:
            return by_path[path].quantization if path in by_path else False

        return choose

    def describe(self) -> list[str]:
        """Lines about the choice, one a kind of unit."""
        counts: dict[str, Counter[Width]] = defaultdict(Counter)
        for unit, width in self.widths.items():
            counts[unit.kind][width] += 1
        lines = [
            f"{kind}: " + ", ".join(_describe(width, n) for width, n in sorted(found.items()))
            for kind, found in counts.items()
        ]
        errors = "measured on a text" if self.measured else "expected; measuring may move them"
        return [*lines, f"(by errors that were {errors})"]


def _describe(width: Width, count: int) -> str:
    groups = f" in groups of {width.group_size}" if width.group_size == COARSE else ""
    return f"{width.bits} bits{groups}" + (f" ({count})" if count > 1 else "")


def fit(
    plan: Callable[..., Conversion],
    gigabytes: float,
    group_size: int,
    calibration: str | None,
    target: Path,
    partial: Path,
    measured: bool,
) -> tuple[Conversion, list[str]]:
    """Plans the conversion whose model stays in the memory of a Mac of so many gigabytes.

    Args:
        plan: :func:`plan_conversion` without ``base``, ``predicate`` and ``searched``.
        gigabytes: 2^30 bytes each.
        group_size: of all widths but the smallest.
        calibration: the text's file; None for the text that is there, ``NO_TEXT`` for none.
        target, partial: the folder to make, and the one to work in.
        measured: whether to measure errors that no folder keeps; else they are expected ones.

    Returns:
        The plan, and lines about it.

    Raises:
        ValueError: the smallest widths are too large, or nothing can be measured.
    """
    start = plan(base=Width(4, group_size).quantization)
    units = find_units(start, group_size)

    def choose(errors: Errors | None) -> tuple[Conversion, list[str]]:
        choice = choose_widths(start, units, gigabytes, errors)
        conversion = plan(base=start.base, predicate=choice.predicate, searched=True)
        return conversion, choice.describe()

    if calibration == NO_TEXT:
        return choose(None)
    text = default_text() if calibration is None else read_text(calibration)
    task = Calibration(start, units, text)
    errors = task.find(target) or task.find(partial)
    if errors is not None:
        return choose(errors)
    conversion, lines = choose(None)
    if not measured:
        return conversion, [*lines, f"(measuring takes about {task.memory / GB:.1f} GB of memory)"]
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} exists already; move it away or choose another --mlx-path")
    tokens = task.tokenize(calibration)
    files = conversion.files(partial)
    report.check_disk(partial, conversion, files, weights.chunks(files, conversion.source))
    with Progress(partial, task.identity) as progress, saying_how_to_go_on(progress, task.layers):
        errors = task.measure(tokens, partial, progress)
    return choose(errors)


def memory_needed(conversion: Conversion, weights: int) -> float:
    """The memory of a Mac, in units of 2^30 bytes, that is enough to keep a model resident.

    Args:
        weights: bytes of the weights.
    """
    config = conversion.source.config
    cache = capacity.cache_bytes(
        config,
        min(DEFAULT_CONTEXT, config.max_position_embeddings),
        mtp=MTP_FILE in conversion.parameters,
        itemsize=conversion.dtype.size,
    )
    return (weights + cache) / _SHARE


def choose_widths(
    conversion: Conversion, units: Sequence[Unit], gigabytes: float, errors: Errors | None
) -> Fit:
    """Chooses the widths of a conversion's units for a Mac of so many gigabytes.

    Args:
        conversion: quantized in any way; its sizes count.
        units: see :func:`find_units`.
        gigabytes: the Mac's memory (2^30 bytes each).
        errors: measured ones; None for the expected ones.

    Raises:
        ValueError: the smallest widths are too large.
    """
    parameters = conversion.by_path
    costs = {u.name: {w: _bytes(u, w, parameters) for w in u.widths} for u in units}
    smallest = {unit: unit.widths[0] for unit in units}
    least = (
        conversion.resident_bytes
        - sum(parameters[f"{path}.weight"].nbytes for unit in units for path in unit.paths)
        + sum(costs[unit.name][width] for unit, width in smallest.items())
    )
    needed = memory_needed(conversion, least)
    if needed > gigabytes:
        raise ValueError(
            f"--fit {gigabytes:g} is too small: the smallest that fits is "
            f"{math.ceil(10 * needed) / 10:g}; a checkpoint larger than memory runs with "
            "--experts-in-memory, from the SSD"
        )
    left = (gigabytes - needed) * _SHARE
    widths = _allocate(smallest, costs, errors or expected_errors(units), left)
    return Fit(widths, measured=errors is not None)


def _bytes(unit: Unit, width: Width, parameters: Mapping[str, Parameter]) -> int:
    """The bytes of a unit's weights at a width."""
    whole = (parameters[f"{path}.weight"] for path in unit.paths)
    return sum(replace(p, quantization=width.quantization).nbytes for p in whole)


def _allocate(
    smallest: Mapping[Unit, Width],
    costs: Mapping[str, Mapping[Width, int]],
    errors: Errors,
    left: float,
) -> dict[Unit, Width]:
    """The widths by the greedy choice.

    Args:
        costs: unit's name -> width -> bytes.
        left: bytes that may be added to the smallest widths.
    """
    chosen = dict(smallest)
    while True:
        best: tuple[float, Unit, Width] | None = None
        for unit, width in chosen.items():
            cost, error = costs[unit.name], errors[unit.name]
            for wider in cost:
                added, gain = cost[wider] - cost[width], error[width] - error[wider]
                if 0 < added <= left and gain > 0 and (best is None or gain / added > best[0]):
                    best = gain / added, unit, wider
        if best is None:
            return chosen
        _, unit, wider = best
        left -= costs[unit.name][wider] - costs[unit.name][chosen[unit]]
        chosen[unit] = wider
