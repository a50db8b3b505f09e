"""Attention in blocks: equal to float64, in bounded memory."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_qwen3next.compute import cpu_attention
from mlx_qwen3next.compute.cpu_attention import FROM, PIECE, attention

NH, NKV, HD = 4, 2, 32


def heads(L, S, B=1):
    mx.random.seed(L + S)
    shapes = (B, NH, L, HD), (B, NKV, S, HD), (B, NKV, S, HD)
    return [mx.random.normal(shape) for shape in shapes]


def exact(q, k, v, scale):
    """Computes causal attention in float64."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, NH // NKV, axis=1) for x in (k, v))
    L, S = q.shape[2], k.shape[2]
    scores = np.where(np.tri(L, S, S - L, bool), scale * q @ k.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def error(q, k, v):
    o = attention(q, k, v, scale=0.3, mask="causal")
    return np.abs(np.array(o) - exact(q, k, v, 0.3)).max()


@pytest.mark.parametrize("before", [0, 1, 300])
@pytest.mark.parametrize("L", [1, FROM - 1, FROM, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_equal_to_float64(L, before):
    assert error(*heads(L, before + L, B=2)) < 6e-6


@pytest.mark.parametrize("several_cores", [False, True])
@pytest.mark.parametrize("block", [16, 100, 256])
def test_blocks_of_keys(block, several_cores, monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    if several_cores:
        monkeypatch.setattr(cpu_attention, "MANY", 1)
    q, k, v = heads(200, 456, B=2)
    k[:, :, 300:] *= 2  # later blocks have higher scores
    assert error(q, k, v) < 6e-6


def test_dtype_of_the_queries():
    q, k, v = (x.astype(mx.bfloat16) for x in heads(40, 50))
    o = attention(q, k, v, scale=0.3, mask="causal")
    assert o.dtype == mx.bfloat16
    assert (
        np.abs(
            np.array(o.astype(mx.float32)) - exact(*(x.astype(mx.float32) for x in (q, k, v)), 0.3)
        ).max()
        < 0.02
    )


def test_not_all_scores_are_in_memory(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 32)
    peaks = []
    for S in (2048, 8192):
        q, k, v = heads(64, S)
        mx.eval(q, k, v)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attention(q, k, v, scale=0.3, mask="causal"))
        transposed_keys = k.nbytes
        peaks.append(mx.get_peak_memory() - before - transposed_keys)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("mask", [None, "array"])
def test_other_masks(mask):
    q, k, v = heads(40, 50)
    if mask == "array":
        mask = mx.random.uniform(shape=(40, 50)) < 0.5
    ours = attention(q, k, v, scale=0.3, mask=mask)
    theirs = scaled_dot_product_attention(q, k, v, cache=None, scale=0.3, mask=mask)
    assert mx.abs(ours - theirs).max().item() < 1e-6
