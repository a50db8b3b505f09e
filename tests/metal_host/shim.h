// The subset of the Metal Shading Language that compute kernels need, for a host compiler:
// kernel text compiled behind this header runs as ordinary x86-64 code, one call per thread.
// Precompiled, hence the order: standard headers first, the keywords of Metal last. Reading
// <cmath> would take longer than compiling most kernels, hence the __builtin_ functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "runtime.h"

// The line of the caller: what simd functions and barriers report.
#define MSL_LINE int line_ = __builtin_LINE()

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#undef INFINITY
#undef NAN
#undef MAXFLOAT
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define HALF_MAX ((half)65504)
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 320

typedef _Float16 half;

// As in Metal: converts to float by itself, from anything only explicitly, and an operation on
// two bfloat numbers rounds to bfloat.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <typename T>
    requires(std::is_arithmetic_v<T> || std::is_same_v<T, half>)
  explicit constexpr bfloat(T x) : bits(round_to_nearest_even(static_cast<float>(x))) {}

  static constexpr uint16_t round_to_nearest_even(float x) {
    uint32_t u = __builtin_bit_cast(uint32_t, x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(u >> 16 | 64);
    return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  static constexpr bfloat from_bits(uint16_t bits) {
    bfloat result;
    result.bits = bits;
    return result;
  }

  constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  constexpr bfloat operator-() const { return bfloat(-static_cast<float>(*this)); }

#define MSL_BFLOAT_OPERATOR(op)                                                            \
  friend bfloat operator op(bfloat a, bfloat b) {                                          \
    return bfloat(static_cast<float>(a) op static_cast<float>(b));                         \
  }                                                                                        \
  template <typename I>                                                                    \
    requires std::is_integral_v<I>                                                         \
  friend bfloat operator op(bfloat a, I b) { return a op bfloat(b); }                      \
  template <typename I>                                                                    \
    requires std::is_integral_v<I>                                                         \
  friend bfloat operator op(I a, bfloat b) { return bfloat(a) op b; }                      \
  bfloat& operator op##=(bfloat b) { return *this = *this op b; }
  MSL_BFLOAT_OPERATOR(+)
  MSL_BFLOAT_OPERATOR(-)
  MSL_BFLOAT_OPERATOR(*)
  MSL_BFLOAT_OPERATOR(/)
#undef MSL_BFLOAT_OPERATOR
};
typedef bfloat bfloat16_t;
typedef half float16_t;

// Literals such as 1.5h. The name is reserved, in a header the compiler takes as the user's own.
#pragma GCC diagnostic ignored "-Wliteral-suffix"
inline half operator""h(long double x) { return static_cast<half>(x); }

namespace metal {

using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::is_unsigned_v;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;

template <typename T>
constexpr bool is_scalar_v =
    std::is_arithmetic_v<T> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

template <typename T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return static_cast<half>(__builtin_inff()); }
  static constexpr half max() { return static_cast<half>(65504.0f); }
  static constexpr half lowest() { return static_cast<half>(-65504.0f); }
  static constexpr half min() { return static_cast<half>(6.103515625e-5f); }
  static constexpr half epsilon() { return static_cast<half>(9.765625e-4f); }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat infinity() { return bfloat::from_bits(0x7F80); }
  static constexpr bfloat max() { return bfloat::from_bits(0x7F7F); }
  static constexpr bfloat lowest() { return bfloat::from_bits(0xFF7F); }
  static constexpr bfloat min() { return bfloat::from_bits(0x0080); }
  static constexpr bfloat epsilon() { return bfloat::from_bits(0x3C00); }
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  __builtin_memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
  return to;
}

}  // namespace metal

#include "shim_vector.h"
#include "shim_math.h"
#include "shim_simd.h"

using namespace metal;
using metal::vec;

#define as_type metal::bit_cast

// The translation turns `threadgroup T name[n];` into this; `threadgroup T*` stays a pointer.
#define MSL_THREADGROUP(name, ...)                                                         \
  __VA_ARGS__& name = *static_cast<__VA_ARGS__*>(rt_threadgroup_memory(                    \
      sizeof(__VA_ARGS__), alignof(__VA_ARGS__) < 16 ? 16 : alignof(__VA_ARGS__), __COUNTER__))

#define device
#define constant
#define threadgroup
#define thread
#define kernel

// Not in Metal, so an error here as well.
#pragma GCC poison double std goto throw try catch new delete virtual typeid dynamic_cast
