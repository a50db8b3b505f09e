"""The router and the mixture of experts, in MLX's own operations."""

import mlx.core as mx
import pytest
from float64 import relative_error

from mlx_qwen3next.compute import reference
from mlx_qwen3next.compute.experts import route, sparse_experts
from mlx_qwen3next.metal_kernels import Experts


def assert_close(name, result, expected, bound=5e-6):
    error = relative_error(result, expected)
    assert error <= bound, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_route(top_k, normalise):
    logits = mx.random.normal((2, 5, 8))
    experts, weights = reference.route(logits, top_k, normalise)
    got_experts, got_weights = route(logits, top_k, normalise)
    order = mx.argsort(-got_weights, axis=-1)
    assert mx.array_equal(mx.take_along_axis(got_experts, order, -1), experts)
    assert_close("weights", mx.take_along_axis(got_weights, order, -1), weights)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(
    ("shared", "apart"), [(False, False), (True, False), (True, True)], ids=["", "shared", "apart"]
)
def test_parts_of_the_experts_add_up_to_all(rows, shared, apart):
    """Few rows, and so many that they are sorted; one part has no token's experts."""
    E, k, H, width = 9, 2, 32, 16
    mx.random.seed(rows)
    x, residual = mx.random.normal((rows, H)), mx.random.normal((rows, H))
    logits = mx.random.normal((rows, E + shared))
    logits[:, 6:9] -= 100
    gate_up = mx.random.normal((E + shared, 2 * width, H)) * 0.2
    down = mx.random.normal((E + shared, H, width)) * 0.2
    options = {"experts": E, "top_k": k, "normalise": True}

    def mixture(logits, ids, residual, **more):
        chosen = mx.array(list(ids))
        weights = Experts(gate_up[chosen]), Experts(down[chosen])
        return sparse_experts(x, logits, *weights, residual, **options, **more)

    whole = mixture(logits, range(E + shared), residual)
    one = {"shared": (Experts(gate_up[E]), Experts(down[E]))} if apart else {}
    first = [0, 1, 2] + [E] * (shared and not apart)
    parts = mixture(logits, first, residual, own=range(0, 3), **one)
    for own in (range(3, 6), range(6, 9)):
        parts = parts + mixture(logits[:, :E], own, mx.zeros_like(residual), own=own)
    assert relative_error(parts, whole) < 1e-6
