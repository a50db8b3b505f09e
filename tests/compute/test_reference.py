"""The float32 reference equations equal the float64 oracle, which shares no code with them."""

import float64
import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen3next.compute import reference


def normal(rng, *shape):
    return rng.standard_normal(shape)


def assert_close(name, result, expected, bound=2e-6):
    error = float64.relative_error(np.array(result), expected)
    assert error <= bound, f"{name}: relative L2 error {error:.1e}"


def array(x):
    return mx.array(x.astype(np.float32))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("L", [1, 2, 3, 63, 100])
def test_gated_delta_rule(rng, L):
    B, Hk, Hv, Dk, Dv = 2, 2, 6, 24, 16
    q = float64.l2_norm(normal(rng, B, L, Hk, Dk)) * Dk**-0.5
    k = float64.l2_norm(normal(rng, B, L, Hk, Dk))
    v, state = normal(rng, B, L, Hv, Dv), normal(rng, B, Hv, Dv, Dk)
    g, beta = -np.abs(normal(rng, B, L, Hv)), rng.uniform(size=(B, L, Hv))
    expected = float64.gated_delta_rule(q, k, v, g, beta, state)
    result = reference.gated_delta_rule(*map(array, (q, k, v, g, beta, state)))
    assert_close("o", result[0], expected[0])
    assert_close("state", result[1], expected[1])


@pytest.mark.parametrize("K", [2, 3, 4])
def test_causal_conv(rng, K):
    x, weight, history = normal(rng, 2, 9, 5), normal(rng, 5, K), normal(rng, 2, K - 1, 5)
    expected = float64.causal_conv(x, weight, history)
    result = reference.causal_conv(array(x), array(weight[..., None]), array(history))
    assert_close("y", result[0], expected[0])
    assert_close("rows", result[1], expected[1])


def test_norms(rng):
    x, z, w = normal(rng, 3, 7, 16), normal(rng, 3, 7, 16), normal(rng, 16)
    assert_close(
        "rms", reference.rms_norm(array(x), array(1 + w), 1e-2), float64.rms_norm(x, w, 1e-2)
    )
    gated = reference.gated_rms_norm(array(x), array(z), array(w), 1e-2)
    assert_close("gated", gated, float64.gated_rms_norm(x, z, w, 1e-2))
    tiny = x * 1e-4  # where the eps decides
    assert_close("l2", reference.l2norm(array(tiny)), float64.l2_norm(tiny))


def test_decay(rng):
    a, A_log, dt_bias = 4 * normal(rng, 5, 6), normal(rng, 6), normal(rng, 6)
    expected = -np.exp(A_log) * float64.softplus(a + dt_bias)
    assert_close("g", reference.decay(array(a), array(A_log), array(dt_bias)), expected)


def test_route_prefers_the_lowest_index_among_ties():
    logits = mx.array([[1.0, 2.0, 2.0, 0.0, 2.0]])
    experts, weights = reference.route(logits, 2, normalise=True)
    assert experts.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]
