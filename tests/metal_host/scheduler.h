// State shared by the two halves of the runtime: runtime.cpp (threads) and memory.cpp (buffers
// and the checks of every access).
#pragma once

#include "runtime.h"

constexpr int kMaxThreads = 1024;
constexpr int kMaxSimdgroups = kMaxThreads / kSimdWidth;
constexpr int kMaxBuffers = 64;
constexpr size_t kThreadgroupBytes = 32768;
constexpr size_t kStackBytes = 128 << 10;

// One kernel thread: a stack of its own and the place to continue.
struct Fiber {
  ThreadInfo info;
  char* stack;
  void* stack_pointer;
  struct Simdgroup* simdgroup;
};

struct Wait {
  int kind;       // WaitKind
  int operation;  // which simd operation, or the memory flags of a barrier
  int line;
  bool operator==(const Wait&) const = default;
};

// How often barriers have ordered accesses to the two kinds of memory.
struct Epochs {
  uint32_t device;
  uint32_t threadgroup;
};

struct Simdgroup {
  SimdExchange exchange[2];  // in turn: a lane may be one operation ahead of another
  int turn;
  Fiber* lanes;
  uint32_t fresh;    // lanes that have not started
  uint32_t ready;    // lanes that can run (the fresh ones among them)
  uint32_t waiting;  // lanes in `wait`
  uint32_t done;     // lanes that have returned
  Wait wait;
  Epochs epochs;     // simdgroup_barrier
};

extern Fiber* current;            // the running kernel thread, null outside of kernels
extern uint32_t group_serial;     // counts threadgroups, of all launches, from 1
extern Epochs group_epochs;       // threadgroup_barrier
extern size_t threadgroup_used;   // bytes of threadgroup memory handed out
extern char threadgroup_memory[];
extern bool failed;

// What the kernel's entry gets: the buffers in the order of the kernel's parameters.
extern void* buffer_addresses[];

// Where the failure is: an address in the kernel, for its line table, or the line itself.
extern void* failed_at;
extern int failed_line;

// The fiber that owns the stack at `address`, null if none.
Fiber* owner_of_stack(uintptr_t address);

inline bool on_own_stack(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(current->stack) < kStackBytes;
}
