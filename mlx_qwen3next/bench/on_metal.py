"""Graphs of steps as they are built on an Apple GPU, on any machine.

MLX's GPU backend runs some of its operations as one kernel where a CPU takes several, and custom
kernels run there alone. While :func:`as_on_metal` is active, each of these is one opaque primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta, qwen3_next

from ..compute import proof
from ..metal_kernels import Kernel
from ..model import mtp_head
from ..model.config import Config
from ..model.packed import packing, tracing
from ..model.qwen3_next import Model

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


# Makes arrays of some shapes and dtypes that depend on others.
Opaque = Callable[[Sequence[Any], Sequence[Sequence[int]], Sequence[mx.Dtype]], list[mx.array]]

_functions: dict[Opaque, dict[Any, Any]] = {}  # traces with opaque primitives in them


@contextmanager
def as_on_metal(opaque: Opaque, *, kernels: bool) -> Iterator[None]:
    """While active, graphs are built as on an Apple GPU, with opaque primitives in them."""

    def like_first(x: mx.array, *inputs: Any, **_: Any) -> mx.array:
        return opaque([x, *inputs], [x.shape], [x.dtype])[0]

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        return opaque([q, k, v], [(*q.shape[:-1], v.shape[-1])], [q.dtype])[0]

    def delta_rule(*inputs: Any, **_: Any) -> list[mx.array]:
        k, v = inputs[1:3]
        state = (v.shape[0], v.shape[2], v.shape[3], k.shape[3])
        return opaque(inputs, [v.shape, state], [v.dtype, mx.float32])

    def custom(*_: Any, inputs: Any, output_shapes: Any, output_dtypes: Any, **__: Any) -> Any:
        return opaque(inputs, output_shapes, output_dtypes)

    stand_ins: list[tuple[Any, str, Any]] = [
        (mx.fast, "rms_norm", like_first),
        (mx.fast, "rope", like_first),
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx.fast, "gated_delta_update", delta_rule),
        (mx.metal, "is_available", lambda: True),
        (mx, "default_device", lambda: mx.gpu),
        (gated_delta, "_gated_delta_kernel", custom),
        (gated_delta, "_gated_delta_kernel_packed", custom),
        (Kernel, "launch", custom),
        (tracing, "_functions", _functions.setdefault(opaque, {})),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        before = proof.mode()
        proof.set_kernels("on" if kernels else "off")
        stack.callback(proof.set_kernels, before)
        yield


def ours(layers: int, bits: Callable[[str], int] = lambda path: 4) -> Model:
    """Makes this package's model with an MTP head, packed, in bfloat16.

    Args:
        bits: those of the linear layer, or of the experts' stack, that has a path.
    """
    model = Model(Config.from_dict({**CONFIG, "num_hidden_layers": layers}))
    mtp_head.attach(model)

    def chosen(path: str, module: nn.Module) -> bool | dict[str, int]:
        return _linear(path, module) and {"group_size": 64, "bits": bits(path)}

    nn.quantize(model, 64, 4, class_predicate=chosen)
    dtypes = {True: mx.bfloat16, False: mx.float32}
    leaves: Any = tree_flatten(model.parameters())
    for path, array in leaves:
        if mx.issubdtype(array.dtype, mx.floating):
            cast = array.astype(dtypes[model.cast_predicate(path)])
            model.load_weights([(path, cast)], strict=False)
    return packing.pack(model)


def mlx_lm(layers: int) -> Any:
    """Makes mlx-lm's model at 4 bits in bfloat16."""
    args = qwen3_next.ModelArgs.from_dict({**CONFIG, "num_hidden_layers": layers})
    model = qwen3_next.Model(args)
    nn.quantize(model, 64, 4, class_predicate=_linear)
    model.set_dtype(mx.bfloat16)
    return model


def _linear(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and not path.endswith("embed_tokens")
