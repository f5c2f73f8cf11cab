// The backward pass of the experts. With g = W2^T grad of a queued token, and z = W1 x + b1 from the forward pass:
//
//   hidden = weight gelu(z),   of z = weight g gelu'(z),   of weight = g . gelu(z) + grad . b2
//   of W2 = sum over the queue of grad hidden^T,   of W1 = sum of (of z) x^T,   of x = sum over choices of W1^T (of z)
//
// First W2^T grad, some columns of an expert at a time, with what follows from them alone; then the other products, each
// block of a result by one task; then what is added up over a token's choices. Each number is added up in a fixed order:
// the result does not depend on the threads. Where pairs of bfloat16 are multiplied, hidden and (of z) are rounded.
#pragma once
#include "experts.h"

namespace AM_ISA {

constexpr int64_t COLUMN_BLOCK = 2 * TILE_COLUMNS;
// Rows of a tile of two vectors: as many sums as there are registers for. And rows of a weight's gradient of one task.
constexpr int TALL = W == 16 ? 12 : W == 8 ? 6 : 4;
constexpr int64_t GRADIENT_ROWS = 48;

// What is asked for while something else is multiplied: of rows `step` bytes apart LINES lines each, one row after another,
// from line number `line` on and before `last`; `count` of them in a step.
template <int64_t LINES>
struct Behind {
  const char* from = nullptr;
  int64_t step = 0, line = 0, last = 0, count = 0;

  void ask() {
    for (int64_t i = 0; i < count && line < last; ++i, ++line) prefetch_l2(from + line / LINES * step + line % LINES * 64);
  }
};
using Nothing = Behind<1>;

// keep(i, j, sum) for vector j of row i of A B, over `depth` words: A(i, k) lies at a[i a_row + k a_depth], row k of B at
// b[k b_step].
template <class Words, int ROWS, class Ask, class Keep>
static inline void product_tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_step, int64_t depth,
                                Ask behind, const Keep& keep) {
  float before[ROWS][2 * W];
  for (int64_t from = 0;; from += DEPTH) {
    int64_t to = least(from + DEPTH, depth);
    F sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = set1(0);
    for (int64_t k = from; k < to; ++k) {
      behind.ask();
      F left = load(b + k * b_step), right = load(b + k * b_step + W);
      for (int i = 0; i < ROWS; ++i) {
        F factor = set1(a[i * a_row + k * a_depth]);
        sum[i][0] = Words::add_product(factor, left, sum[i][0]);
        sum[i][1] = Words::add_product(factor, right, sum[i][1]);
      }
    }
    bool last = to >= depth;
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < 2; ++j) {
        F all = from > 0 ? load(before[i] + j * W) + sum[i][j] : sum[i][j];
        if (last)
          keep(i, j, all);
        else
          store(before[i] + j * W, all);
      }
    if (last) return;
  }
}

template <class Words, class Ask, class Keep>
static inline void product_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_step,
                                int64_t depth, Ask behind, const Keep& keep) {
#define AM_ROWS(n) \
  case n: return product_tile<Words, n < TALL ? n : TALL>(a, a_row, a_depth, b, b_step, depth, behind, keep);
  switch (rows) {
    AM_ROWS(1) AM_ROWS(2) AM_ROWS(3) AM_ROWS(4) AM_ROWS(5) AM_ROWS(6)
    AM_ROWS(7) AM_ROWS(8) AM_ROWS(9) AM_ROWS(10) AM_ROWS(11) AM_ROWS(12)
  }
#undef AM_ROWS
}

// One row of words, or where words are pairs, two rows of one. A null row is zeros.
template <class T>
static inline F word_of(Singles, const T* row, const T*, int64_t i, int lanes) {
  return row ? load_lanes(row + i, lanes, 0) : set1(0);
}
#if defined(AM_PAIRS)
template <class T>
static inline F word_of(Pairs, const T* low, const T* high, int64_t i, int lanes) {
  return pair_up(low ? load_lanes(low + i, lanes, 0) : set1(0), high ? load_lanes(high + i, lanes, 0) : set1(0));
}
#endif

template <class Words, class T>
struct ExpertsBackward {
  static constexpr int64_t IN_WORD = Words::IN_WORD;
  static constexpr bool APART = IN_WORD > 1;  // whether rows along and across differ

  const am_experts_backward& b;
  const am_experts& a;
  am_parallel with;
  Queues q;
  bool through;  // whether anything behind gelu is wanted
  int64_t width_step, hidden_step;              // words from row to row
  int64_t width_along, hidden_along, blocks, word_rows = 0;
  int64_t* first = nullptr;  // of each expert, its first row of words across
  float *grad_along = nullptr, *grad_across = nullptr, *x_across = nullptr, *z_along = nullptr, *z_across = nullptr,
        *hidden_across = nullptr, *of_x = nullptr, *of_weight = nullptr;
  Scratch memory;

  ExpertsBackward(const am_experts_backward& backward, am_parallel threads)
      : b(backward), a(backward.forward), with(threads) {
    through = b.grad_x || b.grad_weights || b.grad_w1.data || b.grad_b1;
    // an odd number of lines, so that rows do not meet in the first cache
    width_step = up_to(a.width, TILE_COLUMNS) + W;
    hidden_step = up_to(a.hidden, TILE_COLUMNS) + W;
    width_along = APART ? up_to(a.width, 2) / 2 : width_step;
    hidden_along = APART ? up_to(a.hidden, TILE_COLUMNS) / 2 : hidden_step;
    blocks = (a.hidden + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  }
  ~ExpertsBackward() { free(first); }

  int64_t length(int64_t e) const { return q.offsets[e + 1] - q.offsets[e]; }
  int64_t depth(int64_t e) const { return (length(e) + IN_WORD - 1) / IN_WORD; }
  const T* grad_row(int64_t place) const { return (const T*)b.grad + q.token(place) * b.grad_step; }
  const T* x_row(int64_t place) const { return (const T*)a.x + q.token(place) * a.x_step; }

  bool make() {
    first = (int64_t*)malloc(sizeof(int64_t) * (size_t)(a.experts + 1));
    if (!first || !q.make(a)) return false;
    for (int64_t e = 0; e < a.experts; ++e) {
      first[e] = word_rows;
      word_rows += depth(e);
    }
    int64_t n = q.pairs;
    struct {
      float** to;
      int64_t floats;
    } parts[] = {{&grad_across, word_rows * width_step}, {&grad_along, APART ? n * width_along : 0},
                 {&x_across, word_rows * width_step},    {&hidden_across, word_rows * hidden_step},
                 {&z_across, word_rows * hidden_step},   {&z_along, APART ? n * hidden_along : 0},
                 {&of_x, n * width_step},                {&of_weight, n * blocks}};
    int64_t floats = 0;
    for (auto& p : parts) floats += up_to(p.floats, W);
    if (!memory.grow(floats)) return false;
    float* at = memory.data;
    for (auto& p : parts) {
      *p.to = at;
      at += up_to(p.floats, W);
    }
    if (!APART) grad_along = grad_across, z_along = z_across;
    return true;
  }

  // Rows of grad and x as words.
  void gather() {
    parallel(with, a.experts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        for (int64_t r = 0; r < depth(e); ++r) {
          int64_t place = q.offsets[e] + r * IN_WORD;
          bool two = APART && place + 1 < q.offsets[e + 1];
          gather_row(first[e] + r, grad_row(place), two ? grad_row(place + 1) : nullptr, grad_across);
          gather_row(first[e] + r, x_row(place), two ? x_row(place + 1) : nullptr, x_across);
          for (int64_t i = 0; APART && i <= (two ? 1 : 0); ++i) {
            float* to = grad_along + (place + i) * width_along;
            memset(to + width_along - 1, 0, sizeof(float));
            memcpy(to, grad_row(place + i), (size_t)a.width * sizeof(T));
          }
        }
    });
  }
  void gather_row(int64_t row, const T* low, const T* high, float* out) {
    for (int64_t i = 0; i < up_to(a.width, TILE_COLUMNS); i += W) {
      int lanes = (int)least(W, a.width - i);
      store(out + row * width_step + i, lanes > 0 ? word_of(Words(), low, high, i, lanes) : set1(0));
    }
  }

  // Columns [from, from + COLUMN_BLOCK) of a weight (rows x columns) as rows of words.
  static void pack(const T* w, int64_t step, int64_t rows, int64_t columns, int64_t from, float* out) {
    for (int64_t k = 0; k < rows; k += IN_WORD, out += COLUMN_BLOCK) {
      const T *low = w + k * step + from, *high = k + 1 < rows ? low + step : nullptr;
      for (int64_t j = 0; j < COLUMN_BLOCK; j += W) {
        int64_t lanes = least(W, columns - from - j);
        store(out + j, lanes > 0 ? word_of(Words(), low, high, j, (int)lanes) : set1(0));
      }
    }
  }
  // The columns behind those of a packed weight, in pass number `pass` of `passes` over it.
  static constexpr int64_t LINES = COLUMN_BLOCK * (int64_t)sizeof(T) / 64;
  static Behind<LINES> behind(const T* w, int64_t step, int64_t rows, int64_t columns, int64_t from, int64_t pass, int64_t passes) {
    Behind<LINES> ahead;
    if (from + COLUMN_BLOCK >= columns) return ahead;
    int64_t deep = (rows + IN_WORD - 1) / IN_WORD;
    ahead.from = (const char*)(w + from + COLUMN_BLOCK);
    ahead.step = step * (int64_t)sizeof(T);
    ahead.last = rows * LINES;
    ahead.count = (ahead.last + passes * deep - 1) / (passes * deep);
    ahead.line = pass * deep * ahead.count;
    return ahead;
  }

  // W2^T grad for some columns of an expert, and what follows from it.
  int of_hidden() {
    int64_t deep = (a.width + IN_WORD - 1) / IN_WORD;
    return share(with, a.experts * blocks, deep * COLUMN_BLOCK + MOST_TOKENS * COLUMN_BLOCK, [&](int64_t task, float* scratch) {
      int64_t e = task / blocks, block = task % blocks, from = block * COLUMN_BLOCK, many = least(COLUMN_BLOCK, a.hidden - from);
      float *panel = scratch, *g = scratch + deep * COLUMN_BLOCK;
      F of_bias[COLUMN_BLOCK / W];
      for (F& v : of_bias) v = set1(0);
      const T* w = (const T*)a.w2 + e * a.w2_step[0];
      if (through && length(e) > 0) pack(w, a.w2_step[1], a.width, a.hidden, from, panel);
      int64_t passes = (least(MOST_TOKENS, length(e)) + TALL - 1) / TALL * ((many + TILE_COLUMNS - 1) / TILE_COLUMNS);
      for (int64_t at = q.offsets[e], pass = 0; at < q.offsets[e + 1]; at += MOST_TOKENS) {
        int64_t tokens = least(MOST_TOKENS, q.offsets[e + 1] - at);
        for (int64_t j = 0; through && j < many; j += TILE_COLUMNS)
          for (int64_t t = 0; t < tokens; t += TALL, ++pass)
            product_rows<Words>(least(TALL, tokens - t), grad_along + (at + t) * width_along, width_along, 1, panel + j, COLUMN_BLOCK, deep,
                                behind(w, a.w2_step[1], a.width, a.hidden, from, pass, passes),
                                [&](int i, int v, F sum) { store(g + (t + i) * COLUMN_BLOCK + j + v * W, sum); });
        for (int64_t t = 0; t < tokens; t += IN_WORD)
          differentiate(e, at + t, block, g + t * COLUMN_BLOCK, of_bias);
      }
      if (b.grad_b1)
        for (int64_t j = 0; j < many; j += W)
          put((T*)b.grad_b1 + e * a.hidden + from + j, of_bias[j / W], (int)least(W, many - j));
    });
  }
  // One row of words: IN_WORD tokens.
  void differentiate(int64_t e, int64_t place, int64_t block, const float* g, F* of_bias) {
    int64_t from = block * COLUMN_BLOCK, row = first[e] + (place - q.offsets[e]) / IN_WORD;
    int tokens = (int)least(IN_WORD, q.offsets[e + 1] - place);
    F of_choice[IN_WORD], weight[IN_WORD];
    for (int i = 0; i < IN_WORD; ++i) {
      of_choice[i] = set1(0);
      weight[i] = set1(i < tokens ? a.weights[q.pair[place + i]] : 0);
    }
    for (int64_t j = 0; j < COLUMN_BLOCK && from + j < up_to(a.hidden, TILE_COLUMNS); j += W) {
      int lanes = (int)least(W, a.hidden - from - j);
      F hidden[IN_WORD], of_z[IN_WORD];
      for (int i = 0; i < IN_WORD; ++i) {
        hidden[i] = of_z[i] = set1(0);
        if (i >= tokens || lanes <= 0) continue;
        Gelu gelu(load_lanes(a.saved + (place + i) * a.hidden + from + j, lanes, 0));
        hidden[i] = weight[i] * gelu.value;
        if (!through) continue;
        F of = load(g + i * COLUMN_BLOCK + j);
        of_choice[i] = fma(of, gelu.value, of_choice[i]);
        of_z[i] = weight[i] * of * gelu.derivative;
        of_bias[j / W] = of_bias[j / W] + of_z[i];
      }
      store(hidden_across + row * hidden_step + from + j, word_rounded(Words(), hidden[0], hidden[IN_WORD - 1]));
      if (!through) continue;
      store(z_across + row * hidden_step + from + j, word_rounded(Words(), of_z[0], of_z[IN_WORD - 1]));
      for (int i = 0; APART && i < tokens; ++i) put_weights<Words>(z_along + (place + i) * hidden_along, from + j, of_z[i]);
    }
    for (int i = 0; i < tokens; ++i) of_weight[(place + i) * blocks + block] = (float)sum_of_lanes(widen(of_choice[i]));
  }

  // Rows [row, row + GRADIENT_ROWS) of the gradient of a weight: the sum over the queue of left right^T.
  void of_weights(int64_t e, int64_t row, int64_t rows, int64_t columns, const float* left, int64_t left_step, const float* right,
                  int64_t right_step, const am_place& out) {
    int64_t last = least(row + GRADIENT_ROWS, rows);
    T* to = (T*)out.data + e * rows * columns;
    ask_for_pages(out, to + row * columns, (last - row) * columns);
    if (length(e) == 0) {
      memset(to + row * columns, 0, sizeof(T) * (size_t)((last - row) * columns));
      return;
    }
    left += first[e] * left_step;
    right += first[e] * right_step;
    bool streams = sizeof(T) * (size_t)(a.experts * rows * columns) > (size_t)am_l2_bytes() &&
                   columns % W == 0 && (uintptr_t)out.data % 64 == 0;
    auto tile = [&](int64_t i, int64_t j) {
      product_rows<Words>(least(TALL, last - i), left + i, 1, left_step, right + j, right_step, depth(e), Nothing(),
                          [&](int r, int v, F sum) {
                            int64_t lanes = least(W, columns - j - v * W);
                            T* at = to + (i + r) * columns + j + v * W;
                            if (lanes <= 0) return;
                            if (streams)
                              stream(at, sum);
                            else
                              put(at, sum, (int)lanes);
                          });
    };
    // along the rows that are written, unless what is right of them is more than the second cache keeps
    if (depth(e) * right_step * 4 <= am_l2_bytes() / 2) {
      for (int64_t i = row; i < last; i += TALL)
        for (int64_t j = 0; j < columns; j += TILE_COLUMNS) tile(i, j);
    } else {
      for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
        for (int64_t i = row; i < last; i += TALL) tile(i, j);
    }
    if (streams) fence();
  }
  void of_tokens(int64_t e, int64_t from, float* panel) {
    if (length(e) == 0) return;
    int64_t deep = (a.hidden + IN_WORD - 1) / IN_WORD, pass = 0;
    int64_t passes = (length(e) + TALL - 1) / TALL * 2;
    const T* w = (const T*)a.w1 + e * a.w1_step[0];
    pack(w, a.w1_step[1], a.hidden, a.width, from, panel);
    for (int64_t j = 0; j < COLUMN_BLOCK && from + j < a.width; j += TILE_COLUMNS)
      for (int64_t at = q.offsets[e]; at < q.offsets[e + 1]; at += TALL, ++pass)
        product_rows<Words>(least(TALL, q.offsets[e + 1] - at), z_along + at * hidden_along, hidden_along, 1, panel + j, COLUMN_BLOCK, deep,
                            behind(w, a.w1_step[1], a.hidden, a.width, from, pass, passes),
                            [&](int i, int v, F sum) { store(of_x + (at + i) * width_step + from + j + v * W, sum); });
  }
  void of_second_bias(int64_t e) {
    for (int64_t i = 0; i < a.width; i += W) {
      int lanes = (int)least(W, a.width - i);
      F sum = set1(0);
      for (int64_t p = q.offsets[e]; p < q.offsets[e + 1]; ++p)
        sum = fma(set1(a.weights[q.pair[p]]), load_lanes(grad_row(p) + i, lanes, 0), sum);
      put((T*)b.grad_b2 + e * a.width + i, sum, lanes);
    }
  }
  int of_the_rest() {
    auto blocks_of = [](bool wanted, int64_t n, int64_t each) { return wanted ? (n + each - 1) / each : 0; };
    int64_t second = blocks_of(b.grad_w2.data, a.width, GRADIENT_ROWS), before = blocks_of(b.grad_w1.data, a.hidden, GRADIENT_ROWS);
    int64_t tokens = blocks_of(b.grad_x, a.width, COLUMN_BLOCK), each = second + before + tokens + (b.grad_b2 ? 1 : 0);
    int64_t floats = b.grad_x ? (a.hidden + IN_WORD - 1) / IN_WORD * COLUMN_BLOCK : 0;
    return share(with, a.experts * each, floats, [&](int64_t task, float* scratch) {
      int64_t e = task / each, i = task % each;
      if (i < tokens) return of_tokens(e, i * COLUMN_BLOCK, scratch);
      i -= tokens;
      if (i < second)
        return of_weights(e, i * GRADIENT_ROWS, a.width, a.hidden, grad_across, width_step, hidden_across, hidden_step, b.grad_w2);
      i -= second;
      if (i < before)
        return of_weights(e, i * GRADIENT_ROWS, a.hidden, a.width, z_across, hidden_step, x_across, width_step, b.grad_w1);
      of_second_bias(e);
    });
  }
  void of_choices() {
    parallel(with, a.tokens * a.choices, grain_of(a.width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t place = q.place[i];
        double sum = 0;
        if (place >= 0) {
          for (int64_t block = 0; block < blocks; ++block) sum += of_weight[place * blocks + block];
          if (a.b2) {
            F dot = set1(0);
            const T *grad = grad_row(place), *bias = (const T*)a.b2 + a.index[i] * a.width;
            for (int64_t j = 0; j < a.width; j += W) {
              int lanes = (int)least(W, a.width - j);
              dot = fma(load_lanes(grad + j, lanes, 0), load_lanes(bias + j, lanes, 0), dot);
            }
            sum += sum_of_lanes(widen(dot));
          }
        }
        b.grad_weights[i] = (float)sum;
      }
    });
  }

  int run() {
    if (!make()) return 1;
    gather();
    if ((through || b.grad_w2.data) && of_hidden()) return 1;
    if (of_the_rest()) return 1;
    if (b.grad_x) add_choices(a, q, of_x, width_step, (T*)b.grad_x, nullptr, with);
    if (b.grad_weights) of_choices();
    return 0;
  }
};

static int experts_backward(const am_experts_backward* b, am_parallel with) {
  if (b->forward.dtype == AM_FLOAT32) return ExpertsBackward<Singles, float>(*b, with).run();
#if defined(AM_PAIRS)
  return ExpertsBackward<Pairs, bf16>(*b, with).run();
#else
  return ExpertsBackward<Singles, bf16>(*b, with).run();
#endif
}

}  // namespace AM_ISA
