// Sixteen floats at a time.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "half.h"

namespace AM_ISA {

constexpr int W = 16;

struct F {
  __m512 v;
};
// The same lanes in double: lane k of F is lane k of lo, or lane k - 8 of hi.
struct D {
  __m512d lo, hi;
};

static inline F set1(float a) { return {_mm512_set1_ps(a)}; }
static inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a < b ? a : b and a > b ? a : b, so that NaN in b stays.
static inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
// a 2^n, n rounded down, n <= 127; may be 0 from n = -127 on.
static inline F scale(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// The same where n may be above: then at least a 2^127.
static inline F scale_any(F a, F n) { return scale(a, n); }
static inline bool all_below(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ) == 0; }
static inline bool any_greater(F a, F b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}

// x - n ln 2, with ln 2 in two parts: LN2_REST is the second one.
constexpr float LN2_REST = -0x1.05C61p-29f;
static inline F reduce_coarsely(F x, F n) { return {_mm512_fnmadd_ps(n.v, _mm512_set1_ps(0x1.62E43p-1f), x.v)}; }
static inline F reduce_argument(F x, F n) {
  return {_mm512_fnmadd_ps(n.v, _mm512_set1_ps(LN2_REST), reduce_coarsely(x, n).v)};
}

static inline F round(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }

// For exp.h: up to the next whole number, and 2^(j/16) for j in the last four bits.
#define AM_TABLE
static inline F whole(F n) { return {_mm512_roundscale_ps(n.v, 0x0a)}; }
static inline F look_up_power(F j) {
  const __m512 powers = _mm512_setr_ps(
      0x1p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f, 0x1.3dea64p+0f,
      0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
      0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f);
  return {_mm512_permutexvar_ps(_mm512_castps_si512(j.v), powers)};
}

static inline float max_of_lanes(F a) { return _mm512_reduce_max_ps(a.v); }

static inline D zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
static inline D widen(F a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
static inline D operator+(D a, D b) {
  return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)};
}
static inline D operator*(D a, D b) {
  return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)};
}
// a 2^n for whole n <= 0.
static inline D scale(D a, F n) {
  D k = widen(n);
  return {_mm512_scalef_pd(a.lo, k.lo), _mm512_scalef_pd(a.hi, k.hi)};
}
static inline F narrow(D a) {
  __m512 lo = _mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo));
  return {_mm512_insertf32x8(lo, _mm512_cvtpd_ps(a.hi), 1)};
}
static inline void store(double* p, D a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}
static inline double sum_of_lanes(D a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.lo, a.hi)); }

static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline F load(const bf16* p) {
  __m256i h = _mm256_loadu_si256((const __m256i*)p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline F load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
static inline __m256i to_bf16(F a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
static inline __m256i to_f16(F a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

static inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline void store(bf16* p, F a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
static inline void store(f16* p, F a) { _mm256_storeu_si256((__m256i*)p, to_f16(a)); }
// Past the cache; p aligned to the bytes written.
static inline void stream(float* p, F a) { _mm512_stream_ps(p, a.v); }
static inline void stream(bf16* p, F a) { _mm256_stream_si256((__m256i*)p, to_bf16(a)); }
static inline void stream(f16* p, F a) { _mm256_stream_si256((__m256i*)p, to_f16(a)); }

// The first k < W lanes; the others are `fill`.
static inline F load_part(const float* p, int k, float fill) {
  __mmask16 m = (__mmask16)((1u << k) - 1);
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), m, p)};
}
static inline F load_part(const bf16* p, int k, float fill) {
  __mmask16 m = (__mmask16)((1u << k) - 1);
  __m512i u = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), m, _mm512_castsi512_ps(u))};
}
static inline F load_part(const f16* p, int k, float fill) {
  __mmask16 m = (__mmask16)((1u << k) - 1);
  __m512 v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), m, v)};
}
static inline void store_part(float* p, F a, int k) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << k) - 1), a.v);
}
static inline void store_part(bf16* p, F a, int k) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << k) - 1), to_bf16(a));
}
static inline void store_part(f16* p, F a, int k) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << k) - 1), to_f16(a));
}

// v[i] lane k becomes v[k] lane i.
static inline void transpose(F* v) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + j]), _mm512_castps_pd(a[i + j + 2])));
      b[i + 2 * j + 1] =
          _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + j]), _mm512_castps_pd(a[i + j + 2])));
    }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    v[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
  }
}

// Lane i of the result is the sum of the lanes of v[i].
static inline F sums_by_lane(const F* v) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v), _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 4; ++i) {
    __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}

// 1 / a to 1 ULP for a in [1, 2], and as near at other exponents: an estimate of 14 bits and one step of Newton's, which
// is less than a division.
static inline F reciprocal(F a) {
  F r = {_mm512_rcp14_ps(a.v)};
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, r.v, _mm512_set1_ps(1)), r.v, r.v)};
}
static inline F absolute(F a) { return {_mm512_abs_ps(a.v)}; }
// x < y ? a : b; b where x is NaN.
static inline F select_below(F x, F y, F a, F b) {
  return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), a.v)};
}
// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for x > 0 and not subnormal. Returns k.
static inline F split_exponent(F x, F* m) {
  F k = {_mm512_getexp_ps(_mm512_mul_ps(x.v, _mm512_set1_ps(0x1.6a09e6p-1f)))};
  k = k + set1(1);  // m in [1/2, 1) sqrt(2)
  *m = {_mm512_scalef_ps(x.v, _mm512_sub_ps(_mm512_setzero_ps(), k.v))};
  return k;
}
// 0, 1, 2 ...
static inline F lane_numbers() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
// a where the byte of a lane is not 0, else b.
static inline F where_set(const uint8_t* bytes, F a, F b) {
  __m128i m = _mm_loadu_si128((const __m128i*)bytes);
  return {_mm512_mask_mov_ps(b.v, _mm_test_epi8_mask(m, m), a.v)};
}

#if defined(AM_PAIRS)
// A word is two bfloat16, the first one in its lower half: c + a0 b0 + a1 b1.
static inline F add_product_of_pairs(F a, F b, F c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
}
// Words of the bfloat16 that `low` and `high` hold exactly.
static inline F pair_up(F low, F high) {
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low.v), 16), _mm512_castps_si512(high.v)))};
}
// To the nearest bfloat16; subnormal numbers become 0.
static inline F round_to_pairs(F a) {
  __m256i h = (__m256i)_mm512_cvtneps_pbh(a.v);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
// Rounded to nearest; subnormal numbers become 0.
static inline void store_pairs(bf16* p, F a) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
}
#endif

static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
static inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
static inline void fence() { _mm_sfence(); }

}  // namespace AM_ISA
