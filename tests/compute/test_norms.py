"""Every norm computes its reference equation."""

import mlx.core as mx
from float64 import relative_error

from mlx_qwen3next.compute import norms, reference


def assert_close(name, result, expected, bound=5e-6):
    error = relative_error(result, expected)
    assert error <= bound, f"{name}: relative L2 error {error:.1e}"


def test_norms():
    x, z, w = (mx.random.normal((3, 7, 16)) for _ in range(3))
    w = w[0, 0]
    assert_close("rms", norms.rms_norm(x, w, 1e-2), reference.rms_norm(x, w, 1e-2))
    expected = reference.gated_rms_norm(x, z, w, 1e-2)
    assert_close("gated", norms.gated_rms_norm(x, z, w, 1e-2), expected)
    tiny = x * 1e-4  # where the eps decides
    assert_close("l2", norms.l2norm(tiny, scale=0.25), reference.l2norm(tiny) * 0.25)


def test_norms_are_computed_in_float32():
    x, w = mx.random.normal((4, 64)).astype(mx.bfloat16), 1 + 1e-3 * mx.random.normal((64,))
    result = norms.rms_norm(x, w, 1e-6)
    assert result.dtype == mx.bfloat16
    assert mx.array_equal(result, reference.rms_norm(x, w, 1e-6).astype(mx.bfloat16))
