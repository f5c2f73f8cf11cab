// Rows that lie across memory, side by side: a lane is a row, and nothing is copied or transposed.
#pragma once
#include "softmax.h"

namespace AM_ISA {

// Vectors side by side: 64 rows with sixteen lanes, so that every step down reads whole cache lines.
constexpr int WIDE = 4;

static inline bool side_by_side(const am_shape& shape, const am_place& place) {
  return shape.dims > 0 && place.step[shape.dims - 1] == 1;
}

// Calls group(first row, vectors, lanes of the last vector): WIDE vectors where there are so many.
template <class Group>
static void each_group(const am_shape& shape, am_parallel with, const Group& group) {
  int64_t across = shape.size[shape.dims - 1], wide = WIDE * W, groups = (across + wide - 1) / wide;
  parallel(with, shape.rows / across * groups, grain_of(shape.length * wide), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t column = i % groups * wide, first = i / groups * across + column;
      int64_t rows = across - column < wide ? across - column : wide;
      if (rows == wide) {
        group(first, WIDE, W);
        continue;
      }
      for (int64_t r = 0; r < rows; r += W) group(first + r, 1, rows - r < W ? (int)(rows - r) : W);
    }
  });
}

// y (which may be null) gets the softmax or its log, lse (which may be null) the logsumexp of each
// row. False, with nothing written, where a row holds what the pairs do not.
template <int VECTORS, class T>
static bool softmax_side_by_side(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t n, int lanes, bool log,
                                 am_lse* lse) {
  const F low = set1(LOWEST * 0.9f), high = set1(LOWEST * -0.9f);
  F top[VECTORS], e[VECTORS];
  D sum[VECTORS];
  auto at = [&](int64_t k, int j) { return load_lanes(x + k * x_step + j * W, lanes, 0); };
  for (int j = 0; j < VECTORS; ++j) top[j] = set1(-INFINITY);
  for (int64_t k = 0; k < n; ++k)
    for (int j = 0; j < VECTORS; ++j) top[j] = max(at(k, j), top[j]);
  for (int j = 0; j < VECTORS; ++j) {
    if (any_greater(top[j], high) || any_greater(low, top[j])) return false;
    e[j] = whole(round(top[j] * set1(0x1.715476p+0f))) - set1(BIAS);
    sum[j] = zero();
  }
  for (int64_t k = 0; k < n; ++k)
    for (int j = 0; j < VECTORS; ++j) {
      Pair a = exp_pair(at(k, j));
      sum[j] = sum[j] + widen(scale(a.p, a.n - e[j]));
    }
  float exponents[VECTORS * W], first[VECTORS * W], second[VECTORS * W];
  double sums[VECTORS * W];
  for (int j = 0; j < VECTORS; ++j) {
    store(exponents + j * W, e[j]);
    store(sums + j * W, sum[j]);
  }
  int rows = (VECTORS - 1) * W + lanes;
  for (int r = 0; r < VECTORS * W; ++r) {
    if (r < rows && !(sums[r] > 0)) return false;
    if (log || lse) {
      double of_row = log_of({sums[r], exponents[r]});
      first[r] = (float)of_row;
      second[r] = (float)(of_row - first[r]);
      if (lse && r < rows) lse[r] = {0, of_row};
    } else {
      first[r] = (float)(1 / sums[r]);
    }
  }
  if (!y) return true;
  for (int64_t k = 0; k < n; ++k)
    for (int j = 0; j < VECTORS; ++j) {
      F v = at(k, j), a = load(first + j * W);
      if (log) {
        v = min(set1(0), (v - a) - load(second + j * W));
      } else {
        Pair p = exp_pair(v);
        v = scale(p.p, p.n - e[j]) * a;
      }
      put(y + k * y_step + j * W, v, lanes);
    }
  return true;
}

template <class T>
static int softmax_across(const am_softmax* a, am_parallel with) {
  int failed = 0;
  am_algorithm algorithm = chosen<float>(AM_AUTO, a->shape.length, a->log != 0, false);
  each_group(a->shape, with, [&](int64_t first, int vectors, int lanes) {
    const T* x = (const T*)a->in.data + offset_of(a->shape, a->in, first);
    T* y = (T*)a->out.data + offset_of(a->shape, a->out, first);
    int64_t n = a->shape.length;
    bool done = vectors == WIDE
                    ? softmax_side_by_side<WIDE>(x, a->in.stride, y, a->out.stride, n, W, a->log != 0, nullptr)
                    : softmax_side_by_side<1>(x, a->in.stride, y, a->out.stride, n, lanes, a->log != 0, nullptr);
    if (done) return;
    Scratch row(n), scratch(n);
    if (!row.data || !scratch.data) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t r = first; r < first + (vectors - 1) * W + lanes; ++r) {
      gather<T>(a->shape, a->in, r, 1, row.data);
      am_place place = panel_place(row.data, n);
      Softmax<float> op = {panel_shape(1, n), row.data, row.data, &place,       &place,
                           algorithm,         a->empty, a->log != 0, false};
      walk_rows(op, 0, 1, scratch);
      scatter<T>(a->shape, a->out, r, 1, row.data);
    }
  });
  return failed;
}

template <class T>
static int logsumexp_across(const am_logsumexp* a, am_parallel with) {
  int failed = 0;
  each_group(a->shape, with, [&](int64_t first, int vectors, int lanes) {
    const T* x = (const T*)a->in.data + offset_of(a->shape, a->in, first);
    int64_t n = a->shape.length;
    T* none = nullptr;
    bool done = vectors == WIDE
                    ? softmax_side_by_side<WIDE>(x, a->in.stride, none, 0, n, W, false, a->lse + first)
                    : softmax_side_by_side<1>(x, a->in.stride, none, 0, n, lanes, false, a->lse + first);
    if (done) return;
    Scratch row(n);
    if (!row.data) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t r = first; r < first + (vectors - 1) * W + lanes; ++r) {
      gather<T>(a->shape, a->in, r, 1, row.data);
      Sum sum = {0, 0};
      for (int64_t at = 0; at < n; at += PIECE) sum = add(sum, sum_pairs<false>(row.data + at, n - at < PIECE ? n - at : PIECE, 0));
      a->lse[r] = lse_of(sum, row.data, n);
    }
  });
  return failed;
}

template <class T, bool Log>
static int softmax_backward_across(const am_softmax_backward* a, am_parallel with) {
  each_group(a->shape, with, [&](int64_t first, int vectors, int lanes) {
    const T* grad = (const T*)a->grad.data + offset_of(a->shape, a->grad, first);
    const T* result = (const T*)a->result.data + offset_of(a->shape, a->result, first);
    T* out = (T*)a->out.data + offset_of(a->shape, a->out, first);
    ProbabilityOf identity{Probability({0, 0})};
    for (int j = 0; j < vectors; ++j, grad += W, result += W, out += W) {
      D sum = zero();
      for (int64_t k = 0; k < a->shape.length; ++k) {
        F g = load_lanes(grad + k * a->grad.stride, lanes, 0);
        sum = sum + widen(Log ? g : g * load_lanes(result + k * a->result.stride, lanes, 0));
      }
      F s = narrow(sum);
      for (int64_t k = 0; k < a->shape.length; ++k) {
        F g = load_lanes(grad + k * a->grad.stride, lanes, 0);
        F y = load_lanes(result + k * a->result.stride, lanes, 0);
        put(out + k * a->out.stride, Log ? g - identity.of<false>(y) * s : y * (g - s), lanes);
      }
    }
  });
  return 0;
}

}  // namespace AM_ISA
