// Attention over heads, forward: blocks of query rows against tiles of keys, never the whole matrix.
//
// Keys and values of a few heads at a time are packed once. A task takes QUERY_ROWS rows of one head. A map that streams
// (row_maps.h) walks the tiles of keys once: scores = query key^T, weights in place of scores, out += weights value. A
// map that has to see its row first keeps the scores of fewer rows, all keys of them, in a strip.
#pragma once
#include "few_queries.h"
#include "tasks.h"

namespace AM_ISA {

// Floats that the strip of one task may hold, where that leaves it TILE_ROWS rows: 512 KB.
constexpr int64_t STRIP = 1 << 17;

// Keys, values and what is to be known of them, of the heads [first, first + heads) of all that have any.
template <class Words, class T>
struct Packed {
  const am_attention* a;
  int64_t first, heads;
  int64_t words, padded, depth;  // words of a key; keys up to whole tiles, and up to whole vectors
  int64_t key_room, value_room;  // floats of a head
  Scratch keys, values, factors;
  uint8_t *flawed = nullptr, *tile_flawed = nullptr;

  Packed(const am_attention* attention, int64_t at_once)
      : a(attention),
        first(0),
        heads(at_once),
        words(words_for<Words>(a->width)),
        padded(up_to(a->keys, KEY_TILE)),
        depth(up_to(a->keys, W)),
        key_room(up_to(depth, TILE_COLUMNS) * words),
        value_room(up_to(a->value_width, TILE_COLUMNS) * (depth / Words::IN_WORD)) {}
  ~Packed() {
    free(flawed);
    free(tile_flawed);
  }
  int64_t tiles() const { return padded / KEY_TILE; }
  int64_t value_panel() const { return depth / Words::IN_WORD * TILE_COLUMNS; }  // floats from one to the next
  const uint8_t* flawed_in(int64_t head) const { return flawed + (head - first) * padded; }
  const uint8_t* tiles_flawed_in(int64_t head) const { return tile_flawed + (head - first) * tiles(); }
  const float* factors_in(int64_t head) const { return factors.data + (head - first) * padded; }
  const float* keys_in(int64_t head) const { return keys.data + (head - first) * key_room; }
  const float* values_in(int64_t head) const { return values.data + (head - first) * value_room; }

  // Factors of the keys of one head are 1 / their length for cosines, and multiply the floats; pairs keep
  // their digits and have their scores multiplied.
  HeadRows<T> key_rows(int64_t head) const {
    HeadRows<T> rows(a->key, head / a->kv_heads, head % a->kv_heads, a->keys, a->width);
    rows.flawed = flawed_in(head);
    if (a->cosine) rows.factor = factors_in(head);
    return rows;
  }
  HeadRows<T> value_rows(int64_t head) const {
    HeadRows<T> rows(a->value, head / a->kv_heads, head % a->kv_heads, a->keys, a->value_width);
    rows.flawed = flawed_in(head);
    return rows;
  }

  // Flaws and lengths of as many heads from `from` on; `pack` may follow for the same heads.
  bool look(am_parallel with, int64_t from) {
    first = from;
    if (!flawed) flawed = (uint8_t*)malloc((size_t)(heads * padded) + 1);
    if (!tile_flawed) tile_flawed = (uint8_t*)malloc((size_t)(heads * tiles()) + 1);
    if (!flawed || !tile_flawed || (a->cosine && !factors.grow(heads * padded))) return false;
    parallel(with, here() * tiles(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) look_at(i / tiles(), i % tiles());
    });
    return true;
  }
  int64_t here() const { return least(heads, a->batch * a->kv_heads - first); }
  void look_at(int64_t i, int64_t tile) {
    int64_t head = first + i, j = tile * KEY_TILE, end = least(j + KEY_TILE, a->keys);
    HeadRows<T> key(a->key, head / a->kv_heads, head % a->kv_heads, a->keys, a->width);
    HeadRows<T> value(a->value, head / a->kv_heads, head % a->kv_heads, a->keys, a->value_width);
    bool all_sound = true;
    for (; j < end; ++j) {
      bool sound = is_finite(key.row(j), a->width) && is_finite(value.row(j), a->value_width);
      flawed[i * padded + j] = !sound;
      all_sound = all_sound && sound;
      if (a->cosine) factors.data[i * padded + j] = sound ? one_over_length(key.row(j), a->width) : 1;
    }
    for (; j < (tile + 1) * KEY_TILE; ++j) {
      flawed[i * padded + j] = 0;
      if (a->cosine) factors.data[i * padded + j] = 1;
    }
    tile_flawed[i * tiles() + tile] = !all_sound;
  }

  bool pack(am_parallel with) {
    if (!keys.grow(heads * key_room) || !values.grow(heads * value_room)) return false;
    int failed = 0;
    parallel(with, here() * tiles(), 2, [&](int64_t begin, int64_t end) {
      Scratch scratch(W * up_to(words, W));
      if (!scratch.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t i = begin; i < end; ++i) {
        int64_t head = i / tiles(), from = i % tiles() * KEY_TILE, to = least(from + KEY_TILE, depth);
        pack_across<Words>(key_rows(first + head), from, to, keys.data + head * key_room + from * words, scratch.data);
        pack_along(Words(), value_rows(first + head), from, to,
                   values.data + head * value_room + from / Words::IN_WORD * TILE_COLUMNS, value_panel());
      }
    });
    return !failed;
  }
};

// The rows of queries of a task, as words, and by what their scores have to be multiplied.
template <class Words, class T>
struct Queries {
  const Packed<Words, T>& p;
  int64_t batch, head, kv, first, count, padded;
  float* words;                      // (padded, words of a row)
  float factor[QUERY_ROWS];          // of the scores
  bool flawed[QUERY_ROWS], poisoned[QUERY_ROWS];
  RowOf row(int64_t r) const { return {p.a, batch, head, first + r}; }

  Queries(const Packed<Words, T>& packed, int64_t b, int64_t h, int64_t from, int64_t many, float* room)
      : p(packed), batch(b), head(h), kv(b * p.a->kv_heads + h / (p.a->heads / p.a->kv_heads)), first(from), count(many),
        padded(up_to(many, TILE_ROWS)), words(room) {
    const am_attention& a = *p.a;
    HeadRows<T> query(a.query, b, h, a.queries, a.width);
    for (int64_t r = 0; r < padded; ++r) {
      float* to = words + r * room_of_row();
      const T* x = r < count ? query.row(first + r) : nullptr;
      flawed[r] = x && !is_finite(x, a.width);
      poisoned[r] = false;
      if (!x || flawed[r]) {
        memset(to, 0, (size_t)room_of_row() * 4);
        factor[r] = 0;
        continue;
      }
      factor[r] = query_factor(row(r), x);
      row_to_words(Words(), x, a.width, Words::IN_WORD == 1 ? factor[r] : 1, to);
    }
  }
  int64_t room_of_row() const { return up_to(p.words, W); }

  // Scores of the rows of the band against the keys from `from` on.
  void scores(Band band, int64_t from, float* s, int64_t s_step) const {
    const float* keys = p.keys_in(kv) + from * p.words;
    multiply<Words>(words + band.row * room_of_row(), room_of_row(), 1, keys, TILE_COLUMNS * p.words, p.words,
                    s + band.row * s_step, s_step, band.rows, band.many, false);
  }

  // What the scores of row r are beside the product: factors, biases, hidden keys. `within`: the row sees all of them.
  void finish_scores(int64_t r, int64_t from, int64_t many, float* s, bool within) {
    const am_attention& a = *p.a;
    if (Words::IN_WORD > 1) {
      F f = set1(factor[r]);
      const float* of_key = a.cosine ? p.factors_in(kv) + from : nullptr;
      for (int64_t j = 0; j < many; j += W) {
        F v = load(s + j) * f;
        store(s + j, of_key ? v * load(of_key + j) : v);
      }
    }
    if (!within || a.visible.stretch || a.visible.slopes) {
      RowView view(a.visible, batch, head, first + r, a.keys);
      view.shift(s, from, many);
      if (!within) view.hide(s, from, many);
    }
    if (p.tiles_flawed_in(kv)[from / KEY_TILE] || flawed[r]) look_for_poison(r, from, many, s);
  }
  void look_for_poison(int64_t r, int64_t from, int64_t many, const float* s) {
    const uint8_t* flaws = p.flawed_in(kv) + from;
    for (int64_t j = 0; j < many; ++j)
      if ((flaws[j] || flawed[r]) && s[j] != -INFINITY) poisoned[r] = true;
  }
  bool within(int64_t from, int64_t many) const { return all_see_all(p.a->visible, first, count, from, many, p.a->keys); }
  template <class Step>
  void each_band(int64_t from, int64_t many, bool within, Step step) const {
    each_band_of(*p.a, batch, head, first, count, from, many, within, step);
  }
  KeyRange seen() const {
    KeyRange some = some_see(p.a->visible, first, count, p.a->keys);
    return {some.low / TILE_COLUMNS * TILE_COLUMNS, some.high};
  }
};

// Values weighted by the weights of the rows of the band, added to what is there.
template <class Words, class T>
static void add_values(const Queries<Words, T>& q, Band band, const float* weights, int64_t step, int64_t from, float* out,
                       int64_t out_step, bool add) {
  const auto& p = q.p;
  const float* values = p.values_in(q.kv) + from / Words::IN_WORD * TILE_COLUMNS;
  multiply<Words>(weights + band.row * step, step, 1, values, p.value_panel(), band.many / Words::IN_WORD,
                  out + band.row * out_step, out_step, band.rows, p.a->value_width, add);
}

template <class Words, class T>
static void store_out(const Queries<Words, T>& q, const float* out, int64_t step, const float* factors) {
  const am_attention& a = *q.p.a;
  float nothing[AM_STATS];
  for (int64_t r = 0; r < q.count; ++r) {
    if (q.poisoned[r]) stats_of(a, q.row(r), nothing)[0] = NAN;
    store_out_row<T>(a.out, q.row(r), out + r * step, q.poisoned[r] ? NAN : factors[r], a.value_width);
  }
}

// ---- maps that stream ----------------------------------------------------------------------------

template <class Map, class Words, class T>
static void attend_streaming(const Packed<Words, T>& p, int64_t batch, int64_t head, int64_t first, int64_t count, float* room) {
  const am_attention& a = *p.a;
  int64_t wide = up_to(a.value_width, TILE_COLUMNS), step = KEY_TILE / Words::IN_WORD;  // of the weights
  float *scores = room, *weights = scores + QUERY_ROWS * KEY_TILE, *out = weights + QUERY_ROWS * KEY_TILE;
  Queries<Words, T> q(p, batch, head, first, count, out + QUERY_ROWS * wide);
  typename Map::State state[QUERY_ROWS];
  for (int64_t r = 0; r < count; ++r) Map::open(state[r], q.row(r));
  memset(out, 0, (size_t)(q.padded * wide) * 4);
  memset(weights, 0, (size_t)(q.padded * step) * 4);  // also of the rows beyond the last

  KeyRange seen = q.seen();
  for (int64_t from = seen.low; from < seen.high;) {
    // tiles begin where tiles begin, so that each has its flag
    int64_t end = (from / KEY_TILE + 1) * KEY_TILE;
    int64_t many = up_to(least(end, seen.high) - from, W);
    bool within = q.within(from, many);
    q.each_band(from, many, within, [&](Band band) {
      q.scores(band, from, scores, KEY_TILE);
      for (int64_t r = band.row; r < least(band.row + band.rows, count); ++r) {
        float *s = scores + r * KEY_TILE, *w = weights + r * step;
        q.finish_scores(r, from, band.many, s, within);
        scale_row(out + r * wide, wide, Map::template weigh<Words>(state[r], s, w, band.many));
      }
      add_values(q, band, weights, step, from, out, wide, true);
    });
    from = end;
  }
  float factors[QUERY_ROWS], nothing[AM_STATS];
  for (int64_t r = 0; r < count; ++r) factors[r] = Map::close(state[r], q.row(r), new_stats_of(a, q.row(r), nothing));
  store_out(q, out, wide, factors);
}

// ---- maps that see their row first ------------------------------------------------------------------

template <class Map, class Words, class T>
static void attend_by_strip(const Packed<Words, T>& p, int64_t batch, int64_t head, int64_t first, int64_t count, float* room) {
  const am_attention& a = *p.a;
  int64_t wide = up_to(a.value_width, TILE_COLUMNS);
  float *out = room, *words = out + QUERY_ROWS * wide, *strip = words + QUERY_ROWS * up_to(p.words, W);
  Queries<Words, T> q(p, batch, head, first, count, words);
  KeyRange seen = q.seen();
  int64_t from = seen.low / KEY_TILE * KEY_TILE, length = most(up_to(seen.high, W) - from, 0);
  int64_t strip_step = length + TILE_COLUMNS;  // rows a power of two apart would share their places in the cache
  float* weights = strip + q.padded * strip_step;
  typename Map::State state[QUERY_ROWS];
  for (int64_t r = 0; r < count; ++r) Map::open(state[r], q.row(r));
  int64_t reach[QUERY_ROWS / TILE_ROWS] = {};  // how far the rows of a band have come
  for (int64_t at = 0; at < length; at += KEY_TILE) {
    int64_t many = least(KEY_TILE, length - at);
    bool within = q.within(from + at, many);
    q.each_band(from + at, many, within, [&](Band band) {
      q.scores(band, from + at, strip + at, strip_step);
      for (int64_t r = band.row; r < least(band.row + band.rows, count); ++r) {
        float* s = strip + r * strip_step;
        q.finish_scores(r, from + at, band.many, s + at, within);
        Map::first(state[r], s + at, band.many, s, at);
      }
      for (int64_t r = band.row; r < band.row + band.rows; ++r) {  // 0 for what was left out on the way
        int64_t* so_far = &reach[r / TILE_ROWS];
        memset(strip + r * strip_step + *so_far, 0, (size_t)(at - *so_far) * 4);
        if (r % TILE_ROWS == TILE_ROWS - 1) *so_far = at + band.many;
      }
    });
  }
  int64_t step = strip_step / Words::IN_WORD;
  memset(weights, 0, (size_t)(q.padded * step) * 4);
  memset(out, 0, (size_t)(q.padded * wide) * 4);
  auto sum_values = [&] {
    for (int64_t r = 0; r < q.padded; r += TILE_ROWS)
      add_values(q, Band{r, TILE_ROWS, reach[r / TILE_ROWS]}, weights, step, from, out, wide, false);
  };
  float factors[QUERY_ROWS], extra_factors[QUERY_ROWS];
  for (int64_t r = 0; r < count; ++r) {
    typename Map::Row row = Map::settle(state[r], state[r], q.row(r));
    D total = zero(), second = zero();
    const float* f = strip + r * strip_step;
    for (int64_t j = 0; j < reach[r / TILE_ROWS]; j += W) {
      F w = row.of(load(f + j));
      put_weights<Words>(weights + r * step, j, w);
      total = total + widen(w);
      if (a.extra) second = second + widen(row.second_of(load(f + j)));
    }
    float nothing[AM_STATS];
    factors[r] = Map::close(state[r], row, q.row(r), sum_of_lanes(total), sum_of_lanes(second),
                            new_stats_of(a, q.row(r), nothing), &extra_factors[r]);
  }
  sum_values();
  store_out(q, out, wide, factors);
  if (!a.extra) return;
  for (int64_t r = 0; r < count; ++r) {
    typename Map::Row row = Map::settle(state[r], state[r], q.row(r));
    for (int64_t j = 0; j < reach[r / TILE_ROWS]; j += W)
      put_weights<Words>(weights + r * step, j, row.second_of(load(strip + r * strip_step + j)));
  }
  sum_values();
  for (int64_t r = 0; r < count; ++r) {
    float* to = a.extra + ((batch * a.heads + head) * a.queries + first + r) * a.value_width;
    F f = set1(q.poisoned[r] ? 0 : extra_factors[r]);
    each_vector(out + r * wide, 0, a.value_width, 0, [&](F v, int lanes, int64_t i) { put(to + i, v * f, lanes); });
  }
}

// ---- tasks -----------------------------------------------------------------------------------------

// Heads that are packed at a time: enough to keep the threads busy, and no more, so that the memory that they take is
// used again; nor more than PACKED_BYTES of them, but one for each thread.
constexpr int64_t TASKS_PER_THREAD = 32;
constexpr int64_t PACKED_BYTES = 64 << 20;

template <class Words>
static int64_t heads_at_once(const am_attention* a, int64_t threads) {
  int64_t rows = a->heads / a->kv_heads * a->queries, all = a->batch * a->kv_heads;
  int64_t busy = (TASKS_PER_THREAD * threads * QUERY_ROWS + rows - 1) / rows;
  int64_t bytes = a->keys * (a->width + a->value_width) * 4 / Words::IN_WORD;
  return most(1, least(all, least(busy, most(threads, PACKED_BYTES / bytes))));
}

template <class Words, class T>
static int attention_as(const am_attention* a, am_parallel with) {
  if (are_few(a)) return attend_few<T>(a, with);
  int64_t all = a->batch * a->kv_heads, group = a->heads / a->kv_heads;
  Packed<Words, T> p(a, heads_at_once<Words>(a, with.threads));
  int64_t wide = up_to(a->value_width, TILE_COLUMNS), row_words = up_to(p.words, W);
  bool by_strip = am_sees_row_first(a->map);
  int64_t rows = QUERY_ROWS, room = QUERY_ROWS * (wide + row_words);
  if (by_strip) {
    while (rows > TILE_ROWS && rows * p.padded > STRIP) rows /= 2;
    room += rows * (p.padded + TILE_COLUMNS) * 2;
  } else {
    room += 2 * QUERY_ROWS * KEY_TILE;
  }
  int64_t blocks = (a->queries + rows - 1) / rows;
  for (int64_t kv = 0; kv < all; kv += p.heads) {
    if (!p.look(with, kv) || !p.pack(with)) return 1;
    int failed = share(with, p.here() * group * blocks, room, [&](int64_t i, float* scratch) {
      // the longest rows of a causal head first
      int64_t head = kv * group + i / blocks, first = (blocks - 1 - i % blocks) * rows, count = least(rows, a->queries - first);
      int64_t b = head / a->heads, h = head % a->heads;
      switch (a->map) {
        case AM_MAP_SOFTMAX: return attend_streaming<SoftmaxMap>(p, b, h, first, count, scratch);
        case AM_MAP_SIGMOID: return attend_streaming<SigmoidMap>(p, b, h, first, count, scratch);
        case AM_MAP_RELU: return attend_streaming<ReluMap>(p, b, h, first, count, scratch);
        case AM_MAP_SOFTPLUS: return attend_streaming<SoftplusMap>(p, b, h, first, count, scratch);
        case AM_MAP_LSSAR: return attend_by_strip<LssarMap>(p, b, h, first, count, scratch);
        case AM_MAP_CLIPPED: return attend_by_strip<ClippedMap>(p, b, h, first, count, scratch);
      }
    });
    if (failed) return failed;
  }
  return 0;
}

template <class T>
static int attention_of(const am_attention* a, am_parallel with) {
  return attention_as<Singles, T>(a, with);
}
#if defined(AM_PAIRS)
template <>
int attention_of<bf16>(const am_attention* a, am_parallel with) {
  return attention_as<Pairs, bf16>(a, with);
}
#endif

}  // namespace AM_ISA
