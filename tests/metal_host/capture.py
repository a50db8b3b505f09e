"""The exact text and launch that MLX makes of a custom kernel, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Launch:
    """One call of a custom kernel: what MLX would compile, and what it would run it on."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    inputs: tuple[mx.array, ...]
    shape_infos: tuple[tuple[bool, bool, bool], ...]  # per input: shape, strides, ndim wanted
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    init_value: float | None = None


def capture(
    kernel: Any,
    *,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
) -> Launch:
    """The launch that calling `kernel` (of mx.fast.metal_kernel) with these arguments makes.

    mx.export_function traces the call and hands over the primitive with the text in it; nothing
    is compiled or run.
    """
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    found: list[dict[str, Any]] = []
    names: dict[str, mx.array] = {}

    def receive(event: dict[str, Any]) -> None:
        if event["type"] == "inputs":
            names.update(
                (name, array) for (name, *_), array in zip(event["inputs"], arrays, strict=True)
            )
        elif event["type"] == "primitive" and event["name"] == "CustomKernel":
            found.append(event)

    def call(*arguments: mx.array) -> list[mx.array]:
        return kernel(
            inputs=list(arguments),
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            init_value=init_value,
        )

    mx.export_function(receive, call, *arrays)
    (event,) = found
    arguments = event["arguments"]
    return Launch(
        name=arguments[0],
        source=arguments[1],
        grid=tuple(arguments[2:5]),
        threadgroup=tuple(arguments[5:8]),
        inputs=tuple(names[name] for name, *_ in event["inputs"]),
        shape_infos=tuple(arguments[8]),
        outputs=tuple((tuple(shape), dtype) for _, shape, dtype in event["outputs"]),
        init_value=init_value,
    )
