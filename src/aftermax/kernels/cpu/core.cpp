// Which body is in use, and what the caches are like.
#include "core.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#endif

namespace aftermax_portable { extern const am_body_table body; }
#if defined(AM_X86)
namespace aftermax_avx2 { extern const am_body_table body; }
namespace aftermax_avx512 { extern const am_body_table body; }
namespace aftermax_avx512bf16 { extern const am_body_table body; }
#endif

namespace {

struct Body {
  const char* name;
  bool runs;
  const am_body_table* table;
};

// Best first.
const Body* bodies(int* count) {
#if defined(AM_X86)
  __builtin_cpu_init();
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const Body all[] = {{"avx512bf16", bf16, &aftermax_avx512bf16::body},
                             {"avx512", avx512, &aftermax_avx512::body},
                             {"avx2", avx2, &aftermax_avx2::body},
                             {"portable", true, &aftermax_portable::body}};
#else
  static const Body all[] = {{"avx512bf16", false, nullptr},
                             {"avx512", false, nullptr},
                             {"avx2", false, nullptr},
                             {"portable", true, &aftermax_portable::body}};
#endif
  *count = (int)(sizeof(all) / sizeof(all[0]));
  return all;
}

const am_body_table* best() {
  int count;
  const Body* body = bodies(&count);
  while (!body->runs) ++body;
  return body->table;
}

const am_body_table* in_use = best();

// The size of the cache of that level that one core sees, or `otherwise`. sysconf() is asked last: on
// some processors it adds up the slices of the last level that belong to other cores.
int64_t cache_bytes(int level, int64_t otherwise) {
#if defined(__linux__)
  for (int index = 0; index < 8; ++index) {
    char path[80];
    int is = 0;
    long kilobytes = 0;
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/level", index);
    FILE* file = fopen(path, "r");
    if (!file) break;
    if (fscanf(file, "%d", &is) != 1) is = 0;
    fclose(file);
    if (is != level) continue;
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    file = fopen(path, "r");
    if (!file) break;
    if (fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    fclose(file);
    if (kilobytes > 0) return (int64_t)kilobytes << 10;
  }
#endif
#if defined(_SC_LEVEL2_CACHE_SIZE)
  long bytes = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return otherwise;
}

const int64_t l2 = cache_bytes(2, 1 << 20);
const int64_t l3 = cache_bytes(3, 0);

}  // namespace

const am_body_table* am_body(void) { return in_use; }
const char* am_isa(void) { return in_use->name; }
int am_use_isa(const char* name) {
  int count;
  const Body* body = bodies(&count);
  for (int i = 0; i < count; ++i) {
    if (strcmp(name, body[i].name) != 0) continue;
    if (!body[i].runs) return 2;
    in_use = body[i].table;
    return 0;
  }
  return 1;
}
int64_t am_multiply_adds(int64_t rounds) { return in_use->multiply_adds(rounds); }
int64_t am_multiply_pairs(int64_t rounds) { return in_use->multiply_pairs(rounds); }
int64_t am_l2_bytes(void) { return l2; }
int64_t am_last_level_bytes(void) { return l3 > l2 ? l3 : l2; }

#if defined(__linux__)
namespace {

// Smaller results come out of memory that the allocator has at hand, mostly.
const int64_t LARGE_RESULT = 4 << 20;
// A block that takes longer than this to come has cost more than small pages do.
const double SLOW_NANOSECONDS_PER_BYTE = 0.4;
const int64_t PAUSE_NANOSECONDS = 1000000000;

const bool large_pages_declined = [] {
  const char* wish = getenv("AFTERMAX_HUGE_PAGES");
  return wish && strcmp(wish, "0") == 0;
}();
std::atomic<int64_t> large_pages_from{0};

int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

}  // namespace

int am_is_fresh(const void* data, int64_t bytes) {
  if (bytes < LARGE_RESULT) return 0;
  unsigned char has = 1;
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), middle = ((uintptr_t)data + (uintptr_t)bytes / 2) & ~(page - 1);
  return mincore((void*)middle, page, &has) == 0 && (has & 1) == 0;
}

// Large pages cost a third of small ones, where they can be had at once. Where memory has to be moved
// for them, or to come from the host of a virtual machine, they cost many times as much: then they are
// left alone for a while.
void am_ask_for_pages(void* data, int64_t bytes) {
  const int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, from Linux 5.14
  static std::atomic<bool> unknown{false};
  if (unknown.load(std::memory_order_relaxed)) return;
  bool large = !large_pages_declined && nanoseconds() >= large_pages_from.load(std::memory_order_relaxed);
  if (large) madvise(data, (size_t)bytes, MADV_HUGEPAGE);
  int64_t begin = nanoseconds();
  if (madvise(data, (size_t)bytes, POPULATE_WRITE) != 0 && errno == EINVAL) {
    unknown.store(true, std::memory_order_relaxed);  // then nothing tells how long large pages take
    return;
  }
  int64_t end = nanoseconds();
  if (large && (double)(end - begin) > SLOW_NANOSECONDS_PER_BYTE * (double)bytes)
    large_pages_from.store(end + PAUSE_NANOSECONDS, std::memory_order_relaxed);
}
#else
int am_is_fresh(const void*, int64_t) { return 0; }
void am_ask_for_pages(void*, int64_t) {}
#endif
