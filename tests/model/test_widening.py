"""Codes at more bits have the values that they had."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlx_qwen3next.model.packed import widening
from mlx_qwen3next.model.packed.widening import in_one_quantization

BITS = (2, 3, 4, 5, 6, 8)


def values(layer):
    return mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)


@pytest.mark.parametrize(("few", "many"), [*itertools.combinations(BITS, 2)])
def test_values(few, many):
    narrow = nn.QuantizedLinear(128, 24, bias=False, group_size=64, bits=few)
    wide = nn.QuantizedLinear(128, 8, bias=False, group_size=32, bits=many)
    for before, after in zip((narrow, wide), in_one_quantization([narrow, wide]), strict=True):
        assert (after.bits, after.group_size) == (many, 32)
        assert mx.array_equal(values(after), values(before)).item()
    assert (narrow.bits, narrow.weight.shape) == (few, (24, 128 * few // 32))


def test_a_stack_in_pieces(monkeypatch):
    monkeypatch.setattr(widening, "PIECE", 40)
    narrow, wide = (
        QuantizedSwitchLinear(64, 4, 3, bias=False, group_size=32, bits=b) for b in (5, 6)
    )
    after = in_one_quantization([wide, narrow])[1]
    assert mx.array_equal(values(after), values(narrow)).item()


@pytest.mark.parametrize(("bits", "fits"), [((4, 5), True), ((3, 4), True), ((4, 6), False)])
def test_memory(monkeypatch, bits, fits):
    layers = [nn.QuantizedLinear(64, 64, bias=False, group_size=64, bits=b) for b in bits]
    assert in_one_quantization(layers) is not None
    monkeypatch.setattr(widening, "FEW", 0)
    assert (in_one_quantization(layers) is not None) == fits


def test_others_are_left():
    affine = nn.QuantizedLinear(64, 8, bias=False, group_size=32, bits=5)
    mxfp4 = nn.QuantizedLinear(64, 8, bias=False, group_size=32, bits=4, mode="mxfp4")
    for other in (mxfp4, nn.Linear(64, 8, bias=False)):
        assert in_one_quantization([affine, other]) is None
