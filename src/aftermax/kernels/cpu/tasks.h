// What the ways of attention share: sizes of blocks, how tasks are handed out, how a row of the result is stored.
#pragma once
#include "row_maps.h"
#include "visible.h"

namespace AM_ISA {

constexpr int64_t QUERY_ROWS = 64;
constexpr int64_t KEY_TILE = 128;

// Rows of queries beside each other, a multiple of TILE_ROWS, and how many keys of a tile they are taken against: a
// multiple of W.
struct Band {
  int64_t row, rows, many;
};

// Calls step(band) for the rows [first, first + count), counted from 0, and the keys [from, from + many), with as many
// keys as the rows of the band see the last of: for all rows at once where that is the same, or as few as TILE_ROWS.
// `within`: all rows see all of these keys.
template <class Step>
static inline void each_band_of(const am_attention& a, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t from,
                                int64_t many, bool within, Step step) {
  if (within) return step(Band{0, up_to(count, TILE_ROWS), many});
  Band band = {0, 0, 0};
  for (int64_t row = 0; row < count; row += TILE_ROWS) {
    int64_t reach = reach_of(a.visible, batch, head, first + row, least(TILE_ROWS, count - row), from, many, a.keys);
    if (reach != band.many) {
      if (band.many > 0) step(band);
      band = {row, 0, reach};
    }
    band.rows += TILE_ROWS;
  }
  if (band.many > 0) step(band);
}

// Runs task(i, scratch) for i in [0, count): whoever is free takes the next. 1 where there was no memory.
template <class Task>
static int share(am_parallel with, int64_t count, int64_t floats, const Task& task) {
  int failed = 0;
  int64_t next = 0, workers = least(with.threads, count);
  parallel(with, workers, 1, [&](int64_t, int64_t) {
    Scratch scratch(floats);
    if (!scratch.data) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (;;) {
      int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) return;
      task(i, scratch.data);
    }
  });
  return failed;
}

// By what a query is multiplied before it meets the keys.
template <class T>
static float query_factor(const RowOf& row, const T* x) {
  const am_attention& a = *row.a;
  return a.scale * row.per(a.row_scale, 1) * (a.cosine ? one_over_length(x, a.width) : 1);
}

template <class T>
static void store_out_row(const am_heads& to, const RowOf& row, const float* from, float factor, int64_t width) {
  T* y = (T*)to.data + row.batch * to.step[0] + row.head * to.step[1] + row.row * to.step[2];
  F f = set1(factor);
  each_vector(from, 0, width, 0, [&](F v, int lanes, int64_t i) { put(y + i, v * f, lanes); });
}

static inline float* stats_of(const am_attention& a, const RowOf& row, float* otherwise) {
  return a.stats ? a.stats + ((row.batch * a.heads + row.head) * a.queries + row.row) * AM_STATS : otherwise;
}
// The same, all 0: no map fills all of them.
static inline float* new_stats_of(const am_attention& a, const RowOf& row, float* otherwise) {
  return (float*)memset(stats_of(a, row, otherwise), 0, AM_STATS * sizeof(float));
}

}  // namespace AM_ISA
