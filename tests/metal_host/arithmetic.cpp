// Arithmetic that the options of a launch decide: the order of reductions over the lanes of a
// simdgroup, and the errors of transcendental functions.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime.h"

namespace {

template <typename T>
T combine(int operation, T a, T b) {
  switch (operation) {
    case kReduceSum: return a + b;
    case kReduceProduct: return a * b;
    case kReduceMax: return b > a || a != a ? b : a;
    default: return b < a || a != a ? b : a;
  }
}

template <typename T>
T combine_bits(int operation, T a, T b) {
  if (operation == kReduceAnd) return a & b;
  if (operation == kReduceOr) return a | b;
  return combine(operation, a, b);
}
inline float combine_any(int operation, float a, float b) { return combine(operation, a, b); }
inline uint32_t combine_any(int operation, uint32_t a, uint32_t b) {
  return combine_bits(operation, a, b);
}

// Lane a takes in lane b, if there is one; lanes that exist come first.
template <typename T>
inline void join(int operation, T* values, int a, int b, int lanes) {
  if (b < lanes) values[a] = combine_any(operation, values[a], values[b]);
}

template <typename T>
T reduce_in_order(int operation, T* values, int lanes) {
  switch (rt_options.sums) {
    case 1:
      for (int i = 1; i < lanes; i++) join(operation, values, 0, i, lanes);
      break;
    case 2:
      for (int distance = kSimdWidth / 2; distance; distance /= 2) {
        for (int i = 0; i < distance; i++) join(operation, values, i, i + distance, lanes);
      }
      break;
    default:
      for (int distance = 1; distance < kSimdWidth; distance *= 2) {
        for (int i = 0; i < lanes; i += 2 * distance) {
          join(operation, values, i, i + distance, lanes);
        }
      }
  }
  return values[0];
}

template <typename T>
T reduce(int operation, T value, int line) {
  SimdExchange* exchange = rt_exchange(&value, sizeof value, operation, line);
  if (!exchange->reduced) {
    T values[kSimdWidth];
    for (int i = 0; i < kSimdWidth; i++) memcpy(&values[i], exchange->value[i], sizeof(T));
    T result = reduce_in_order(operation, values, __builtin_popcount(exchange->lanes));
    memcpy(exchange->result, &result, sizeof result);
    exchange->reduced = true;
  }
  memcpy(&value, exchange->result, sizeof value);
  return value;
}

}  // namespace

float rt_reduce_float(int operation, float value, int line) {
  return reduce(operation, value, line);
}
uint32_t rt_reduce_uint(int operation, uint32_t value, int line) {
  return reduce(operation, value, line);
}
int32_t rt_reduce_int(int operation, int32_t value, int line) {
  // Sums and products wrap; an order of the values that min and max understand: sign bit flipped.
  bool ordered = operation == kReduceMax || operation == kReduceMin;
  uint32_t flip = ordered ? 0x80000000u : 0;
  return static_cast<int32_t>(reduce(operation, static_cast<uint32_t>(value) ^ flip, line) ^ flip);
}

float rt_jitter(float x, float ulps, float absolute) {
  if (x == 0 || !std::isfinite(x)) return x;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint64_t hash = (bits + 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
  hash ^= hash >> 31;
  float fraction = static_cast<int>(hash & 0xFFFFFF) / 8388608.0f - 1;  // from -1 to 1
  float last_place = std::ldexp(1.0f, std::max(std::ilogb(x) - 23, -149));
  float error = std::max(std::floor(ulps) * last_place, absolute);
  return x + fraction * error;
}
