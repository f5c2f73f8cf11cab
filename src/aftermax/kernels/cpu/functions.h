// Functions of a vector that the row maps of attention are made of, with the largest relative error of each.
#pragma once
#include "exp.h"

namespace AM_ISA {

// e^x as p 2^n without the second part of ln 2: a factor of e^(n LN2_REST) is left in it, which cancels
// where e^x is divided by a sum of its like, and is 1e-7 at |x| = 36 where it is not.
static inline Pair exp_coarse(F x) { return exp_pair<true>(x); }

// e^x for x <= 0, to 1.5 ULP near 0 and 3 ULP at -36; 0 at -infinity.
static inline F exp_of_negative(F x) {
  Pair e = exp_coarse(x);
  return scale(e.p, e.n);
}

// ln(1 + e) for e in [0, 1]: e times a polynomial of degree 8, error 3e-8 before rounding.
static inline F log1p_of_unit(F e) {
  F q = fma(set1(0x1.56ee0ap-8f), e, set1(-0x1.e369f0p-6f));
  q = fma(q, e, set1(0x1.4069dap-4f));
  q = fma(q, e, set1(-0x1.17d2c2p-3f));
  q = fma(q, e, set1(0x1.874a80p-3f));
  q = fma(q, e, set1(-0x1.fcc8c6p-3f));
  q = fma(q, e, set1(0x1.553004p-2f));
  q = fma(q, e, set1(-0x1.fffeacp-2f));
  q = fma(q, e, set1(0x1.fffffep-1f));
  return q * e;
}

// 1 / (1 + e^-x), to 3 ULP for |x| < 20; 0 at -infinity, 1 at infinity.
static inline F sigmoid(F x) {
  F e = exp_of_negative(set1(0) - absolute(x)), larger = reciprocal(set1(1) + e);
  return select_below(x, set1(0), e * larger, larger);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|), to 3 ULP for x > -20; 0 at -infinity. And its derivative
// 1 / (1 + e^-x), from the same e^-|x|.
static inline F softplus(F x, F* derivative) {
  F e = exp_of_negative(set1(0) - absolute(x)), larger = reciprocal(set1(1) + e);
  *derivative = select_below(x, set1(0), e * larger, larger);
  return max(x, set1(0)) + log1p_of_unit(e);
}
static inline F softplus(F x) {
  F unused;
  return softplus(x, &unused);
}

// log2(x) for 0 < x < infinity and not subnormal: x = m 2^k with m near 1, and m - 1 times a polynomial of
// degree 8, error 2.7e-8 before rounding.
static inline F log2_of(F x) {
  F m, k = split_exponent(x, &m);  // m in [sqrt(1/2), sqrt(2))
  F t = m - set1(1);
  F q = fma(set1(0x1.01b6d6p-3f), t, set1(-0x1.a87d08p-3f));
  q = fma(q, t, set1(0x1.b9c91ap-3f));
  q = fma(q, t, set1(-0x1.e95be8p-3f));
  q = fma(q, t, set1(0x1.26d384p-2f));
  q = fma(q, t, set1(-0x1.715c4ep-2f));
  q = fma(q, t, set1(0x1.ec73d6p-2f));
  q = fma(q, t, set1(-0x1.715470p-1f));
  q = fma(q, t, set1(0x1.715476p+0f));
  return fma(q, t, k);
}

// x^a for finite x >= 0 and a >= 0 (0^0 = 1 where a is whole): relative error about 1e-7 (1 + a |log2 x|). Whole powers
// up to 64 by repeated squaring.
struct Power {
  float a;
  int whole;  // or -1

  explicit Power(float power = 1) : a(power), whole(power >= 0 && power <= 64 && power == (float)(int)power ? (int)power : -1) {}

  F of(F x) const {
    if (whole < 0) {
      F least = set1(0x1p-126f);
      Pair e = exp_coarse(log2_of(max(least, x)) * set1(a * 0x1.62e43p-1f));
      return select_below(x, least, set1(0), scale_any(e.p, e.n));
    }
    F result = set1(1);
    for (int rest = whole; rest; rest >>= 1) {
      if (rest & 1) result = result * x;
      x = x * x;
    }
    return result;
  }
};

}  // namespace AM_ISA
