// Declarations for the type check of kernel text: clang in its C++ for OpenCL mode knows address
// spaces, vectors, half and bfloat as Metal does. Nothing here has a body; nothing is run.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang diagnostic ignored "-Wopencl-unsupported-rgba"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;
typedef half float16_t;

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define HALF_MAX ((half)65504)
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f

namespace metal {

// ---- types ----

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define VECTOR_NAMES(type)                                                                 \
  typedef vec<type, 2> type##2;                                                            \
  typedef vec<type, 3> type##3;                                                            \
  typedef vec<type, 4> type##4;

template <bool Condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool Condition, class T = void>
using enable_if_t = typename enable_if<Condition, T>::type;

template <bool Value>
struct bool_constant {
  static constexpr bool value = Value;
};
template <class T, class U>
struct is_same : bool_constant<false> {};
template <class T>
struct is_same<T, T> : bool_constant<true> {};
template <class T, class U>
constexpr bool is_same_v = is_same<T, U>::value;
template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
constexpr bool is_signed_v = __is_signed(T);

template <bool Condition, class T, class U>
struct conditional {
  typedef T type;
};
template <class T, class U>
struct conditional<false, T, U> {
  typedef U type;
};
template <bool Condition, class T, class U>
using conditional_t = typename conditional<Condition, T, U>::type;

template <class T>
struct numeric_limits {
  static constexpr T infinity();
  static constexpr T max();
  static constexpr T lowest();
  static constexpr T min();
  static constexpr T epsilon();
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, from);
}

// ---- building vectors: `float4(a, b)` becomes `make_float4(a, b)` in the checked text ----

#define MAKE_ANY(type, n)                                                                  \
  vec<type, n> make_##type##n(type);                                                       \
  template <class T>                                                                       \
  vec<type, n> make_##type##n(vec<T, n>);
#define MAKE_VECTORS(type)                                                                 \
  VECTOR_NAMES(type)                                                                       \
  MAKE_ANY(type, 2)                                                                        \
  MAKE_ANY(type, 3)                                                                        \
  MAKE_ANY(type, 4)                                                                        \
  type##2 make_##type##2(type, type);                                                      \
  type##3 make_##type##3(type, type, type);                                                \
  type##3 make_##type##3(type##2, type);                                                   \
  type##3 make_##type##3(type, type##2);                                                   \
  type##4 make_##type##4(type, type, type, type);                                          \
  type##4 make_##type##4(type##2, type##2);                                                \
  type##4 make_##type##4(type##2, type, type);                                             \
  type##4 make_##type##4(type, type, type##2);                                             \
  type##4 make_##type##4(type, type##3);                                                   \
  type##4 make_##type##4(type##3, type);
MAKE_VECTORS(char)
MAKE_VECTORS(uchar)
MAKE_VECTORS(short)
MAKE_VECTORS(ushort)
MAKE_VECTORS(int)
MAKE_VECTORS(uint)
MAKE_VECTORS(long)
MAKE_VECTORS(ulong)
MAKE_VECTORS(half)
MAKE_VECTORS(bfloat)
MAKE_VECTORS(float)

// `vec<T, 4>(...)` becomes `make_vec<T, 4>(...)`; what it is made of is not looked at.
template <class T, int N, class... Parts>
vec<T, N> make_vec(Parts...);

// ---- arithmetic ----

#define OF_ONE(name)                                                                       \
  float name(float);                                                                       \
  half name(half);                                                                         \
  bfloat name(bfloat);                                                                     \
  template <class T, int N>                                                                \
  vec<T, N> name(vec<T, N>);
#define OF_ONE_IN_TWO_FORMS(name)                                                          \
  namespace precise {                                                                      \
  OF_ONE(name)                                                                             \
  }                                                                                        \
  namespace fast {                                                                         \
  OF_ONE(name)                                                                             \
  }                                                                                        \
  OF_ONE(name)
OF_ONE_IN_TWO_FORMS(exp)
OF_ONE_IN_TWO_FORMS(exp2)
OF_ONE_IN_TWO_FORMS(log)
OF_ONE_IN_TWO_FORMS(log2)
OF_ONE_IN_TWO_FORMS(sqrt)
OF_ONE_IN_TWO_FORMS(rsqrt)
OF_ONE_IN_TWO_FORMS(sin)
OF_ONE_IN_TWO_FORMS(cos)
OF_ONE_IN_TWO_FORMS(tanh)
OF_ONE(floor)
OF_ONE(ceil)
OF_ONE(round)
OF_ONE(rint)
OF_ONE(trunc)
OF_ONE(fabs)
OF_ONE(sign)
OF_ONE(abs)
int abs(int);

#define OF_TWO_FLOATS(name)                                                                \
  float name(float, float);                                                                \
  half name(half, half);                                                                   \
  bfloat name(bfloat, bfloat);                                                             \
  template <class T, int N>                                                                \
  vec<T, N> name(vec<T, N>, vec<T, N>);
#define OF_TWO(name)                                                                       \
  OF_TWO_FLOATS(name)                                                                      \
  char name(char, char);                                                                   \
  uchar name(uchar, uchar);                                                                \
  short name(short, short);                                                                \
  ushort name(ushort, ushort);                                                             \
  int name(int, int);                                                                      \
  uint name(uint, uint);                                                                   \
  long name(long, long);                                                                   \
  ulong name(ulong, ulong);
OF_TWO(max)
OF_TWO(min)
OF_TWO_FLOATS(fmax)
OF_TWO_FLOATS(fmin)
OF_TWO_FLOATS(pow)
OF_TWO_FLOATS(copysign)
namespace precise {
OF_TWO_FLOATS(pow)
}
namespace fast {
OF_TWO_FLOATS(pow)
OF_TWO_FLOATS(max)
OF_TWO_FLOATS(min)
}

#define OF_THREE(name)                                                                     \
  float name(float, float, float);                                                         \
  half name(half, half, half);                                                             \
  bfloat name(bfloat, bfloat, bfloat);                                                     \
  template <class T, int N>                                                                \
  vec<T, N> name(vec<T, N>, vec<T, N>, vec<T, N>);
OF_THREE(fma)
OF_THREE(clamp)
short clamp(short, short, short);
ushort clamp(ushort, ushort, ushort);
int clamp(int, int, int);
uint clamp(uint, uint, uint);
long clamp(long, long, long);
ulong clamp(ulong, ulong, ulong);

#define QUESTION(name)                                                                     \
  bool name(float);                                                                        \
  bool name(half);                                                                         \
  bool name(bfloat);
QUESTION(isnan)
QUESTION(isinf)
QUESTION(isfinite)

template <class T, int N>
T dot(vec<T, N>, vec<T, N>);
template <class T>
T select(T, T, bool);
template <class T, class C, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<C, N>);
template <class C, int N>
bool any(vec<C, N>);
template <class C, int N>
bool all(vec<C, N>);

uint popcount(uint);
uint clz(uint);
uint ctz(uint);

// ---- barriers and simdgroup functions ----

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define REDUCTION(name)                                                                    \
  float name(float);                                                                       \
  half name(half);                                                                         \
  bfloat name(bfloat);                                                                     \
  char name(char);                                                                         \
  uchar name(uchar);                                                                       \
  short name(short);                                                                       \
  ushort name(ushort);                                                                     \
  int name(int);                                                                           \
  uint name(uint);                                                                         \
  template <class T, int N>                                                                \
  vec<T, N> name(vec<T, N>);
REDUCTION(simd_sum)
REDUCTION(simd_product)
REDUCTION(simd_max)
REDUCTION(simd_min)
REDUCTION(simd_and)
REDUCTION(simd_or)
REDUCTION(simd_prefix_inclusive_sum)
REDUCTION(simd_prefix_exclusive_sum)
REDUCTION(simd_broadcast_first)
bool simd_any(bool);
bool simd_all(bool);

struct simd_vote {
  operator ulong();
  bool any() const;
  bool all() const;
};
simd_vote simd_ballot(bool);

#define MOVE(name)                                                                         \
  template <class T>                                                                       \
  T name(T, ushort);
MOVE(simd_shuffle)
MOVE(simd_shuffle_xor)
MOVE(simd_shuffle_up)
MOVE(simd_shuffle_down)
MOVE(simd_broadcast)

}  // namespace metal

using namespace metal;

#define as_type metal::bit_cast

// What the translation makes of `threadgroup T name[n];`: this mode allows such a variable only
// in a kernel proper, which is never a template. The number stands for any address.
#define MSL_THREADGROUP(name, ...)                                                         \
  threadgroup __VA_ARGS__& name = *(threadgroup __VA_ARGS__*)4096

#pragma GCC poison double std goto throw try catch new delete virtual typeid dynamic_cast
