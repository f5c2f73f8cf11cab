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

// gelu(x) = x P(x), P the normal distribution, and its derivative P(x) + x P'(x). For t = |x|, P(-t) = e^(-t^2/2) R(t),
// where R falls from 1/2 so slowly that it is u times a polynomial of degree 9 in u = 1 / (1 + t/4), error 4e-9 before
// rounding: the tail keeps its digits, where 1 + erf(x / sqrt 2) loses them. Errors: of gelu 7 ULP for x < 1 (1 in the mean),
// 1.6 ULP above; of the derivative 2 ULP of 1 at most, and relative ones in the tail.
struct Gelu {
  F value, derivative;

  explicit Gelu(F x) {
    F t = min(set1(40), absolute(x));  // e^(-800) is 0
    F square = t * t, lost = fma(t, t, set1(0) - square);
    if constexpr (W == 4) {  // nothing is fused there
      F high = round(t * set1(64)) * set1(0x1p-6f);
      lost = (high * high - square) + (t - high) * (t + high);
    }
    F e = exp_below(square * set1(-0.5f));
    e = fma(e * lost, set1(-0.5f), e);
    F u = reciprocal(fma(t, set1(0.25f), set1(1)));
    F q = fma(set1(0x1.14c460p-6f), u, set1(-0x1.0858ccp-4f));
    q = fma(q, u, set1(0x1.c9c6e8p-5f));
    q = fma(q, u, set1(0x1.726c96p-6f));
    q = fma(q, u, set1(0x1.2297c2p-6f));
    q = fma(q, u, set1(0x1.577374p-4f));
    q = fma(q, u, set1(0x1.2b0fccp-4f));
    q = fma(q, u, set1(0x1.864c7ep-4f));
    q = fma(q, u, set1(0x1.97a3d2p-4f));
    q = fma(q, u, set1(0x1.988f9cp-4f));
    F tail = q * u * e;                                              // P(-t)
    value = max(set1(0), x) - t * tail;                              // NaN stays
    F below = tail - t * e * set1(0x1.988454p-2f);                   // the derivative at -t
    derivative = select_below(x, set1(0), below, set1(1) - below);
  }
};

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
