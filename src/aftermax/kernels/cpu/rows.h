// Passes over a piece of a row, and how pieces and rows are shared among threads.
#pragma once
#include <stdlib.h>

#include "core.h"
#include "exp.h"

namespace AM_ISA {

// Vectors between two updates of the running sum: their tree of additions keeps the float part of the
// sum short, everything beyond it is added in double. As many as the registers hold.
constexpr int GROUP = W == 16 ? 8 : 4;
constexpr int STEP = GROUP * W;
// Bytes that loads are asked for ahead of their use.
constexpr int AHEAD = 4096;
// Results that are written are kept 2^64 too large until their last multiplication, which then rounds
// into the subnormal numbers once.
constexpr float BIAS = 64;
constexpr float UNBIAS = 0x1p-64f;

// A row is summed in pieces of this many elements, which are added in order: the result does not
// depend on the number of threads.
constexpr int64_t PIECE = 32768;

template <class T>
static inline void prefetch_ahead(const T* x) {
  for (int line = 0; line < (int)(STEP * sizeof(T)); line += 64) prefetch((const char*)x + AHEAD + line);
}

static inline F tree_sum(const F* a) {
  if constexpr (GROUP == 8) return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
  return (a[0] + a[1]) + (a[2] + a[3]);
}
static inline F tree_max(const F* a) {
  F m = max(max(a[0], a[1]), max(a[2], a[3]));
  if constexpr (GROUP == 8) m = max(m, max(max(a[4], a[5]), max(a[6], a[7])));
  return m;
}

// Calls step(vector, lanes, index) for every vector of x, the ragged last one with fewer lanes.
template <class T, class Step>
static inline void each_vector(const T* x, int64_t i, int64_t n, float fill, Step step) {
  for (; i + W <= n; i += W) step(load(x + i), W, i);
  if (i < n) step(load_part(x + i, (int)(n - i), fill), (int)(n - i), i);
}

template <class T>
static inline void put(T* y, F a, int lanes) {
  if (lanes == W)
    store(y, a);
  else
    store_part(y, a, lanes);
}

// The maximum; NaN does not count.
template <class T>
static float max_of(const T* x, int64_t n) {
  F m[4] = {set1(-INFINITY), set1(-INFINITY), set1(-INFINITY), set1(-INFINITY)};
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    prefetch_ahead(x + i);
    for (int k = 0; k < GROUP; ++k) m[k % 4] = max(load(x + i + k * W), m[k % 4]);
  }
  each_vector(x, i, n, -INFINITY, [&](F v, int, int64_t) { m[0] = max(v, m[0]); });
  return max_of_lanes(max(max(m[0], m[1]), max(m[2], m[3])));
}

// Sum of e^(x - shift) by pairs, with an exponent of its own in every lane.
template <bool Shift, class T>
static Sum sum_by_lanes(const T* x, int64_t n, float shift) {
  D sum = zero();
  F e = set1(-FLT_MAX), s = set1(shift);
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    prefetch_ahead(x + i);
    F p[GROUP], exponent[GROUP];
    for (int k = 0; k < GROUP; ++k) {
      F v = load(x + i + k * W);
      Pair a = exp_pair(Shift ? v - s : v);
      p[k] = a.p;
      exponent[k] = a.n;
    }
    F top = tree_max(exponent);
    if (any_greater(top, e)) {  // seldom, after the first groups
      top = whole(max(e, top));
      sum = scale(sum, e - top);
      e = top;
    }
    for (int k = 0; k < GROUP; ++k) p[k] = scale(p[k], exponent[k] - e);
    sum = sum + widen(tree_sum(p));
  }
  each_vector(x, i, n, -INFINITY, [&](F v, int, int64_t) {
    Pair a = exp_pair(Shift ? v - s : v);
    F top = whole(max(e, a.n));
    sum = scale(sum, e - top) + widen(scale(a.p, a.n - top));
    e = top;
  });
  float top = max_of_lanes(e);
  return {sum_of_lanes(scale(sum, e - set1(top))), top};
}

// The same without a look at every exponent: that of the first group that is not hidden stands for all of a
// piece. False where others are so far above it that floats do not reach, or where there is NaN; nothing is
// lost far below it.
//
// The terms are coarse, with a factor of e^(n LN2_REST) each. Weighted by them, the mean of n is
// log2 of the sum less the entropy of the weights, which is 0 to 15 bits for PIECE elements. Where one
// term is all of the sum it is 0, so that much is taken out; what may be left is half a ULP.
constexpr double FAR = 0x1p100;
constexpr int GROUPS_BETWEEN_CHECKS = 16;
template <class T>
static bool sum_alike(const T* x, int64_t n, Sum* sum) {
  D total = zero();
  float top = -INFINITY;
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    F p[GROUP];
    for (int k = 0; k < GROUP; ++k) p[k] = load(x + i + k * W);
    top = max_of_lanes(tree_max(p));
    if (top != -INFINITY) break;
    for (int k = 0; k < STEP; ++k)
      if (to_float(x[i + k]) != -INFINITY) return false;  // NaN, which a maximum does not see
  }
  F e = whole(exp_pair<true>(set1(top)).n);
  for (int group = 0; i + STEP <= n; i += STEP, ++group) {
    if (group % GROUPS_BETWEEN_CHECKS == GROUPS_BETWEEN_CHECKS - 1 && !(sum_of_lanes(total) < FAR)) return false;
    prefetch_ahead(x + i);
    F p[GROUP];
    for (int k = 0; k < GROUP; ++k) {
      Pair a = exp_pair<true>(load(x + i + k * W));
      p[k] = scale_any(a.p, a.n - e);
    }
    total = total + widen(tree_sum(p));
  }
  each_vector(x, i, n, -INFINITY, [&](F v, int, int64_t) {
    Pair a = exp_pair<true>(v);
    total = total + widen(scale_any(a.p, a.n - e));
  });
  *sum = {sum_of_lanes(total), max_of_lanes(e)};
  if (!(sum->s < FAR)) return false;
  double rest = LN2_REST * (sum->e + ilogb(sum->s));
  sum->s *= 1 - rest + rest * rest / 2;  // e^(-rest), which is within 1e-3 of 1
  return true;
}

template <bool Shift, class T>
static Sum sum_pairs(const T* x, int64_t n, float shift) {
  Sum sum;
  if (!Shift && n >= 2 * STEP && sum_alike(x, n, &sum)) return sum;
  return sum_by_lanes<Shift>(x, n, shift);
}

// Sum of e^x 2^(-exponent), for an exponent that no element exceeds by much. Writes the terms to y
// where there is one.
template <bool Write, class T>
static double sum_fixed(const T* x, float* y, int64_t n, float exponent, const char* next) {
  D sum = zero();
  F e = set1(exponent);
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    if (next)
      for (int line = 0; line < (int)(STEP * sizeof(T)); line += 64)
        prefetch_l2(next + i * (int64_t)sizeof(T) + line);
    else
      prefetch_ahead(x + i);
    F p[GROUP];
    for (int k = 0; k < GROUP; ++k) {
      Pair a = exp_pair(load(x + i + k * W));
      p[k] = scale(a.p, a.n - e);
      if (Write) store(y + i + k * W, p[k]);
    }
    sum = sum + widen(tree_sum(p));
  }
  if (i < n) {
    F rest = set1(0);
    each_vector(x, i, n, -INFINITY, [&](F v, int lanes, int64_t at) {
      Pair a = exp_pair(v);
      F term = scale(a.p, a.n - e);
      if (Write) put(y + at, term, lanes);
      rest = rest + term;
    });
    sum = sum + widen(rest);
  }
  return sum_of_lanes(sum);
}

// Milakov and Gimelshein's online normaliser (arXiv:1805.02867) with a maximum in every lane:
// the sum of e^(x - m), and m in place of the exponent.
template <class T>
static Sum sum_online(const T* x, int64_t n) {
  D sum = zero();
  F m = set1(-FLT_MAX);
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    prefetch_ahead(x + i);
    F p[GROUP];
    for (int k = 0; k < GROUP; ++k) p[k] = load(x + i + k * W);
    F top = tree_max(p);
    if (any_greater(top, m)) {
      top = max(top, m);
      sum = sum * widen(exp_below(m - top));
      m = top;
    }
    for (int k = 0; k < GROUP; ++k) p[k] = exp_below(p[k] - m);
    sum = sum + widen(tree_sum(p));
  }
  each_vector(x, i, n, -INFINITY, [&](F v, int, int64_t) {
    F top = max(v, m);
    sum = sum * widen(exp_below(m - top)) + widen(exp_below(v - top));
    m = top;
  });
  float top = max_of_lanes(m);
  return {sum_of_lanes(sum * widen(exp_below(m - set1(top)))), top};
}

static inline Sum add_online(Sum a, Sum b) {
  if (a.s == 0) return b;
  if (b.s == 0) return a;
  double m = a.e > b.e ? a.e : b.e;
  return {a.s * exp(a.e - m) + b.s * exp(b.e - m), m};
}

// y = f(vector index) over n elements, written past the cache where asked: the head is written
// one part at a time until y is aligned. f(pointer offset, lanes) gives the vector.
template <bool Stream, class T, class Make>
static inline void write_row(T* y, int64_t n, Make make) {
  int64_t i = 0;
  if (Stream) {
    int64_t bytes = W * (int64_t)sizeof(T);
    int64_t off = (int64_t)((uintptr_t)y % (uintptr_t)bytes);
    int64_t head = off ? (bytes - off) / (int64_t)sizeof(T) : 0;
    if (head > n) head = n;
    if (head) {
      store_part(y, make(0, (int)head), (int)head);
      i = head;
    }
    for (; i + 4 * W <= n; i += 4 * W)
      for (int k = 0; k < 4; ++k) stream(y + i + k * W, make(i + k * W, W));
  } else {
    for (; i + 4 * W <= n; i += 4 * W) {
      F a[4];
      for (int k = 0; k < 4; ++k) a[k] = make(i + k * W, W);
      for (int k = 0; k < 4; ++k) store(y + i + k * W, a[k]);
    }
  }
  for (; i + W <= n; i += W) store(y + i, make(i, W));
  if (i < n) store_part(y + i, make(i, (int)(n - i)), (int)(n - i));
}

template <class T>
static inline F load_lanes(const T* x, int lanes, float fill) {
  return lanes == W ? load(x) : load_part(x, lanes, fill);
}

// y = e^(x - shift) factor 2^(-exponent), but at most 1: no probability is above, but by rounding.
template <bool Shift, bool Stream, class T>
static void write_exp(const T* x, T* y, int64_t n, float shift, float exponent, float factor) {
  F e = set1(exponent - BIAS), f = set1(factor * UNBIAS), s = set1(shift);
  write_row<Stream>(y, n, [&](int64_t i, int lanes) {
    if (lanes == W) prefetch((const char*)(x + i) + AHEAD);
    F v = load_lanes(x + i, lanes, 0);
    Pair a = exp_pair(Shift ? v - s : v);
    return min(set1(1), scale(a.p * f, a.n - e));
  });
}

// y = (x - a) - b, but at most 0: no logarithm of a probability is above, but by rounding.
template <bool Stream, class T>
static void write_difference(const T* x, T* y, int64_t n, float a, float b) {
  F va = set1(a), vb = set1(b);
  write_row<Stream>(y, n, [&](int64_t i, int lanes) {
    if (lanes == W) prefetch((const char*)(x + i) + AHEAD);
    return min(set1(0), (load_lanes(x + i, lanes, 0) - va) - vb);
  });
}

// y = x factor
template <bool Stream, class T>
static void write_scaled(const float* x, T* y, int64_t n, float factor) {
  F f = set1(factor);
  write_row<Stream>(y, n, [&](int64_t i, int lanes) { return load_lanes(x + i, lanes, 0) * f; });
}

template <class T>
static void write_constant(T* y, int64_t n, float a) {
  F v = set1(a);
  write_row<false>(y, n, [&](int64_t, int) { return v; });
}

// ---- places and rows ---------------------------------------------------------------------------

static inline int64_t offset_of(const am_shape& shape, const am_place& place, int64_t row) {
  if (shape.dims == 0) return 0;
  if (shape.dims == 1) return row * place.step[0];
  int64_t offset = 0;
  for (int d = shape.dims - 1; d >= 0; --d) {
    offset += row % shape.size[d] * place.step[d];
    row /= shape.size[d];
  }
  return offset;
}

// Asks for the pages under n elements that are about to be written at y. The blocks that begin there
// are asked for whole, so that rows in order ask for each block once, just before it is written, while
// the cache still holds what the system has cleared.
template <class T>
static inline void ask_for_pages(const am_place& place, const T* y, int64_t n) {
  constexpr uintptr_t BLOCK = 1 << 21;  // a large page of x86-64
  if (place.fresh == 0) return;
  uintptr_t from = ((uintptr_t)y + BLOCK - 1) / BLOCK * BLOCK, to = ((uintptr_t)(y + n) + BLOCK - 1) / BLOCK * BLOCK;
  uintptr_t end = ((uintptr_t)place.data + (uintptr_t)place.fresh) / BLOCK * BLOCK;
  if (to > end) to = end;
  if (from < to) am_ask_for_pages((void*)from, (int64_t)(to - from));
}

// Memory that lives as long as one task; null where there is none to be had.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  int64_t row_step = 0;  // from one row's part of it to the next: 0 where it holds one row
  Scratch() = default;
  explicit Scratch(int64_t floats) { grow(floats); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data); }
  bool grow(int64_t floats) {
    if (data && floats <= size) return true;
    free(data);
    data = nullptr;
    size = 0;
    void* p = nullptr;
    if (posix_memalign(&p, 64, (size_t)(floats * 4 + 64)) != 0) return false;
    data = (float*)p;
    size = floats;
    return true;
  }
};

template <class Body>
static void parallel(am_parallel with, int64_t count, int64_t grain, const Body& body) {
  auto task = [](int64_t begin, int64_t end, void* context) {
    (*(const Body*)context)(begin, end);
  };
  with.run(count, grain > 0 ? grain : 1, task, (void*)&body);
}

static inline int64_t grain_of(int64_t length) { return PIECE / (length > 0 ? length : 1) + 1; }

// Rows that lie across memory are taken this many at a time: a cache line's worth of neighbours. Fewer
// where the copies would be more than MOST_COPIED elements.
constexpr int64_t PANEL = 16;
constexpr int64_t MOST_COPIED = 1 << 24;

// Where the rows [first, first + count) begin. Returns how many from the first on lie side by side, as
// far as whole vectors go: those are copied by transposing squares of W x W.
static inline int64_t starts(const am_shape& shape, const am_place& place, int64_t first, int64_t count, int64_t* at) {
  int64_t together = 1;
  for (int64_t r = 0; r < count; ++r) {
    at[r] = offset_of(shape, place, first + r);
    if (r == together && at[r] == at[0] + r) ++together;
  }
  return together / W * W;
}

// Copies rows [first, first + count) to `rows` (contiguous, `length` apart), or back.
template <class T>
static void gather(const am_shape& shape, const am_place& place, int64_t first, int64_t count, float* rows) {
  int64_t at[PANEL], n = shape.length, squares = n / W * W;
  int64_t together = starts(shape, place, first, count, at);
  const T* x = (const T*)place.data;
  for (int64_t k = 0; k < squares; k += W)
    for (int64_t r = 0; r < together; r += W) {
      F v[W];
      for (int i = 0; i < W; ++i) v[i] = load(x + at[r] + (k + i) * place.stride);
      transpose(v);
      for (int i = 0; i < W; ++i) store(rows + (r + i) * n + k, v[i]);
    }
  for (int64_t k = 0; k < n; ++k)
    for (int64_t r = k < squares ? together : 0; r < count; ++r)
      rows[r * n + k] = to_float(x[at[r] + k * place.stride]);
}
template <class T>
static void scatter(const am_shape& shape, const am_place& place, int64_t first, int64_t count, const float* rows) {
  int64_t at[PANEL], n = shape.length, squares = n / W * W;
  int64_t together = starts(shape, place, first, count, at);
  T* y = (T*)place.data;
  for (int64_t k = 0; k < squares; k += W)
    for (int64_t r = 0; r < together; r += W) {
      F v[W];
      for (int i = 0; i < W; ++i) v[i] = load(rows + (r + i) * n + k);
      transpose(v);
      for (int i = 0; i < W; ++i) store(y + at[r] + (k + i) * place.stride, v[i]);
    }
  for (int64_t k = 0; k < n; ++k)
    for (int64_t r = k < squares ? together : 0; r < count; ++r)
      from_float(rows[r * n + k], y + at[r] + k * place.stride);
}

static inline am_shape panel_shape(int64_t rows, int64_t length) {
  am_shape s;
  s.rows = rows;
  s.length = length;
  s.dims = 1;
  s.size[0] = rows;
  return s;
}
static inline am_place panel_place(float* rows, int64_t length) {
  am_place p;
  p.data = rows;
  p.fresh = 0;
  p.stride = 1;
  p.step[0] = length;
  return p;
}

// Walks the rows [begin, end) of an op whose rows are contiguous, one after the other.
//
// An op has phases(), and for each phase part(phase, state, row, begin, length) on a piece of a row,
// merge(phase, state, part) in order, and close(phase, state, row), which may end the row (true).
// Where turns() says so, the last phase walks its pieces backwards: the end of a long row is what the cache
// still holds. Fresh memory is not: its pages are asked for in order.
template <class Op>
static void walk_rows(const Op& op, int64_t begin, int64_t end, Scratch& scratch) {
  int64_t n = op.shape.length;
  for (int64_t row = begin; row < end; ++row) {
    typename Op::State state;
    op.open(state, row);
    int phases = op.phases();
    for (int phase = 0; phase < phases; ++phase) {
      if (n <= PIECE) {
        op.merge(phase, state, op.part(phase, state, row, 0, n, scratch));
      } else if (phase + 1 < phases || !op.turns()) {
        for (int64_t at = 0; at < n; at += PIECE)
          op.merge(phase, state, op.part(phase, state, row, at, n - at < PIECE ? n - at : PIECE, scratch));
      } else {
        for (int64_t at = (n - 1) / PIECE * PIECE; at >= 0; at -= PIECE)
          op.merge(phase, state, op.part(phase, state, row, at, n - at < PIECE ? n - at : PIECE, scratch));
      }
      if (op.close(phase, state, row)) break;
    }
  }
}

// The same for few long rows: the pieces of all rows are shared among the threads, phase by phase.
template <class Op>
static int walk_pieces(const Op& op, am_parallel with) {
  int64_t n = op.shape.length, rows = op.shape.rows, pieces = (n + PIECE - 1) / PIECE;
  struct Row {
    typename Op::State state;
    bool done;
  };
  Row* row = (Row*)malloc(sizeof(Row) * (size_t)rows);
  typename Op::Part* parts = (typename Op::Part*)malloc(sizeof(typename Op::Part) * (size_t)(rows * pieces));
  Scratch scratch;
  bool ok = row && parts && scratch.grow(op.row_scratch() * rows);
  scratch.row_step = op.row_scratch();
  if (ok) {
    for (int64_t r = 0; r < rows; ++r) {
      op.open(row[r].state, r);
      row[r].done = false;
    }
    for (int phase = 0; phase < op.phases(); ++phase) {
      parallel(with, rows * pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t r = i / pieces, at = i % pieces * PIECE;
          if (!row[r].done)
            parts[i] = op.part(phase, row[r].state, r, at, n - at < PIECE ? n - at : PIECE, scratch);
        }
        fence();
      });
      for (int64_t r = 0; r < rows; ++r) {
        if (row[r].done) continue;
        for (int64_t k = 0; k < pieces; ++k) op.merge(phase, row[r].state, parts[r * pieces + k]);
        row[r].done = op.close(phase, row[r].state, r);
      }
    }
  }
  free(row);
  free(parts);
  return ok ? 0 : 1;
}

template <class Op>
static int walk(const Op& op, am_parallel with) {
  int64_t n = op.shape.length, rows = op.shape.rows;
  if (rows == 0) return 0;
  if (with.threads > 1 && n > PIECE && rows < 8 * with.threads && rows % with.threads != 0)
    return walk_pieces(op, with);
  int failed = 0;
  parallel(with, rows, grain_of(n), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    if (!scratch.grow(op.row_scratch())) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    walk_rows(op, begin, end, scratch);
    fence();
  });
  return failed;
}

// The same for rows that lie across memory: copied together, walked, copied back. `inputs` and
// `output` (which may be null) are their places; make(places of the copies, shape, first row) gives
// the op, which leaves its result where the first input was.
template <class T, class Make>
static int walk_across(const am_shape& shape, const am_place* const* inputs, int count, const am_place* output,
                       am_parallel with, const Make& make) {
  int failed = 0;
  int64_t n = shape.length, panel_rows = PANEL;
  while (panel_rows > 1 && (panel_rows / 2 >= shape.rows || n * panel_rows > MOST_COPIED)) panel_rows /= 2;
  int64_t panels = (shape.rows + panel_rows - 1) / panel_rows;
  parallel(with, panels, grain_of(n * panel_rows), [&](int64_t begin, int64_t end) {
    Scratch scratch, rows;
    if (!rows.grow(n * panel_rows * count)) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      int64_t first = panel * panel_rows;
      int64_t many = shape.rows - first < panel_rows ? shape.rows - first : panel_rows;
      for (int k = 0; k < count; ++k) gather<T>(shape, *inputs[k], first, many, rows.data + k * n * panel_rows);
      am_place places[2] = {panel_place(rows.data, n), panel_place(rows.data + n * panel_rows, n)};
      auto op = make(places, panel_shape(many, n), first);
      if (!scratch.grow(op.row_scratch())) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      walk_rows(op, 0, many, scratch);
      if (output) scatter<T>(shape, *output, first, many, rows.data);
    }
    fence();
  });
  return failed;
}

}  // namespace AM_ISA
