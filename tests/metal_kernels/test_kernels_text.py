"""Rules on the kernels' text that no compiler knows."""

import re

import pytest
from helpers_metal import KERNELS

from mlx_qwen3next.metal_kernels import kernel as kernel_module
from mlx_qwen3next.metal_kernels.kernel import body_of, condensed, definitions, needed, text

INEXACT = re.compile(
    r"(?<!precise::)\b(a?(?:sin|cos|tan)h?|exp(?:2|10)?|log(?:2|10)?|r?sqrt|powr?|divide)\("
)
FAMILIES = sorted({kernel.family for kernel in KERNELS} | {"common"})


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_are_the_precise_ones(family):
    """On the CPU both kinds are the same, so that no result would show it."""
    code = re.sub(r"//.*", "", text(family))
    assert [found.group() for found in INEXACT.finditer(code)] == []


@pytest.mark.parametrize("call", ["metal::exp(x)", "fast::cos(x)", "rsqrt(x)", "metal::log2(x)"])
def test_the_rule_finds(call):
    assert INEXACT.search(call)


def test_every_file_is_part_of_a_kernel():
    """And is installed with the package: it is read from there."""
    assert FAMILIES == ["attention", "common", "experts", "gated_delta", "norms", "router"]
    assert all(f"inline {kind}" in text("common") for kind in ("float load", "float sigmoid"))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernels_text_is_short(kernel):
    """MLX copies it at each launch or trace; the file's text is for readers."""
    header, source = needed(definitions(kernel.family), kernel.body), condensed(kernel.body)
    assert len(header + source) <= 5000
    assert not re.search(r"//|^\s|\n\n|  ", header + source)
    for other in KERNELS:  # nothing of another kernel
        assert f" {other.name}(" not in header or f" {other.name}<" in kernel.body
        if other.family == "gated_delta" == kernel.family:
            foreign = {*other.inputs, *other.outputs} - {*kernel.inputs, *kernel.outputs}
            assert not foreign & set(re.findall(r"\w+", header + source))


def test_a_body_holds_the_lines_that_are_chosen(monkeypatch):
    file = """
inline void other() {
}

kernel void one() {
  a();
#if TWICE
  a();
#else
  b();
#endif
#if !TWICE
  c();
#endif
  if (d) {
  }
}

kernel void two() {
  e();
}
"""
    monkeypatch.setattr(kernel_module, "text", {"common": "", "family": file}.get)
    assert definitions("family").strip() == "inline void other() {\n}"
    assert body_of("family", "one", TWICE=True) == "  a();\n  a();\n  if (d) {\n  }\n"
    assert body_of("family", "one", TWICE=False) == "  a();\n  b();\n  c();\n  if (d) {\n  }\n"
    assert body_of("family", "two") == "  e();\n"


def test_a_text_holds_what_a_kernel_needs():
    file = """
// Unused.
inline float other(float x) {
  return first(x);
}

constant constexpr int kOne = 1;  // one
constant constexpr int kTwo = 2;

template <typename T>
struct Pair {
  T x;  // named x
};

template <
    typename T, int N>
inline T add(
    T x, T y) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    x += -y * kOne / *&y;
  }

  return x;
}

inline float first(Pair<float> pair) {
  return add<float, 2>(pair.x, 1.0f);
}
"""
    expected = """constant constexpr int kOne=1;
template<typename T>
struct Pair{
T x;
};
template<
typename T,int N>
inline T add(
T x,T y){
#pragma unroll
for(int i=0;i<N;i++){
x+= -y*kOne/ *&y;
}
return x;
}
inline float first(Pair<float>pair){
return add<float,2>(pair.x,1.0f);
}
"""
    assert needed(file, "y[0] = first(pair);") == expected
    assert needed(file, "firsts(pair)") == ""
