// Which body is in use, and what the caches are like.
#include "core.h"

#include <stdio.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace aftermax_portable { extern const am_body_table body; }
#if defined(AM_X86)
namespace aftermax_avx2 { extern const am_body_table body; }
namespace aftermax_avx512 { extern const am_body_table body; }
#endif

namespace {

const am_body_table* find(const char* name, int* known) {
  *known = strcmp(name, "portable") == 0 || strcmp(name, "avx2") == 0 || strcmp(name, "avx512") == 0;
  if (strcmp(name, "portable") == 0) return &aftermax_portable::body;
#if defined(AM_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && strcmp(name, "avx512") == 0) return &aftermax_avx512::body;
  if (avx2 && strcmp(name, "avx2") == 0) return &aftermax_avx2::body;
#endif
  return nullptr;
}

const am_body_table* best() {
  int known;
  const am_body_table* body = find("avx512", &known);
  if (!body) body = find("avx2", &known);
  return body ? body : &aftermax_portable::body;
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
  int known;
  const am_body_table* body = find(name, &known);
  if (!body) return known ? 2 : 1;
  in_use = body;
  return 0;
}
int64_t am_l2_bytes(void) { return l2; }
int64_t am_last_level_bytes(void) { return l3 > l2 ? l3 : l2; }
