"""Transposed matrices give what they gave before."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import GOLDENS, relative_error
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_qwen3next import load_model
from mlx_qwen3next.compute import cpu_matmul, cpu_streams
from mlx_qwen3next.compute.cpu_matmul import TransposedLinear, gather, transpose, transposed

STORED = [(None, 64), (2, 64), (4, 32), (4, 64), (4, 128), (8, 64)]
TOLERANCE = 2e-6  # sums in another order


def linear(bits, group_size, outputs, inputs=256, dtype=mx.float32):
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.set_dtype(dtype)
    if bits is None:
        return layer
    return nn.QuantizedLinear.from_linear(layer, group_size, bits)


def stack(bits, group_size, outputs, inputs=256, experts=5):
    layer = SwitchLinear(inputs, outputs, experts, bias=False)
    return layer if bits is None else layer.to_quantized(group_size, bits)


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (2, 7), (70,)], ids=str)
@pytest.mark.parametrize("outputs", [64, 40, 200])
@pytest.mark.parametrize(("bits", "group_size"), STORED)
def test_linear(bits, group_size, outputs, rows):
    layer = linear(bits, group_size, outputs)
    x = mx.random.normal((*rows, 256))
    assert transpose(layer)(x).shape == layer(x).shape
    assert relative_error(transpose(layer)(x), layer(x)) < TOLERANCE


@pytest.mark.parametrize(("bits", "group_size"), STORED)
def test_each_weight_is_where_it_was(bits, group_size):
    layer = linear(bits, group_size, 40)
    if bits is None:
        weights = layer.weight
    else:
        weights = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size, bits)
    # 1 times a weight, and zeros: nothing but the weight's own rounding.
    assert mx.allclose(transpose(layer)(mx.eye(256)), weights.T, rtol=3e-7, atol=3e-7).item()


@pytest.mark.parametrize("rows", [32, 64, 2**19])
@pytest.mark.parametrize(("bits", "group_size"), STORED)
def test_stack(bits, group_size, rows, monkeypatch):
    """One row for several matrices, and a row for each, transposed some rows at a time."""
    monkeypatch.setattr(cpu_matmul, "PIECE", rows * 256 * (bits or 32) // 8)
    layer = stack(bits, group_size, 40)
    weights = transpose(layer).weights
    shared, own = mx.random.normal((3, 1, 1, 256)), mx.random.normal((3, 2, 1, 256))
    indices = mx.array([[4, 0], [1, 1], [3, 2]], mx.uint32)
    for x in (shared, own):
        expected = layer(x, indices)
        assert gather(x, weights, indices).shape == expected.shape
        assert relative_error(gather(x, weights, indices), expected) < TOLERANCE


@pytest.mark.parametrize("sums", [1, 40 * 4 * 2, 40 * 4 * 5])
def test_in_pieces(sums, monkeypatch):
    """A row at a time, two or five; the last piece may be smaller."""
    monkeypatch.setattr(cpu_matmul, "MANY", 0)
    monkeypatch.setattr(cpu_streams, "streams", lambda: (mx.default_stream(mx.cpu),))
    weights, x = transpose(linear(4, 64, 40)), mx.random.normal((7, 256))
    experts, each = transpose(stack(4, 64, 40)).weights, mx.random.normal((7, 1, 1, 256))
    indices = mx.random.randint(0, 5, (7, 2)).astype(mx.uint32)
    whole = weights(x), gather(each, experts, indices)
    monkeypatch.setattr(cpu_matmul, "SUMS", sums)
    for piecewise, at_once in zip((weights(x), gather(each, experts, indices)), whole, strict=True):
        assert piecewise.shape == at_once.shape
        assert relative_error(piecewise, at_once) < TOLERANCE


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("rows", [2, 7, 64])
def test_the_same_bits_on_several_cores(cores, rows, monkeypatch):
    """Pieces of rows change no bit, and each core has some of them."""
    weights, x = transpose(linear(4, 64, 200)), mx.random.normal((rows, 256))
    experts, each = transpose(stack(4, 64, 40)).weights, mx.random.normal((rows, 1, 1, 256))
    indices = mx.random.randint(0, 5, (rows, 2)).astype(mx.uint32)
    whole = weights(x), gather(each, experts, indices)
    streams = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(cores))
    used = []
    monkeypatch.setattr(cpu_matmul, "MANY", 0)
    monkeypatch.setattr(cpu_streams, "streams", lambda: streams)
    group_sums = cpu_matmul._group_sums

    def noting(*arguments):
        used.append(mx.default_stream(mx.cpu))
        return group_sums(*arguments)

    monkeypatch.setattr(cpu_matmul, "_group_sums", noting)
    for piecewise, at_once in zip((weights(x), gather(each, experts, indices)), whole, strict=True):
        assert mx.array_equal(piecewise, at_once).item()
    assert len(set(map(str, used))) == min(cores, rows)


def test_few_rows_stay_on_one_core(monkeypatch):
    """Steps of decoding would wait longer for another core than it saves."""
    layer = transpose(linear(4, 64, 512, inputs=1024))
    monkeypatch.setattr(cpu_matmul, "in_turn", lambda pieces: list(pieces)[:0])
    assert layer(mx.zeros((16, 1024))).shape == (16, 512)
    with pytest.raises(ValueError, match="concatenate"):  # of no pieces
        layer(mx.zeros((64, 1024)))


def test_memory_of_many_rows():
    """Sums over groups are held of some rows only: of all they take 16 times the result, twice."""
    layer, x = transpose(linear(4, 64, 512, inputs=1024)), mx.random.normal((2048, 1024))
    mx.eval(layer.parameters(), x)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    y = layer(x)
    mx.eval(y)
    assert mx.get_peak_memory() - before < 16 * y.nbytes


def test_memory_of_pieces(monkeypatch):
    """They are computed one after the other (4 to 8 MB): side by side some twenty take 18."""
    monkeypatch.setattr(cpu_matmul, "SUMS", 1 << 16)
    weights, x = (
        transpose(stack(4, 64, 512, inputs=512)).weights,
        mx.random.normal((640, 1, 1, 512)),
    )
    indices = mx.arange(640, dtype=mx.uint32)[:, None] // 128
    mx.eval(weights.weight, weights.scales, weights.biases, x, indices)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(gather(x, weights, indices))
    assert mx.get_peak_memory() - before < 12e6


def with_bias():
    return nn.Linear(128, 64)


def of_bytes():
    return nn.QuantizedLinear.from_linear(nn.Linear(128, 64, bias=False), 32, 4, mode="mxfp4")


@pytest.mark.parametrize(
    "layer",
    [
        with_bias(),
        of_bytes(),
        linear(3, 64, 64),
        linear(6, 64, 64),
        linear(None, 64, 64, dtype=mx.bfloat16),
        linear(4, 64, 64, dtype=mx.bfloat16),
        nn.Embedding(8, 64),
    ],
    ids=["bias", "mxfp4", "3 bits", "6 bits", "bfloat16", "4 bits, bfloat16", "embedding"],
)
def test_what_stays_as_it_is(layer, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_measure", lambda bits: 2.0)
    assert transposed(layer) is None
    assert transposed(linear(4, 64, 64)) is not None


def test_only_where_it_pays(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_measure", lambda bits: 0.9)
    assert transposed(linear(4, 64, 64)) is None
    monkeypatch.setattr(cpu_matmul, "_measure", lambda bits: 1.1)
    assert isinstance(transposed(linear(4, 64, 64)), TransposedLinear)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert transposed(linear(4, 64, 64)) is None


def test_the_measurement(monkeypatch):
    """Turned weights that take half the time are twice as fast."""
    now = [0.0]

    def evaluate(y):
        now[0] += y

    monkeypatch.setattr(cpu_matmul, "transpose", lambda layer: lambda x: 1.0)
    monkeypatch.setattr(nn.QuantizedLinear, "__call__", lambda layer, x: 2.0)
    monkeypatch.setattr(mx, "eval", evaluate)
    monkeypatch.setattr(cpu_matmul.time, "perf_counter", lambda: now[0])
    assert cpu_matmul._measure.__wrapped__(4) == 2.0


@pytest.mark.parametrize("model", [None, GOLDENS / "base"], ids=["demo", "golden"])
def test_all_of_a_model_is_transposed(model, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_measure", lambda bits: 2.0)
    left = [
        path
        for path, module in load_model(model, dtype=mx.float32).named_modules()
        if "weight" in module
        and module.weight.ndim > 1
        and not isinstance(module, TransposedLinear)
    ]
    assert sorted(path.split(".")[-1] for path in left if "conv1d" not in path) == ["embed_tokens"]


def test_memory():
    """A transposed model is as large as before: what a unit of outputs is padded to aside."""
    layer = linear(4, 64, 1024, inputs=512)
    sizes = [
        sum(a.nbytes for _, a in tree_flatten(m.parameters())) for m in (layer, transpose(layer))
    ]
    assert sizes[0] == sizes[1]
    mx.synchronize()
    before = mx.get_active_memory()
    cpu_matmul._units.cache_clear()
    cpu_matmul._units(4096, 64, 16)
    assert mx.get_active_memory() - before < 64 * 16 * 4 * 4
