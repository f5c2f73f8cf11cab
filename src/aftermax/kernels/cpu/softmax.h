// softmax, log-softmax and logsumexp over rows, forward and backward.
#pragma once
#include "rows.h"

namespace AM_ISA {

// What a row comes to: e^x 2^(-e) / s, or where the pairs do not reach, e^(x - shift) / s.
struct Norm {
  double s, e;
  float shift;
  bool shifted;

  double log() const { return shifted ? shift + ::log(s) : log_of(Sum{s, e}); }
  // s > 0 and not subnormal becomes s in [1, 2): 1 / s is a plain number and e the whole exponent
  void normalise() {
    uint64_t bits;
    memcpy(&bits, &s, 8);
    e += (double)(int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
    memcpy(&s, &bits, 8);
  }
};

// The row as torch's softmax treats it, for what the pairs cannot hold: infinities, NaN, values
// beyond +-2^21. Subtracts the maximum; NaN or +inf anywhere make the sum NaN, and -inf everywhere
// leaves shift = -inf.
template <class T>
static Norm shifted_norm(const T* x, int64_t n) {
  float m = max_of(x, n);
  Norm norm = {NAN, 0, m, true};
  if (m == -INFINITY) {
    for (int64_t i = 0; i < n; ++i)
      if (to_float(x[i]) != -INFINITY) return norm;  // NaN, which a maximum does not see
    norm.s = 0;
  } else if (m < INFINITY) {
    norm.s = 0;
    Sum total = {0, 0};
    for (int64_t at = 0; at < n; at += PIECE)
      total = add(total, sum_pairs<true>(x + at, n - at < PIECE ? n - at : PIECE, m));
    norm.s = total.e >= 0 ? total.s : times_power(total.s, total.e);  // the exponent is 0 or a little below
  }
  return norm;
}

// The log of the sum of e^x; +inf where there is one and no NaN.
template <class T>
static am_lse shifted_lse(const T* x, int64_t n) {
  Norm norm = shifted_norm(x, n);
  if (norm.s == 0) return {-INFINITY, 0};
  if (norm.shift == INFINITY) {
    for (int64_t i = 0; i < n; ++i)
      if (to_float(x[i]) != to_float(x[i])) return {0, NAN};
    return {INFINITY, 0};
  }
  return {norm.shift, ::log(norm.s)};
}
template <class T>
static am_lse lse_of(Sum sum, const T* x, int64_t n) {
  return ordinary(sum) ? am_lse{0, log_of(sum)} : shifted_lse(x, n);
}
static inline double value_of(am_lse lse) { return lse.shift + lse.rest; }

template <class T>
struct Softmax {
  am_shape shape;
  const T* x;
  T* y;
  const am_place *in, *out;
  am_algorithm algorithm;
  am_empty empty;
  bool log, streamed;

  struct State {
    const T* x;
    T* y;
    Norm norm;
    float top;
    float hi, lo;
  };
  struct Part {
    Sum sum;
  };

  // reload keeps e^x where its last pass finds it: in the result, or in scratch where the result is
  // not float, or should pass by a cache that has room for the scratch.
  bool reloads() const { return algorithm == AM_THREE_PASS_RELOAD && !log; }
  bool through_scratch() const {
    return reloads() && (sizeof(T) != 4 || (streamed && shape.length * 4 <= am_l2_bytes()));
  }
  int64_t row_scratch() const { return through_scratch() ? shape.length : 0; }
  bool three_passes() const { return algorithm == AM_THREE_PASS_RECOMPUTE || algorithm == AM_THREE_PASS_RELOAD; }
  int phases() const { return three_passes() ? 3 : 2; }
  bool turns() const { return out->fresh == 0; }
  int first_to_write() const { return reloads() && !through_scratch() ? 1 : phases() - 1; }

  void open(State& s, int64_t row) const {
    s.x = x + offset_of(shape, *in, row);
    s.y = y + offset_of(shape, *out, row);
    s.norm = {0, 0, 0, false};
    s.top = -INFINITY;
  }

  Part part(int phase, const State& s, int64_t row, int64_t at, int64_t n, Scratch& scratch) const {
    const T* piece = s.x + at;
    Part p = {{0, 0}};
    if (phase == first_to_write()) ask_for_pages(*out, s.y + at, n);
    if (phase + 1 == phases()) {
      write(s, row, at, n, scratch);
    } else if (three_passes()) {
      if (phase == 0) {
        p.sum.s = max_of(piece, n);
      } else {
        float e = (float)s.norm.e;
        if (reloads()) {
          const char* next = through_scratch() && row + 1 < shape.rows ? (const char*)(piece + shape.length) : nullptr;
          p.sum.s = sum_fixed<true>(piece, stored(s, row, at, scratch), n, e - BIAS, next);
        } else {
          p.sum.s = sum_fixed<false>(piece, nullptr, n, e - BIAS, nullptr);
        }
      }
    } else if (algorithm == AM_TWO_PASS) {
      p.sum = sum_pairs<false>(piece, n, 0);
    } else {
      p.sum = sum_online(piece, n);
    }
    return p;
  }

  void merge(int phase, State& s, const Part& p) const {
    Norm& norm = s.norm;
    if (phase + 1 == phases()) return;
    if (three_passes()) {
      if (phase == 0)
        s.top = p.sum.s > s.top ? (float)p.sum.s : s.top;
      else
        norm.s += p.sum.s;
    } else {
      Sum have = {norm.s, norm.e};
      have = algorithm == AM_TWO_PASS ? add(have, p.sum) : add_online(have, p.sum);
      norm.s = have.s;
      norm.e = have.e;
    }
  }

  bool close(int phase, State& s, int64_t) const {
    Norm& norm = s.norm;
    int last = phases() - 1;
    if (phase == last) return true;
    if (three_passes() && phase == 0) {
      if (!(s.top > LOWEST * 0.9f && s.top < -LOWEST * 0.9f)) return write_shifted(s);
      norm.e = nearbyintf(s.top * 0x1.715476p+0f);
      return false;
    }
    if (phase + 1 < last) return false;
    if (algorithm == AM_ONLINE) {
      norm.shift = (float)norm.e;
      norm.shifted = true;
      norm.e = 0;
      if (!(norm.s > 0) || !(norm.shift > -FLT_MAX)) return write_shifted(s);
    } else {
      if (three_passes()) norm.e -= BIAS;
      if (!ordinary({norm.s, norm.e})) return write_shifted(s);
      // what is stored is scaled by the exponent of the top, so reload keeps it
      if (!reloads()) norm.normalise();
    }
    if (log) split_log(s);
    return false;
  }

  void split_log(State& s) const {
    double lse = s.norm.shifted ? ::log(s.norm.s) : s.norm.log();
    s.hi = s.norm.shifted ? s.norm.shift : (float)lse;
    s.lo = s.norm.shifted ? (float)lse : (float)(lse - s.hi);
  }

  float* stored(const State& s, int64_t row, int64_t at, Scratch& scratch) const {
    if (!through_scratch()) return (float*)(s.y + at);
    return scratch.data + row * scratch.row_step + at;
  }

  void write(const State& s, int64_t row, int64_t at, int64_t n, Scratch& scratch) const {
    const T* from = s.x + at;
    T* to = s.y + at;
    const Norm& norm = s.norm;
    float factor = (float)(1 / norm.s);
    if (log) {
      if (streamed)
        write_difference<true>(from, to, n, s.hi, s.lo);
      else
        write_difference<false>(from, to, n, s.hi, s.lo);
    } else if (reloads()) {
      const float* from = stored(s, row, at, scratch);
      if (streamed && through_scratch())
        write_scaled<true>(from, to, n, factor);
      else
        write_scaled<false>(from, to, n, factor);
    } else if (norm.shifted) {
      if (streamed)
        write_exp<true, true>(from, to, n, norm.shift, 0, factor);
      else
        write_exp<true, false>(from, to, n, norm.shift, 0, factor);
    } else {
      if (streamed)
        write_exp<false, true>(from, to, n, 0, (float)norm.e, factor);
      else
        write_exp<false, false>(from, to, n, 0, (float)norm.e, factor);
    }
  }

  bool write_shifted(State& s) const {
    int64_t n = shape.length;
    s.norm = shifted_norm(s.x, n);
    if (s.norm.s == 0) {
      float none = log ? -INFINITY : 0.0f;
      write_constant(s.y, n, empty == AM_EMPTY_ZERO ? none : NAN);
    } else if (s.norm.s != s.norm.s) {
      write_constant(s.y, n, NAN);
    } else if (log) {
      split_log(s);
      write_difference<false>(s.x, s.y, n, s.hi, s.lo);
    } else {
      write_exp<true, false>(s.x, s.y, n, s.norm.shift, 0, (float)(1 / s.norm.s));
    }
    return true;
  }
};

// Rows of this many vectors at most stay in registers between the passes of reload.
constexpr int SHORT = W == 16 ? 8 : 4;

// One such row, of VECTORS vectors, the last one with `last` lanes. False (and nothing written) where
// it takes the shifted path.
template <int VECTORS, class T>
static inline bool short_row(const T* x, T* y, int last) {
  constexpr int END = VECTORS - 1;
  F v[VECTORS];
  for (int k = 0; k < END; ++k) v[k] = load(x + k * W);
  v[END] = load_lanes(x + END * W, last, -INFINITY);
  F m = v[0];
  for (int k = 1; k < VECTORS; ++k) m = max(v[k], m);
  float top = max_of_lanes(m);
  if (!(top > LOWEST * 0.9f && top < -LOWEST * 0.9f)) return false;
  F e = whole(round(set1(top * 0x1.715476p+0f))) - set1(BIAS);
  F sum[VECTORS];
  for (int k = 0; k < VECTORS; ++k) {
    Pair a = exp_pair(v[k]);
    sum[k] = v[k] = scale(a.p, a.n - e);
  }
  for (int step = 1; step < VECTORS; step *= 2)
    for (int k = 0; k + step < VECTORS; k += 2 * step) sum[k] = sum[k] + sum[k + step];
  double s = sum_of_lanes(widen(sum[0]));
  if (!(s > 0)) return false;
  F factor = set1((float)(1 / s));
  for (int k = 0; k < END; ++k) store(y + k * W, v[k] * factor);
  put(y + END * W, v[END] * factor, last);
  return true;
}

template <int VECTORS, class T>
static void short_rows(const Softmax<T>& op, int64_t begin, int64_t end) {
  int last = (int)(op.shape.length - (VECTORS - 1) * W);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = op.x + offset_of(op.shape, *op.in, row);
    T* y = op.y + offset_of(op.shape, *op.out, row);
    ask_for_pages(*op.out, y, op.shape.length);
    if (!short_row<VECTORS>(x, y, last)) {
      typename Softmax<T>::State state;
      op.open(state, row);
      op.write_shifted(state);
    }
  }
}

template <class T>
static int walk_short(const Softmax<T>& op, am_parallel with) {
  int vectors = (int)((op.shape.length + W - 1) / W);
  parallel(with, op.shape.rows, grain_of(op.shape.length), [&](int64_t begin, int64_t end) {
    switch (vectors) {
      case 1: return short_rows<1>(op, begin, end);
      case 2: return short_rows<2>(op, begin, end);
      case 3: return short_rows<3>(op, begin, end);
      case 4: return short_rows<4>(op, begin, end);
      case 5: return short_rows<(SHORT > 4 ? 5 : 1)>(op, begin, end);
      case 6: return short_rows<(SHORT > 4 ? 6 : 1)>(op, begin, end);
      case 7: return short_rows<(SHORT > 4 ? 7 : 1)>(op, begin, end);
      case 8: return short_rows<(SHORT > 4 ? 8 : 1)>(op, begin, end);
    }
  });
  return 0;
}

// Results larger than half of the last cache will not be found there by whoever reads them next. Fresh
// pages are in the cache, though, where the system has just cleared them.
static inline bool streamed(am_store asked, const am_place& out, int64_t bytes) {
  if (asked != AM_STORE_AUTO) return asked == AM_STORE_STREAMED;
  return out.fresh == 0 && bytes > am_last_level_bytes() / 2;
}
// The fastest as measured (docs/kernels.md). Where a row stays in a cache between the passes, the one
// with a single exp wins: up to a quarter of the last cache. Where the result is streamed, what is kept
// between the passes goes through L2: up to a half of it, but with sixteen floats at a time an exp is
// so cheap that for float32 memory takes over from a sixteenth on. Beyond, memory is what counts, and
// two-pass reads it least. log(softmax) needs no exp in its last pass, so that two passes are the
// least everywhere.
template <class T>
static inline am_algorithm chosen(am_algorithm asked, int64_t length, bool log, bool past) {
  if (asked != AM_AUTO) return asked;
  if (log) return AM_TWO_PASS;
  int64_t streamed_limit = am_l2_bytes() / (W == 16 && sizeof(T) == 4 ? 16 : 2);
  return length * 4 <= (past ? streamed_limit : am_last_level_bytes() / 4) ? AM_THREE_PASS_RELOAD : AM_TWO_PASS;
}

// across.h: rows side by side
static inline bool side_by_side(const am_shape& shape, const am_place& place);
template <class T>
static int softmax_across(const am_softmax* a, am_parallel with);
template <class T>
static int logsumexp_across(const am_logsumexp* a, am_parallel with);
template <class T, bool Log>
static int softmax_backward_across(const am_softmax_backward* a, am_parallel with);

template <class T>
static int softmax_of(const am_softmax* a, am_parallel with) {
  const am_shape& shape = a->shape;
  bool across = a->in.stride != 1 || a->out.stride != 1;
  bool past = !across && streamed(a->store, a->out, shape.rows * shape.length * (int64_t)sizeof(T));
  am_algorithm algorithm = chosen<T>(a->algorithm, shape.length, a->log != 0, past);
  if (!across) {
    Softmax<T> op = {shape,     (const T*)a->in.data, (T*)a->out.data, &a->in,
                     &a->out,   algorithm,            a->empty,        a->log != 0,
                     past};
    if (a->algorithm == AM_AUTO && !op.log && !past && shape.length <= SHORT * W) return walk_short(op, with);
    return walk(op, with);
  }
  if (a->algorithm == AM_AUTO && side_by_side(shape, a->in) && side_by_side(shape, a->out))
    return softmax_across<T>(a, with);
  const am_place* inputs[] = {&a->in};
  return walk_across<T>(shape, inputs, 1, &a->out, with, [&](const am_place* at, const am_shape& panel, int64_t) {
    float* rows = (float*)at->data;
    return Softmax<float>{panel, rows, rows, at, at, algorithm, a->empty, a->log != 0, false};
  });
}

template <class T>
struct LogSumExp {
  am_shape shape;
  const T* x;
  const am_place* in;
  am_lse* lse;

  struct State {
    const T* x;
    Sum sum;
  };
  typedef Sum Part;

  int64_t row_scratch() const { return 0; }
  int phases() const { return 1; }
  bool turns() const { return false; }
  void open(State& s, int64_t row) const {
    s.x = x + offset_of(shape, *in, row);
    s.sum = {0, 0};
  }
  Part part(int, const State& s, int64_t, int64_t at, int64_t n, Scratch&) const {
    return sum_pairs<false>(s.x + at, n, 0);
  }
  void merge(int, State& s, const Part& p) const { s.sum = add(s.sum, p); }
  bool close(int, State& s, int64_t row) const {
    lse[row] = lse_of(s.sum, s.x, shape.length);
    return true;
  }
};

template <class T>
static int logsumexp_of(const am_logsumexp* a, am_parallel with) {
  int failed;
  if (a->in.stride == 1) {
    failed = walk(LogSumExp<T>{a->shape, (const T*)a->in.data, &a->in, a->lse}, with);
  } else if (side_by_side(a->shape, a->in)) {
    failed = logsumexp_across<T>(a, with);
  } else {
    const am_place* inputs[] = {&a->in};
    failed = walk_across<T>(a->shape, inputs, 1, nullptr, with,
                            [&](const am_place* at, const am_shape& panel, int64_t first) {
                              return LogSumExp<float>{panel, (const float*)at->data, at, a->lse + first};
                            });
  }
  if (!failed)
    for (int64_t r = 0; r < a->shape.rows; ++r) from_float((float)value_of(a->lse[r]), (T*)a->out + r);
  return failed;
}

// ---- backward ----------------------------------------------------------------------------------

// e^(x - lse) as e^x factor 2^(-exponent), or shifted where the pairs do not reach.
struct Probability {
  float exponent, factor, shift;
  bool shifted;

  explicit Probability(am_lse lse) : shift((float)lse.shift), shifted(lse.shift != 0) {
    double e = shifted ? 0 : nearbyint(lse.rest * 1.4426950408889634);
    exponent = (float)e;
    factor = (float)exp(e * 0.693147180559945309417 - lse.rest);
  }
};

// The same on a vector, ready to be multiplied.
struct ProbabilityOf {
  F e, f, s;
  explicit ProbabilityOf(const Probability& p)
      : e(set1(p.exponent - BIAS)), f(set1(p.factor * UNBIAS)), s(set1(p.shift)) {}
  template <bool Shift>
  F of(F x) const {
    // a difference of infinities is NaN here, as in torch
    Pair a = exp_pair(Shift ? x - s : x);
    return scale(a.p * f, a.n - e);
  }
};

// softmax:      out = y (grad - sum grad y)
// log-softmax:  out = grad - e^y sum grad
template <class T, bool Log>
struct SoftmaxBackward {
  am_shape shape;
  const T *grad, *y;
  T* out;
  const am_place *grad_at, *y_at, *out_at;
  bool streamed;

  struct State {
    const T *grad, *y;
    T* out;
    double sum;
  };
  typedef double Part;

  int64_t row_scratch() const { return 0; }
  int phases() const { return 2; }
  bool turns() const { return out_at->fresh == 0; }
  void open(State& s, int64_t row) const {
    s = {grad + offset_of(shape, *grad_at, row), y + offset_of(shape, *y_at, row),
         out + offset_of(shape, *out_at, row), 0};
  }
  Part part(int phase, const State& s, int64_t, int64_t at, int64_t n, Scratch&) const {
    if (phase == 0) return sum_of(s.grad + at, s.y + at, n);
    ask_for_pages(*out_at, s.out + at, n);
    if (streamed)
      write<true>(s, at, n);
    else
      write<false>(s, at, n);
    return 0;
  }
  void merge(int phase, State& s, const Part& p) const {
    if (phase == 0) s.sum += p;
  }
  bool close(int, State&, int64_t) const { return false; }

  static double sum_of(const T* g, const T* y, int64_t n) {
    D sum = zero();
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
      prefetch_ahead(g + i);
      if (!Log) prefetch_ahead(y + i);
      F p[GROUP];
      for (int k = 0; k < GROUP; ++k) {
        p[k] = load(g + i + k * W);
        if (!Log) p[k] = p[k] * load(y + i + k * W);
      }
      sum = sum + widen(tree_sum(p));
    }
    for (; i < n; i += W) {
      int lanes = n - i < W ? (int)(n - i) : W;
      F p = load_lanes(g + i, lanes, 0);
      sum = sum + widen(Log ? p : p * load_lanes(y + i, lanes, 0));
    }
    return sum_of_lanes(sum);
  }
  template <bool Stream>
  void write(const State& s, int64_t at, int64_t n) const {
    const T *g = s.grad + at, *y = s.y + at;
    F sum = set1((float)s.sum);
    ProbabilityOf identity{Probability({0, 0})};
    write_row<Stream>(s.out + at, n, [&](int64_t i, int lanes) {
      F vg = load_lanes(g + i, lanes, 0), vy = load_lanes(y + i, lanes, 0);
      return Log ? vg - identity.of<false>(vy) * sum : vy * (vg - sum);
    });
  }
};

template <class T, bool Log>
static int softmax_backward_as(const am_softmax_backward* a, am_parallel with) {
  if (a->grad.stride == 1 && a->result.stride == 1 && a->out.stride == 1) {
    bool past = streamed(AM_STORE_AUTO, a->out, a->shape.rows * a->shape.length * (int64_t)sizeof(T));
    SoftmaxBackward<T, Log> op = {a->shape, (const T*)a->grad.data, (const T*)a->result.data, (T*)a->out.data,
                                  &a->grad, &a->result,             &a->out,                  past};
    return walk(op, with);
  }
  if (side_by_side(a->shape, a->grad) && side_by_side(a->shape, a->result) && side_by_side(a->shape, a->out))
    return softmax_backward_across<T, Log>(a, with);
  const am_place* inputs[] = {&a->grad, &a->result};
  return walk_across<T>(a->shape, inputs, 2, &a->out, with, [&](const am_place* at, const am_shape& panel, int64_t) {
    float *g = (float*)at[0].data, *y = (float*)at[1].data;
    return SoftmaxBackward<float, Log>{panel, g, y, g, &at[0], &at[1], &at[0], false};
  });
}
template <class T>
static int softmax_backward_of(const am_softmax_backward* a, am_parallel with) {
  return a->of == AM_OF_LOG_SOFTMAX ? softmax_backward_as<T, true>(a, with) : softmax_backward_as<T, false>(a, with);
}

// out = grad e^(x - lse)
template <class T>
struct LogSumExpBackward {
  am_shape shape;
  const T* x;
  T* out;
  const am_place *in_at, *out_at;
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
    Probability p(lse[row]);
    ask_for_pages(*out_at, s.out + at, n);
    if (p.shifted)
      write<true, false>(s, p, grad[row], at, n);
    else if (streamed)
      write<false, true>(s, p, grad[row], at, n);
    else
      write<false, false>(s, p, grad[row], at, n);
    return 0;
  }
  void merge(int, State&, const Part&) const {}
  bool close(int, State&, int64_t) const { return true; }

  template <bool Shift, bool Stream>
  void write(const State& s, const Probability& p, float grad, int64_t at, int64_t n) const {
    const T* from = s.x + at;
    ProbabilityOf probability(p);
    F g = set1(grad);
    write_row<Stream>(s.out + at, n, [&](int64_t i, int lanes) {
      if (lanes == W) prefetch((const char*)(from + i) + AHEAD);
      return probability.of<Shift>(load_lanes(from + i, lanes, 0)) * g;
    });
  }
};

template <class T>
static int logsumexp_backward_of(const am_logsumexp_backward* a, am_parallel with) {
  int64_t rows = a->shape.rows;
  Scratch grad;
  if (!grad.grow(rows)) return 1;
  for (int64_t r = 0; r < rows; ++r) grad.data[r] = to_float(((const T*)a->grad)[r]);
  if (a->in.stride == 1 && a->out.stride == 1) {
    bool past = streamed(AM_STORE_AUTO, a->out, rows * a->shape.length * (int64_t)sizeof(T));
    return walk(LogSumExpBackward<T>{a->shape, (const T*)a->in.data, (T*)a->out.data, &a->in, &a->out, grad.data,
                                     a->lse, past},
                with);
  }
  const am_place* inputs[] = {&a->in};
  return walk_across<T>(a->shape, inputs, 1, &a->out, with,
                        [&](const am_place* at, const am_shape& panel, int64_t first) {
                          float* rows = (float*)at->data;
                          return LogSumExpBackward<float>{panel, rows, rows, at, at, grad.data + first,
                                                          a->lse + first, false};
                        });
}

}  // namespace AM_ISA
