"""The checks of the Metal harness: each finds a small kernel's mistake, and says where."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from metal_host.samples import HEADER, INDEX, LANE, STYLE_HEADER, launch, run, values

# ---- mistakes that the check build finds ----

SHARED = "threadgroup float s[64];\n" + INDEX + LANE
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
PAIR = {"threads": 64, "group": 64, "outputs": [(64,)]}

MISTAKES = {
    "read behind": (
        INDEX + "y[i] = x[i + 1];",
        {},
        "out of bounds read of 4 bytes at byte 128 of 'x'",
    ),
    "read before": (
        INDEX + "y[i] = x[int(i) - 1];",
        {},
        "out of bounds read of 4 bytes at byte -4",
    ),
    "write behind": (
        INDEX + "y[i + 1] = x[i];",
        {},
        "out of bounds write of 4 bytes at byte 128 of 'y'",
    ),
    "write of input": (
        INDEX + "((device float*)x)[i] = 1; y[i] = 1;",
        {},
        "write to the input 'x'",
    ),
    "read of output": (INDEX + "y[i] += x[i];", {}, "of the output 'y' before any write"),
    "output not written": (
        INDEX + "if (i != 5) y[i] = x[i];",
        {},
        "output 'y' was not fully written: first byte 20",
    ),
    "threadgroup memory not written": (
        SHARED + "if (lane != 3) s[lane] = 1;\n" + BARRIER + "y[i] = s[lane];",
        {},
        "read of uninitialised threadgroup memory at byte 12",
    ),
    "threadgroup memory end": (
        SHARED + "threadgroup float* p = s + 33; p[i] = 1;\n" + BARRIER + "y[i] = p[i];",
        {},
        "out of bounds write at byte 256 of threadgroup memory",
    ),
    "race of simdgroups": (
        SHARED + "s[i & 31] = x[0]; y[i] = s[i & 31];",
        PAIR,
        "race: write of byte 0 of threadgroup memory, written by thread 0 of this threadgroup",
    ),
    "race in a simdgroup": (
        SHARED + "s[lane & 15] = x[i]; y[i] = s[lane & 15];",
        {},
        "race: write of byte 0 of threadgroup memory, written by thread 0",
    ),
    "write after read": (
        SHARED + "s[i] = x[0];\n" + BARRIER + "y[i] = s[63 - i]; s[i] = 2;",
        PAIR,
        "race: .* of threadgroup memory",
    ),
    "write after reads of several": (
        SHARED + "s[i] = x[0];\n" + BARRIER + "y[i] = s[32]; if (i == 32) s[i] = 2;",
        PAIR,
        "race: write of byte 128 of threadgroup memory, read by this threadgroup",
    ),
    "barrier of a simdgroup between simdgroups": (
        SHARED + "s[i] = x[0]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63 - i];",
        PAIR,
        "threadgroup memory",
    ),
    "barrier for other memory": (
        SHARED + "s[i] = x[0]; threadgroup_barrier(mem_flags::mem_device); y[i] = s[63 - i];",
        PAIR,
        "race: read of byte .* of threadgroup memory",
    ),
    "race of threadgroups": (
        INDEX + "y[i % 32] = x[0];",
        {"threads": 64},
        "race: write of byte 0 of y, written by thread 0 of another threadgroup",
    ),
    "race through device memory": (
        INDEX + "y[i] = x[0]; threadgroup_barrier(mem_flags::mem_threadgroup); y[63 - i] += 1;",
        PAIR,
        "race: read of byte .* of y",
    ),
    "divergent barrier": (
        LANE + INDEX + "if (lane < 16) {\n" + BARRIER + "} else {\n" + BARRIER + "}\ny[i] = x[i];",
        {},
        "divergent synchronisation: .* threadgroup_barrier at line",
    ),
    "divergent simd operation": (
        LANE + INDEX + "float a = lane;\nif (lane < 16) a = simd_sum(a);\ny[i] = simd_sum(a);",
        {},
        "divergent synchronisation: .* simd operation at line",
    ),
    "divergent simdgroups": (
        INDEX + "if (i < 32) {\n" + BARRIER + "} else {\n" + BARRIER + "}\ny[i] = x[0];",
        PAIR,
        "simdgroups of one threadgroup wait at different barriers",
    ),
    "return before a barrier": (
        INDEX + "y[i] = x[0]; if (i >= 32) return;\n" + BARRIER,
        PAIR,
        "threadgroup_barrier at line 7: 32 of 64 threads have returned before it",
    ),
    "return in a simdgroup": (
        INDEX + "y[i] = x[i]; if (i == 31) return;\n" + BARRIER,
        {},
        "has returned while lane 0 of its simdgroup waits at the threadgroup_barrier",
    ),
    "simd operation after a return": (
        INDEX + "y[i] = x[i]; if (i == 0) return;\ny[i] = simd_sum(x[i]);",
        {},
        "simd operation at line .* after lane 0 of the simdgroup has returned",
    ),
    "misaligned": (
        INDEX + "y[i] = ((const device float4*)(x + 1))[i & 3].x;",
        {},
        "misaligned",
    ),
    "too much threadgroup memory": (
        INDEX + "threadgroup float a[8192]; threadgroup float b[1]; a[0] = b[0] = 1; y[i] = a[0];",
        {},
        "32784|32772 bytes of threadgroup memory, which is over 32 KiB",
    ),
    "division by zero": (INDEX + "y[i] = 100 / (int(x[i]) - 5);", {}, "integer division by zero"),
    "shift": (INDEX + "y[i] = 1u << (i + 1);", {}, "shift by a negative or too large amount"),
    "signed overflow": (
        INDEX + "y[i] = 2147483647 + int(x[i]);",
        {},
        "signed integer overflow in +",
    ),
    "float to int": (INDEX + "y[i] = int(x[i] * 1e9f);", {}, "float to integer conversion"),
    "array index": (
        INDEX + "float a[4] = {0, 1, 2, 3}; y[i] = a[int(x[i])];",
        {},
        "array index out of bounds",
    ),
    "lane that is not there": (
        INDEX + "y[i] = simd_shuffle(x[i], 20);",
        {"threads": 16, "outputs": [(16,)]},
        "shuffle from lane 20, which is not active",
    ),
    "too many threads": (
        INDEX + "y[i] = x[0];",
        {"threads": 2048, "group": 2048, "outputs": [(2048,)]},
        "2048 threads in a threadgroup",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_finds(mistake):
    source, settings, message = MISTAKES[mistake]
    with pytest.raises(metal_host.KernelError, match=message):
        run(source, **settings)


def test_errors_name_line_and_thread():
    source = "// a comment\n" + INDEX + "float a = x[0];\ny[i] = a + x[i * 2];"
    with pytest.raises(metal_host.KernelError) as error:
        run(source)
    made = launch(source).source.splitlines()
    line = made.index("y[i] = a + x[i * 2];") + 1
    assert f"line {line} (`y[i] = a + x[i * 2];`): out of bounds" in str(error.value)
    assert "[thread (16, 0, 0) of threadgroup (0, 0, 0), simdgroup 0, lane 16]" in str(error.value)


def test_corrected_kernels_pass():
    """The neighbours of the mistakes above that are right."""
    ordered = SHARED + "s[i] = x[0];\n" + BARRIER + "y[i] = s[63 - i];\n" + BARRIER + "s[i] = 2;"
    run(ordered, **PAIR)
    in_simdgroup = "simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[lane ^ 1];"
    run(SHARED + "s[lane] = x[i]; " + in_simdgroup)
    device = "y[i] = x[0]; threadgroup_barrier(mem_flags::mem_device); float a = y[63 - i];\n"
    run(INDEX + device + "threadgroup_barrier(mem_flags::mem_device); y[i] = a;", **PAIR)
    run(INDEX + "y[i] = x[i]; y[i] += 1;")


def test_uninitialised_variable():
    """Seen by the type check; in the check build, in memory, it is huge or NaN."""
    made = launch(INDEX + "float a; if (x[i] > 100.0f) a = 1; y[i] = a;")
    assert "variable 'a' is used uninitialized" in metal_host.type_check(made.source)[0]
    made = launch(INDEX + "float a[32]; a[i ^ 1] = 1; y[i] = a[int(x[i])];")
    output = np.array(metal_host.run(made, "check").outputs[0])
    assert not (np.abs(output) < 1e30).any()


def test_fast_build_survives_wild_accesses():
    with pytest.raises(metal_host.KernelError, match="out of bounds access"):
        run(INDEX + "y[i] = x[i + (1u << 29)];", build="fast")
    with pytest.raises(metal_host.KernelError, match="division by zero"):
        run(INDEX + "y[i] = 100 / (int(x[i]) - 5);", build="fast")
    assert values(INDEX + "y[i] = x[i];", build="fast")[3] == 3


def test_text_that_does_not_compile():
    with pytest.raises(metal_host.KernelError, match="does not compile"):
        run("y[0] = nothing;")


# ---- type check and lint ----

CHECK_HEADER = """
template <typename T>
inline void copy(const device T* p, thread float* o) {
  for (int i = 0; i < 4; i++) o[i] = p[i];
}
"""
CHECK_BODY = "uint i = thread_position_in_grid.x; threadgroup float s[32]; float r[4];\n"
GOOD = [
    "copy(x, r); s[i] = r[0]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[x1];",
    "const device float4* p = (const device float4*)x; float4 a = p[i]; a.xy = a.zw; y[i] = a.x;",
    "threadgroup float* t = s + 4; t[i] = 1; threadgroup float4* v = (threadgroup float4*)s;"
    " y[i] = v[0].x;",
    "bfloat b = static_cast<bfloat>(x[i]); y[i] = static_cast<float>(b) + simd_sum(x[i]);",
]
BAD = [
    "thread float* p = x;",
    "device float* p = s;",
    "copy(r, r);",
    "copy(x, s);",
    "device float* p = x;",
    "x[i] = 1;",
    "x1 = 1;",
    "const float* p = x;",
    "thread float& q = s[0];",
    "device float* p = (device float*)s; p[0] = 1;",
    "y[i] = max(i, x1);",
    "double d = 1; y[i] = d;",
    "const thread int* p = &x1;",
    "float4 a = float2(1, 2); y[i] = a.x;",
    "float4 a = float4(1, 2, 3); y[i] = a.x;",
    "float a; y[i] = a;",
    "y[i] = undeclared(x[i]);",
]


def checked(code):
    inputs = [mx.zeros((32,)), mx.array(3, dtype=mx.int32)]
    return launch(CHECK_BODY + code, inputs, header=CHECK_HEADER).source


def test_type_check():
    assert metal_host.type_check(*map(checked, GOOD)) == []
    for code in BAD:
        assert metal_host.type_check(checked(code)), code


def test_type_check_of_several_names_lines():
    messages = metal_host.type_check(checked(GOOD[0]), checked("\n\ny[i] = undeclared;"))
    line = checked("\n\ny[i] = undeclared;").splitlines().index("y[i] = undeclared;") + 1
    assert len(messages) == 1
    assert f"line {line}: use of undeclared identifier" in messages[0]


LINT = {
    "inline float f(const float* p) { return p[0]; }": (
        "parameter without address space: const float* p"
    ),
    "inline void f(thread float* p, float& q) {\n}": "parameter without address space: float& q",
    "inline void f(thread float* p) {\n  float* q = p;\n}": "line 2: pointer or reference without",
    "void f() { static int x = 0; }": "a static variable in a function",
    "void f() { auto g = [](int a) { return a; }; }": "a lambda",
    "void f() { goto end; }": "goto",
    "union U { int a; float b; };": "a union",
    "void f(long long a) {}": "long long",
    "void f() { double a = 0; }": "double",
    "void f() { std::swap(a, b); }": "std::",
    "void f() { int a = new int; }": "new or delete",
}


@pytest.mark.parametrize("text", LINT)
def test_lint_finds(text):
    (message,) = metal_host.lint(text)
    assert LINT[text] in message


def test_lint_passes():
    assert metal_host.lint(STYLE_HEADER + CHECK_HEADER + HEADER) == []
    for code in GOOD:
        assert metal_host.lint(checked(code)) == []
    arithmetic = "void f(int a, float b) {\n  x = a * b;\n  if (a & b) { y = p[a] * b; }\n}"
    assert metal_host.lint("// float* p = double\n" + arithmetic) == []
