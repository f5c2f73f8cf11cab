// Which body is in use, and what the caches are like.
#include "core.h"

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

int64_t cache_bytes(int which, int64_t otherwise) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  long bytes = sysconf(which);
  if (bytes > 0) return bytes;
#endif
  (void)which;
  return otherwise;
}

#if defined(_SC_LEVEL2_CACHE_SIZE)
const int64_t l2 = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
const int64_t l3 = cache_bytes(_SC_LEVEL3_CACHE_SIZE, 0);
#else
const int64_t l2 = cache_bytes(0, 1 << 20);
const int64_t l3 = cache_bytes(0, 16 << 20);
#endif

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
