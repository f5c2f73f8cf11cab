// Four floats at a time in plain C++, for processors without a body of their own. The compiler makes
// of it what the baseline has (SSE2 on x86-64, NEON on aarch64).
#pragma once
#include <float.h>
#include <stdint.h>

#include "half.h"

namespace AM_ISA {

constexpr int W = 4;

struct F {
  float v[W];
};
struct D {
  double v[W];
};

#define AM_LANES(expression) \
  F r;                       \
  for (int i = 0; i < W; ++i) r.v[i] = expression; \
  return r

static inline F set1(float a) { AM_LANES(a); }
static inline F operator+(F a, F b) { AM_LANES(a.v[i] + b.v[i]); }
static inline F operator-(F a, F b) { AM_LANES(a.v[i] - b.v[i]); }
static inline F operator*(F a, F b) { AM_LANES(a.v[i] * b.v[i]); }
// Rounded twice here: the baseline has no fused instruction.
static inline F fma(F a, F b, F c) { AM_LANES(a.v[i] * b.v[i] + c.v[i]); }
// a < b ? a : b and a > b ? a : b, so that NaN in b stays.
static inline F min(F a, F b) { AM_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F max(F a, F b) { AM_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
// To the nearest whole number, for |a| < 2^22: adding 3 2^22 leaves no bits for a fraction.
static inline F round(F a) { AM_LANES((a.v[i] + 0x1.8p23f) - 0x1.8p23f); }
static inline bool all_below(F a, F b) {
  bool all = true;
  for (int i = 0; i < W; ++i) all = all && a.v[i] < b.v[i];
  return all;
}
static inline bool any_greater(F a, F b) {
  bool any = false;
  for (int i = 0; i < W; ++i) any |= a.v[i] > b.v[i];
  return any;
}

static inline float clamp(float n, float low, float high) {
  return n < low ? low : n > high ? high : n;  // NaN stays
}
// 2^n for whole n in [-127, 127] (0 at -127). NaN comes with a NaN factor: any number will do.
static inline float power_of_two(float n) {
  return float_of((uint32_t)(int32_t)(n == n ? n + 127.0f : 127.0f) << 23);
}
// a 2^n for whole n <= 127; 0 from n = -127 on.
static inline F scale(F a, F n) {
  AM_LANES(a.v[i] * power_of_two(clamp(n.v[i], -127.0f, 127.0f)));
}
// The same where n may be above: then at least a 2^127.
static inline F scale_any(F a, F n) { return scale(a, n); }

// x - n ln 2, in double, since there is no fused multiply-add to keep its digits.
static inline F reduce_argument(F x, F n) {
  AM_LANES((float)((double)x.v[i] - (double)n.v[i] * 0x1.62e42fefa39efp-1));
}
constexpr float LN2_REST = 0;
static inline F reduce_coarsely(F x, F n) { return reduce_argument(x, n); }

static inline float max_of_lanes(F a) {
  float m = a.v[0];
  for (int i = 1; i < W; ++i) m = m > a.v[i] ? m : a.v[i];
  return m;
}

static inline D zero() { return D{}; }
static inline D widen(F a) {
  D r;
  for (int i = 0; i < W; ++i) r.v[i] = a.v[i];
  return r;
}
static inline D operator+(D a, D b) {
  D r;
  for (int i = 0; i < W; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
static inline D operator*(D a, D b) {
  D r;
  for (int i = 0; i < W; ++i) r.v[i] = a.v[i] * b.v[i];
  return r;
}
// a 2^n for whole n <= 0 (0 from -1023 on).
static inline D scale(D a, F n) {
  D r;
  for (int i = 0; i < W; ++i) {
    float c = clamp(n.v[i], -1023.0f, 1023.0f);
    uint64_t u = (uint64_t)(int64_t)(c == c ? c + 1023.0f : 1023.0f) << 52;
    double power;
    memcpy(&power, &u, 8);
    r.v[i] = a.v[i] * power;
  }
  return r;
}
static inline F narrow(D a) { AM_LANES((float)a.v[i]); }
static inline void store(double* p, D a) {
  for (int i = 0; i < W; ++i) p[i] = a.v[i];
}
static inline double sum_of_lanes(D a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

template <class T>
static inline F load(const T* p) { AM_LANES(to_float(p[i])); }
template <class T>
static inline void store(T* p, F a) {
  for (int i = 0; i < W; ++i) from_float(a.v[i], p + i);
}
template <class T>
static inline void stream(T* p, F a) { store(p, a); }
template <class T>
static inline F load_part(const T* p, int k, float fill) { AM_LANES(i < k ? to_float(p[i]) : fill); }
template <class T>
static inline void store_part(T* p, F a, int k) {
  for (int i = 0; i < k; ++i) from_float(a.v[i], p + i);
}

// v[i] lane k becomes v[k] lane i.
static inline void transpose(F* v) {
  for (int i = 0; i < W; ++i)
    for (int k = 0; k < i; ++k) {
      float t = v[i].v[k];
      v[i].v[k] = v[k].v[i];
      v[k].v[i] = t;
    }
}

// Lane i of the result is the sum of the lanes of v[i].
static inline F sums_by_lane(F* v) {
  transpose(v);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) v[i] = v[i] + v[i + step];
  return v[0];
}

static inline F reciprocal(F a) { AM_LANES(1 / a.v[i]); }
static inline F absolute(F a) { AM_LANES(a.v[i] < 0 ? -a.v[i] : a.v[i]); }
// x < y ? a : b; b where x is NaN.
static inline F select_below(F x, F y, F a, F b) { AM_LANES(x.v[i] < y.v[i] ? a.v[i] : b.v[i]); }
// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for x > 0 and not subnormal. Returns k.
static inline F split_exponent(F x, F* m) {
  F k;
  for (int i = 0; i < W; ++i) {
    int32_t whole = (int32_t)(bits_of(x.v[i]) - 0x3f3504f3) >> 23;  // from sqrt(1/2) on
    m->v[i] = float_of(bits_of(x.v[i]) - ((uint32_t)whole << 23));
    k.v[i] = (float)whole;
  }
  return k;
}
// 0, 1, 2 ...
static inline F lane_numbers() { AM_LANES((float)i); }
// a where the byte of a lane is not 0, else b.
static inline F where_set(const uint8_t* bytes, F a, F b) { AM_LANES(bytes[i] ? a.v[i] : b.v[i]); }

static inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}
static inline void prefetch_l2(const void* p) { prefetch(p); }
static inline void fence() {}

#undef AM_LANES

}  // namespace AM_ISA
