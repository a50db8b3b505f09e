// The parts that all kernels share. Values are read with load(), which widens to float: MSL would
// round bfloat products to bfloat. Pointers to inputs that may hold fewer than 8 elements are
// template parameters, since MLX places those in the constant address space.

template <typename P>
inline float load(P values, uint i) {
  return static_cast<float>(values[i]);
}

// 1 / (1 + exp(-x))
inline float sigmoid(float x) {
  return 1.0f / (1.0f + metal::precise::exp(-x));
}

inline float silu(float x) {
  return x * sigmoid(x);
}

// log(1 + exp(x)). Where 1 + e rounds, log(1 + e) is corrected by e / ((1 + e) - 1) (Kahan).
inline float softplus(float x) {
  const float e = metal::precise::exp(-metal::abs(x));
  const float u = 1.0f + e;
  const float log1p = u == 1.0f ? e : metal::precise::log(u) * (e / (u - 1.0f));
  return metal::max(x, 0.0f) + log1p;
}
