"""Metal kernels of operations that MLX needs several launches for, and a function to launch each.

The only place that touches ``mx.fast.metal_kernel``. Each family has a ``.metal`` file with its
kernels' text, after ``common.metal``, and a Python file whose bodies only call into that text. Each
function says what shapes and dtypes it takes and what its limits are;
:mod:`mlx_qwen3next.compute.proof` decides whether a kernel is used at all. T is the activations'
dtype: float32, bfloat16 or float16.
"""

from .attention import attention_gate, attention_heads
from .experts import (
    Experts,
    combine,
    expert_down,
    expert_gate_up,
    takes_combine,
    takes_experts,
)
from .gated_delta import gated_delta_replay, gated_delta_step, takes_gated_delta
from .kernel import Kernel, available, source_hash
from .norms import add_rms_norm, rms_norm
from .router import choose, route, takes_choice, takes_router

__all__ = [
    "Experts",
    "Kernel",
    "add_rms_norm",
    "attention_gate",
    "attention_heads",
    "available",
    "choose",
    "combine",
    "expert_down",
    "expert_gate_up",
    "gated_delta_replay",
    "gated_delta_step",
    "rms_norm",
    "route",
    "source_hash",
    "takes_choice",
    "takes_combine",
    "takes_experts",
    "takes_gated_delta",
    "takes_router",
]
