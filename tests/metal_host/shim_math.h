// Arithmetic functions of Metal.
#pragma once

namespace metal {

namespace shim {
inline float with_error(float x, float ulps, float absolute = 0) {
  return __builtin_expect(rt_options.jitter, 0) ? rt_jitter(x, ulps, absolute) : x;
}
}  // namespace shim

#define MSL_VECTOR_OF_ONE(name)                                                              \
  template <typename T, int N>                                                               \
  inline vec<T, N> name(const vec<T, N>& x) {                                                \
    vec<T, N> result;                                                                        \
    MSL_EACH(i) result[i] = name(x[i]);                                                      \
    return result;                                                                           \
  }

#define MSL_NARROW_AND_VECTOR(name)                                                          \
  inline half name(half x) { return static_cast<half>(name(static_cast<float>(x))); }        \
  inline bfloat name(bfloat x) { return bfloat(name(static_cast<float>(x))); }               \
  MSL_VECTOR_OF_ONE(name)

// A function in its precise and its fast form, which differ in the error that the Metal
// specification allows: some ULPs, or an absolute error if that is more. Without
// a namespace it is the fast one. half and bfloat are computed in float and rounded once.
#define MSL_TRANSCENDENTAL(name, expression, precise_ulps, ...)                              \
  namespace precise {                                                                        \
  inline float name(float x) { return shim::with_error(expression, precise_ulps); }          \
  MSL_VECTOR_OF_ONE(name)                                                                    \
  }                                                                                          \
  namespace fast {                                                                           \
  inline float name(float x) { return shim::with_error(expression, __VA_ARGS__); }           \
  MSL_VECTOR_OF_ONE(name)                                                                    \
  }                                                                                          \
  inline float name(float x) { return fast::name(x); }                                       \
  MSL_NARROW_AND_VECTOR(name)

namespace shim {
constexpr float kLogError = 0x1p-21f;     // between 0.5 and 2
constexpr float kCircleError = 0x1p-13f;  // between -pi and pi
constexpr float kTanhError = 0x1p-21f;    // (t - 1) / (t + 1) with t = exp(2 * x)
inline float near_one(float x, float error) { return x >= 0.5f && x <= 2 ? error : 0; }
}  // namespace shim

MSL_TRANSCENDENTAL(exp, __builtin_expf(x), 4, 3 + __builtin_floorf(__builtin_fabsf(2 * x)))
MSL_TRANSCENDENTAL(exp2, __builtin_exp2f(x), 4, 3 + __builtin_floorf(__builtin_fabsf(2 * x)))
MSL_TRANSCENDENTAL(log, __builtin_logf(x), 4, 3, shim::near_one(x, shim::kLogError))
MSL_TRANSCENDENTAL(log2, __builtin_log2f(x), 4, 3, shim::near_one(x, shim::kLogError))
MSL_TRANSCENDENTAL(sqrt, __builtin_sqrtf(x), 0, 2)
MSL_TRANSCENDENTAL(rsqrt, 1.0f / __builtin_sqrtf(x), 2, 2)
MSL_TRANSCENDENTAL(sin, __builtin_sinf(x), 4, 4, shim::kCircleError)
MSL_TRANSCENDENTAL(cos, __builtin_cosf(x), 4, 4, shim::kCircleError)
MSL_TRANSCENDENTAL(tanh, __builtin_tanhf(x), 5, 5, shim::kTanhError)

#define MSL_EXACT(name, expression)                                                          \
  inline float name(float x) { return expression; }                                          \
  MSL_NARROW_AND_VECTOR(name)
MSL_EXACT(floor, __builtin_floorf(x))
MSL_EXACT(ceil, __builtin_ceilf(x))
MSL_EXACT(round, __builtin_roundf(x))
MSL_EXACT(rint, __builtin_nearbyintf(x))
MSL_EXACT(trunc, __builtin_truncf(x))
MSL_EXACT(fabs, __builtin_fabsf(x))
MSL_EXACT(abs, __builtin_fabsf(x))

// Two arguments of one type; vectors element by element.
#define MSL_VECTOR_OF_TWO(name)                                                              \
  template <typename T, int N>                                                               \
  inline vec<T, N> name(const vec<T, N>& x, const vec<T, N>& y) {                            \
    vec<T, N> result;                                                                        \
    MSL_EACH(i) result[i] = name(x[i], y[i]);                                                \
    return result;                                                                           \
  }
#define MSL_FLOAT_OF_TWO(name, expression)                                                   \
  inline float name(float x, float y) { return expression; }                                 \
  inline half name(half x, half y) {                                                         \
    return static_cast<half>(name(static_cast<float>(x), static_cast<float>(y)));            \
  }                                                                                          \
  inline bfloat name(bfloat x, bfloat y) {                                                   \
    return bfloat(name(static_cast<float>(x), static_cast<float>(y)));                       \
  }
MSL_FLOAT_OF_TWO(fmax, __builtin_fmaxf(x, y))
MSL_FLOAT_OF_TWO(fmin, __builtin_fminf(x, y))
MSL_FLOAT_OF_TWO(max, __builtin_fmaxf(x, y))
MSL_FLOAT_OF_TWO(min, __builtin_fminf(x, y))
MSL_FLOAT_OF_TWO(pow, shim::with_error(__builtin_powf(x, y), 16))
MSL_FLOAT_OF_TWO(copysign, __builtin_copysignf(x, y))

#define MSL_INTEGER(type)                                                                    \
  inline type max(type x, type y) { return x > y ? x : y; }                                  \
  inline type min(type x, type y) { return x < y ? x : y; }                                  \
  inline type clamp(type x, type low, type high) { return min(max(x, low), high); }
MSL_INTEGER(char)
MSL_INTEGER(uchar)
MSL_INTEGER(short)
MSL_INTEGER(ushort)
MSL_INTEGER(int)
MSL_INTEGER(uint)
MSL_INTEGER(long)
MSL_INTEGER(ulong)

#define MSL_FLOAT(type)                                                                      \
  inline type clamp(type x, type low, type high) { return min(max(x, low), high); }          \
  inline bool isnan(type x) { return __builtin_isnan(static_cast<float>(x)); }                    \
  inline bool isinf(type x) { return __builtin_isinf(static_cast<float>(x)); }                    \
  inline bool isfinite(type x) { return __builtin_isfinite(static_cast<float>(x)); }              \
  inline type sign(type x) {                                                                 \
    return static_cast<type>(static_cast<float>((x > type(0.0f)) - (x < type(0.0f))));       \
  }
MSL_FLOAT(float)
MSL_FLOAT(half)
MSL_FLOAT(bfloat)

MSL_VECTOR_OF_TWO(fmax)
MSL_VECTOR_OF_TWO(fmin)
MSL_VECTOR_OF_TWO(max)
MSL_VECTOR_OF_TWO(min)
MSL_VECTOR_OF_TWO(pow)

namespace precise {
using metal::pow;
}
namespace fast {
using metal::max;
using metal::min;
using metal::pow;
}

inline int abs(int x) { return x < 0 ? -x : x; }

template <typename T, int N>
inline vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) {
  return min(max(x, low), high);
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) {
  // The product is exact; the sum is rounded to float, then to half.
  return static_cast<half>(__builtin_fmaf(a, b, c));
}
inline bfloat fma(bfloat a, bfloat b, bfloat c) {
  return bfloat(__builtin_fmaf(a, b, c));
}
template <typename T, int N>
inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> result;
  MSL_EACH(i) result[i] = fma(a[i], b[i], c[i]);
  return result;
}

template <typename T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}

template <typename T>
inline T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <typename T, int N>
inline vec<T, N> select(const vec<T, N>& if_false, const vec<T, N>& if_true,
                        const vec<bool, N>& condition) {
  vec<T, N> result;
  MSL_EACH(i) result[i] = condition[i] ? if_true[i] : if_false[i];
  return result;
}
template <int N>
inline bool any(const vec<bool, N>& x) {
  bool result = false;
  MSL_EACH(i) result = result || x[i];
  return result;
}
template <int N>
inline bool all(const vec<bool, N>& x) {
  bool result = true;
  MSL_EACH(i) result = result && x[i];
  return result;
}

inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

}  // namespace metal
