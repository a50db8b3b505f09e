"""Every form of the delta rule computes the reference equations, as do its inputs."""

import mlx.core as mx
import pytest
from float64 import relative_error

from mlx_qwen3next.compute import gated_delta, reference
from mlx_qwen3next.compute.gated_delta import (
    causal_conv,
    decay,
    gated_delta_chunked,
    gated_delta_replay,
    gated_delta_rule,
    gated_delta_steps,
)

LENGTHS = [1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 130]
SHAPES = [  # B, Hk, Hv, Dk, Dv
    pytest.param((1, 2, 6, 32, 16), id="B1-Hk2-Hv6-Dk32-Dv16"),
    pytest.param((3, 1, 2, 16, 48), id="B3-Hk1-Hv2-Dk16-Dv48"),
]


def segment(shape, L, *, alike=0.0, seed=0):
    """(q, k, v, g, beta, state); ``alike`` near 1 makes all keys nearly the same."""
    B, Hk, Hv, Dk, Dv = shape
    mx.random.seed(seed)
    keys = mx.random.normal((B, L, Hk, Dk)) * (1 - alike) + mx.random.normal((B, 1, Hk, Dk)) * alike
    return (
        reference.l2norm(mx.random.normal((B, L, Hk, Dk))) * Dk**-0.5,
        reference.l2norm(keys),
        mx.random.normal((B, L, Hv, Dv)),
        -mx.abs(mx.random.normal((B, L, Hv))) * mx.random.uniform(0, 1, (Hv,)) ** 3,
        mx.sigmoid(3 * mx.random.normal((B, L, Hv))),
        mx.random.normal((B, Hv, Dv, Dk)),
    )


def assert_close(name, result, expected, bound=5e-6):
    error = relative_error(result, expected)
    assert error <= bound, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [gated_delta_rule, gated_delta_chunked, gated_delta_steps])
def test_gated_delta(form, shape, L):
    inputs = segment(shape, L)
    o, state = reference.gated_delta_rule(*inputs)
    result = form(*inputs)
    assert_close("o", result[0], o)
    assert_close("state", result[1], state)


@pytest.mark.parametrize("L", [1, 40])
def test_mlx_own_kernel_gets_its_arguments_right(monkeypatch, L):
    """Where there is no GPU, MLX computes the same function in plain ops."""
    monkeypatch.setattr(gated_delta, "available", lambda: True)
    inputs = segment((2, 2, 6, 32, 16), L)
    o, state = reference.gated_delta_rule(*inputs)
    result = gated_delta_rule(*inputs)
    assert_close("o", result[0], o)
    assert_close("state", result[1], state)


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_chunk_size_does_not_matter(chunk):
    inputs = segment((1, 2, 6, 32, 16), 100)
    o, state = reference.gated_delta_rule(*inputs)
    result = gated_delta_chunked(*inputs, chunk=chunk)
    assert_close("o", result[0], o)
    assert_close("state", result[1], state)


def test_chunked_form_is_stable_when_keys_repeat():
    # The inverse by matrix powers loses all digits here: its terms grow like binomials.
    q, k, v, g, _, state = segment((1, 1, 2, 32, 16), 128, alike=0.9999)
    inputs = (q, k, v, g * 1e-3, mx.full(g.shape, 0.999), state)
    o, after = reference.gated_delta_rule(*inputs)
    result = gated_delta_chunked(*inputs)
    assert_close("o", result[0], o, 2e-5)
    assert_close("state", result[1], after, 2e-5)


@pytest.mark.parametrize("stronger", [3, 10, 40])
def test_chunked_form_under_strong_decay(stronger):
    q, k, v, g, beta, state = segment((1, 2, 6, 32, 16), 65)
    inputs = (q, k, v, g - stronger, beta, state)  # exp(-g) of a chunk would be infinite
    o, after = reference.gated_delta_rule(*inputs)
    result = gated_delta_chunked(*inputs)
    assert_close("o", result[0], o)
    assert_close("state", result[1], after)


def test_inverse_without_faint_numbers():
    """Its products of faint decays would be too small for a CPU to be fast."""
    A = mx.eye(16, k=-1) * 2.0**-40
    sizes = mx.abs(gated_delta._unit_lower_inverse(A))
    assert mx.allclose(sizes, mx.eye(16) + A).item()
    assert mx.where(sizes == 0, 1, sizes).min().item() >= gated_delta.FAINT


@pytest.mark.parametrize("argument", range(6), ids=["q", "k", "v", "g", "beta", "state"])
def test_gradients_flow_through_the_chunked_form(argument):
    inputs = list(segment((1, 2, 4, 16, 8), 40))
    weights = mx.random.normal((1, 40, 4, 8))

    def loss(form, x):
        replaced = [*inputs[:argument], x, *inputs[argument + 1 :]]
        o, state = form(*replaced)
        return (o * weights).sum() + (state * state).sum()

    expected = mx.grad(lambda x: loss(reference.gated_delta_rule, x))(inputs[argument])
    result = mx.grad(lambda x: loss(gated_delta_chunked, x))(inputs[argument])
    assert_close("gradient", result, expected, 2e-5)


@pytest.mark.parametrize("form", [gated_delta_chunked, gated_delta_steps])
def test_padding_tokens_change_nothing(form):
    q, k, v, g, beta, state = segment((2, 2, 6, 32, 16), 40)
    keep = (mx.arange(40) % 3 != 0)[None, :, None]
    g, beta = mx.where(keep, g, 0), mx.where(keep, beta, 0)
    at = mx.array([t for t in range(40) if t % 3])
    o, after = reference.gated_delta_rule(*(x[:, at] for x in (q, k, v, g, beta)), state)
    result = form(q, k, v, g, beta, state)
    assert_close("o", result[0][:, at], o)
    assert_close("state", result[1], after)


@pytest.mark.parametrize("keep", [0, 1, 3, 7])
def test_replay_gives_the_very_bits_of_the_steps(keep):
    q, k, v, g, beta, state = segment((2, 2, 6, 32, 16), 7)
    _, _, delta = gated_delta_steps(q, k, v, g, beta, state)
    kept = [x[:, :keep] for x in (q, k, v, g, beta)]
    expected = gated_delta_steps(*kept, state)[1] if keep else state
    assert mx.array_equal(gated_delta_replay(state, g, k, delta, keep), expected)


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("L", [1, 5])
def test_causal_conv(K, L):
    x, history = mx.random.normal((2, L, 6)), mx.random.normal((2, K - 1, 6))
    weight = mx.random.normal((6, K, 1))
    expected, _ = reference.causal_conv(x, weight, history)
    result = causal_conv(mx.concatenate([history, x], axis=1), weight)
    assert_close("y", result, expected)


def test_decay():
    a, A_log, dt_bias = 4 * mx.random.normal((5, 6)), mx.random.normal((6,)), mx.random.normal((6,))
    expected = reference.decay(a, A_log, dt_bias)
    assert_close("g", decay(a, A_log, dt_bias), expected)
    half = decay(a.astype(mx.bfloat16), A_log, dt_bias)
    assert half.dtype == mx.float32
