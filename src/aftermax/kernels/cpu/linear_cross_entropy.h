// Cross-entropy of hidden weight^T + bias, in blocks over the classes.
//
// Forward: a task takes SEGMENT classes, makes their logits for BLOCK rows at a time and keeps of each
// row the sum of exponentials. Backward: for a few panels of classes at a time, the logits are made
// again and turned into their gradient G, from which the panels' part of the weight's gradient
// (G^T hidden) is finished; then every block of rows adds its part of the hidden gradient (G weight).
// Each number is added up by one task in a fixed order: the result does not depend on the threads.
#pragma once
#include "cross_entropy.h"
#include "gemm.h"

namespace AM_ISA {

constexpr int64_t PANEL_CLASSES = 128;
constexpr int64_t SEGMENT = 4 * PANEL_CLASSES;
constexpr int64_t BLOCK = 128;
// Panels whose gradient exists at a time (at least two for every thread).
constexpr int64_t PANELS_AT_ONCE = 8;
// Logits that exist at a time where loss and gradients are made together: 80 MB, but at least BLOCK rows.
constexpr int64_t LOGITS_AT_ONCE = 20000000;

// The rows that count, packed for the tiles.
template <class T>
struct Hidden {
  int64_t rows = 0;          // that count
  int64_t* index = nullptr;  // where each of them comes from
  Scratch packed;

  ~Hidden() { free(index); }
  bool pack(const am_linear_cross_entropy* a, const Loss& loss, am_parallel with) {
    index = (int64_t*)malloc(sizeof(int64_t) * (size_t)(a->rows + 1));
    if (!index) return false;
    for (int64_t r = 0; r < a->rows; ++r)
      if (!loss.ignored(r)) index[rows++] = r;
    if (!packed.grow(up_to(rows, BLOCK) * a->width)) return false;
    parallel(with, (rows + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t many = rows - b * BLOCK < BLOCK ? rows - b * BLOCK : BLOCK;
        pack_rows((const T*)a->hidden, a->hidden_step, index + b * BLOCK, many, a->width,
                  packed.data + b * BLOCK * a->width);
      }
    });
    return true;
  }
};

// logits (rows x PANEL_CLASSES) of `rows` packed rows, from one packed panel of the weight.
static inline void make_logits(const float* hidden, int64_t rows, const float* panel, int64_t width, float* logits) {
  if (width == 0) memset(logits, 0, sizeof(float) * (size_t)(rows * PANEL_CLASSES));
  for (int64_t k = 0; k < width; k += DEPTH) {
    int64_t depth = width - k < DEPTH ? width - k : DEPTH;
    for (int64_t j = 0; j < PANEL_CLASSES; j += TILE_COLUMNS)
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        multiply_tile(hidden + i * width + k * TILE_ROWS, 1, TILE_ROWS, panel + j * width + k * TILE_COLUMNS, depth,
                      logits + i * PANEL_CLASSES + j, PANEL_CLASSES, k > 0);
  }
}

template <class T>
static void load_bias(const void* bias, int64_t from, int64_t count, float* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = bias ? to_float(((const T*)bias)[from + k]) : 0.0f;
}

// What is kept of a row: the sum of e^x, as a sum of pairs or where those do not reach as its log, and
// sum_k w_k x_k where labels are smoothed.
struct RowSum {
  Sum sum = {0, 0};
  am_lse lse = {0, 0};
  bool far = false;
  double weighted = 0;

  am_lse log() const { return far ? lse : sum.s == 0 ? am_lse{-INFINITY, 0} : am_lse{0, log_of(sum)}; }

  void add(const RowSum& more) {
    weighted += more.weighted;
    if (!far && !more.far) {
      sum = AM_ISA::add(sum, more.sum);
      return;
    }
    am_lse a = log(), b = more.log();
    far = true;
    if (value_of(b) > value_of(a)) {
      am_lse t = a;
      a = b;
      b = t;
    }
    double apart = (b.shift - a.shift) + (b.rest - a.rest);  // at most 0, or NaN
    if (b.shift == -INFINITY && a.shift == a.shift)
      apart = -INFINITY;
    lse = a.shift == INFINITY || a.shift == -INFINITY ? a : am_lse{a.shift, a.rest + log1p(exp(apart))};
    if (apart != apart) lse = {0, NAN};
  }
};

static inline RowSum sum_of_row(const float* x, int64_t n, const Loss& loss, const float* w) {
  RowSum row;
  row.sum = sum_pairs<false>(x, n, 0);
  row.far = !ordinary(row.sum);
  if (row.far) row.lse = shifted_lse(x, n);
  if (loss.smooths()) row.weighted = sum_weighted(x, w, n);
  return row;
}

static inline void clear(double* of_rows, am_lse* lse, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    of_rows[r] = 0;
    lse[r] = {0, 0};
  }
}

template <class T>
static int linear_cross_entropy_of(const am_linear_cross_entropy* a, am_parallel with) {
  Loss loss(&a->classes, a->rows, a->count);
  Hidden<T> hidden;
  int64_t width = a->width, segments = (a->count + SEGMENT - 1) / SEGMENT;
  if (!hidden.pack(a, loss, with)) return 1;
  int64_t rows = hidden.rows;
  RowSum* parts = (RowSum*)malloc(sizeof(RowSum) * (size_t)(rows * segments + 1));
  Scratch memory;
  int failed = !parts || !memory.grow(2 * (a->rows + rows));
  if (!failed) {
    double *of_rows = (double*)memory.data, *at_target = of_rows + a->rows;
    parallel(with, segments, 1, [&](int64_t begin, int64_t end) {
      Scratch panel(PANEL_CLASSES * width), logits(BLOCK * PANEL_CLASSES);
      float bias[PANEL_CLASSES];
      if (!panel.data || !logits.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t segment = begin; segment < end; ++segment) {
        for (int64_t r = 0; r < rows; ++r) parts[segment * rows + r] = RowSum();
        int64_t last = (segment + 1) * SEGMENT < a->count ? (segment + 1) * SEGMENT : a->count;
        for (int64_t c = segment * SEGMENT; c < last; c += PANEL_CLASSES) {
          int64_t classes = last - c < PANEL_CLASSES ? last - c : PANEL_CLASSES;
          pack_transposed((const T*)a->weight + c * a->weight_step, a->weight_step, classes, PANEL_CLASSES, width,
                          panel.data);
          load_bias<T>(a->bias, c, classes, bias);
          const float* w = a->classes.weight ? a->classes.weight + c : nullptr;
          for (int64_t first = 0; first < rows; first += BLOCK) {
            int64_t many = rows - first < BLOCK ? rows - first : BLOCK;
            make_logits(hidden.packed.data + first * width, up_to(many, TILE_ROWS), panel.data, width, logits.data);
            for (int64_t r = 0; r < many; ++r) {
              float* x = logits.data + r * PANEL_CLASSES;
              if (a->bias)
                for (int64_t k = 0; k < classes; ++k) x[k] += bias[k];
              parts[segment * rows + first + r].add(sum_of_row(x, classes, loss, w));
              int64_t target = a->classes.target[hidden.index[first + r]] - c;
              if (target >= 0 && target < classes) at_target[first + r] = x[target];
            }
          }
        }
      }
    });
    if (!failed) {
      clear(of_rows, a->lse, a->rows);
      for (int64_t r = 0; r < rows; ++r) {
        RowSum whole = parts[r];
        for (int64_t s = 1; s < segments; ++s) whole.add(parts[s * rows + r]);
        int64_t row = hidden.index[r];
        a->lse[row] = finite_or_nan(whole.log());
        of_rows[row] = loss.of(row, a->lse[row], at_target[r], whole.weighted);
      }
      loss.finish(of_rows, a->rows, a->loss);
    }
  }
  free(parts);
  return failed;
}

// One row of logits becomes its gradient, in place.
static inline void differentiate(float* x, const float* bias, int64_t n, const Probability& p, const LossGradient& g,
                                 const float* w, bool smooths) {
  ProbabilityOf probability(p);
  F of_probability = set1((float)g.of_probability), everywhere = set1((float)g.everywhere);
  for (int64_t i = 0; i < n; i += W) {
    int lanes = n - i < W ? (int)(n - i) : W;
    F v = load(x + i);  // the panel is whole, whatever n
    if (bias) v = v + load(bias + i);
    v = (p.shifted ? probability.of<true>(v) : probability.of<false>(v)) * of_probability;
    if (smooths) v = v - (w ? everywhere * load_lanes(w + i, lanes, 0) : everywhere);
    store(x + i, v);
  }
  for (int64_t i = n; i < PANEL_CLASSES; ++i) x[i] = 0;
}

template <class T>
static inline void store_row(const float* from, T* to, int64_t n) {
  each_vector(from, 0, n, 0.0f, [&](F v, int lanes, int64_t i) { put(to + i, v, lanes); });
}

// The gradient of the packed rows [first, first + many) goes where they came from; the first of them
// also clears those that are ignored.
template <class T>
static void store_hidden(const am_linear_cross_entropy_backward* b, const Hidden<T>& hidden, int64_t first,
                         int64_t many, const float* sum, int64_t wide) {
  const am_linear_cross_entropy& a = b->forward;
  T* out = (T*)b->grad_hidden;
  for (int64_t r = 0; r < many; ++r) store_row(sum + r * wide, out + hidden.index[first + r] * a.width, a.width);
  if (first > 0) return;
  for (int64_t r = 0; r < a.rows; ++r)
    if (a.classes.target[r] == a.classes.ignore_index) memset(out + r * a.width, 0, sizeof(T) * (size_t)a.width);
}

template <class T>
static int linear_cross_entropy_backward_of(const am_linear_cross_entropy_backward* b, am_parallel with) {
  const am_linear_cross_entropy* a = &b->forward;
  Loss loss(&a->classes, a->rows, a->count);
  Hidden<T> hidden;
  if (!hidden.pack(a, loss, with)) return 1;
  int64_t rows = hidden.rows, width = a->width, wide = up_to(width, TILE_COLUMNS), tall = up_to(rows, BLOCK);
  int64_t panels = (a->count + PANEL_CLASSES - 1) / PANEL_CLASSES;
  int64_t at_once = PANELS_AT_ONCE > 2 * with.threads ? PANELS_AT_ONCE : 2 * with.threads;
  if (at_once > panels) at_once = panels;
  int64_t deep = at_once * PANEL_CLASSES;

  // G by panels [panel][row][PANEL_CLASSES]; weight and hidden as right-hand sides [column][row][TILE_COLUMNS]
  Scratch gradient(at_once * tall * PANEL_CLASSES), weight(deep * wide), columns(tall * wide), sum(tall * wide);
  if (!gradient.data || !weight.data || !columns.data || !sum.data) return 1;
  parallel(with, wide / TILE_COLUMNS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * TILE_COLUMNS; j < end * TILE_COLUMNS; j += TILE_COLUMNS) {
      int64_t columns_here = width - j < TILE_COLUMNS ? width - j : TILE_COLUMNS;
      float* to = columns.data + j * tall;
      pack_columns((const T*)a->hidden + j, a->hidden_step, hidden.index, rows, columns_here, to, 0);
      memset(to + rows * TILE_COLUMNS, 0, sizeof(float) * (size_t)((tall - rows) * TILE_COLUMNS));
    }
  });
  memset(sum.data, 0, sizeof(float) * (size_t)(tall * wide));

  int failed = 0;
  for (int64_t start = 0; start < panels; start += at_once) {
    int64_t now = panels - start < at_once ? panels - start : at_once;
    parallel(with, now, 1, [&](int64_t begin, int64_t end) {
      Scratch panel(PANEL_CLASSES * width), out(PANEL_CLASSES * wide);
      float bias[PANEL_CLASSES] = {};
      if (!panel.data || !out.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t p = begin; p < end; ++p) {
        int64_t c = (start + p) * PANEL_CLASSES;
        int64_t classes = a->count - c < PANEL_CLASSES ? a->count - c : PANEL_CLASSES;
        const T* from = (const T*)a->weight + c * a->weight_step;
        float* g = gradient.data + p * tall * PANEL_CLASSES;
        pack_transposed(from, a->weight_step, classes, PANEL_CLASSES, width, panel.data);
        load_bias<T>(a->bias, c, classes, bias);
        const float* w = a->classes.weight ? a->classes.weight + c : nullptr;
        for (int64_t first = 0; first < rows; first += BLOCK) {
          int64_t many = rows - first < BLOCK ? rows - first : BLOCK;
          float* x = g + first * PANEL_CLASSES;
          make_logits(hidden.packed.data + first * width, up_to(many, TILE_ROWS), panel.data, width, x);
          for (int64_t r = 0; r < many; ++r) {
            int64_t row = hidden.index[first + r], target = a->classes.target[row] - c;
            LossGradient of(loss, row, a->lse[row], a->classes.reduction == AM_NONE ? b->grad[row] : b->grad[0]);
            differentiate(x + r * PANEL_CLASSES, a->bias ? bias : nullptr, classes, Probability(a->lse[row]), of, w,
                          loss.smooths());
            if (target >= 0 && target < classes)
              x[r * PANEL_CLASSES + target] = (float)(x[r * PANEL_CLASSES + target] - of.at_target);
          }
          memset(x + many * PANEL_CLASSES, 0, sizeof(float) * (size_t)((BLOCK - many) * PANEL_CLASSES));
        }
        if (b->grad_hidden) {  // the weight for the second half; classes beyond the last are 0
          float* to = weight.data + p * PANEL_CLASSES * TILE_COLUMNS;
          pack_columns(from, a->weight_step, nullptr, classes, width, to, deep * TILE_COLUMNS);
          for (int64_t j = 0; j < wide / TILE_COLUMNS; ++j)
            memset(to + j * deep * TILE_COLUMNS + classes * TILE_COLUMNS, 0,
                   sizeof(float) * (size_t)((PANEL_CLASSES - classes) * TILE_COLUMNS));
        }
        if (b->grad_bias) {
          for (int64_t k = 0; k < classes; ++k) {
            double s = 0;
            for (int64_t r = 0; r < rows; ++r) s += g[r * PANEL_CLASSES + k];
            from_float((float)s, (T*)b->grad_bias + c + k);
          }
        }
        if (b->grad_weight) {
          for (int64_t k = 0; k < tall; k += BLOCK)
            for (int64_t j = 0; j < wide; j += TILE_COLUMNS)
              for (int64_t i = 0; i < PANEL_CLASSES; i += TILE_ROWS)
                multiply_tile(g + k * PANEL_CLASSES + i, 1, PANEL_CLASSES, columns.data + j * tall + k * TILE_COLUMNS,
                              BLOCK, out.data + i * wide + j, wide, k > 0);
          for (int64_t k = 0; k < classes; ++k)
            store_row(out.data + k * wide, (T*)b->grad_weight + (c + k) * width, width);
        }
      }
    });
    if (failed) return failed;
    if (b->grad_hidden)
      parallel(with, tall / BLOCK * 2, 1, [&](int64_t begin, int64_t end) {
        constexpr int64_t HALF = BLOCK / 2;
        for (int64_t block = begin; block < end; ++block)
          for (int64_t p = 0; p < now; ++p)
            for (int64_t j = 0; j < wide; j += TILE_COLUMNS)
              for (int64_t i = block * HALF; i < (block + 1) * HALF; i += TILE_ROWS)
                multiply_tile(gradient.data + (p * tall + i) * PANEL_CLASSES, PANEL_CLASSES, 1,
                              weight.data + j * deep + p * PANEL_CLASSES * TILE_COLUMNS, PANEL_CLASSES,
                              sum.data + i * wide + j, wide, true);
      });
  }
  if (b->grad_weight && rows == 0) memset(b->grad_weight, 0, sizeof(T) * (size_t)(a->count * width));
  if (b->grad_hidden) store_hidden(b, hidden, 0, rows, sum.data, wide);
  return 0;
}

// Loss and gradients in one go, for float32 and reductions to one number: the logits of some rows at a time (all
// classes) become their gradient in place, so that they are made once and not twice. What is written
// is the gradient for a loss whose own gradient is 1; half precision could lose it before it is scaled.
static int linear_cross_entropy_gradients(const am_linear_cross_entropy_backward* b, am_parallel with) {
  const am_linear_cross_entropy* a = &b->forward;
  Loss loss(&a->classes, a->rows, a->count);
  Hidden<float> hidden;
  if (!hidden.pack(a, loss, with)) return 1;
  int64_t rows = hidden.rows, width = a->width, wide = up_to(width, TILE_COLUMNS);
  int64_t panels = (a->count + PANEL_CLASSES - 1) / PANEL_CLASSES;
  int64_t most = LOGITS_AT_ONCE / ((panels ? panels : 1) * PANEL_CLASSES);
  if (most > (rows + 3) / 4) most = (rows + 3) / 4;  // never all of them, however few
  if (most < BLOCK) most = BLOCK;
  int64_t blocks = (rows + most - 1) / most;
  int64_t tall = blocks ? up_to((rows + blocks - 1) / blocks, TILE_ROWS) : 0;

  Scratch gradient(panels * tall * PANEL_CLASSES), columns(tall * wide), sum(tall * wide);
  Scratch memory(2 * (a->rows + tall + a->count));
  RowSum* parts = (RowSum*)malloc(sizeof(RowSum) * (size_t)(panels * tall + 1));
  bool ok = gradient.data && columns.data && sum.data && memory.data && parts;
  double *of_rows = (double*)memory.data, *at_target = of_rows + a->rows, *bias_sum = at_target + tall;
  int failed = ok ? 0 : 1;
  if (ok) clear(of_rows, a->lse, a->rows);

  for (int64_t block = 0; block < blocks && !failed; ++block) {
    int64_t first = block * tall, many = rows - first < tall ? rows - first : tall;
    int64_t padded = up_to(many, TILE_ROWS);
    parallel(with, wide / TILE_COLUMNS, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * TILE_COLUMNS; j < end * TILE_COLUMNS; j += TILE_COLUMNS) {
        int64_t columns_here = width - j < TILE_COLUMNS ? width - j : TILE_COLUMNS;
        float* to = columns.data + j * tall;
        pack_columns((const float*)a->hidden + j, a->hidden_step, hidden.index + first, many, columns_here, to, 0);
        memset(to + many * TILE_COLUMNS, 0, sizeof(float) * (size_t)((padded - many) * TILE_COLUMNS));
      }
    });

    // logits, and of each row the sum over each panel
    parallel(with, panels, 1, [&](int64_t begin, int64_t end) {
      Scratch panel(PANEL_CLASSES * width);
      float bias[PANEL_CLASSES];
      if (!panel.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t p = begin; p < end; ++p) {
        int64_t c = p * PANEL_CLASSES, classes = a->count - c < PANEL_CLASSES ? a->count - c : PANEL_CLASSES;
        float* g = gradient.data + p * tall * PANEL_CLASSES;
        pack_transposed((const float*)a->weight + c * a->weight_step, a->weight_step, classes, PANEL_CLASSES, width,
                        panel.data);
        load_bias<float>(a->bias, c, classes, bias);
        for (int64_t at = 0; at < many; at += BLOCK) {
          int64_t here = many - at < BLOCK ? many - at : BLOCK;
          make_logits(hidden.packed.data + (first + at) * width, up_to(here, TILE_ROWS), panel.data, width,
                      g + at * PANEL_CLASSES);
          for (int64_t r = at; r < at + here; ++r) {
            float* x = g + r * PANEL_CLASSES;
            if (a->bias)
              for (int64_t k = 0; k < classes; ++k) x[k] += bias[k];
            parts[p * tall + r] = sum_of_row(x, classes, loss, a->classes.weight ? a->classes.weight + c : nullptr);
            int64_t target = a->classes.target[hidden.index[first + r]] - c;
            if (target >= 0 && target < classes) at_target[r] = x[target];
          }
        }
      }
    });
    if (failed) break;
    parallel(with, many, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        RowSum whole = parts[r];
        for (int64_t p = 1; p < panels; ++p) whole.add(parts[p * tall + r]);
        int64_t row = hidden.index[first + r];
        a->lse[row] = finite_or_nan(whole.log());
        of_rows[row] = loss.of(row, a->lse[row], at_target[r], whole.weighted);
      }
    });

    // the logits become their gradient, and that goes into the weight's
    parallel(with, panels, 1, [&](int64_t begin, int64_t end) {
      Scratch out(PANEL_CLASSES * wide);
      if (!out.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t p = begin; p < end; ++p) {
        int64_t c = p * PANEL_CLASSES, classes = a->count - c < PANEL_CLASSES ? a->count - c : PANEL_CLASSES;
        float* g = gradient.data + p * tall * PANEL_CLASSES;
        const float* w = a->classes.weight ? a->classes.weight + c : nullptr;
        for (int64_t r = 0; r < many; ++r) {
          int64_t row = hidden.index[first + r], target = a->classes.target[row] - c;
          LossGradient of(loss, row, a->lse[row], 1);
          float* x = g + r * PANEL_CLASSES;
          differentiate(x, nullptr, classes, Probability(a->lse[row]), of, w, loss.smooths());
          if (target >= 0 && target < classes) x[target] = (float)(x[target] - of.at_target);
        }
        memset(g + many * PANEL_CLASSES, 0, sizeof(float) * (size_t)((padded - many) * PANEL_CLASSES));
        if (b->grad_bias) {
          for (int64_t k = 0; k < classes; ++k) {
            double s = block > 0 ? bias_sum[c + k] : 0;
            for (int64_t r = 0; r < many; ++r) s += g[r * PANEL_CLASSES + k];
            bias_sum[c + k] = s;
            ((float*)b->grad_bias)[c + k] = (float)s;
          }
        }
        if (b->grad_weight) {
          // summed where it stays, if whole tiles fit there
          bool direct = width == wide && classes == PANEL_CLASSES;
          float* weight = (float*)b->grad_weight + c * width;
          float* to = direct ? weight : out.data;
          for (int64_t k = 0; k < padded; k += BLOCK)
            for (int64_t j = 0; j < wide; j += TILE_COLUMNS)
              for (int64_t i = 0; i < PANEL_CLASSES; i += TILE_ROWS)
                multiply_tile(g + k * PANEL_CLASSES + i, 1, PANEL_CLASSES, columns.data + j * tall + k * TILE_COLUMNS,
                              padded - k < BLOCK ? padded - k : BLOCK, to + i * wide + j, wide,
                              k > 0 || (direct && block > 0));
          for (int64_t k = 0; k < classes && !direct; ++k)
            for (int64_t i = 0; i < width; ++i)
              weight[k * width + i] = (block > 0 ? weight[k * width + i] : 0) + out.data[k * wide + i];
        }
      }
    });
    if (failed) break;

    // and into the hidden one's: a task takes some columns of it
    if (b->grad_hidden) {
      parallel(with, wide / TILE_COLUMNS, 1, [&](int64_t begin, int64_t end) {
        int64_t from = begin * TILE_COLUMNS, to = end * TILE_COLUMNS < width ? end * TILE_COLUMNS : width;
        Scratch weight(PANEL_CLASSES * (end - begin) * TILE_COLUMNS);
        if (!weight.data) {
          __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
          return;
        }
        for (int64_t p = 0; p < panels; ++p) {
          int64_t c = p * PANEL_CLASSES, classes = a->count - c < PANEL_CLASSES ? a->count - c : PANEL_CLASSES;
          pack_columns((const float*)a->weight + c * a->weight_step + from, a->weight_step, nullptr, classes, to - from,
                       weight.data, PANEL_CLASSES * TILE_COLUMNS);
          for (int64_t j = begin; j < end; ++j) {
            const float* right = weight.data + (j - begin) * PANEL_CLASSES * TILE_COLUMNS;
            for (int64_t i = 0; i < padded; i += TILE_ROWS)
              multiply_tile(gradient.data + (p * tall + i) * PANEL_CLASSES, PANEL_CLASSES, 1, right, classes,
                            sum.data + i * wide + j * TILE_COLUMNS, wide, p > 0);
          }
        }
      });
      if (!failed) store_hidden(b, hidden, first, many, sum.data, wide);
    }
  }
  if (!failed) {
    if (rows == 0) {
      if (b->grad_weight) memset(b->grad_weight, 0, sizeof(float) * (size_t)(a->count * width));
      if (b->grad_bias) memset(b->grad_bias, 0, sizeof(float) * (size_t)a->count);
      if (b->grad_hidden) memset(b->grad_hidden, 0, sizeof(float) * (size_t)(a->rows * width));
    }
    loss.finish(of_rows, a->rows, a->loss);
  }
  free(parts);
  return failed;
}

}  // namespace AM_ISA
