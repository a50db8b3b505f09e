"""Floats of one dtype in another, bit for bit as MLX rounds them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen3next.storage.safetensors import NAMES, converted

DTYPES = mx.float32, mx.bfloat16, mx.float16


@pytest.mark.parametrize("held", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_floats_are_converted_as_mlx_does(stored, held):
    random = np.random.default_rng(0)
    values = random.standard_normal(4000) * 10.0 ** random.integers(-9, 9, 4000)
    ties = 1 + np.arange(64) / 1024  # halves between neighbours in bfloat16
    array = mx.array([*values, *ties, 0.0, -0.0, np.inf, 65519, 65520, 6e-8]).astype(stored)
    raw = np.frombuffer(bytes(memoryview(array.view(mx.uint8))), np.uint8)
    found = converted(raw, NAMES[stored], held)
    bits = mx.uint32 if held == mx.float32 else mx.uint16
    assert np.array_equal(
        found.view(np.dtype(f"u{found.itemsize}")), np.array(array.astype(held).view(bits))
    )
