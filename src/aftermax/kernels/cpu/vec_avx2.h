// Eight floats at a time, with fused multiply-add and half-precision loads (F16C).
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "half.h"

namespace AM_ISA {

constexpr int W = 8;

struct F {
  __m256 v;
};
// The same lanes in double: lane k of F is lane k of lo, or lane k - 4 of hi.
struct D {
  __m256d lo, hi;
};

static inline F set1(float a) { return {_mm256_set1_ps(a)}; }
static inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// a < b ? a : b and a > b ? a : b, so that NaN in b stays.
static inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline F round(F a) { return {_mm256_round_ps(a.v, 8)}; }
static inline bool all_below(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)) == 0; }
static inline bool any_greater(F a, F b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}

// 2^n for whole n in [-127, 127] (0 at -127), by putting n + 127 where a float keeps its exponent.
static inline __m256 power_of_two(__m256 n) {
  __m256i i = _mm256_cvtps_epi32(_mm256_add_ps(n, _mm256_set1_ps(127.0f)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}
// a 2^n for whole n <= 127; 0 from n = -127 on.
static inline F scale(F a, F n) {
  return {_mm256_mul_ps(a.v, power_of_two(max(set1(-127.0f), n).v))};
}
// The same where n may be above: then at least a 2^127.
static inline F scale_any(F a, F n) { return scale(a, min(set1(127.0f), n)); }

// x - n ln 2, with ln 2 in two parts: LN2_REST is the second one.
constexpr float LN2_REST = -0x1.05C61p-29f;
static inline F reduce_coarsely(F x, F n) { return {_mm256_fnmadd_ps(n.v, _mm256_set1_ps(0x1.62E43p-1f), x.v)}; }
static inline F reduce_argument(F x, F n) {
  return {_mm256_fnmadd_ps(n.v, _mm256_set1_ps(LN2_REST), reduce_coarsely(x, n).v)};
}

static inline float max_of_lanes(F a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline D zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
static inline D widen(F a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
          _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
}
static inline D operator+(D a, D b) {
  return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)};
}
static inline D operator*(D a, D b) {
  return {_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)};
}
static inline __m256d power_of_two(__m128 n) {
  __m256i i = _mm256_cvtepi32_epi64(_mm_cvtps_epi32(_mm_add_ps(n, _mm_set1_ps(1023.0f))));
  return _mm256_castsi256_pd(_mm256_slli_epi64(i, 52));
}
// a 2^n for whole n <= 0 (0 from -1023 on).
static inline D scale(D a, F n) {
  F c = max(set1(-1023.0f), n);
  return {_mm256_mul_pd(a.lo, power_of_two(_mm256_castps256_ps128(c.v))),
          _mm256_mul_pd(a.hi, power_of_two(_mm256_extractf128_ps(c.v, 1)))};
}
static inline F narrow(D a) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(a.hi), _mm256_cvtpd_ps(a.lo))};
}
static inline void store(double* p, D a) {
  _mm256_storeu_pd(p, a.lo);
  _mm256_storeu_pd(p + 4, a.hi);
}
static inline double sum_of_lanes(D a) {
  __m256d s = _mm256_add_pd(a.lo, a.hi);
  __m128d t = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
  return _mm_cvtsd_f64(_mm_add_sd(t, _mm_unpackhi_pd(t, t)));
}

static inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline F load(const bf16* p) {
  __m128i h = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
static inline F load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
static inline __m128i to_bf16(F a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  __m256i quiet = _mm256_set1_epi32(0x7fc00000);
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan));
  r = _mm256_srli_epi32(r, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
static inline __m128i to_f16(F a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

static inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
static inline void store(bf16* p, F a) { _mm_storeu_si128((__m128i*)p, to_bf16(a)); }
static inline void store(f16* p, F a) { _mm_storeu_si128((__m128i*)p, to_f16(a)); }
// Past the cache; p aligned to the bytes written.
static inline void stream(float* p, F a) { _mm256_stream_ps(p, a.v); }
static inline void stream(bf16* p, F a) { _mm_stream_si128((__m128i*)p, to_bf16(a)); }
static inline void stream(f16* p, F a) { _mm_stream_si128((__m128i*)p, to_f16(a)); }

// The first k < W lanes; the others are `fill`.
static inline __m256i first(int k) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline F load_part(const float* p, int k, float fill) {
  __m256i m = first(k);
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m))};
}
template <class T>
static inline F load_part(const T* p, int k, float fill) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < k ? to_float(p[i]) : fill;
  return load(lanes);
}
static inline void store_part(float* p, F a, int k) { _mm256_maskstore_ps(p, first(k), a.v); }
template <class T>
static inline void store_part(T* p, F a, int k) {
  T lanes[W];
  store(lanes, a);
  for (int i = 0; i < k; ++i) p[i] = lanes[i];
}

// v[i] lane k becomes v[k] lane i.
static inline void transpose(F* v) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    v[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// Lane i of the result is the sum of the lanes of v[i].
static inline F sums_by_lane(F* v) {
  transpose(v);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) v[i] = v[i] + v[i + step];
  return v[0];
}

static inline F reciprocal(F a) { return {_mm256_div_ps(_mm256_set1_ps(1), a.v)}; }
static inline F absolute(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// x < y ? a : b; b where x is NaN.
static inline F select_below(F x, F y, F a, F b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for x > 0 and not subnormal. Returns k.
static inline F split_exponent(F x, F* m) {
  const __m256i half = _mm256_set1_epi32(0x3f3504f3);  // sqrt(1/2)
  __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(_mm256_castps_si256(x.v), half), 23);
  *m = {_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(k, 23)))};
  return {_mm256_cvtepi32_ps(k)};
}
// 0, 1, 2 ...
static inline F lane_numbers() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
// a where the byte of a lane is not 0, else b.
static inline F where_set(const uint8_t* bytes, F a, F b) {
  __m256i m = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
  return {_mm256_blendv_ps(a.v, b.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(m, _mm256_setzero_si256())))};
}

static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
static inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
static inline void fence() { _mm_sfence(); }

}  // namespace AM_ISA
