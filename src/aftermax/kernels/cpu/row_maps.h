// The row maps of attention: scores -> weights, and back. A tile of scores comes in, with -infinity where a key is
// hidden; every map makes 0 of that.
//
// A map that streams has a State for each row, which weigh() brings forward from tile to tile. What it returns is the
// factor by which all that was summed with earlier weights has to be multiplied. close() gives the factor that is left
// for the whole row, and what the backward pass needs of it (am_attention.stats; the first must be written). merge() puts
// together the states of two parts of a row, and says what their sums have to be multiplied by.
//
// In the backward pass the map of a row turns scores and the gradients of weights (dp = grad . value) into weights and
// the gradients of scores.
#pragma once
#include "functions.h"
#include "heads.h"

namespace AM_ISA {

// Weights as the second product takes them.
template <class Words>
static inline void put_weights(float* row, int64_t j, F w);
template <>
inline void put_weights<Singles>(float* row, int64_t j, F w) {
  store(row + j, w);
}
#if defined(AM_PAIRS)
template <>
inline void put_weights<Pairs>(float* row, int64_t j, F w) {
  store_pairs((bf16*)row + j, w);
}
#endif

// x *= factor, for whole vectors of x.
static inline void scale_row(float* x, int64_t n, float factor) {
  if (factor == 1) return;
  F f = set1(factor);
  for (int64_t j = 0; j < n; j += W) store(x + j, load(x + j) * f);
}

static inline float at_row(const am_per_row& p, int64_t batch, int64_t head, int64_t row, float otherwise) {
  return p.data ? p.data[batch * p.step[0] + head * p.step[1] + row] : otherwise;
}

struct RowOf {
  const am_attention* a;
  int64_t batch, head, row;
  float per(const am_per_row& p, float otherwise) const { return at_row(p, batch, head, row, otherwise); }
};

// ---- e^s -----------------------------------------------------------------------------------------
//
// The weights are e^(s - shift) 2^-e. e is a whole number near the exponent of the largest score so far, but is not
// kept at it: floats reach far, so that a tile may weigh up to REACH more than e says before all is scaled anew, by
// a power of two, without rounding. No maximum is taken on the way. shift is 0, but for scores beyond +-FAR_SCORE, of
// which no pair can be made: there it is the maximum, as in other softmaxes.
constexpr float REACH = 0x1p20f;
constexpr float FAR_SCORE = 1e5f;

// Writes the weights of a tile and returns their sum by lanes.
template <bool Shift, class Words>
static inline F exponentials(const float* x, float* p, int64_t n, float exponent, float shift) {
  F e = set1(exponent), s = set1(shift), sum[4] = {set1(0), set1(0), set1(0), set1(0)};
  int64_t j = 0;
  auto weight = [&](int64_t at) {
    F v = load(x + at);
    Pair a = exp_coarse(Shift ? v - s : v);
    F w = scale_any(a.p, a.n - e);
    put_weights<Words>(p, at, w);
    return w;
  };
  for (; j + 4 * W <= n; j += 4 * W)
    for (int k = 0; k < 4; ++k) sum[k] = sum[k] + weight(j + k * W);
  for (; j < n; j += W) sum[0] = sum[0] + weight(j);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class Words>
static inline void no_weights(float* p, int64_t n) {
  for (int64_t j = 0; j < n; j += W) put_weights<Words>(p, j, set1(0));
}

// The largest of a tile; NaN where there is NaN or infinity.
static inline float top_of(const float* x, int64_t n) {
  F top = set1(-INFINITY), off = set1(-INFINITY);
  for (int64_t j = 0; j < n; j += W) {
    F v = load(x + j);
    top = max(v, top);
    off = off + v;  // NaN for NaN, and for infinity
  }
  double sum = sum_of_lanes(widen(off));
  return sum == sum ? max_of_lanes(top) : NAN;
}

struct SoftmaxMap {
  struct State {
    D sum;
    double sink;
    float e, shift;
    bool begun;

    double log() const { return shift + e * 0.693147180559945309417; }
    // 1 / the sum of the row; 0 for an empty one.
    float factor() const {
      double total = sum_of_lanes(sum) + sink;
      return total > 0 || total != total ? (float)(1 / total) : 0;
    }
  };

  static void open(State& s, const RowOf& row) {
    s = {zero(), 0, 0, 0, false};
    if (!row.a->sink) return;
    double sink = row.a->sink[row.head];
    if (sink == -INFINITY) return;
    bool far = !(sink < FAR_SCORE && sink > -FAR_SCORE);
    s.shift = far ? (float)sink : 0;
    s.e = far ? 0 : (float)nearbyint(sink * 1.4426950408889634);
    s.sink = exp(sink - s.log());
    s.begun = true;
  }

  template <class Words>
  static float weigh(State& s, const float* x, float* p, int64_t n) {
    if (s.begun && s.shift == 0) {
      F sum = exponentials<false, Words>(x, p, n, s.e, 0);
      // beyond +-FAR_SCORE not even the sign is sure
      if (all_below(absolute(sum), set1(REACH))) {
        s.sum = s.sum + widen(sum);
        return 1;
      }
    }
    return settle<Words>(s, x, p, n);
  }

  // A row begins, or leaves the reach of its exponent.
  template <class Words>
  static float settle(State& s, const float* x, float* p, int64_t n) {
    float top = top_of(x, n), factor = 1;
    if (top == -INFINITY) {
      no_weights<Words>(p, n);
      return 1;
    }
    double before = s.log();
    if (s.shift == 0 && top < FAR_SCORE && top > -FAR_SCORE) {
      float e = nearbyintf(top * 0x1.715476p+0f);
      // never down: what is there would leave the floats
      if (s.begun && e < s.e) e = s.e;
      if (s.begun) factor = (float)times_power(1, s.e - e);
      s.e = e;
    } else {
      s.shift = s.begun && before > top ? (float)before : top;
      s.e = 0;
      if (s.begun) factor = (float)::exp(before - s.shift);
    }
    s.begun = true;
    s.sink *= factor;
    s.sum = s.sum * widen(set1(factor)) + widen(s.shift != 0 ? exponentials<true, Words>(x, p, n, s.e, s.shift)
                                                             : exponentials<false, Words>(x, p, n, s.e, 0));
    return factor;
  }

  // `more`: of keys that come later, without a sink.
  static void merge(State& s, const State& more, float* of_s, float* of_more) {
    if (!more.begun) {
      *of_more = 0;
      return;
    }
    if (!s.begun) {
      s = more;
      *of_s = 0;
      return;
    }
    if (s.shift == 0 && more.shift == 0) {
      float e = s.e > more.e ? s.e : more.e;
      *of_s = (float)times_power(1, s.e - e);
      *of_more = (float)times_power(1, more.e - e);
      s.e = e;
    } else {
      double log = s.log(), log_of_more = more.log();
      s.shift = (float)(log > log_of_more ? log : log_of_more);
      s.e = 0;
      *of_s = (float)::exp(log - s.shift);
      *of_more = (float)::exp(log_of_more - s.shift);
    }
    s.sink *= *of_s;
    s.sum = s.sum * widen(set1(*of_s)) + more.sum * widen(set1(*of_more));
  }

  static float close(const State& s, const RowOf&, float* stats) {
    stats[0] = s.factor();
    stats[1] = s.e;
    stats[2] = s.shift;
    return stats[0];
  }

  // By what the weights of a part are multiplied to be weights of the whole that it was merged into. Not above 1, but for
  // rounding: no part lies above the whole.
  static float share_of(const State& part, const State& whole) {
    if (!part.begun) return 0;
    if (part.shift == 0 && whole.shift == 0) return (float)times_power(1, part.e - whole.e);
    return (float)::exp(part.log() - whole.log());
  }

  struct Back {
    F factor, e, shift, delta;
    Back(const RowOf&, const float* stats, float of_delta, float)
        : factor(set1(stats[0])), e(set1(stats[1])), shift(set1(stats[2])), delta(set1(of_delta)) {}
    void step(F s, F dp, F* p, F* ds) const {
      Pair a = exp_coarse(s - shift);
      *p = scale_any(a.p * factor, a.n - e);
      *ds = *p * (dp - delta);
    }
  };
};

// ---- maps of a score by itself ---------------------------------------------------------------------

struct SigmoidMap {
  struct State {
    F bias;
  };
  static void open(State& s, const RowOf& row) { s.bias = set1(row.per(row.a->row_bias, 0)); }
  template <class Words>
  static float weigh(State& s, const float* x, float* p, int64_t n) {
    for (int64_t j = 0; j < n; j += W) put_weights<Words>(p, j, sigmoid(load(x + j) + s.bias));
    return 1;
  }
  static void merge(State&, const State&, float*, float*) {}
  static float close(const State&, const RowOf&, float* stats) { return stats[0] = 1; }

  struct Back {
    F bias;
    Back(const RowOf& row, const float*, float, float) : bias(set1(row.per(row.a->row_bias, 0))) {}
    void step(F s, F dp, F* p, F* ds) const {
      *p = sigmoid(s + bias);
      *ds = dp * (*p - *p * *p);
    }
  };
};

struct ReluMap {
  struct State {
    Power power;
  };
  static void open(State& s, const RowOf& row) { s.power = Power(row.a->power); }
  template <class Words>
  static float weigh(State& s, const float* x, float* p, int64_t n) {
    for (int64_t j = 0; j < n; j += W) put_weights<Words>(p, j, s.power.of(max(set1(0), load(x + j))));
    return 1;
  }
  static void merge(State&, const State&, float*, float*) {}
  static float close(const State&, const RowOf& row, float* stats) {
    return stats[0] = row.per(row.a->row_weight, 1);
  }

  struct Back {
    Power less;  // by one
    F weight, slope;
    Back(const RowOf& row, const float*, float, float)
        : less(row.a->power - 1),
          weight(set1(row.per(row.a->row_weight, 1))),
          slope(set1(row.per(row.a->row_weight, 1) * row.a->power)) {}
    void step(F s, F dp, F* p, F* ds) const {
      F r = max(set1(0), s), below = less.of(r);
      *p = below * r * weight;
      *ds = select_below(set1(0), s, below * slope * dp, set1(0));
    }
  };
};

// ---- ln(1 + e^s) by its sum --------------------------------------------------------------------------

// 1 / the sum of a row. What is not above the subnormal numbers, of which some processors make 0, counts as an empty row.
static inline float over(double total) { return total >= 0x1p-126 || total != total ? (float)(1 / total) : 0; }

struct SoftplusMap {
  struct State {
    D sum;
  };
  static void open(State& s, const RowOf&) { s.sum = zero(); }
  template <class Words>
  static float weigh(State& s, const float* x, float* p, int64_t n) {
    F sum = set1(0);
    for (int64_t j = 0; j < n; j += W) {
      F f = softplus(load(x + j));
      put_weights<Words>(p, j, f);
      sum = sum + f;
    }
    s.sum = s.sum + widen(sum);
    return 1;
  }
  static void merge(State& s, const State& more, float*, float*) { s.sum = s.sum + more.sum; }
  static float close(const State& s, const RowOf&, float* stats) {
    return stats[0] = over(sum_of_lanes(s.sum));
  }

  struct Back {
    F factor, delta;
    Back(const RowOf&, const float* stats, float of_delta, float)
        : factor(set1(stats[0])), delta(set1(of_delta)) {}
    void step(F s, F dp, F* p, F* ds) const {
      F slope;
      *p = softplus(s, &slope) * factor;
      *ds = (dp - delta) * factor * slope;
    }
  };
};

// ---- maps that have to see the whole row first --------------------------------------------------------
//
// Their scores stay in a strip. first() takes a tile as it comes, and may change what stands in the strip of earlier ones;
// settle() takes the state of the whole row, after which Row gives the weights, and second_of() those of the second sum
// that the backward pass needs (am_attention.extra). Where the strip was made in parts, each by itself, merge() puts their
// states together, and settle() is also told that of the part whose strip the Row will be given.

// A row whose largest f exceeds the mean by no more than this share of it is flat: there is nothing to sharpen but
// rounding, and it takes the weights of the softplus map.
constexpr float FLAT = 1e-6f;

struct LssarMap {
  struct State {
    D sum;
    F top;
  };
  static void open(State& s, const RowOf&) { s = {zero(), set1(0)}; }
  static void first(State& s, float* x, int64_t n, float*, int64_t) {
    F sum = set1(0);
    for (int64_t j = 0; j < n; j += W) {
      F f = softplus(load(x + j));
      store(x + j, f);
      sum = sum + f;
      s.top = max(f, s.top);
    }
    s.sum = s.sum + widen(sum);
  }
  static void merge(State& s, const State& more) {
    s.sum = s.sum + more.sum;
    s.top = max(s.top, more.top);
  }

  struct Row {
    F threshold, over_top;
    Power power, less;
    bool flat;

    Row(const State& s, const RowOf& row) {
      float n = row.per(row.a->count, 0), p = row.per(row.a->row_power, row.a->power);
      float mean = n > 0 ? (float)(sum_of_lanes(s.sum) / n) : 0, above = n > 3 ? mean : 0;
      float top = max_of_lanes(s.top) - above;
      flat = !(top > FLAT * mean && top >= 0x1p-126f);
      threshold = set1(above);
      over_top = set1(flat ? 0 : 1 / top);
      power = Power(p);
      less = Power(p - 1);
    }
    F share(F f) const { return max(set1(0), f - threshold) * over_top; }
    F of(F f) const { return flat ? f : power.of(share(f)); }
    F second_of(F f) const {
      F x = share(f);
      return select_below(set1(0), x, less.of(x), set1(0));
    }
  };
  static Row settle(const State& s, const State&, const RowOf& row) { return Row(s, row); }
  // `total`, `second`: of the weights. Returns what the weighted sum is multiplied by; extra_factor likewise.
  static float close(const State&, const Row& r, const RowOf&, double total, double second, float* stats,
                     float* extra_factor) {
    float factor = over(total), over_top = max_of_lanes(r.over_top);
    *extra_factor = factor * over_top;
    stats[0] = max_of_lanes(r.threshold);
    stats[1] = over_top;
    stats[2] = factor;
    stats[3] = (float)(second * *extra_factor);
    return factor;
  }

  struct Back {
    F threshold, over_top, factor, slope, delta, common;
    Power less;
    bool flat;
    // of_extra: grad . extra
    Back(const RowOf& row, const float* stats, float of_delta, float of_extra) {
      float n = row.per(row.a->count, 0), p = row.per(row.a->row_power, row.a->power);
      flat = stats[1] == 0;
      threshold = set1(stats[0]);
      over_top = set1(stats[1]);
      factor = set1(stats[2]);
      delta = set1(of_delta);
      slope = set1(flat ? stats[2] : p * stats[1] * stats[2]);
      float sum = p * (of_extra - of_delta * stats[3]);  // of the gradients of r, over the row
      common = set1(flat || n <= 3 ? 0 : sum / n);
      less = Power(p - 1);
    }
    void step(F s, F dp, F* p, F* ds) const {
      F by_s, f = softplus(s, &by_s);
      if (flat) {
        *p = f * factor;
        *ds = (dp - delta) * slope * by_s;
        return;
      }
      F x = max(set1(0), f - threshold) * over_top, below = less.of(x);
      *p = below * x * factor;
      F by_r = select_below(set1(0), x, below * slope * (dp - delta), set1(0));
      *ds = (by_r - common) * by_s;
    }
  };
};

// Where a weight has no gradient: a little above 1, to which whole rows come with zeta = 1. There, forward and backward
// pass must not part by a digit.
constexpr float CLIPPED_ABOVE = 1 + 0x1p-16f;

struct ClippedMap {
  typedef SoftmaxMap::State State;
  static void open(State& s, const RowOf& row) { SoftmaxMap::open(s, row); }
  static void first(State& s, float* x, int64_t n, float* before, int64_t count) {
    scale_row(before, count, SoftmaxMap::settle<Singles>(s, x, x, n));
  }
  static void merge(State& s, const State& more) {
    float of_s = 1, of_more = 1;
    SoftmaxMap::merge(s, more, &of_s, &of_more);
  }
  struct Row {
    F stretch, bias;  // of e^s
    F of(F e) const { return min(set1(1), max(set1(0), fma(e, stretch, bias))); }
    F second_of(F e) const {
      F u = fma(e, stretch, bias), none = set1(0);
      return select_below(u, none, none, select_below(set1(CLIPPED_ABOVE), u, none, e));
    }
  };
  static Row settle(const State& s, const State& part, const RowOf& row) {
    float stretch = row.per(row.a->row_weight, 1) * s.factor() * SoftmaxMap::share_of(part, s);
    return {set1(stretch), set1(row.per(row.a->row_bias, 0))};
  }
  static float close(const State& s, const Row& r, const RowOf& at, double, double, float* stats, float* extra_factor) {
    SoftmaxMap::close(s, at, stats);
    *extra_factor = max_of_lanes(r.stretch);
    return 1;
  }

  struct Back {
    F factor, e, shift, stretch, bias, delta;
    Back(const RowOf& row, const float* stats, float, float of_extra)
        : factor(set1(stats[0])),
          e(set1(stats[1])),
          shift(set1(stats[2])),
          stretch(set1(row.per(row.a->row_weight, 1))),
          bias(set1(row.per(row.a->row_bias, 0))),
          delta(set1(of_extra)) {}
    void step(F s, F dp, F* p, F* ds) const {
      Pair a = exp_coarse(s - shift);
      F soft = scale_any(a.p * factor, a.n - e), u = fma(soft, stretch, bias), none = set1(0);
      *p = min(set1(1), max(none, u));
      F w = select_below(u, none, none, select_below(set1(CLIPPED_ABOVE), u, none, dp * stretch));
      *ds = soft * (w - delta);
    }
  };
};

}  // namespace AM_ISA
