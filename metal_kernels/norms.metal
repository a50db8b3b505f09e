// RMSNorm of one row by one threadgroup, with the residual addition before it where there is one:
// x + y (rounded to T, as the residual stream is) and its norm in one launch instead of six.

template <typename T, bool Add>
inline float residual(const device T* x, const device T* y, uint i) {
  const float value = load(x, i);
  return Add ? static_cast<float>(static_cast<T>(value + load(y, i))) : value;
}

// x, y: [rows, H]; weight: [H] float32; sum, normed: [rows, H]. sum is written if Add.
// shared: [SG], one partial sum of squares a simdgroup.
template <typename T, int H, int SG, bool Add>
inline void rms_norm(
    const device T* x, const device T* y, const device float* weight, float eps, device T* sum,
    device T* normed, threadgroup float* shared, uint row, uint thread_index, uint lane,
    uint simdgroup) {
  const uint start = row * H;
  float squares = 0.0f;
  for (uint i = thread_index; i < H; i += 32 * SG) {
    const float value = residual<T, Add>(x, y, start + i);
    squares += value * value;
    if (Add) {
      sum[start + i] = static_cast<T>(value);
    }
  }
  squares = simd_sum(squares);
  if (lane == 0) {
    shared[simdgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (uint s = 0; s < SG; s++) {
    total += shared[s];
  }
  const float scale = metal::precise::rsqrt(total / H + eps);
  for (uint i = thread_index; i < H; i += 32 * SG) {
    const float value = residual<T, Add>(x, y, start + i);
    normed[start + i] = static_cast<T>(value * scale * weight[i]);
  }
}
