// Cross-entropy over rows of logits, forward and backward.
//
// loss_i = (1 - s) w_t (lse_i - x_t) + s / K sum_k w_k (lse_i - x_k) + z lse_i^2
// with s the label smoothing, K classes, w their weights, t the target of row i and z the factor of
// the squared log-partition. The mean divides the first two by the sum of w_t and the last by the
// number of rows that count.
#pragma once
#include "softmax.h"

namespace AM_ISA {

// What is the same for all rows.
struct Loss {
  const am_classes* classes;
  int64_t count;            // K
  double smooth, sum_of_weights;  // s / K, sum_k w_k
  double scale, square_scale;     // what the reduction multiplies with: the two parts of the loss

  Loss(const am_classes* c, int64_t rows, int64_t k) : classes(c), count(k) {
    smooth = k > 0 ? c->label_smoothing / (double)k : 0;
    sum_of_weights = (double)k;
    if (c->weight) {
      sum_of_weights = 0;
      for (int64_t i = 0; i < k; ++i) sum_of_weights += c->weight[i];
    }
    scale = square_scale = 1;
    if (c->reduction == AM_MEAN) {
      double weights = 0, rows_that_count = 0;
      for (int64_t r = 0; r < rows; ++r) {
        if (ignored(r)) continue;
        weights += weight(c->target[r]);
        rows_that_count += 1;
      }
      scale = 1 / weights;
      square_scale = 1 / rows_that_count;
    }
  }
  bool ignored(int64_t row) const { return classes->target[row] == classes->ignore_index; }
  double weight(int64_t k) const { return classes->weight ? (double)classes->weight[k] : 1.0; }
  bool smooths() const { return classes->label_smoothing != 0; }

  // weighted is sum_k w_k x_k; only looked at where labels are smoothed
  double of(int64_t row, am_lse lse, double target_logit, double weighted) const {
    double w = weight(classes->target[row]);
    double hit = (lse.shift - target_logit) + lse.rest;
    if (hit < 0) hit = 0;  // by rounding alone: no logit is above the logsumexp
    double loss = (1 - classes->label_smoothing) * w * hit;
    if (smooths()) loss += smooth * ((sum_of_weights * lse.shift - weighted) + sum_of_weights * lse.rest);
    double value = value_of(lse);
    double square = classes->lse_square_scale != 0 ? classes->lse_square_scale * value * value : 0;
    return scale * loss + square_scale * square;
  }
  void finish(const double* of_rows, int64_t rows, float* out) const {
    if (classes->reduction == AM_NONE) {
      for (int64_t r = 0; r < rows; ++r) out[r] = (float)of_rows[r];
      return;
    }
    double sum = 0;
    bool none = true;
    for (int64_t r = 0; r < rows; ++r) {
      none = none && ignored(r);
      sum += of_rows[r];
    }
    // the mean of nothing is NaN, as in torch
    out[0] = classes->reduction == AM_MEAN && none ? NAN : (float)sum;
  }
};

// d loss / d x_k = p_k of_probability - w_k everywhere - (k == t) at_target, times the gradient.
struct LossGradient {
  double of_probability, everywhere, at_target;

  LossGradient(const Loss& loss, int64_t row, am_lse lse, double grad) {
    const am_classes& c = *loss.classes;
    double w = loss.weight(c.target[row]);
    double hit = loss.scale * (1 - c.label_smoothing) * w;
    of_probability = grad * (hit + loss.scale * loss.smooth * loss.sum_of_weights);
    if (c.lse_square_scale != 0) of_probability += grad * loss.square_scale * 2 * c.lse_square_scale * value_of(lse);
    everywhere = loss.smooths() ? grad * loss.scale * loss.smooth : 0;
    at_target = grad * hit;
  }
};

// torch takes inf - inf here: a row with +inf, or without anything finite, has no loss.
static inline am_lse finite_or_nan(am_lse lse) {
  return lse.shift < INFINITY && lse.shift > -INFINITY ? lse : am_lse{0, NAN};
}

// sum_k w_k x_k; w may be null.
template <class T>
static double sum_weighted(const T* x, const float* w, int64_t n) {
  D sum = zero();
  for (int64_t i = 0; i < n; i += W) {
    int lanes = n - i < W ? (int)(n - i) : W;
    F v = load_lanes(x + i, lanes, 0);
    sum = sum + (w ? widen(v) * widen(load_lanes(w + i, lanes, 0)) : widen(v));
  }
  return sum_of_lanes(sum);
}

template <class T>
struct CrossEntropy {
  am_shape shape;
  const T* x;
  const am_place* in;
  const Loss* loss;
  int64_t first;  // the number of this op's row 0
  double* of_rows;
  am_lse* lse;

  struct State {
    const T* x;
    Sum sum;
    double weighted;
  };
  struct Part {
    Sum sum;
    double weighted;
  };

  int64_t row_scratch() const { return 0; }
  int phases() const { return 1; }
  bool turns() const { return false; }
  void open(State& s, int64_t row) const { s = {x + offset_of(shape, *in, row), {0, 0}, 0}; }
  Part part(int, const State& s, int64_t row, int64_t at, int64_t n, Scratch&) const {
    if (loss->ignored(first + row)) return {{0, 0}, 0};
    Part p = {sum_pairs<false>(s.x + at, n, 0), 0};
    const float* w = loss->classes->weight;
    if (loss->smooths()) p.weighted = sum_weighted(s.x + at, w ? w + at : nullptr, n);
    return p;
  }
  void merge(int, State& s, const Part& p) const {
    s.sum = add(s.sum, p.sum);
    s.weighted += p.weighted;
  }
  bool close(int, State& s, int64_t row) const {
    row += first;
    of_rows[row] = 0;
    lse[row] = {0, 0};
    if (loss->ignored(row)) return true;
    lse[row] = finite_or_nan(lse_of(s.sum, s.x, shape.length));
    of_rows[row] = loss->of(row, lse[row], to_float(s.x[loss->classes->target[row]]), s.weighted);
    return true;
  }
};

template <class T>
static int cross_entropy_of(const am_cross_entropy* a, am_parallel with) {
  int64_t rows = a->shape.rows;
  Loss loss(&a->classes, rows, a->shape.length);
  Scratch memory;
  if (!memory.grow(2 * rows)) return 1;
  double* of_rows = (double*)memory.data;
  int failed;
  if (a->logits.stride == 1) {
    CrossEntropy<T> op = {a->shape, (const T*)a->logits.data, &a->logits, &loss, 0, of_rows, a->lse};
    failed = walk(op, with);
  } else {
    const am_place* inputs[] = {&a->logits};
    failed = walk_across<T>(a->shape, inputs, 1, nullptr, with,
                            [&](const am_place* at, const am_shape& panel, int64_t first) {
                              return CrossEntropy<float>{panel, (const float*)at->data, at, &loss, first,
                                                         of_rows, a->lse};
                            });
  }
  if (!failed) loss.finish(of_rows, rows, a->loss);
  return failed;
}

template <class T>
struct CrossEntropyBackward {
  am_shape shape;
  const T* x;
  T* out;
  const am_place *in_at, *out_at;
  const Loss* loss;
  int64_t first;
  const float* grad;
  const am_lse* lse;
  bool streamed;

  struct State {
    const T* x;
    T* out;
  };
  typedef char Part;

  int64_t row_scratch() const { return 0; }
  int phases() const { return 1; }
  bool turns() const { return false; }
  void open(State& s, int64_t row) const {
    s = {x + offset_of(shape, *in_at, row), out + offset_of(shape, *out_at, row)};
  }
  Part part(int, const State& s, int64_t row, int64_t at, int64_t n, Scratch&) const {
    row += first;
    ask_for_pages(*out_at, s.out + at, n);
    if (loss->ignored(row)) {
      write_constant(s.out + at, n, 0);
      return 0;
    }
    LossGradient g(*loss, row, lse[row], loss->classes->reduction == AM_NONE ? grad[row] : grad[0]);
    Probability p(lse[row]);
    int64_t target = loss->classes->target[row] - at;
    // before anything is written: the result may lie over the logits
    double logit = target >= 0 && target < n ? to_float(s.x[at + target]) : 0;
    if (p.shifted)
      write<true, false>(s, p, g, at, n);
    else if (streamed)
      write<false, true>(s, p, g, at, n);
    else
      write<false, false>(s, p, g, at, n);
    if (target >= 0 && target < n) {
      double exact = exp((logit - lse[row].shift) - lse[row].rest) * g.of_probability - loss->weight(at + target) * g.everywhere - g.at_target;
      from_float((float)exact, s.out + at + target);
    }
    return 0;
  }
  void merge(int, State&, const Part&) const {}
  bool close(int, State&, int64_t) const { return true; }

  template <bool Shift, bool Stream>
  void write(const State& s, const Probability& p, const LossGradient& g, int64_t at, int64_t n) const {
    const T* from = s.x + at;
    const float* w = loss->classes->weight;
    ProbabilityOf probability(p);
    F of_probability = set1((float)g.of_probability), everywhere = set1((float)g.everywhere);
    if (!loss->smooths())
      write_row<Stream>(s.out + at, n, [&](int64_t i, int lanes) {
        if (lanes == W) prefetch((const char*)(from + i) + AHEAD);
        return probability.of<Shift>(load_lanes(from + i, lanes, 0)) * of_probability;
      });
    else
      write_row<Stream>(s.out + at, n, [&](int64_t i, int lanes) {
        F share = w ? everywhere * load_lanes(w + at + i, lanes, 0) : everywhere;
        return probability.of<Shift>(load_lanes(from + i, lanes, 0)) * of_probability - share;
      });
  }
};

template <class T>
static int cross_entropy_backward_of(const am_cross_entropy_backward* a, am_parallel with) {
  Loss loss(&a->classes, a->shape.rows, a->shape.length);
  if (a->logits.stride == 1 && a->out.stride == 1) {
    bool past = streamed(AM_STORE_AUTO, a->out, a->shape.rows * a->shape.length * (int64_t)sizeof(T));
    CrossEntropyBackward<T> op = {a->shape, (const T*)a->logits.data, (T*)a->out.data, &a->logits, &a->out,
                                  &loss,    0,                        a->grad,         a->lse,     past};
    return walk(op, with);
  }
  const am_place* inputs[] = {&a->logits};
  return walk_across<T>(a->shape, inputs, 1, &a->out, with,
                        [&](const am_place* at, const am_shape& panel, int64_t first) {
                          float* rows = (float*)at->data;
                          return CrossEntropyBackward<float>{panel, rows,  rows,    at,     at,
                                                             &loss, first, a->grad, a->lse, false};
                        });
}

}  // namespace AM_ISA
