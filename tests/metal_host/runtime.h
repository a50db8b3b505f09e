// What a compiled kernel asks of the runtime. Included by the shim (in every kernel) and by
// the runtime itself.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr int kSimdWidth = 32;

enum ReduceOp : int { kReduceSum, kReduceProduct, kReduceMax, kReduceMin, kReduceAnd, kReduceOr };

// What a lane can wait for. Lanes of one simdgroup have to wait for the same thing at the same
// line, everything else is reported as divergence.
enum WaitKind : int { kWaitNone, kWaitSimd, kWaitSimdgroupBarrier, kWaitThreadgroupBarrier };

// The bits of metal::mem_flags.
enum MemoryFlags : int { kMemoryDevice = 1, kMemoryThreadgroup = 2 };

// The values that the lanes of a simdgroup hand over in one simd operation.
struct SimdExchange {
  alignas(32) unsigned char value[kSimdWidth][32];
  alignas(8) unsigned char result[8];
  uint32_t lanes;  // the lanes that take part
  bool reduced;    // `result` holds the reduction: the first lane to resume computes it
};

struct ThreadInfo {
  uint32_t local[3];  // thread_position_in_threadgroup
  uint32_t index;     // thread_index_in_threadgroup
  uint32_t lane;
  uint32_t simdgroup;
};

struct LaunchInfo {
  uint32_t grid[3];             // threads asked for
  uint32_t size[3];             // threads in a whole threadgroup
  uint32_t threadgroups[3];     // threadgroups in the grid
  uint32_t position[3];         // of the threadgroup that runs now
  uint32_t here[3];             // its size: less than `threadgroup` at the edge of the grid
  uint32_t simdgroups;          // of the threadgroup that runs now
};

// Everything that one compiled kernel can be run with.
struct Options {
  int order;   // bit set, see execute.py
  int sums;    // 0: pairs of neighbours first, 1: one lane after another, 2: halves first
  int jitter;  // transcendental functions off by up to their documented error
  int flush;   // subnormal numbers are zero
};

extern "C" {
extern ThreadInfo* rt_thread;
extern LaunchInfo rt_launch;
extern Options rt_options;

// Hands over `bytes` of `value` and returns, once all lanes did, what they handed over.
SimdExchange* rt_exchange(const void* value, size_t bytes, int operation, int line);
float rt_reduce_float(int operation, float value, int line);
int32_t rt_reduce_int(int operation, int32_t value, int line);
uint32_t rt_reduce_uint(int operation, uint32_t value, int line);
void rt_barrier(int kind, int flags, int line);

// The storage of one `threadgroup` declaration; `site` numbers the declarations of a kernel.
void* rt_threadgroup_memory(size_t bytes, size_t alignment, int site);

// `x` with an error that depends on its bits alone: at most `ulps` of its last place, or
// `absolute` if that is more. Zero, infinity and NaN have none.
float rt_jitter(float x, float ulps, float absolute);

[[noreturn]] void rt_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
}
