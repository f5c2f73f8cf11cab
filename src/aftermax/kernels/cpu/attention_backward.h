// The gradients of attention, in memory that grows with the rows and not with their square, and with every sum in one
// order: the result does not depend on the threads.
//
// A task takes one head of keys and every splits-th tile of them, and walks the heads and rows of queries that see it:
// scores and weights are made again from what the forward pass left of each row, the gradients of keys and values are
// finished for its tiles, and those of queries are added up in a part of their own. The parts are added in order at
// the end. Everything is float32.
#pragma once
#include "attention.h"

namespace AM_ISA {

// Tasks that there should be, where there are fewer heads: a number of the shape alone, not of the threads.
constexpr int64_t TASKS = 16;

template <class T>
struct Backward {
  const am_attention_backward* b;
  const am_attention& a;
  Packed<Singles, T> p;  // only its flaws and lengths
  int64_t group, splits, rows, deep, wide;
  Scratch parts;  // of the gradients of queries: (batch, heads, splits, rows, deep)

  explicit Backward(const am_attention_backward* backward)
      : b(backward), a(backward->forward), p(&backward->forward, most(1, a.batch * a.kv_heads)), group(a.heads / a.kv_heads),
        splits(most(1, least(least((TASKS + p.heads - 1) / p.heads, 8), p.tiles()))),
        rows(up_to(a.queries, TILE_ROWS)), deep(up_to(a.width, TILE_COLUMNS)), wide(up_to(a.value_width, TILE_COLUMNS)) {}

  int64_t tiles_of(int64_t split) const { return (p.tiles() - split + splits - 1) / splits; }
  float* part(int64_t batch, int64_t head, int64_t split) const {
    return parts.data + ((batch * a.heads + head) * splits + split) * rows * deep;
  }
  RowOf row(int64_t batch, int64_t head, int64_t r) const { return {&a, batch, head, r}; }
  HeadRows<T> queries(int64_t batch, int64_t head) const { return HeadRows<T>(a.query, batch, head, a.queries, a.width); }

  // ---- one task ----

  struct Room {
    float *query, *grad, *delta, *of_extra;           // all rows of a head
    float *keys, *values, *keys_along, *scratch;      // one tile of keys
    float *weights, *slopes;                          // QUERY_ROWS x KEY_TILE
    float *grad_keys, *grad_values;                   // all tiles of the task
    int64_t size = 0;

    Room(const Backward& w, float* memory) {
      auto take = [&](float** at, int64_t n) {
        *at = memory ? memory + size : nullptr;
        size += up_to(n, 16);
      };
      int64_t keys_here = w.tiles_of(0) * KEY_TILE;
      take(&query, w.rows * w.deep);
      take(&grad, w.rows * w.wide);
      take(&delta, w.rows);
      take(&of_extra, w.rows);
      take(&keys, KEY_TILE * w.a.width);
      take(&values, KEY_TILE * w.a.value_width);
      take(&keys_along, KEY_TILE * w.deep);
      take(&scratch, W * most(up_to(w.a.width, W), up_to(w.a.value_width, W)));
      take(&weights, QUERY_ROWS * KEY_TILE);
      take(&slopes, QUERY_ROWS * KEY_TILE);
      take(&grad_keys, keys_here * w.deep);
      take(&grad_values, keys_here * w.wide);
    }
  };

  template <class Map>
  void task(int64_t kv, int64_t split, float* memory) const {
    Room room(*this, memory);
    int64_t batch = kv / a.kv_heads;
    memset(room.grad_keys, 0, (size_t)(tiles_of(split) * KEY_TILE * deep) * 4);
    memset(room.grad_values, 0, (size_t)(tiles_of(split) * KEY_TILE * wide) * 4);
    for (int64_t h = kv % a.kv_heads * group; h < (kv % a.kv_heads + 1) * group; ++h) {
      memset(part(batch, h, split), 0, (size_t)(rows * deep) * 4);
      take_rows(batch, h, room);
      for (int64_t i = 0; i < tiles_of(split); ++i) tile<Map>(kv, batch, h, split, i, room);
    }
    for (int64_t i = 0; i < tiles_of(split); ++i) store_tile(kv, split, i, room);
  }

  // Rows that gave NaN because of what they saw, or where the query is flawed, have no gradient.
  bool dead(const RowOf& row) const {
    const float* stats = stats_of(a, row, nullptr);
    return stats[0] != stats[0];
  }

  void take_rows(int64_t batch, int64_t head, const Room& room) const {
    HeadRows<T> query = queries(batch, head), grad(b->grad, batch, head, a.queries, a.value_width);
    HeadRows<T> out(a.out, batch, head, a.queries, a.value_width);
    for (int64_t r = 0; r < rows; ++r) {
      float *q = room.query + r * deep, *g = room.grad + r * wide;
      memset(q, 0, (size_t)deep * 4);
      memset(g, 0, (size_t)wide * 4);
      room.delta[r] = room.of_extra[r] = 0;
      if (r >= a.queries || dead(row(batch, head, r)) || !is_finite(query.row(r), a.width)) continue;
      row_to_words(Singles(), query.row(r), a.width, query_factor(row(batch, head, r), query.row(r)), q);
      row_to_words(Singles(), grad.row(r), a.value_width, 1, g);
      room.delta[r] = (float)dot(g, out.row(r), a.value_width);
      if (a.extra)
        room.of_extra[r] =
            (float)dot(g, a.extra + ((batch * a.heads + head) * a.queries + r) * a.value_width, a.value_width);
    }
  }
  template <class Y>
  static double dot(const float* x, const Y* y, int64_t n) {
    D sum = zero();
    each_vector(y, 0, n, 0, [&](F v, int lanes, int64_t i) { sum = sum + widen(v) * widen(load_lanes(x + i, lanes, 0)); });
    return sum_of_lanes(sum);
  }

  template <class Map>
  void tile(int64_t kv, int64_t batch, int64_t head, int64_t split, int64_t i, const Room& room) const {
    int64_t from = (split + i * splits) * KEY_TILE, many = up_to(least(KEY_TILE, a.keys - from), W);
    HeadRows<T> keys = p.key_rows(kv);
    pack_across<Singles>(keys, from, from + many, room.keys, room.scratch);
    pack_across<Singles>(p.value_rows(kv), from, from + many, room.values, room.scratch);
    memset(room.keys_along, 0, (size_t)(many * deep) * 4);
    for (int64_t j = 0; j < many; ++j)
      if (keys.row(from + j))
        row_to_words(Singles(), keys.row(from + j), a.width, keys.factor_of(from + j), room.keys_along + j * deep);
    float *grad_keys = room.grad_keys + i * KEY_TILE * deep, *grad_values = room.grad_values + i * KEY_TILE * wide;
    float* grad_query = part(batch, head, split);

    for (int64_t first = 0; first < a.queries; first += QUERY_ROWS) {
      int64_t count = least(QUERY_ROWS, a.queries - first);
      KeyRange some = some_see(a.visible, first, count, a.keys);
      if (some.high <= from || some.low >= from + many) continue;
      bool within = all_see_all(a.visible, first, count, from, many, a.keys);
      const float *query = room.query + first * deep, *grad = room.grad + first * wide;
      int64_t begin = 0, end = 0;  // of the rows that see any of the keys
      each_band_of(a, batch, head, first, count, from, many, within, [&](Band band) {
        float *weights = room.weights + band.row * KEY_TILE, *slopes = room.slopes + band.row * KEY_TILE;
        if (end == 0) begin = end = band.row;
        memset(room.weights + end * KEY_TILE, 0, (size_t)((band.row - end) * KEY_TILE) * 4);
        memset(room.slopes + end * KEY_TILE, 0, (size_t)((band.row - end) * KEY_TILE) * 4);
        end = least(band.row + band.rows, count);
        multiply<Singles>(query + band.row * deep, deep, 1, room.keys, TILE_COLUMNS * a.width, a.width, weights, KEY_TILE,
                          band.rows, band.many, false);
        multiply<Singles>(grad + band.row * wide, wide, 1, room.values, TILE_COLUMNS * a.value_width, a.value_width, slopes,
                          KEY_TILE, band.rows, band.many, false);
        for (int64_t r = 0; r < least(band.rows, count - band.row); ++r) {
          int64_t at = first + band.row + r;
          float *w = weights + r * KEY_TILE, *s = slopes + r * KEY_TILE;
          differentiate<Map>(row(batch, head, at), from, band.many, within, room.delta[at], room.of_extra[at], w, s);
          memset(w + band.many, 0, (size_t)(many - band.many) * 4);
          memset(s + band.many, 0, (size_t)(many - band.many) * 4);
        }
        // (rows x keys) (keys x width)
        multiply<Singles>(slopes, KEY_TILE, 1, room.keys_along, TILE_COLUMNS, band.many,
                          grad_query + (first + band.row) * deep, deep, band.rows, a.width, true, deep);
      });
      // (keys x rows) (rows x width)
      multiply<Singles>(room.weights + begin * KEY_TILE, 1, KEY_TILE, grad + begin * wide, TILE_COLUMNS, end - begin,
                        grad_values, wide, many, a.value_width, true, wide);
      multiply<Singles>(room.slopes + begin * KEY_TILE, 1, KEY_TILE, query + begin * deep, TILE_COLUMNS, end - begin, grad_keys,
                        deep, many, a.width, true, deep);
    }
  }

  // Scores and gradients of weights become weights and gradients of scores.
  template <class Map>
  void differentiate(const RowOf& row, int64_t from, int64_t many, bool within, float delta, float of_extra, float* s,
                     float* dp) const {
    if (dead(row)) {
      memset(s, 0, (size_t)many * 4);
      memset(dp, 0, (size_t)many * 4);
      return;
    }
    if (!within || a.visible.stretch || a.visible.slopes) {
      RowView view(a.visible, row.batch, row.head, row.row, a.keys);
      view.shift(s, from, many);
      if (!within) view.hide(s, from, many);
      // whatever a hidden key and its value have made of the product
      for (int64_t j = 0; !within && j < many; j += W)
        store(dp + j, select_below(set1(-INFINITY), load(s + j), load(dp + j), set1(0)));
    }
    typename Map::Back back(row, stats_of(a, row, nullptr), delta, of_extra);
    for (int64_t j = 0; j < many; j += W) {
      F w, slope;
      back.step(load(s + j), load(dp + j), &w, &slope);
      store(s + j, w);
      store(dp + j, slope);
    }
    if (a.visible.stretch) RowView(a.visible, row.batch, row.head, row.row, a.keys).stretch(dp, from, many);
  }

  // ---- results ----

  // The gradient of a vector of which f x was compared (f: its factor, with 1 / its length where cosines are).
  void store_vector(const am_heads& to, const RowOf& at, const T* x, const float* g, float f, float over_length) const {
    T* y = (T*)to.data + at.batch * to.step[0] + at.head * to.step[1] + at.row * to.step[2];
    float along = a.cosine ? (float)(dot(g, x, a.width) * over_length * over_length) : 0;
    F factor = set1(f), back = set1(along);
    each_vector(g, 0, a.width, 0, [&](F v, int lanes, int64_t i) {
      put(y + i, (v - back * load_lanes(x + i, lanes, 0)) * factor, lanes);
    });
  }
  static void store_zeros(const am_heads& to, const RowOf& at, int64_t width) {
    T* y = (T*)to.data + at.batch * to.step[0] + at.head * to.step[1] + at.row * to.step[2];
    memset(y, 0, (size_t)width * sizeof(T));
  }

  void store_tile(int64_t kv, int64_t split, int64_t i, const Room& room) const {
    int64_t from = (split + i * splits) * KEY_TILE;
    for (int64_t j = 0; j < KEY_TILE && from + j < a.keys; ++j) {
      RowOf at = {&a, kv / a.kv_heads, kv % a.kv_heads, from + j};
      if (p.flawed_in(kv)[from + j]) {
        store_zeros(b->grad_key, at, a.width);
        store_zeros(b->grad_value, at, a.value_width);
        continue;
      }
      float over_length = a.cosine ? p.factors_in(kv)[from + j] : 1;
      HeadRows<T> key(a.key, at.batch, at.head, a.keys, a.width);
      store_vector(b->grad_key, at, key.row(from + j), room.grad_keys + (i * KEY_TILE + j) * deep, over_length, over_length);
      store_out_row<T>(b->grad_value, at, room.grad_values + (i * KEY_TILE + j) * wide, 1, a.value_width);
    }
  }

  void store_queries(int64_t batch, int64_t head, int64_t begin, int64_t end) const {
    HeadRows<T> query = queries(batch, head);
    for (int64_t r = begin; r < end; ++r) {
      RowOf at = row(batch, head, r);
      float* of_scale = b->grad_row_scale ? b->grad_row_scale + (batch * a.heads + head) * a.queries + r : nullptr;
      const T* x = query.row(r);
      if (p.tiles() == 0 || dead(at) || !is_finite(x, a.width)) {
        store_zeros(b->grad_query, at, a.width);
        if (of_scale) *of_scale = 0;
        continue;
      }
      float* sum = part(batch, head, 0) + r * deep;
      for (int64_t k = 1; k < splits; ++k) {
        const float* more = part(batch, head, k) + r * deep;
        for (int64_t j = 0; j < deep; j += W) store(sum + j, load(sum + j) + load(more + j));
      }
      float over_length = a.cosine ? one_over_length(x, a.width) : 1;
      if (of_scale) *of_scale = (float)(dot(sum, x, a.width) * over_length * a.scale);
      store_vector(b->grad_query, at, x, sum, query_factor(at, x), over_length);
    }
  }

  int run(am_parallel with) {
    if (!p.look(with, 0) || !parts.grow(a.batch * a.heads * splits * rows * deep)) return 1;
    Room size(*this, nullptr);
    int failed = share(with, p.heads * splits, size.size, [&](int64_t i, float* memory) {
      int64_t kv = i / splits, split = i % splits;
      switch (a.map) {
        case AM_MAP_SOFTMAX: return task<SoftmaxMap>(kv, split, memory);
        case AM_MAP_SIGMOID: return task<SigmoidMap>(kv, split, memory);
        case AM_MAP_RELU: return task<ReluMap>(kv, split, memory);
        case AM_MAP_SOFTPLUS: return task<SoftplusMap>(kv, split, memory);
        case AM_MAP_LSSAR: return task<LssarMap>(kv, split, memory);
        case AM_MAP_CLIPPED: return task<ClippedMap>(kv, split, memory);
      }
    });
    if (failed) return failed;
    int64_t blocks = (a.queries + QUERY_ROWS - 1) / QUERY_ROWS;
    parallel(with, a.batch * a.heads * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t head = i / blocks, first = i % blocks * QUERY_ROWS;
        store_queries(head / a.heads, head % a.heads, first, least(first + QUERY_ROWS, a.queries));
      }
    });
    return 0;
  }
};

template <class T>
static int attention_backward_of(const am_attention_backward* b, am_parallel with) {
  return Backward<T>(b).run(with);
}

}  // namespace AM_ISA
