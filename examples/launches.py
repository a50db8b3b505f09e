"""Counts the GPU launches that a forward step queues: stock mlx-lm, this package without its
kernels, and with them. Runs anywhere, no GPU needed.

    python examples/launches.py

A step's graph is built as it would be on an Apple GPU, not evaluated, and its primitives are
counted (mx.export_to_dot). What MLX's GPU backend runs as one kernel, and every Metal kernel of
ours, stands in the graph as one opaque primitive. Operations that only describe memory anew are
not counted, nor are the copies some of them make on a GPU: each count is a lower bound.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from mlx_qwen3next.bench.graph import arrays_of, count
from mlx_qwen3next.bench.on_metal import as_on_metal, mlx_lm, ours
from mlx_qwen3next.model.cache import Round


def one_launch(
    inputs: Sequence[Any], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]
) -> list[mx.array]:
    """Makes arrays that depend on ``inputs`` through exactly one counted primitive."""
    mark = mx.erf(mx.depends(mx.zeros((1,)), [x for x in inputs if isinstance(x, mx.array)]))
    return [mx.depends(mx.zeros(s, t), [mark]) for s, t in zip(shapes, dtypes, strict=True)]


def step(model: Any, rows: int, kernels: bool, speculating: bool) -> Counter[str]:
    """The launches of a step of ``rows`` tokens; ``speculating``: a round that follows another."""
    model.eval()
    cache = model.make_cache()
    mx.eval(model.parameters(), model(mx.array([[1, 2, 3]]), cache=cache))
    if speculating:
        with Round(cache, rows) as last:
            mx.eval(model(mx.array([[4] * rows]), cache=cache))
            last.commit(max(1, rows - 1))
    mx.eval(arrays_of(cache))
    with ExitStack() as stack:
        if speculating:
            stack.enter_context(Round(cache, rows))
        stack.enter_context(as_on_metal(one_launch, kernels=kernels))
        return count([model(mx.array([[5] * rows]), cache=cache), *arrays_of(cache)])


def per_period(
    make: Callable[[int], Any], rows: int, *, kernels: bool = False, speculating: bool = False
) -> Counter[str]:
    """The launches of one more period: three Gated DeltaNet layers and one of attention."""
    few, many = (step(make(n), rows, kernels, speculating) for n in (4, 8))
    many.subtract(few)
    return many


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="name the primitives")
    args = parser.parse_args()
    cases = [
        ("mlx-lm", mlx_lm, 1, {}),
        ("here, MLX's own operations", ours, 1, {}),
        ("here, kernels", ours, 1, {"kernels": True}),
        ("here, kernels, a round of 4", ours, 4, {"kernels": True, "speculating": True}),
        ("mlx-lm", mlx_lm, 4, {}),
    ]
    print("launches a period of three Gated DeltaNet layers and one of attention")
    for name, make, rows, options in cases:
        launches = per_period(make, rows, **options)
        print(f"{name:28} {rows} row{'s' * (rows > 1):1} {launches.total():4}")
        if args.verbose:
            print("   ", ", ".join(f"{n} {name}" for name, n in launches.most_common() if n))


if __name__ == "__main__":
    main()
