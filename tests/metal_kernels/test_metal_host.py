"""The Metal harness itself: what small kernels compute, in every way to run them."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from metal_host.samples import HEADER, INDEX, STYLE_HEADER, launch, run, values

# ---- what kernels compute ----


@pytest.mark.parametrize("build", ["fast", "fma", "check"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_elementwise(build, dtype):
    x = mx.arange(100, dtype=dtype)
    got = values(
        INDEX + "y[i] = static_cast<T>(twice(x, i));",
        [x],
        build=build,
        header=HEADER,
        template=[("T", dtype)],
        threads=100,
        outputs=[(100,)],
        dtypes=[dtype],
    )
    np.testing.assert_array_equal(got, 2 * np.arange(100))


def test_positions():
    source = (
        "uint3 p = thread_position_in_grid;\n"
        "uint i = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x;\n"
        "y[i] = thread_index_in_threadgroup;\n"
        "y1[i] = threadgroup_position_in_grid.x * 100 + threadgroup_position_in_grid.y * 10 "
        "+ threadgroup_position_in_grid.z;\n"
        "y2[i] = simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup;\n"
    )
    kernel = mx.fast.metal_kernel(
        name="positions", input_names=[], output_names=["y", "y1", "y2"], source=source
    )
    made = metal_host.capture(
        kernel,
        inputs=[],
        grid=(10, 4, 2),
        threadgroup=(4, 2, 2),
        output_shapes=[(2, 4, 10)] * 3,
        output_dtypes=[mx.uint32] * 3,
    )
    index, group, simd = (np.array(o) for o in metal_host.run(made, "check").outputs)
    z, y, x = np.meshgrid(range(2), range(4), range(10), indexing="ij")
    width = np.where(x < 8, 4, 2)  # the last threadgroups hold what is left
    np.testing.assert_array_equal(index, (z * 2 + y % 2) * width + x % 4)
    np.testing.assert_array_equal(group, x // 4 * 100 + y // 2 * 10)
    np.testing.assert_array_equal(simd, index)


SUM_OF_THREADGROUP = """
threadgroup float partial[4];
float sum = simd_sum(x[thread_position_in_grid.x]);
if (thread_index_in_simdgroup == 0) {
  partial[simdgroup_index_in_threadgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index_in_threadgroup == 0) {
  y[threadgroup_position_in_grid.x] = partial[0] + partial[1] + partial[2] + partial[3];
}
"""


@pytest.mark.parametrize("build", ["fast", "check"])
@pytest.mark.parametrize("order", [0, 1, 2, 4, 8, 15, 20])
def test_schedules_agree(build, order):
    x = mx.arange(512, dtype=mx.float32)
    got = values(
        SUM_OF_THREADGROUP, [x], threads=512, group=128, outputs=[(4,)], build=build, order=order
    )
    np.testing.assert_array_equal(got, np.arange(512.0).reshape(4, 128).sum(1))


def test_orders_are_different_schedules():
    """A race shows which simdgroup ran last: the orders differ in that."""
    source = "y[0] = simdgroup_index_in_threadgroup;"
    last = [
        values(source, [], threads=256, group=256, outputs=[(1,)], build="fast", order=order)[0]
        for order in (0, 2, 4, 20, 36, 52, 68)
    ]
    assert last[:2] == [7, 0]
    assert len(set(last)) >= 4


def test_orders_of_sums():
    x = mx.array(np.random.default_rng(0).normal(size=32).astype(np.float32))
    made = launch("y[0] = simd_sum(x[thread_position_in_grid.x]);", [x], outputs=[(1,)])
    got = {
        sums: metal_host.run(made, sums=sums).outputs[0].item()
        for sums in ("tree", "sequential", "halves")
    }
    assert len(set(got.values())) > 1
    assert got["sequential"] == np.cumsum(np.array(x))[-1]
    assert list(got.values()) == pytest.approx([float(np.array(x, np.float64).sum())] * 3, 1e-5)


def test_fma_contracts():
    """1 + 2^-12 squared minus its rounding: exact only in one operation."""
    a = np.float32(1 + 2**-12)
    x = mx.array(np.array([a, -(a * a)] * 16))
    source = "y[0] = x[0] * x[0] + x[1];"
    assert values(source, [x], threads=1, outputs=[(1,)], build="fast")[0] == 0
    assert values(source, [x], threads=1, outputs=[(1,)], build="fma")[0] == 2.0**-24


def test_jitter():
    x = mx.arange(1, 33, dtype=mx.float32) / 8
    made = launch(INDEX + "y[i] = metal::precise::exp(x[i]);", [x])
    plain, moved = (
        np.array(metal_host.run(made, jitter=jitter).outputs[0]) for jitter in (False, True)
    )
    np.testing.assert_array_max_ulp(plain, np.exp(np.array(x)), 2)
    assert (plain != moved).any()
    np.testing.assert_array_max_ulp(plain, moved, 4)

    near_one = launch(
        "y[0] = metal::fast::log(x[0]);", [mx.full((8,), 1.0009765625)], outputs=[(1,)]
    )
    error = abs(metal_host.run(near_one, jitter=True).outputs[0].item() - np.log(1.0009765625))
    assert 2.0**-25 < error <= 2.0**-21


def test_flush():
    tiny = launch(INDEX + "y[i] = x[i] * 0.5f;", [mx.full((32,), 2.0**-126)])
    assert np.array(metal_host.run(tiny).outputs[0])[0] == np.float32(2.0**-127)
    assert np.array(metal_host.run(tiny, flush=True).outputs[0])[0] == 0


SIMD = {
    "simd_sum(i)": lambda i: np.full(32, 496),
    "simd_max(i)": lambda i: np.full(32, 31),
    "simd_min(int(i) - 16)": lambda i: np.full(32, -16),
    "simd_max(int(i) - 40)": lambda i: np.full(32, -9),
    "simd_min(float(i) - 16.0f)": lambda i: np.full(32, -16),
    "simd_and(i | 64)": lambda i: np.full(32, 64),
    "simd_or(i)": lambda i: np.full(32, 31),
    "simd_product(i == 3 ? 5.0f : 1.0f)": lambda i: np.full(32, 5),
    "simd_broadcast(i, 7)": lambda i: np.full(32, 7),
    "simd_broadcast_first(i + 3)": lambda i: np.full(32, 3),
    "simd_shuffle(i, ushort(31 - i))": lambda i: 31 - i,
    "simd_shuffle_xor(i, 5)": lambda i: i ^ 5,
    "simd_shuffle_up(i, 4)": lambda i: np.where(i < 4, i, i - 4),
    "simd_shuffle_down(i, 4)": lambda i: np.where(i > 27, i, i + 4),
    "simd_prefix_inclusive_sum(i)": lambda i: np.cumsum(i),
    "simd_prefix_exclusive_sum(i)": lambda i: np.cumsum(i) - i,
    "popcount(uint(ulong(simd_ballot(i < 20))))": lambda i: np.full(32, 20),
    "simd_any(i == 3)": lambda i: np.ones(32),
    "simd_all(i == 3)": lambda i: np.zeros(32),
    "simd_sum(half(i))": lambda i: np.full(32, 496),
    "simd_sum(bfloat(i))": lambda i: np.full(32, 496),
    "simd_sum(float4(i)).w": lambda i: np.full(32, 496),
    "clz(i)": lambda i: 32 - np.array([int(n).bit_length() for n in i]),
    "ctz(i | 8)": lambda i: np.where(i % 2, 0, np.where(i % 4, 1, np.where(i % 8, 2, 3))),
}


def test_simd_functions():
    lines = [f"y{n or ''}[i] = {code};" for n, code in enumerate(SIMD)]
    expected = [function(np.arange(32)) for function in SIMD.values()]
    made = launch(INDEX + "\n".join(lines), [], outputs=[(32,)] * len(SIMD))
    assert metal_host.type_check(made.source) == []
    for build in ("fast", "check"):
        outputs = metal_host.run(made, build).outputs
        for code, output, wanted in zip(SIMD, outputs, expected, strict=True):
            np.testing.assert_array_equal(np.array(output), wanted, err_msg=code)


VECTORS = {
    "float4(1, 2, 3, 4).w": 4,
    "dot(float4(1, 2, 3, 4), float4(4, 3, 2, 1))": 20,
    "float3(float2(1, 2), 3).z": 3,
    "float(half4(1.5h, 2.5h, 3.5h, 4.5h).y)": 2.5,
    "float((bfloat4(bfloat(3.0f)) * bfloat4(bfloat(2.0f))).z)": 6,
    "uint2(uint4(1, 2, 3, 4).zw).y": 4,
    "(ushort4(9) >> ushort4(1)).x": 4,
    "(uint2(5, 6) & uint2(3)).y": 2,
    "max(float2(1, 5), float2(2, 3)).y": 5,
    "clamp(7, 1, 5)": 5,
    "clamp(float2(7, -7), float2(-1), float2(1)).y": -1,
    "min(half(2.0f), half(3.0f))": 2,
    "select(1.0f, 2.0f, true)": 2,
    "select(float2(1, 2), float2(3, 4), float2(1, 0) > float2(0, 0)).x": 3,
    "any(float2(1, 0) > float2(0, 0))": 1,
    "all(float2(1, 0) > float2(0, 0))": 0,
    "abs(-3) + abs(-0.5f)": 3.5,
    "fma(2.0f, 3.0f, 4.0f)": 10,
    "fma(float2(2), float2(3), float2(4)).x": 10,
    "metal::fast::exp2(3.0f)": 8,
    "log2(8.0f) + rsqrt(4.0f) + sqrt(9.0f)": 6.5,
    "metal::precise::log(metal::precise::exp(0.0f))": 0,
    "sin(0.0f) + cos(0.0f) + tanh(0.0f)": 1,
    "isnan(0.0f / x[0]) + 2 * isinf(1.0f / x[0])": 3,
    "as_type<uint>(1.0f)": 0x3F800000,
    "float(as_type<bfloat>(ushort(0x4040)))": 3,
    "as_type<half2>(0x3C004000u).x": 2,
    "float(bfloat(1.00390625f))": 1,  # a tie, to even
    "1.0 / 3.0 == 1.0f / 3.0f": 1,  # literals are float
    "sizeof(float3) + sizeof(bfloat4)": 24,
    "float(numeric_limits<half>::max())": 65504,
}


def test_scalars_and_vectors():
    lines = [f"y[{n}] = {code};" for n, code in enumerate(VECTORS)]
    made = launch("\n".join(lines), [mx.zeros(32)], threads=1, outputs=[(len(VECTORS),)])
    assert metal_host.type_check(made.source) == []
    for build in ("fast", "fma", "check"):
        got = np.array(metal_host.run(made, build).outputs[0])
        np.testing.assert_array_equal(got, np.array([*VECTORS.values()], np.float32))


def test_style_of_larger_kernels():
    """Function templates, struct members in device memory, array references, a thin body."""
    body = (
        "threadgroup float shared[2];\n"
        "step<T, Dk>(x, y, shared, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);\n"
    )
    made = launch(
        body,
        [mx.arange(128, dtype=mx.float32)],
        header=STYLE_HEADER,
        template=[("T", mx.float32), ("Dk", 64)],
        threads=64,
        group=64,
        outputs=[(1,)],
    )
    assert metal_host.type_check(made.source) == []
    assert metal_host.lint(made.source) == []
    for build in ("fast", "fma", "check"):
        assert metal_host.run(made, build).outputs[0].item() == 4 * np.arange(128).sum()


def test_small_inputs_and_shapes():
    """Below eight elements an input lies in constant memory; of no dimension, it is a value."""
    source = INDEX + "y[i] = get(x, i) + x1 + x2_shape[1] + x2_ndim;"
    header = "template <typename P> inline float get(P p, uint i) { return p[i]; }\n"
    made = launch(
        source,
        [mx.array([1.0, 2.0]), mx.array(10.0), mx.zeros((3, 500))],
        header=header,
        threads=2,
        outputs=[(2,)],
    )
    assert "const constant float* x " in made.source
    assert "const constant float& x1 " in made.source
    assert metal_host.type_check(made.source) == []
    np.testing.assert_array_equal(metal_host.run(made, "check").outputs[0], [513, 514])


def test_types_of_buffers():
    """Every type of input, as a value, in constant and in device memory; and empty ones."""
    types = [mx.bool_, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32]
    types += [mx.int64, mx.uint64, mx.float16, mx.bfloat16, mx.float32]
    for dtype in types:
        for shape in ((), (3,), (20,)):
            code = "y[0] = static_cast<T>(x);" if not shape else "y[0] = static_cast<T>(x[2]);"
            settings = {"template": [("T", dtype)], "outputs": [(1,)], "dtypes": [dtype]}
            made = launch(code, [mx.ones(shape, dtype)], threads=1, **settings)
            (output,) = metal_host.run(made).outputs
            assert (output.dtype, output.item()) == (dtype, 1)
    assert values("y[0] = x_shape[0];", [mx.zeros((0, 9))], threads=1, outputs=[(1,)])[0] == 0


def test_includes_are_left_out():
    header = "#include <metal_stdlib>\nusing namespace metal;\n"
    assert values(INDEX + "y[i] = max(x[i], 3.0f);", header=header)[0] == 3


def test_initial_value():
    got = values("if (thread_position_in_grid.x == 3) y[3] = 1;", init_value=7.0)
    assert got.tolist() == [7, 7, 7, 1] + [7] * 28


def test_capture_binds_repeated_and_strided_inputs():
    x = mx.arange(64, dtype=mx.float32).reshape(2, 32)
    got = values(INDEX + "y[i] = x[i] - x1[i] + x2[2 * i + 1];", [x, x, x.T])
    np.testing.assert_array_equal(got, np.arange(32, 64))


def test_prepare_builds_many():
    made = [launch(INDEX + f"y[i] = x[i] + {n};") for n in range(3)]
    metal_host.prepare([(one, build) for one in made for build in ("fast", "check")])
    assert [metal_host.run(one).outputs[0][0].item() for one in made] == [0, 1, 2]


# ---- counters ----


def test_counters():
    """Two threadgroups of 32 read x backwards, all of them read x1, each writes y once."""
    source = INDEX + "y[i] = x[63 - i] + x1[0];"
    x, one = mx.arange(64, dtype=mx.float32), mx.ones((8,))
    counters = run(source, [x, one], threads=64, outputs=[(64,)]).counters
    assert counters["x"] == metal_host.Traffic(256, 0, 256, 0, 256, 0)
    assert counters["x1"] == metal_host.Traffic(256, 0, 4, 0, 256, 0)
    assert counters["y"] == metal_host.Traffic(0, 256, 0, 256, 0, 256)


def test_counters_of_vector_loads_and_lines():
    """One thread a threadgroup, and every second float4: half the bytes, all of the lines."""
    source = INDEX + "y[i] = dot(((const device float4*)x)[2 * i], float4(1));"
    counters = run(source, [mx.ones((128,))], threads=16, group=1, outputs=[(16,)]).counters
    assert counters["x"] == metal_host.Traffic(256, 0, 256, 0, 16 * 128, 0)
    assert counters["y"] == metal_host.Traffic(0, 64, 0, 64, 0, 16 * 128)


def test_counters_are_of_the_check_build_alone():
    assert run(INDEX + "y[i] = x[i];", build="fast").counters == {}
