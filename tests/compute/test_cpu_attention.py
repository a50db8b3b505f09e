"""Attention in pieces: equal to MLX's own."""

import mlx.core as mx
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_qwen3next.compute.cpu_attention import FROM, PIECE, attention

NH, NKV, HD = 4, 2, 32


def heads(L, S, B=1):
    mx.random.seed(L + S)
    shapes = (B, NH, L, HD), (B, NKV, S, HD), (B, NKV, S, HD)
    return [mx.random.normal(shape) for shape in shapes]


@pytest.mark.parametrize("before", [0, 1, 300])
@pytest.mark.parametrize("L", [1, FROM - 1, FROM, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_equal_to_mlx(L, before):
    q, k, v = heads(L, before + L, B=2)
    ours = attention(q, k, v, scale=0.3, mask="causal")
    theirs = scaled_dot_product_attention(q, k, v, cache=None, scale=0.3, mask="causal")
    assert mx.abs(ours - theirs).max().item() < 1e-6


@pytest.mark.parametrize("mask", [None, "array"])
def test_other_masks(mask):
    q, k, v = heads(40, 50)
    if mask == "array":
        mask = mx.random.uniform(shape=(40, 50)) < 0.5
    ours = attention(q, k, v, scale=0.3, mask=mask)
    theirs = scaled_dot_product_attention(q, k, v, cache=None, scale=0.3, mask=mask)
    assert mx.abs(ours - theirs).max().item() < 1e-6
