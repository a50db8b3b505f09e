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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta, qwen3_next

from mlx_qwen3next.bench.graph import arrays_of, count
from mlx_qwen3next.compute import proof
from mlx_qwen3next.metal_kernels import Kernel
from mlx_qwen3next.model import packing
from mlx_qwen3next.model.cache import Round
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model

# The 80B model's structure, small.
CONFIG = {
    "model_type": "qwen3_next",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 128,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "full_attention_interval": 4,
    "tie_word_embeddings": False,
}


def one_launch(
    inputs: Sequence[Any], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]
) -> list[mx.array]:
    """Arrays that depend on ``inputs`` through exactly one counted primitive."""
    mark = mx.erf(mx.depends(mx.zeros((1,)), [x for x in inputs if isinstance(x, mx.array)]))
    return [mx.depends(mx.zeros(s, t), [mark]) for s, t in zip(shapes, dtypes, strict=True)]


def _like_first(x: mx.array, *inputs: Any, **_: Any) -> mx.array:
    return one_launch([x, *inputs], [x.shape], [x.dtype])[0]


def _attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    return one_launch([q, k, v], [(*q.shape[:-1], v.shape[-1])], [q.dtype])[0]


def _gated_delta(*inputs: Any, **_: Any) -> list[mx.array]:
    k, v = inputs[1:3]
    state = (v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    return one_launch(inputs, [v.shape, state], [v.dtype, mx.float32])


def _custom(*_: Any, inputs: Any, output_shapes: Any, output_dtypes: Any, **__: Any) -> Any:
    return one_launch(inputs, output_shapes, output_dtypes)


@contextmanager
def as_on_metal(kernels: bool) -> Iterator[None]:
    """While active, graphs are built as on an Apple GPU, with opaque stand-ins."""
    stand_ins: list[tuple[Any, str, Any]] = [
        (mx.fast, "rms_norm", _like_first),
        (mx.fast, "rope", _like_first),
        (mx.fast, "scaled_dot_product_attention", _attention),
        (mx.fast, "gated_delta_update", _gated_delta),
        (mx.metal, "is_available", lambda: True),
        (mx, "default_device", lambda: mx.gpu),
        (gated_delta, "_gated_delta_kernel", _custom),
        (gated_delta, "_gated_delta_kernel_packed", _custom),
        (Kernel, "launch", _custom),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        proof.set_kernels("on" if kernels else "off")
        stack.callback(proof.set_kernels, "auto")
        yield


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
        stack.enter_context(as_on_metal(kernels))
        return count([model(mx.array([[5] * rows]), cache=cache), *arrays_of(cache)])


def ours(layers: int) -> Model:
    """This package's model, packed, at 4 bits in bfloat16."""
    model = Model(Config.from_dict({**CONFIG, "num_hidden_layers": layers}))
    nn.quantize(model, 64, 4, class_predicate=_linear)
    dtypes = {True: mx.bfloat16, False: mx.float32}
    for path, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            cast = array.astype(dtypes[model.cast_predicate(path)])
            model.load_weights([(path, cast)], strict=False)
    return packing.pack(model)


def mlx_lm(layers: int) -> Any:
    """mlx-lm's model at 4 bits in bfloat16."""
    args = qwen3_next.ModelArgs.from_dict({**CONFIG, "num_hidden_layers": layers})
    model = qwen3_next.Model(args)
    nn.quantize(model, 64, 4, class_predicate=_linear)
    model.set_dtype(mx.bfloat16)
    return model


def _linear(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and not path.endswith("embed_tokens")


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
