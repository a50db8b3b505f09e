// The threads of a launch: one fiber each, simdgroups of 32, threadgroups one after another.
// A fiber runs until it has to wait for its simdgroup or threadgroup. x86-64 only.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#include "guards.h"
#include "scheduler.h"

extern "C" {
ThreadInfo* rt_thread;
LaunchInfo rt_launch;
Options rt_options;
void rt_switch(void** save_stack_pointer, void* stack_pointer);
}

Fiber* current;
uint32_t group_serial;
Epochs group_epochs;
size_t threadgroup_used;
alignas(256) char threadgroup_memory[kThreadgroupBytes];
bool failed;
void* failed_at;
int failed_line;

namespace {

constexpr int kMaxSites = 256;
constexpr size_t kPage = 4096;

// Bits of Options::order.
enum Order { kLanesReversed = 1, kSimdgroupsReversed = 2, kSimdgroupsShuffled = 4,
             kThreadgroupsReversed = 8 };

using Entry = void (*)(void**);
Entry entry;

Fiber fibers[kMaxThreads];
Simdgroup simdgroups[kMaxSimdgroups];
int thread_count;
int simdgroup_count;
char* stacks;
void* main_stack_pointer;
char message[2048];

struct Site {
  char* memory;
  size_t bytes;
};
Site sites[kMaxSites];

uint64_t random_state;
uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void leave_to_main() {
  Fiber* me = current;
  current = nullptr;
  rt_switch(&me->stack_pointer, main_stack_pointer);
}

// Records the message; names the thread if one runs.
void report(const char* format, va_list values) {
  int used = vsnprintf(message, sizeof message, format, values);
  failed = true;
  if (!current) return;
  const ThreadInfo& t = current->info;
  snprintf(message + used, sizeof message - used,
           " [thread (%u, %u, %u) of threadgroup (%u, %u, %u), simdgroup %u, lane %u]",
           t.local[0], t.local[1], t.local[2], rt_launch.position[0], rt_launch.position[1],
           rt_launch.position[2], t.simdgroup, t.lane);
}

__attribute__((format(printf, 1, 2))) void report_from_main(const char* format, ...) {
  va_list values;
  va_start(values, format);
  report(format, values);
  va_end(values);
}

}  // namespace

void rt_fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  report(format, values);
  va_end(values);
  leave_to_main();
  __builtin_unreachable();
}

namespace {

const char* describe(const Wait& wait) {
  switch (wait.kind) {
    case kWaitSimdgroupBarrier: return "simdgroup_barrier";
    case kWaitThreadgroupBarrier: return "threadgroup_barrier";
    default: return "simd operation";
  }
}

void fiber_main();

// A stack that starts in fiber_main. Stacks of neighbours begin at different offsets in a page,
// so that the top frames of 32 lanes don't compete for the same cache sets.
void prepare_stack(Fiber& fiber) {
  size_t stagger = (fiber.info.index % 61) * 128;
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64 - stagger);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}

void start(Fiber& fiber) {
  Simdgroup& group = *fiber.simdgroup;
  uint32_t bit = 1u << fiber.info.lane;
  if (group.fresh & bit) {
    group.fresh &= ~bit;
    prepare_stack(fiber);
  }
  current = &fiber;
  rt_thread = &fiber.info;
}

void continue_with(Fiber& next) {
  Fiber* me = current;
  start(next);
  rt_switch(&me->stack_pointer, next.stack_pointer);
}

// The next ready lane after `lane`, cyclically; there has to be one.
Fiber& next_ready(const Simdgroup& group, uint32_t lane) {
  uint32_t ready = group.ready;
  if (rt_options.order & kLanesReversed) {
    uint32_t below = ready & ((1u << lane) - 1);
    return group.lanes[31 - __builtin_clz(below ? below : ready)];
  }
  uint32_t above = ready & ~((2u << lane) - 1);
  return group.lanes[__builtin_ctz(above ? above : ready)];
}

Fiber& first_ready(const Simdgroup& group) {
  return next_ready(group, rt_options.order & kLanesReversed ? 0 : 31);
}

[[noreturn]] void fail_divergent(const Simdgroup& group, const Wait& mine) {
  rt_fail("divergent synchronisation: this lane is at the %s at line %d while lane %d waits at "
          "the %s at line %d",
          describe(mine), mine.line, __builtin_ctz(group.waiting), describe(group.wait),
          group.wait.line);
}

// All lanes of the simdgroup have arrived: they may go on.
void release(Simdgroup& group) {
  group.ready = group.waiting;
  group.waiting = 0;
}

// The running lane waits until all lanes of its simdgroup wait for the same.
void wait_for(const Wait& wait) {
  Fiber& me = *current;
  Simdgroup& group = *me.simdgroup;
  uint32_t bit = 1u << me.info.lane;
  if (group.waiting && !(group.wait == wait)) fail_divergent(group, wait);
  if (group.done) {
    rt_fail("%s at line %d after lane %d of the simdgroup has returned", describe(wait),
            wait.line, __builtin_ctz(group.done));
  }
  group.wait = wait;
  group.waiting |= bit;
  group.ready &= ~bit;
  if (group.ready) {
    continue_with(next_ready(group, me.info.lane));
    return;
  }
  if (wait.kind == kWaitThreadgroupBarrier) {
    leave_to_main();
    return;
  }
  if (wait.kind == kWaitSimd) {
    SimdExchange& exchange = group.exchange[group.turn];
    exchange.lanes = group.waiting;
    exchange.reduced = false;
    group.turn ^= 1;
  } else {
    group.epochs.device += (wait.operation & kMemoryDevice) != 0;
    group.epochs.threadgroup += (wait.operation & kMemoryThreadgroup) != 0;
  }
  release(group);
}

// The running lane has returned from the kernel.
void finish() {
  Fiber& me = *current;
  Simdgroup& group = *me.simdgroup;
  uint32_t bit = 1u << me.info.lane;
  group.ready &= ~bit;
  group.done |= bit;
  if (group.waiting) {
    rt_fail("this lane has returned while lane %d of its simdgroup waits at the %s at line %d",
            __builtin_ctz(group.waiting), describe(group.wait), group.wait.line);
  }
  if (!group.ready) leave_to_main();
}

// Runs its thread; then, on the same stack, threads that have not started: as long as nobody
// waits, no switch happens.
void fiber_main() {
  for (;;) {
    entry(buffer_addresses);
    finish();
    Fiber& me = *current;
    Fiber& next = next_ready(*me.simdgroup, me.info.lane);
    uint32_t bit = 1u << next.info.lane;
    if (!(next.simdgroup->fresh & bit)) continue_with(next);
    next.simdgroup->fresh &= ~bit;
    std::swap(me.stack, next.stack);
    current = &next;
    rt_thread = &next.info;
  }
}

void run_simdgroup(Simdgroup& group) {
  if (!group.ready) return;
  Fiber& first = first_ready(group);
  start(first);
  rt_switch(&main_stack_pointer, first.stack_pointer);
}

// Which threads there are depends on the threadgroup's size alone: the same for all but the
// threadgroups at the edges of the grid.
void number_threads(const uint32_t (&size)[3]) {
  if (std::equal(size, size + 3, rt_launch.here) && thread_count) return;
  std::copy(size, size + 3, rt_launch.here);
  thread_count = size[0] * size[1] * size[2];
  simdgroup_count = (thread_count + kSimdWidth - 1) / kSimdWidth;
  rt_launch.simdgroups = simdgroup_count;
  for (int i = 0; i < thread_count; i++) {
    uint32_t index = i;
    fibers[i].info = {{index % size[0], index / size[0] % size[1], index / (size[0] * size[1])},
                      index, index % kSimdWidth, index / kSimdWidth};
    fibers[i].simdgroup = &simdgroups[i / kSimdWidth];
  }
}

void reset_simdgroups() {
  for (int s = 0; s < simdgroup_count; s++) {
    Simdgroup& group = simdgroups[s];
    int size = std::min(thread_count - s * kSimdWidth, kSimdWidth);
    group.lanes = &fibers[s * kSimdWidth];
    group.ready = group.fresh = size == kSimdWidth ? ~0u : (1u << size) - 1;
    group.waiting = group.done = 0;
    group.turn = 0;
    group.epochs = {};
  }
}

void run_all_simdgroups() {
  int order[kMaxSimdgroups];
  for (int s = 0; s < simdgroup_count; s++) {
    order[s] = rt_options.order & kSimdgroupsReversed ? simdgroup_count - 1 - s : s;
  }
  if (rt_options.order & kSimdgroupsShuffled) {
    for (int s = simdgroup_count - 1; s > 0; s--) {
      std::swap(order[s], order[random_number() % (s + 1)]);
    }
  }
  for (int s = 0; s < simdgroup_count && !failed; s++) run_simdgroup(simdgroups[order[s]]);
}

// Every thread waits at a threadgroup barrier or has returned. True if all may go on.
bool pass_threadgroup_barrier() {
  Simdgroup* first = nullptr;
  int returned = 0;
  for (int s = 0; s < simdgroup_count; s++) {
    Simdgroup& group = simdgroups[s];
    returned += __builtin_popcount(group.done);
    if (!group.waiting) continue;
    if (!first) first = &group;
    if (!(group.wait == first->wait)) {
      report_from_main(
          "simdgroups of one threadgroup wait at different barriers: line %d and line %d",
          first->wait.line, group.wait.line);
      return false;
    }
  }
  if (!first) return false;
  if (returned) {
    report_from_main("threadgroup_barrier at line %d: %d of %d threads have returned before it",
                     first->wait.line, returned, thread_count);
    return false;
  }
  group_epochs.device += (first->wait.operation & kMemoryDevice) != 0;
  group_epochs.threadgroup += (first->wait.operation & kMemoryThreadgroup) != 0;
  for (int s = 0; s < simdgroup_count; s++) release(simdgroups[s]);
  return true;
}

void run_threadgroup(uint64_t number) {
  LaunchInfo& launch = rt_launch;
  uint32_t size[3];
  for (int i = 0; i < 3; i++) {
    launch.position[i] = number % launch.threadgroups[i];
    number /= launch.threadgroups[i];
    uint32_t left = launch.grid[i] - launch.position[i] * launch.size[i];
    size[i] = std::min(left, launch.size[i]);
  }
  number_threads(size);
  reset_simdgroups();
  group_serial++;
  group_epochs = {};
  memset(threadgroup_memory, 0xFF, threadgroup_used);
  do {
    run_all_simdgroups();
  } while (!failed && pass_threadgroup_barrier());
}

}  // namespace

extern "C" {

SimdExchange* rt_exchange(const void* value, size_t bytes, int operation, int line) {
  Simdgroup& group = *current->simdgroup;
  SimdExchange* exchange = &group.exchange[group.turn];
  memcpy(exchange->value[current->info.lane], value, bytes);
  wait_for({kWaitSimd, operation, line});
  return exchange;
}

void rt_barrier(int kind, int flags, int line) { wait_for({kind, flags, line}); }

void* rt_threadgroup_memory(size_t bytes, size_t alignment, int site) {
  if (site >= kMaxSites) rt_fail("more than %d threadgroup arrays", kMaxSites);
  Site& s = sites[site];
  if (!s.memory) {
    size_t offset = (threadgroup_used + alignment - 1) / alignment * alignment;
    if (offset + bytes > kThreadgroupBytes) {
      rt_fail("%zu bytes of threadgroup memory, which is over 32 KiB", offset + bytes);
    }
    s.memory = threadgroup_memory + offset;
    s.bytes = bytes;
    memset(s.memory, 0xFF, bytes);
    threadgroup_used = offset + bytes;
  }
  if (s.bytes != bytes) rt_fail("one threadgroup declaration with two sizes: in a template?");
  return s.memory;
}

const char* rt_error() { return message; }
void* rt_failed_at() { return failed_at; }
int rt_failed_line() { return failed_line; }
}

namespace {

bool make_stacks() {
  if (stacks) return true;
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  stacks = static_cast<char*>(memory);
  for (int i = 0; i < kMaxThreads; i++) {
    fibers[i].stack = stacks + i * kStackBytes;
    mprotect(fibers[i].stack, kPage, PROT_NONE);
  }
  return true;
}

bool set_launch(const uint32_t* grid, const uint32_t* threadgroup) {
  uint64_t threads = 1;
  for (int i = 0; i < 3; i++) {
    rt_launch.grid[i] = grid[i];
    rt_launch.size[i] = std::min(threadgroup[i], grid[i]);
    if (!rt_launch.size[i]) {
      report_from_main("an empty grid or threadgroup");
      return false;
    }
    rt_launch.threadgroups[i] = (grid[i] - 1) / rt_launch.size[i] + 1;
    threads *= rt_launch.size[i];
  }
  if (threads > kMaxThreads) {
    report_from_main("%lu threads in a threadgroup, which may have %d",
                     static_cast<unsigned long>(threads), kMaxThreads);
    return false;
  }
  return true;
}

}  // namespace

Fiber* owner_of_stack(uintptr_t address) {
  uintptr_t offset = address - reinterpret_cast<uintptr_t>(stacks);
  if (offset >= kMaxThreads * kStackBytes) return nullptr;
  char* stack = stacks + offset / kStackBytes * kStackBytes;
  Fiber* owner = std::find_if(fibers, fibers + kMaxThreads,
                              [stack](const Fiber& fiber) { return fiber.stack == stack; });
  return owner == fibers + kMaxThreads ? nullptr : owner;
}

// Runs all threadgroups on the buffers placed before. 0, or 1 with rt_error() set.
extern "C" int rt_run(void* function, const uint32_t* grid, const uint32_t* threadgroup,
                      const Options* options) {
  entry = reinterpret_cast<Entry>(function);
  rt_options = *options;
  random_state = 88172645463325252ull + 2654435761ull * options->order;
  failed = false;
  failed_at = nullptr;
  failed_line = 0;
  current = nullptr;
  threadgroup_used = 0;
  thread_count = 0;
  memset(sites, 0, sizeof sites);
  if (!make_stacks()) {
    report_from_main("no memory for the stacks of the threads");
    return 1;
  }
  if (!set_launch(grid, threadgroup)) return 1;
  const uint32_t* n = rt_launch.threadgroups;
  uint64_t count = static_cast<uint64_t>(n[0]) * n[1] * n[2];
  guards::SignalGuard signals;
  guards::FlushGuard flush(options->flush);
  for (uint64_t i = 0; i < count && !failed; i++) {
    run_threadgroup(options->order & kThreadgroupsReversed ? count - 1 - i : i);
  }
  return failed;
}
