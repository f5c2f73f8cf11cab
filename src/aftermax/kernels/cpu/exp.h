// e^x as a pair: e^x = p 2^n with whole n and p near 1.
//
// It is the usual exp without its last step, the multiplication by 2^n, which is the only one that
// can overflow (Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv:2001.04438, section 3).
// Sums of pairs need no maximum, and x - max, whose rounding is most of the error of other softmaxes,
// is never formed.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>

namespace AM_ISA {

// Inputs below this count as this. It is far below what any row with a maximum above it can tell from
// 0; rows whose maximum is not above it, or is above its negative, take the shifted path (rows.h).
constexpr float LOWEST = -0x1p17f;
// Exponents up to this are exact: rounding by a large addend and the two-part ln 2 hold here.
constexpr double EXPONENT_LIMIT = 1.8e5;

struct Pair {
  F p, n;
};

// Largest error of p: 1.1 ULP. Coarse leaves a factor of e^(n LN2_REST) in it, for sums that take it
// out as a whole.
#if defined(AM_TABLE)
// With sixteen floats in one register: e^x = 2^n 2^(j/16) e^t, |t| <= ln 2 / 32. The multipliers are
// what limits all kernels here, and a look-up takes two products less than a longer polynomial. n
// keeps its sixteenths j: scale() takes the whole part, whole() the next whole number.
template <bool Coarse = false>
static inline Pair exp_pair(F x) {
  x = max(set1(LOWEST), x);
  // the addend rounds to sixteenths and leaves j in the last four bits
  F addend = set1(0x1.8p19f), sum = fma(x, set1(0x1.715476p+0f), addend);
  F n = sum - addend;
  F t = Coarse ? reduce_coarsely(x, n) : reduce_argument(x, n);
  F power = look_up_power(sum);  // 2^(j/16)
  F q = fma(set1(0x1.55573ep-3f), t, set1(0x1.00022p-1f));
  q = fma(q, t, set1(1.0f));
  return {fma(power * t, q, power), n};
}
#else
// A minimax polynomial of degree 6 with p(0) = p'(0) = 1, |t| <= ln 2 / 2: relative error 2.0e-9.
static inline F whole(F n) { return n; }
template <bool Coarse = false>
static inline Pair exp_pair(F x) {
  x = max(set1(LOWEST), x);
  F n = round(x * set1(0x1.715476p+0f));
  F t = Coarse ? reduce_coarsely(x, n) : reduce_argument(x, n);
  F p = fma(set1(0x1.6ae732p-10f), t, set1(0x1.126782p-7f));
  p = fma(p, t, set1(0x1.555822p-5f));
  p = fma(p, t, set1(0x1.55541ap-3f));
  p = fma(p, t, set1(0x1.fffffcp-2f));
  p = fma(p, t, set1(1.0f));
  return {fma(p, t, set1(1.0f)), n};
}
#endif

// e^x for x <= 0.
static inline F exp_below(F x) {
  Pair e = exp_pair(x);
  return scale(e.p, e.n);
}

// A sum of pairs: s 2^e. An empty sum is s = 0.
struct Sum {
  double s, e;
};

// a 2^k for whole k <= 0; NaN stays, also where it spoilt k.
static inline double times_power(double a, double k) { return k >= -1100 ? ldexp(a, (int)k) : a * 0; }

static inline Sum add(Sum a, Sum b) {
  if (a.s == 0) return b;
  if (b.s == 0) return a;
  double e = a.e > b.e ? a.e : b.e;
  return {times_power(a.s, a.e - e) + times_power(b.s, b.e - e), e};
}

static inline bool ordinary(Sum a) { return a.s > 0 && a.e < EXPONENT_LIMIT && a.e > -EXPONENT_LIMIT; }

static inline double log_of(Sum a) { return log(a.s) + a.e * 0.693147180559945309417; }

}  // namespace AM_ISA
