// Buffers of a launch, and the receivers of the calls that -fsanitize=thread and
// -fsanitize=undefined put into the "check" build. The sanitizers' own libraries are not linked:
// these functions know what a buffer, a threadgroup and a barrier is.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "scheduler.h"

namespace {

constexpr size_t kSlotBytes = 4ull << 30;  // of address space, most of it never mapped
constexpr size_t kGuardBytes = 1 << 20;    // unmapped behind a buffer
constexpr size_t kPage = 4096;
constexpr size_t kLineBytes = 128;
constexpr size_t kKeepBytes = 32 << 20;    // memory that a slot keeps for the next launch

constexpr uint32_t kNobody = 0;
constexpr uint32_t kSeveral = ~0u;

// When a byte was last accessed, and by whom. `thread` counts from 1. Several readers since
// the last barrier leave `several_lanes` (all in one simdgroup) or `thread` == kSeveral.
struct Stamp {
  uint32_t group;  // group_serial, or kSeveral
  uint32_t thread;
  uint32_t epoch;
  uint32_t simd_epoch : 31;
  uint32_t several_lanes : 1;
};

struct ByteRecord {
  Stamp writer;
  Stamp reader;
};

struct Traffic {
  uint64_t bytes;
  uint64_t lines;
  std::vector<uint32_t> line_group;  // the last threadgroup that touched a line
  std::vector<bool> touched;         // bytes

  void count(size_t offset, size_t size) {
    bytes += size;
    for (size_t i = offset; i < offset + size; i++) touched[i] = true;
    for (size_t l = offset / kLineBytes; l <= (offset + size - 1) / kLineBytes; l++) {
      lines += line_group[l] != group_serial;
      line_group[l] = group_serial;
    }
  }
  void clear(size_t size) {
    bytes = lines = 0;
    line_group.assign(size / kLineBytes + 1, 0);
    touched.assign(size, false);
  }
};

struct Buffer {
  char* data;
  size_t bytes;
  size_t mapped;  // bytes below the end of the slot's room that are readable
  bool is_output;
  bool initialised;
  char name[64];
  Traffic read, written;
  std::vector<ByteRecord> records;  // outputs only
};

char* arena;
Buffer buffers[kMaxBuffers];
int buffer_count;
ByteRecord threadgroup_records[kThreadgroupBytes];

// A loaded library. Reads of the kernel's (constant tables) and of the runtime's (the shim reads
// a thread's own place there) are fine.
struct Image {
  uintptr_t begin, end;
  bool contains(uintptr_t address, size_t size) const {
    return address >= begin && address + size <= end;
  }
};
Image kernel_image, runtime_image;

char* end_of_room(int slot) { return arena + (slot + 1) * kSlotBytes - kGuardBytes; }

// Buffers end at the end of their slot's room, so that memory mapped for a former launch serves
// again and the unmapped guard is always right behind the last byte (rounded up to 256).
bool map_room(int slot, size_t bytes) {
  Buffer& buffer = buffers[slot];
  size_t needed = (bytes + kPage - 1) / kPage * kPage;
  if (needed <= buffer.mapped) return true;
  char* begin = end_of_room(slot) - needed;
  if (mprotect(begin, needed - buffer.mapped, PROT_READ | PROT_WRITE)) return false;
  buffer.mapped = needed;
  return true;
}

bool make_arena() {
  if (arena) return true;
  void* memory = mmap(nullptr, kMaxBuffers * kSlotBytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  arena = static_cast<char*>(memory);
  return true;
}

const char* verb(bool write) { return write ? "write" : "read"; }

#define FAIL(where, ...)                                                                   \
  do {                                                                                     \
    failed_at = where;                                                                     \
    rt_fail(__VA_ARGS__);                                                                  \
  } while (0)

// ---- who accessed a byte before, and is that ordered before now? ----

struct Now {
  uint32_t thread;
  uint32_t epoch;
  uint32_t simd_epoch;
};

bool same_simdgroup(uint32_t a, uint32_t b) { return (a - 1) / 32 == (b - 1) / 32; }

bool is_ordered(const Stamp& before, const Now& now) {
  if (before.group == kNobody) return true;
  if (before.group != group_serial) return false;
  if (before.epoch < now.epoch) return true;
  if (before.thread == kSeveral) return false;
  if (!same_simdgroup(before.thread, now.thread)) return false;
  if (before.simd_epoch < now.simd_epoch) return true;
  return before.thread == now.thread && !before.several_lanes;
}

Stamp stamp_of(const Now& now) { return {group_serial, now.thread, now.epoch, now.simd_epoch, 0}; }

// Keeps as much of the former readers as a later write has to be compared with.
void add_reader(Stamp& reader, const Now& now) {
  if (reader.group == kNobody) {
    reader = stamp_of(now);
  } else if (reader.group != group_serial) {
    reader.group = kSeveral;
  } else if (reader.epoch < now.epoch) {
    reader = stamp_of(now);
  } else if (reader.thread == kSeveral || reader.thread == now.thread) {
    if (reader.thread == now.thread && reader.simd_epoch < now.simd_epoch) reader = stamp_of(now);
  } else if (!same_simdgroup(reader.thread, now.thread)) {
    reader.thread = kSeveral;
  } else if (reader.simd_epoch < now.simd_epoch) {
    reader = stamp_of(now);
  } else {
    reader.several_lanes = 1;
  }
}

const char* whose(const Stamp& stamp) {
  return stamp.group == group_serial ? "this threadgroup" : "another threadgroup";
}

void check_race(const ByteRecord& record, const Now& now, bool write, const char* name,
                size_t byte, void* where) {
  if (!is_ordered(record.writer, now)) {
    FAIL(where, "race: %s of byte %zu of %s, written by thread %u of %s with no barrier between",
         verb(write), byte, name, record.writer.thread - 1, whose(record.writer));
  }
  if (write && !is_ordered(record.reader, now)) {
    FAIL(where, "race: write of byte %zu of %s, read by %s with no barrier between", byte, name,
         whose(record.reader));
  }
}

void record_access(ByteRecord& record, const Now& now, bool write) {
  if (write) {
    record.writer = stamp_of(now);
  } else {
    add_reader(record.reader, now);
  }
}

// ---- the accesses ----

void access_buffer(size_t slot, uintptr_t address, size_t size, bool write, void* where) {
  Buffer& buffer = buffers[slot];
  size_t offset = address - reinterpret_cast<uintptr_t>(buffer.data);
  if (static_cast<int>(slot) >= buffer_count) {
    FAIL(where, "out of bounds %s far from any buffer", verb(write));
  }
  if (offset >= buffer.bytes || offset + size > buffer.bytes) {
    FAIL(where, "out of bounds %s of %zu bytes at byte %ld of '%s', which has %zu bytes",
         verb(write), size, static_cast<long>(offset), buffer.name, buffer.bytes);
  }
  if (write && !buffer.is_output) FAIL(where, "write to the input '%s'", buffer.name);
  if (buffer.is_output) {
    Epochs simd = current->simdgroup->epochs;
    Now now = {current->info.index + 1, group_epochs.device, simd.device};
    for (size_t i = offset; i < offset + size; i++) {
      ByteRecord& record = buffer.records[i];
      if (!write && !buffer.initialised && record.writer.group == kNobody) {
        FAIL(where, "read of byte %zu of the output '%s' before any write", i, buffer.name);
      }
      check_race(record, now, write, buffer.name, i, where);
      record_access(record, now, write);
    }
  }
  (write ? buffer.written : buffer.read).count(offset, size);
}

void access_threadgroup(size_t offset, size_t size, bool write, void* where) {
  if (offset + size > threadgroup_used) {
    FAIL(where, "out of bounds %s at byte %zu of threadgroup memory, of which %zu are in use",
         verb(write), offset, threadgroup_used);
  }
  Epochs simd = current->simdgroup->epochs;
  Now now = {current->info.index + 1, group_epochs.threadgroup, simd.threadgroup};
  for (size_t i = offset; i < offset + size; i++) {
    ByteRecord& record = threadgroup_records[i];
    if (record.writer.group != group_serial && record.reader.group != group_serial) record = {};
    if (!write && record.writer.group == kNobody) {
      FAIL(where, "read of uninitialised threadgroup memory at byte %zu", i);
    }
    check_race(record, now, write, "threadgroup memory", i, where);
    record_access(record, now, write);
  }
}

void access(void* pointer, size_t size, bool write, void* where) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!current || on_own_stack(address)) return;
  bool power_of_two = (size & (size - 1)) == 0;
  if (power_of_two && size <= 16 && address % size) {
    FAIL(where, "misaligned %s of %zu bytes", verb(write), size);
  }
  size_t in_arena = address - reinterpret_cast<uintptr_t>(arena);
  if (in_arena < kMaxBuffers * kSlotBytes) {
    access_buffer(in_arena / kSlotBytes, address, size, write, where);
    return;
  }
  size_t in_threadgroup = address - reinterpret_cast<uintptr_t>(threadgroup_memory);
  if (in_threadgroup < kThreadgroupBytes) {
    access_threadgroup(in_threadgroup, size, write, where);
    return;
  }
  bool is_in_image = kernel_image.contains(address, size) || runtime_image.contains(address, size);
  if (is_in_image && !write) return;
  if (owner_of_stack(address)) FAIL(where, "%s of another thread's memory", verb(write));
  FAIL(where, "out of bounds %s at address %p, which is in no buffer", verb(write), pointer);
}

}  // namespace

void* buffer_addresses[kMaxBuffers];

// ---- what the thread sanitizer calls ----

#define CALLER __builtin_return_address(0)
#define ACCESS_HOOKS(size)                                                                 \
  void __tsan_read##size(void* p) { access(p, size, false, CALLER); }                      \
  void __tsan_write##size(void* p) { access(p, size, true, CALLER); }                      \
  void __tsan_unaligned_read##size(void* p) { access(p, size, false, CALLER); }            \
  void __tsan_unaligned_write##size(void* p) { access(p, size, true, CALLER); }

extern "C" {
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, false, CALLER); }
void __tsan_write_range(void* p, size_t size) { access(p, size, true, CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  access(const_cast<void*>(from), size, false, CALLER);
  access(to, size, true, CALLER);
  return memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  access(to, size, true, CALLER);
  return memset(to, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

// ---- what the undefined-behaviour sanitizer calls ----

struct UndefinedAt {
  const char* file;
  uint32_t line;
  uint32_t column;
};

[[noreturn]] static void fail_undefined(const char* what, const UndefinedAt& at) {
  failed_line = at.line;
  rt_fail("%s", what);
}

#define UNDEFINED(handler, what)                              \
  extern "C" void __ubsan_handle_##handler(UndefinedAt* at) { \
    fail_undefined(what, *at);                                \
  }
UNDEFINED(add_overflow_abort, "signed integer overflow in +")
UNDEFINED(sub_overflow_abort, "signed integer overflow in -")
UNDEFINED(mul_overflow_abort, "signed integer overflow in *")
UNDEFINED(negate_overflow_abort, "signed integer overflow in negation")
UNDEFINED(divrem_overflow_abort, "integer division by zero or overflow")
UNDEFINED(shift_out_of_bounds_abort, "shift by a negative or too large amount")
UNDEFINED(out_of_bounds_abort, "array index out of bounds")
UNDEFINED(float_cast_overflow_abort, "float to integer conversion out of range")
UNDEFINED(load_invalid_value_abort, "load of an invalid bool or enum value")
UNDEFINED(type_mismatch_v1_abort, "access through a misaligned pointer")
UNDEFINED(builtin_unreachable, "unreachable code reached")
UNDEFINED(missing_return, "function without a return value")

// ---- for Python ----

namespace {

// The library that `symbol` is in.
Image find_image(void* symbol) {
  Image image = {reinterpret_cast<uintptr_t>(symbol), 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Image& image = *static_cast<Image*>(data);
        Image candidate = {~0ul, 0};
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const ElfW(Phdr)& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          candidate.begin = std::min(candidate.begin, begin);
          candidate.end = std::max(candidate.end, begin + header.p_memsz);
        }
        if (!candidate.contains(image.begin, 1)) return 0;
        image = candidate;
        return 1;
      },
      &image);
  return image;
}

}  // namespace

extern "C" {

void rt_reset() { buffer_count = 0; }

// Places a buffer and fills it: from `data`, or with 0xFF if that is null. Its address, null if
// there is no room.
void* rt_buffer(const char* name, const void* data, size_t bytes, int is_output, int initialised,
                int records) {
  if (buffer_count == kMaxBuffers || !make_arena()) return nullptr;
  int slot = buffer_count++;
  Buffer& buffer = buffers[slot];
  size_t room = (bytes + 255) / 256 * 256;
  if (room > kSlotBytes / 2 || !map_room(slot, room)) return nullptr;
  buffer.data = end_of_room(slot) - room;
  buffer_addresses[slot] = buffer.data;
  buffer.bytes = bytes;
  buffer.is_output = is_output;
  buffer.initialised = initialised;
  strncpy(buffer.name, name, sizeof buffer.name - 1);
  if (data) {
    memcpy(buffer.data, data, bytes);
  } else {
    memset(buffer.data, 0xFF, bytes);
  }
  if (records) {
    buffer.read.clear(bytes);
    buffer.written.clear(bytes);
    buffer.records.assign(is_output ? bytes : 0, ByteRecord{});
  }
  return buffer.data;
}

// The first byte that no thread has written, or -1.
int64_t rt_first_unwritten(int slot) {
  const std::vector<bool>& touched = buffers[slot].written.touched;
  auto found = std::find(touched.begin(), touched.end(), false);
  return found == touched.end() ? -1 : found - touched.begin();
}

// Bytes: read, written, different bytes read, different bytes written, lines read, written.
void rt_traffic(int slot, uint64_t* out) {
  const Buffer& buffer = buffers[slot];
  const Traffic* traffic[2] = {&buffer.read, &buffer.written};
  for (int i = 0; i < 2; i++) {
    const std::vector<bool>& touched = traffic[i]->touched;
    out[i] = traffic[i]->bytes;
    out[2 + i] = std::count(touched.begin(), touched.end(), true);
    out[4 + i] = traffic[i]->lines * kLineBytes;
  }
}

// Gives back the memory of large buffers, once the outputs have been copied.
void rt_release() {
  for (int slot = 0; slot < buffer_count; slot++) {
    Buffer& buffer = buffers[slot];
    buffer.records = {};
    buffer.read = {};
    buffer.written = {};
    if (buffer.mapped <= kKeepBytes) continue;
    madvise(end_of_room(slot) - buffer.mapped, buffer.mapped, MADV_DONTNEED);
  }
}

// Remembers where the kernel's library lies; returns the beginning.
uint64_t rt_image(void* symbol) {
  kernel_image = find_image(symbol);
  runtime_image = find_image(&rt_launch);
  return kernel_image.begin;
}
}
