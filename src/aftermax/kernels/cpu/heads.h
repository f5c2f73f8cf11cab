// Rows of one head, and how they are packed for the tiles of gemm.h.
#pragma once
#include "gemm.h"

namespace AM_ISA {

template <class T>
struct HeadRows {
  const T* data;
  int64_t step, rows, width;
  const float* factor;    // of each row; may be null
  const uint8_t* flawed;  // rows that stand for zeros; may be null

  HeadRows(const am_heads& heads, int64_t batch, int64_t head, int64_t count, int64_t wide)
      : data((const T*)heads.data + batch * heads.step[0] + head * heads.step[1]),
        step(heads.step[2]),
        rows(count),
        width(wide),
        factor(nullptr),
        flawed(nullptr) {}
  const T* row(int64_t r) const { return r < rows && !(flawed && flawed[r]) ? data + r * step : nullptr; }
  float factor_of(int64_t r) const { return factor ? factor[r] : 1; }
};

template <class T>
static bool is_finite(const T* x, int64_t n) {
  F off = set1(0);
  each_vector(x, 0, n, 0, [&](F v, int, int64_t) { off = off + (v - v); });
  return sum_of_lanes(widen(off)) == 0;
}

// 1 / the length of the vector; 1 for the zero vector, which has no direction, and for what is so short that its inverse
// would leave float32.
template <class T>
static float one_over_length(const T* x, int64_t n) {
  D sum = zero();
  each_vector(x, 0, n, 0, [&](F v, int, int64_t) {
    D d = widen(v);
    sum = sum + d * d;
  });
  double square = sum_of_lanes(sum);
  return square > 1e-70 ? (float)(1 / sqrt(square)) : 1;
}

// Words that a row of that width takes.
template <class Words>
static inline int64_t words_for(int64_t width) {
  return (width + Words::IN_WORD - 1) / Words::IN_WORD;
}

// A row as words, zeros up to a whole vector of them.
template <class T>
static inline void row_to_words(Singles, const T* x, int64_t width, float factor, float* out) {
  F f = set1(factor);
  each_vector(x, 0, width, 0, [&](F v, int, int64_t i) { store(out + i, v * f); });
}
#if defined(AM_PAIRS)
static inline void row_to_words(Pairs, const bf16* x, int64_t width, float, float* out) {
  int64_t words = words_for<Pairs>(width);
  memset(out + (words - 1), 0, 4);
  memcpy(out, x, (size_t)width * 2);
  for (; words % W; ++words) out[words] = 0;
}
#endif

// Rows [first, last) across: panels of TILE_COLUMNS rows, [panel][word][TILE_COLUMNS]. last - first is a multiple of
// W. `scratch` holds W rows of words.
template <class Words, class T>
static void pack_across(const HeadRows<T>& from, int64_t first, int64_t last, float* out, float* scratch) {
  int64_t words = words_for<Words>(from.width), room = up_to(words, W);
  for (int64_t j = first; j < last; j += W) {
    for (int i = 0; i < W; ++i) {
      const T* x = from.row(j + i);
      if (x)
        row_to_words(Words(), x, from.width, from.factor_of(j + i), scratch + i * room);
      else
        memset(scratch + i * room, 0, (size_t)room * 4);
    }
    int64_t at = j - first;
    float* to = out + at / TILE_COLUMNS * TILE_COLUMNS * words + at % TILE_COLUMNS;
    for (int64_t k = 0; k < words; k += W) {
      F v[W];
      for (int i = 0; i < W; ++i) v[i] = load(scratch + i * room + k);
      transpose(v);
      int many = words - k < W ? (int)(words - k) : W;
      for (int i = 0; i < many; ++i) store(to + (k + i) * TILE_COLUMNS, v[i]);
    }
  }
}

// Rows [first, last) along: panels of TILE_COLUMNS elements, [panel][row or pair of rows][TILE_COLUMNS]; `panel_step`
// words lie from one panel to the next.
template <class T>
static void pack_along(Singles, const HeadRows<T>& from, int64_t first, int64_t last, float* out, int64_t panel_step) {
  for (int64_t r = first; r < last; ++r) {
    const T* x = from.row(r);
    F f = set1(from.factor_of(r < from.rows ? r : 0));
    for (int64_t j = 0; j < from.width; j += W) {
      int lanes = from.width - j < W ? (int)(from.width - j) : W;
      float* to = out + j / TILE_COLUMNS * panel_step + (r - first) * TILE_COLUMNS + j % TILE_COLUMNS;
      store(to, x ? load_lanes(x + j, lanes, 0) * f : set1(0));
    }
  }
}
#if defined(AM_PAIRS)
static void pack_along(Pairs, const HeadRows<bf16>& from, int64_t first, int64_t last, float* out, int64_t panel_step) {
  for (int64_t r = first; r < last; r += 2) {
    const bf16 *x = from.row(r), *y = from.row(r + 1);
    for (int64_t j = 0; j < from.width; j += W) {
      int lanes = from.width - j < W ? (int)(from.width - j) : W;
      float* to = out + j / TILE_COLUMNS * panel_step + (r - first) / 2 * TILE_COLUMNS + j % TILE_COLUMNS;
      F low = x ? load_lanes(x + j, lanes, 0) : set1(0), high = y ? load_lanes(y + j, lanes, 0) : set1(0);
      store(to, pair_up(low, high));
    }
  }
}
#endif

// Panels that hold vectors of `width` columns only as far as they are needed: the last may take one vector.
static inline int vectors_in_panel(int64_t width, int64_t panel) {
  return width - panel * TILE_COLUMNS > W ? 2 : 1;
}

// C (rows x width) += or = A B over `depth` words, tile by tile; rows is a multiple of TILE_ROWS, the panels of B lie
// `panel_step` apart and their rows b_step, C has room for whole panels' vectors.
template <class Words>
static void multiply(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t panel_step, int64_t depth,
                     float* c, int64_t c_step, int64_t rows, int64_t width, bool add, int64_t b_step = TILE_COLUMNS) {
  for (int64_t panel = 0; panel * TILE_COLUMNS < width; ++panel) {
    const float* right = b + panel * panel_step;
    float* to = c + panel * TILE_COLUMNS;
    if (vectors_in_panel(width, panel) == 2)
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        multiply_tile<Words, 2>(a + i * a_row, a_row, a_depth, right, depth, to + i * c_step, c_step, add, b_step);
    else
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        multiply_tile<Words, 1>(a + i * a_row, a_row, a_depth, right, depth, to + i * c_step, c_step, add, b_step);
  }
}

}  // namespace AM_ISA
