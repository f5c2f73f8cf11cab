// One body: all functions for one instruction set. A .cpp file per set says AM_ISA (the namespace) and
// AM_NAME, includes its vectors and then this.
#pragma once
#include "across.h"
#include "attention.h"
#include "attention_backward.h"
#include "core.h"
#include "cross_entropy.h"
#include "experts_backward.h"
#include "linear_cross_entropy.h"
#include "linear_walk.h"
#include "softmax.h"

namespace AM_ISA {

#define AM_BY_DTYPE(name, arguments)                            \
  static int name(const arguments* a, am_parallel with) {      \
    switch (AM_DTYPE_OF(a)) {                                   \
      case AM_FLOAT32: return name##_of<float>(a, with);        \
      case AM_BFLOAT16: return name##_of<bf16>(a, with);        \
      case AM_FLOAT16: return name##_of<f16>(a, with);          \
    }                                                           \
    return 1;                                                   \
  }

#define AM_DTYPE_OF(a) (a)->dtype
AM_BY_DTYPE(softmax, am_softmax)
AM_BY_DTYPE(softmax_backward, am_softmax_backward)
AM_BY_DTYPE(logsumexp, am_logsumexp)
AM_BY_DTYPE(logsumexp_backward, am_logsumexp_backward)
AM_BY_DTYPE(cross_entropy, am_cross_entropy)
AM_BY_DTYPE(cross_entropy_backward, am_cross_entropy_backward)
AM_BY_DTYPE(linear_cross_entropy, am_linear_cross_entropy)
AM_BY_DTYPE(attention, am_attention)
#undef AM_DTYPE_OF
#define AM_DTYPE_OF(a) (a)->forward.dtype
AM_BY_DTYPE(linear_cross_entropy_backward, am_linear_cross_entropy_backward)
AM_BY_DTYPE(attention_backward, am_attention_backward)
#undef AM_DTYPE_OF

// The yardstick of the benchmarks: the loops of the kernels without their arithmetic.
static int memory(const float* x, float* y, int64_t n, am_parallel with) {
  int infinite = 0;
  parallel(with, (n + PIECE - 1) / PIECE, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * PIECE; at < end * PIECE && at < n; at += PIECE) {
      int64_t many = n - at < PIECE ? n - at : PIECE;
      if (y)
        write_scaled<true>(x + at, y + at, many, 1);
      else if (max_of(x + at, many) == INFINITY)
        __atomic_store_n(&infinite, 1, __ATOMIC_RELAXED);  // so that the read has a use
    }
    fence();
  });
  (void)infinite;
  return 0;
}

// The other yardstick: what the multipliers do at best. Products added in registers, nothing else; returns how many
// additions and multiplications those were.
template <class Words>
static int64_t multiply_adds_of(int64_t rounds) {
  constexpr int CHAINS = 12;  // twice the latency of the multipliers
  F sum[CHAINS], a = set1(0.5f), b = set1(0.25f);
  for (F& s : sum) s = set1(0);
  for (int64_t i = 0; i < rounds; ++i)
    for (F& s : sum) s = Words::add_product(a, b, s);
  F all = set1(0);
  for (F s : sum) all = all + s;
  volatile float use = max_of_lanes(all);
  (void)use;
  return rounds * CHAINS * W * 2 * Words::IN_WORD;
}
static int64_t multiply_adds(int64_t rounds) { return multiply_adds_of<Singles>(rounds); }
#if defined(AM_PAIRS)
static int64_t multiply_pairs(int64_t rounds) { return multiply_adds_of<Pairs>(rounds); }
#else
static int64_t multiply_pairs(int64_t) { return 0; }
#endif

extern const am_body_table body;
const am_body_table body = {
    AM_NAME,
    softmax,
    softmax_backward,
    logsumexp,
    logsumexp_backward,
    cross_entropy,
    cross_entropy_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    memory,
    linear_cross_entropy_gradients,
    attention,
    attention_backward,
    count_visible,
    linear_walk,
    linear_walk_backward,
    multiply_adds,
    multiply_pairs,
    experts,
    experts_backward,
};

}  // namespace AM_ISA
