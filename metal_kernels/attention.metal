// The operations before and after mx.fast.scaled_dot_product_attention, one launch each.

// One simdgroup a head and token of the packed projection [q | k | v | gate]: RMSNorm over the
// head and RoPE on its first Rd elements (half-split) for q and k, a copy for v.
//
// x: [B, L, P]; q_weight, k_weight: [D] float32; inverse_frequencies: [Rd / 2] float32;
// attention_factor: of sine and cosine; offsets: [B], the position of each sequence's first token;
// q: [B, Nq, L, D], k and v: [B, Nkv, L, D]. shared: [D]. head counts q's heads, then k's,
// then v's.
template <typename T, int Nq, int Nkv, int D, int Rd, typename F, typename O>
inline void attention_heads(
    const device T* x, const device float* q_weight, const device float* k_weight, float eps,
    F inverse_frequencies, float attention_factor, O offsets, device T* q, device T* k, device T* v,
    threadgroup float* shared, uint L, uint head, uint token, uint batch, uint lane) {
  constexpr uint P = (2 * Nq + 2 * Nkv) * D;
  const device T* from = x + (batch * L + token) * P + head * D;
  if (head >= Nq + Nkv) {
    device T* to = v + ((batch * Nkv + head - Nq - Nkv) * L + token) * D;
    for (uint d = lane; d < D; d += 32) {
      to[d] = from[d];
    }
    return;
  }

  const bool is_query = head < Nq;
  float squares = 0.0f;
  for (uint d = lane; d < D; d += 32) {
    const float value = load(from, d);
    squares += value * value;
  }
  const float scale = metal::precise::rsqrt(simd_sum(squares) / D + eps);
  for (uint d = lane; d < D; d += 32) {
    shared[d] = load(from, d) * scale * (is_query ? q_weight[d] : k_weight[d]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  device T* to = is_query ? q + ((batch * Nq + head) * L + token) * D
                          : k + ((batch * Nkv + head - Nq) * L + token) * D;
  const float position = static_cast<float>(offsets[batch] + static_cast<int>(token));
  for (uint d = lane; d < Rd / 2; d += 32) {
    const float angle = position * load(inverse_frequencies, d);
    const float c = metal::precise::cos(angle) * attention_factor;
    const float s = metal::precise::sin(angle) * attention_factor;
    const float first = shared[d];
    const float second = shared[d + Rd / 2];
    to[d] = static_cast<T>(first * c - second * s);
    to[d + Rd / 2] = static_cast<T>(second * c + first * s);
  }
  for (uint d = Rd + lane; d < D; d += 32) {
    to[d] = static_cast<T>(shared[d]);
  }
}

// One thread an element: attention's output, heads side by side again, times its sigmoid gate.
// o: [B, Nq, L, D]; x: [B, L, P], the packed projection; y: [B, L, Nq D].
template <typename T, int Nq, int Nkv, int D>
inline void attention_gate(
    const device T* o, const device T* x, device T* y, uint L, uint i, uint token, uint batch) {
  constexpr uint P = (2 * Nq + 2 * Nkv) * D;
  const uint row = batch * L + token;
  const float gate = load(x, row * P + (Nq + 2 * Nkv) * D + i);
  const float value = load(o, ((batch * Nq + i / D) * L + token) * D + i % D);
  y[row * Nq * D + i] = static_cast<T>(value * sigmoid(gate));
}
