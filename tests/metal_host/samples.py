"""Small kernels for the tests of the harness itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .capture import Launch, capture
from .execute import Result
from .execute import run as run_launch

INDEX = "uint i = thread_position_in_grid.x;\n"
LANE = "uint lane = thread_index_in_simdgroup;\n"

HEADER = """
template <typename T>
inline float twice(const device T* x, uint i) {
  return 2.0f * static_cast<float>(x[i]);
}
"""

# The forms that larger kernels take: function templates, structs with pointers to device memory,
# array references, constant tables.
STYLE_HEADER = """
constant float table[4] = {1, 2, 3, 4};
template <typename P>
inline float load(P p, uint i) {
  return static_cast<float>(p[i]);
}
template <typename T>
struct Rows {
  const device T* data;
  uint stride;
  const device T* row(uint r) const { return data == nullptr ? nullptr : data + r * stride; }
};
inline void accumulate(thread float (&acc)[4], float x) {
  #pragma unroll
  for (int k = 0; k < 4; k++) {
    acc[k] += x * table[k];
  }
}
template <typename T, int Dk>
inline void step(const device T* x, device T* y, threadgroup float* shared, uint lane, uint group) {
  constexpr int count = Dk / 32;
  static_assert(Dk % 32 == 0, "whole simdgroups");
  Rows<T> rows = {x, Dk};
  float acc[4] = {0, 0, 0, 0};
  for (int k = 0; k < count; k++) {
    accumulate(acc, load(rows.row(group), lane * count + k));
  }
  float sum = simd_sum(acc[3]);
  if (lane == 0) shared[group] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0 && group == 0) y[0] = static_cast<T>(shared[0] + shared[1]);
}
"""


def launch(
    source: str,
    inputs: Sequence[mx.array] | None = None,
    *,
    threads: int = 32,
    group: int = 32,
    outputs: Sequence[Sequence[int]] = ((32,),),
    dtypes: Sequence[mx.Dtype] | None = None,
    header: str = "",
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
) -> Launch:
    """A launch of `source` with inputs x, x1, x2 and outputs y, y1, y2."""
    inputs = [mx.arange(32, dtype=mx.float32)] if inputs is None else inputs
    kernel = mx.fast.metal_kernel(
        name="small",
        input_names=[f"x{i or ''}" for i in range(len(inputs))],
        output_names=[f"y{i or ''}" for i in range(len(outputs))],
        header=header,
        source=source,
    )
    return capture(
        kernel,
        inputs=inputs,
        template=template,
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=outputs,
        output_dtypes=[mx.float32] * len(outputs) if dtypes is None else dtypes,
        init_value=init_value,
    )


def run(source: str, *args: Any, build: str = "check", order: int = 0, **kwargs: Any) -> Result:
    """The result of `launch(source, ...)`."""
    return run_launch(launch(source, *args, **kwargs), build=build, order=order)


def values(source: str, *args: Any, **kwargs: Any) -> np.ndarray:
    """The first output, in float32."""
    return np.array(run(source, *args, **kwargs).outputs[0].astype(mx.float32))
