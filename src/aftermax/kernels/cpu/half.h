// The two 16-bit formats, and one value of each at a time.
#pragma once
#include <stdint.h>
#include <string.h>

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace AM_ISA {

static inline uint32_t bits_of(float a) {
  uint32_t u;
  memcpy(&u, &a, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float a;
  memcpy(&a, &u, 4);
  return a;
}

static inline float to_float(float a) { return a; }
static inline float to_float(bf16 a) { return float_of((uint32_t)a.bits << 16); }
static inline float to_float(f16 a) {
  uint32_t sign = (uint32_t)(a.bits & 0x8000) << 16;
  uint32_t exponent = (a.bits >> 10) & 31, fraction = a.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {  // zero or subnormal: fraction 2^-24, exact in float
    float magnitude = (float)fraction * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

// Round to nearest, ties to even.
static inline void from_float(float a, float* out) { *out = a; }
static inline void from_float(float a, bf16* out) {
  uint32_t u = bits_of(a);
  out->bits = a != a ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void from_float(float a, f16* out) {
  uint32_t u = bits_of(a), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = (uint16_t)(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    out->bits = (uint16_t)(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 1/2 leaves the fraction in the low bits
    float shifted = float_of(magnitude) + 0.5f;
    out->bits = (uint16_t)(sign | (bits_of(shifted) - 0x3f000000));
  } else {
    uint32_t r = magnitude + 0xfff + (magnitude >> 13 & 1);
    out->bits = (uint16_t)(sign | (r - 0x38000000) >> 13);
  }
}

}  // namespace AM_ISA
