// Barriers and simdgroup functions: what the lanes of a simdgroup do together.
#pragma once

namespace metal {

enum class mem_flags : int {
  mem_none = 0,
  mem_device = kMemoryDevice,
  mem_threadgroup = kMemoryThreadgroup,
};
inline mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<int>(a) | static_cast<int>(b));
}

inline void threadgroup_barrier(mem_flags flags, MSL_LINE) {
  rt_barrier(kWaitThreadgroupBarrier, static_cast<int>(flags), line_);
}
inline void simdgroup_barrier(mem_flags flags, MSL_LINE) {
  rt_barrier(kWaitSimdgroupBarrier, static_cast<int>(flags), line_);
}

namespace shim {

// Reductions happen in float, int or uint; half and bfloat results are rounded once.
inline float reduce(int operation, float value, int line) {
  return rt_reduce_float(operation, value, line);
}
inline half reduce(int operation, half value, int line) {
  return static_cast<half>(rt_reduce_float(operation, static_cast<float>(value), line));
}
inline bfloat reduce(int operation, bfloat value, int line) {
  return bfloat(rt_reduce_float(operation, static_cast<float>(value), line));
}
template <typename T>
  requires std::is_integral_v<T>
inline T reduce(int operation, T value, int line) {
  static_assert(sizeof(T) <= 4, "simd reductions take at most 32 bits");
  if constexpr (std::is_signed_v<T>) {
    return static_cast<T>(rt_reduce_int(operation, value, line));
  } else {
    return static_cast<T>(rt_reduce_uint(operation, value, line));
  }
}
template <typename T, int N>
inline vec<T, N> reduce(int operation, const vec<T, N>& value, int line) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result[i] = reduce(operation, value[i], line);
  return result;
}

}  // namespace shim

#define MSL_REDUCTION(name, operation)                                                     \
  template <typename T>                                                                    \
  inline T name(T value, MSL_LINE) {                                                       \
    return shim::reduce(operation, value, line_);                                          \
  }
MSL_REDUCTION(simd_sum, kReduceSum)
MSL_REDUCTION(simd_product, kReduceProduct)
MSL_REDUCTION(simd_max, kReduceMax)
MSL_REDUCTION(simd_min, kReduceMin)
MSL_REDUCTION(simd_and, kReduceAnd)
MSL_REDUCTION(simd_or, kReduceOr)

inline bool simd_any(bool value, MSL_LINE) {
  return rt_reduce_uint(kReduceOr, value, line_);
}
inline bool simd_all(bool value, MSL_LINE) {
  return rt_reduce_uint(kReduceAnd, value, line_);
}

namespace shim {

// Which operation a lane waits in, for the comparison with the other lanes.
enum MoveOp : int { kMoveShuffle = 16, kMovePrefix, kMoveBallot };

// The value of lane `from`; `otherwise` where there is no such lane.
template <typename T>
inline T value_of_lane(const T& value, int from, const T& otherwise, bool exists, int line) {
  SimdExchange* exchange = rt_exchange(&value, sizeof value, kMoveShuffle, line);
  if (!exists) return otherwise;
  if (from < 0 || from >= kSimdWidth || !(exchange->lanes >> from & 1)) {
    rt_fail("shuffle from lane %d, which is not active, at line %d", from, line);
  }
  T result;
  __builtin_memcpy(static_cast<void*>(&result), exchange->value[from], sizeof result);
  return result;
}

}  // namespace shim

template <typename T>
inline T simd_shuffle(T value, ushort lane, MSL_LINE) {
  return shim::value_of_lane(value, lane, value, true, line_);
}
template <typename T>
inline T simd_broadcast(T value, ushort lane, MSL_LINE) {
  return shim::value_of_lane(value, lane, value, true, line_);
}
template <typename T>
inline T simd_broadcast_first(T value, MSL_LINE) {
  return shim::value_of_lane(value, 0, value, true, line_);
}
template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, MSL_LINE) {
  return shim::value_of_lane(value, rt_thread->lane ^ mask, value, true, line_);
}
// Up and down: lanes beyond the end keep their own value, which Metal leaves undefined.
template <typename T>
inline T simd_shuffle_down(T value, ushort distance, MSL_LINE) {
  int from = static_cast<int>(rt_thread->lane) + distance;
  return shim::value_of_lane(value, from, value, from < kSimdWidth, line_);
}
template <typename T>
inline T simd_shuffle_up(T value, ushort distance, MSL_LINE) {
  int from = static_cast<int>(rt_thread->lane) - distance;
  return shim::value_of_lane(value, from, value, from >= 0, line_);
}

namespace shim {

template <typename T>
inline T prefix_sum(T value, int lanes, int line) {
  SimdExchange* exchange = rt_exchange(&value, sizeof value, kMovePrefix, line);
  T sum = static_cast<T>(0);
  for (int lane = 0; lane < lanes; lane++) {
    T other;
    __builtin_memcpy(static_cast<void*>(&other), exchange->value[lane], sizeof other);
    sum = sum + other;
  }
  return sum;
}
}  // namespace shim

template <typename T>
inline T simd_prefix_inclusive_sum(T value, MSL_LINE) {
  return shim::prefix_sum(value, rt_thread->lane + 1, line_);
}
template <typename T>
inline T simd_prefix_exclusive_sum(T value, MSL_LINE) {
  return shim::prefix_sum(value, rt_thread->lane, line_);
}

struct simd_vote {
  ulong lanes;
  explicit operator ulong() const { return lanes; }
  bool any() const { return lanes != 0; }
  bool all() const { return lanes == 0xFFFFFFFFul; }
};
inline simd_vote simd_ballot(bool value, MSL_LINE) {
  return {rt_reduce_uint(kReduceOr, static_cast<uint>(value) << rt_thread->lane, line_)};
}

}  // namespace metal
