// The multiplication of small blocks: C += A B on packed panels, held in registers.
#pragma once
#include <string.h>

#include "rows.h"

namespace AM_ISA {

// One tile of C: as many rows as keep the multipliers busy without running out of registers.
constexpr int TILE_ROWS = W == 16 ? 8 : 4;
constexpr int TILE_COLUMNS = 2 * W;
// Steps of the inner sum between two visits to C, so that a panel of B stays in the first cache.
constexpr int64_t DEPTH = 256;

static inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What the words of a panel are: floats, or where the processor multiplies them, pairs of bfloat16, two
// neighbours along the inner sum in one word. Everything is stored as float, whatever its bits mean.
struct Singles {
  static constexpr int IN_WORD = 1;
  static inline F add_product(F a, F b, F c) { return fma(a, b, c); }
};
#if defined(AM_PAIRS)
struct Pairs {
  static constexpr int IN_WORD = 2;
  static inline F add_product(F a, F b, F c) { return add_product_of_pairs(a, b, c); }
};
#endif

// C (TILE_ROWS x VECTORS W, rows c_step apart) gets A B, added to what it holds or in its place. The
// sum over `depth` starts from 0: a long sum made of many of them does not grow its error with each term.
// A(i, k) lies at a[i a_row + k a_depth]; B(k, j) at b[k b_step + j].
template <class Words = Singles, int VECTORS = 2>
static inline void multiply_tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth,
                                 float* c, int64_t c_step, bool add, int64_t b_step = TILE_COLUMNS) {
  F sum[TILE_ROWS][VECTORS];
  for (int i = 0; i < TILE_ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = set1(0);
  for (int64_t k = 0; k < depth; ++k) {
    F right[VECTORS];
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b + k * b_step + j * W);
    for (int i = 0; i < TILE_ROWS; ++i) {
      F factor = set1(a[i * a_row + k * a_depth]);
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = Words::add_product(factor, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < TILE_ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * c_step + j * W;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// Panels of TILE_ROWS rows, inner sum first: x(rows, depth) becomes [rows / TILE_ROWS][depth][TILE_ROWS].
// index (may be null) tells which rows; rows beyond `rows` are 0.
template <class T>
static void pack_rows(const T* x, int64_t step, const int64_t* index, int64_t rows, int64_t depth, float* out) {
  for (int64_t panel = 0; panel < rows; panel += TILE_ROWS)
    for (int i = 0; i < TILE_ROWS; ++i) {
      float* to = out + panel * depth + i;
      const T* from = panel + i < rows ? x + (index ? index[panel + i] : panel + i) * step : nullptr;
      for (int64_t k = 0; k < depth; ++k) to[k * TILE_ROWS] = from ? to_float(from[k]) : 0.0f;
    }
}

// Panels of TILE_COLUMNS columns: x(depth, columns) becomes [columns / TILE_COLUMNS][depth][TILE_COLUMNS],
// the last one filled up with 0. `panel_step` floats lie from one panel to the next.
template <class T>
static void pack_columns(const T* x, int64_t step, const int64_t* index, int64_t depth, int64_t columns, float* out,
                         int64_t panel_step) {
  for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
    int64_t wide = columns - j < TILE_COLUMNS ? columns - j : TILE_COLUMNS;
    float* to = out + j / TILE_COLUMNS * panel_step;
    for (int64_t k = 0; k < depth; ++k, to += TILE_COLUMNS) {
      const T* from = x + (index ? index[k] : k) * step + j;
      int64_t i = 0;
      for (; i + W <= wide; i += W) store(to + i, load(from + i));
      for (; i < wide; ++i) to[i] = to_float(from[i]);
      for (; i < TILE_COLUMNS; ++i) to[i] = 0;
    }
  }
}

// The same of the transpose: x(columns, depth), with columns of 0 up to `padded`.
template <class T>
static void pack_transposed(const T* x, int64_t step, int64_t columns, int64_t padded, int64_t depth, float* out) {
  for (int64_t j = 0; j < padded; j += W) {  // W columns, half a panel
    float* to = out + j / TILE_COLUMNS * TILE_COLUMNS * depth + j % TILE_COLUMNS;
    F v[W];
    for (int64_t k = 0; k < depth; k += W) {
      int many = depth - k < W ? (int)(depth - k) : W;
      for (int i = 0; i < W; ++i)
        v[i] = j + i < columns ? load_lanes(x + (j + i) * step + k, many, 0) : set1(0);
      transpose(v);
      for (int i = 0; i < many; ++i) store(to + (k + i) * TILE_COLUMNS, v[i]);
    }
  }
}

}  // namespace AM_ISA
