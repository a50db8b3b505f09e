"""The kernels of norms, and around attention: its heads before, its gate after."""

import mlx.core as mx
import numpy as np
import pytest
from helpers_metal import (
    DTYPES,
    assert_same_bits,
    by_host,
    executed,
    ids,
    in_turns,
    mistakes_in_text,
    normal,
    prove,
)

from mlx_qwen3next import metal_kernels as kernels
from mlx_qwen3next.compute import reference

pytestmark = pytest.mark.metal

EPS = 1e-2  # large enough to count

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))

# --- norms ---------------------------------------------------------------------------------------
NORMS = [  # B, T, H: a simdgroup that is not full, threadgroups whose last step is not
    *((1, 1, 8), (1, 3, 33), (3, 3, 264), (2, 16, 1032)),
]
every_norm = pytest.mark.parametrize("shape", NORMS, ids=lambda s: f"B{s[0]}-T{s[1]}-H{s[2]}")


def norm_inputs(shape, dtype):
    mx.random.seed(sum(shape))
    scale = mx.exp(2 * normal(*shape[:2], 1)) / 10
    x, y = (normal(*shape) * scale for _ in range(2))
    return x.astype(dtype), y.astype(dtype), 1 + normal(shape[-1])


@every_norm
@every_dtype
def test_rms_norm(shape, dtype):
    x, _, weight = norm_inputs(shape, dtype)
    expected = {"normed": reference.rms_norm(x, weight, EPS)}
    got = prove(
        lambda: [kernels.rms_norm(x, weight, EPS)],
        expected,
        in_turns((NORMS, shape), (DTYPES, dtype)),
    )
    assert got["normed"].dtype == dtype


@every_norm
@every_dtype
def test_add_rms_norm(shape, dtype):
    x, y, weight = norm_inputs(shape, dtype)
    total = (x.astype(mx.float32) + y.astype(mx.float32)).astype(dtype)
    expected = {
        "sum": total.astype(mx.float32),
        "normed": reference.rms_norm(total, weight, EPS),
    }
    got = prove(
        lambda: kernels.add_rms_norm(x, y, weight, EPS),
        expected,
        in_turns((NORMS, shape), (DTYPES, dtype)),
    )
    assert_same_bits("sum", got["sum"], total)
    with executed():
        assert_same_bits("normed", got["normed"], kernels.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("spoiled", [mx.nan, mx.inf])
def test_a_row_does_not_spoil_another(spoiled):
    x, y, weight = norm_inputs((1, 3, 264), mx.bfloat16)
    with executed():
        expected = [kernels.rms_norm(x, weight, EPS), *kernels.add_rms_norm(x, y, weight, EPS)]
        x[0, 1, 7] = spoiled
        got = [kernels.rms_norm(x, weight, EPS), *kernels.add_rms_norm(x, y, weight, EPS)]
    for result, value in zip(got, expected, strict=True):
        for row in (0, 2):
            assert_same_bits(f"row {row}", result[:, row], value[:, row])
    assert np.isnan(np.array(got[0][0, 1].astype(mx.float32))).any()


# --- attention -----------------------------------------------------------------------------------
HEADS = [  # B, T, query heads, key heads, width, rotary width
    (1, 1, 1, 1, 8, 4),
    (1, 3, 7, 1, 40, 24),
    (2, 5, 4, 2, 48, 48),
    (3, 9, 2, 2, 80, 2),
    (2, 16, 4, 1, 256, 64),
    (1, 2, 1, 1, 160, 144),  # more than one step of a simdgroup rotates
]
GATES = [*HEADS[:3], (2, 16, 4, 1, 256, 64)]  # the second's last threadgroup is not full


def every(shapes):
    names = ["B{}-T{}-nh{}-nkv{}-hd{}-rd{}".format(*shape) for shape in shapes]
    return pytest.mark.parametrize("shape", shapes, ids=names)


class Attention:
    def __init__(self, shape, dtype):
        mx.random.seed(sum(shape))
        self.B, self.T, self.nh, self.nkv, self.hd, self.rd = shape
        heads = 2 * self.nh + 2 * self.nkv
        x = normal(self.B, self.T, heads, self.hd) * mx.exp(normal(self.B, self.T, heads, 1))
        self.x = x.reshape(self.B, self.T, heads * self.hd).astype(dtype)
        self.o = normal(self.B, self.nh, self.T, self.hd, dtype=dtype)
        self.q_weight, self.k_weight = 1 + normal(self.hd), 1 + normal(self.hd)
        self.frequencies = mx.array(100.0) ** -(mx.arange(0, self.rd, 2) / self.rd)
        self.factor = 1.25 if self.B > 1 else 1.0  # of sine and cosine: with YaRN, and without
        self.offsets = mx.array([7, 0, 1_009_000][: self.B], mx.int32)

    def heads(self):
        return kernels.attention_heads(
            *(self.x, self.q_weight, self.k_weight, self.frequencies, self.offsets),
            eps=EPS,
            attention_factor=self.factor,
            heads=self.nh,
            kv_heads=self.nkv,
        )

    def gate(self):
        return kernels.attention_gate(self.o, self.x, kv_heads=self.nkv)

    def split(self):
        ends = np.cumsum([self.nh, self.nkv, self.nkv]).tolist()
        x = self.x.astype(mx.float32).reshape(self.B, self.T, -1, self.hd)
        return mx.split(x, ends, axis=2)  # each [B, T, heads, hd]

    def expected(self):
        q, k, v, _ = self.split()
        positions = self.offsets[:, None] + mx.arange(self.T)
        # The angle is a product in float32; its sine and cosine are exact.
        angles = np.array(positions.astype(mx.float32)[..., None] * self.frequencies, np.float64)
        cos, sin = (
            mx.array((self.factor * f(angles)).astype(np.float32))[:, :, None]
            for f in (np.cos, np.sin)
        )

        def rotated(y, weight):
            y = reference.rms_norm(y, weight, EPS)
            first, second, rest = mx.split(y, [self.rd // 2, self.rd], axis=-1)
            first, second = first * cos - second * sin, second * cos + first * sin
            return mx.concatenate([first, second, rest], axis=-1)

        q, k = rotated(q, self.q_weight), rotated(k, self.k_weight)
        return {name: y.transpose(0, 2, 1, 3) for name, y in (("q", q), ("k", k), ("v", v))}


@every(HEADS)
@every_dtype
def test_attention_heads(shape, dtype):
    attention = Attention(shape, dtype)
    got = prove(attention.heads, attention.expected(), in_turns((HEADS, shape), (DTYPES, dtype)))
    v = attention.split()[2].astype(dtype).transpose(0, 2, 1, 3)
    assert_same_bits("v", got["v"], v)
    assert got["q"].dtype == got["k"].dtype == dtype


@every(GATES)
@every_dtype
def test_attention_gate(shape, dtype):
    attention = Attention(shape, dtype)
    gate = attention.split()[3]
    y = attention.o.astype(mx.float32).transpose(0, 2, 1, 3) * mx.sigmoid(gate)
    expected = {"y": y.reshape(attention.B, attention.T, -1)}
    got = prove(lambda: [attention.gate()], expected, in_turns((GATES, shape), (DTYPES, dtype)))
    assert got["y"].dtype == dtype


def test_a_token_does_not_depend_on_those_beside_it():
    attention = Attention(HEADS[2], mx.float16)
    with executed():
        whole, gated = attention.heads(), attention.gate()
        attention.x, attention.o = attention.x[:, 2:4], attention.o[:, :, 2:4]
        attention.offsets = attention.offsets + 2
        part, part_gated = attention.heads(), attention.gate()
    for name, some, every in zip("qkv", part, whole, strict=True):
        assert_same_bits(name, some, every[:, :, 2:4])
    assert_same_bits("gated", part_gated, gated[:, 2:4])


def test_a_head_does_not_spoil_another():
    attention = Attention(HEADS[2], mx.bfloat16)
    with executed():
        expected = attention.heads()
        attention.x[1, 2, attention.hd] = mx.nan  # in query head 1
        got = attention.heads()
    for name, result, value in zip("qkv", got, expected, strict=True):
        differs = (result.view(mx.uint16) != value.view(mx.uint16)).any(axis=-1)
        assert np.argwhere(np.array(differs)).tolist() == [[1, 1, 2]] * (name == "q")


def test_gates_far_from_zero():
    attention = Attention(HEADS[1], mx.float32)
    attention.x = attention.x * 100
    with executed():
        assert mx.isfinite(attention.gate()).all()


# --- the text ------------------------------------------------------------------------------------
@by_host
def test_text():
    def calls(dtype):
        for shape in NORMS:
            x, y, weight = norm_inputs(shape, dtype)
            kernels.rms_norm(x, weight, EPS)
            kernels.add_rms_norm(x, y, weight, EPS)
        for shape in HEADS:
            Attention(shape, dtype).heads()
        for shape in GATES:
            Attention(shape, dtype).gate()

    assert mistakes_in_text(*(lambda d=dtype: calls(d) for dtype in DTYPES)) == []
