// Attention of a few rows of queries against many keys: the step of a decoder, and its like.
//
// There is little to compute for each key and value that is read, so each is read once, where it lies: nothing is packed.
// The keys are split among tasks by the shape alone, each split leaves what it has summed, and the splits are put together
// in their order: the result does not depend on the threads.
//
// Flaws are not looked for ahead. A product with what is not finite is not finite, be the weight 0: only a tile whose
// scores or sums came out so is looked at.
#pragma once
#include "tasks.h"

namespace AM_ISA {

// Rows of all heads that share their keys.
constexpr int64_t FEW_ROWS = 16;
// Splits that there should be, over all heads of keys: enough for many threads. None is shorter than SPLIT_KEYS.
constexpr int64_t SPLITS = 64;
constexpr int64_t SPLIT_KEYS = 4 * KEY_TILE;

// Rows that are fetched ahead of the one that is read.
constexpr int64_t ROWS_AHEAD = 32;

// Not where a backward pass follows: it makes the scores again as attention.h makes them, to the last digit.
static inline bool are_few(const am_attention* a) {
  return a->heads / a->kv_heads * a->queries <= FEW_ROWS && !a->stats;
}

template <class T>
struct FewQueries {
  const am_attention& a;
  am_attention without_sink;  // a sink is counted in the first split alone
  int64_t group, rows, deep, wide, splits, split_keys;

  explicit FewQueries(const am_attention* attention)
      : a(*attention),
        without_sink(*attention),
        group(a.heads / a.kv_heads),
        rows(group * a.queries),
        deep(up_to(a.width, W)),
        wide(up_to(a.value_width, W)) {
    without_sink.sink = nullptr;
    int64_t heads = a.batch * a.kv_heads, tiles = (a.keys + KEY_TILE - 1) / KEY_TILE;
    int64_t wanted = most(1, least((SPLITS + heads - 1) / heads, a.keys / SPLIT_KEYS));
    split_keys = (tiles + wanted - 1) / wanted * KEY_TILE;
    splits = (a.keys + split_keys - 1) / split_keys;
  }

  // ---- one split of the keys of one head ----

  struct Split {
    const FewQueries& few;
    int64_t batch, kv, first, end;  // kv: within its batch; keys [first, end)
    bool begins;                    // with the first key
    HeadRows<T> key, value;
    float *query, *scores, *weights, *out;  // (rows, deep), (rows, KEY_TILE) twice, (rows, wide)
    bool flawed[FEW_ROWS], poisoned[FEW_ROWS];
    float over_length[KEY_TILE];  // of the keys of a tile, for cosines

    static int64_t room(const FewQueries& few) { return few.rows * (few.deep + 2 * KEY_TILE); }

    Split(const FewQueries& f, int64_t head, int64_t split, float* memory, float* sums)
        : few(f),
          batch(head / f.a.kv_heads),
          kv(head % f.a.kv_heads),
          key(f.a.key, batch, kv, f.a.keys, f.a.width),
          value(f.a.value, batch, kv, f.a.keys, f.a.value_width),
          query(memory),
          scores(query + f.rows * f.deep),
          weights(scores + f.rows * KEY_TILE),
          out(sums) {
      KeyRange some = some_see(few.a.visible, 0, few.a.queries, few.a.keys);
      begins = split == 0;
      first = most(some.low / KEY_TILE * KEY_TILE, split * few.split_keys);
      end = least(some.high, (split + 1) * few.split_keys);
      memset(out, 0, (size_t)(few.rows * few.wide) * 4);
      for (int64_t r = 0; r < few.rows; ++r) take_query(r);
    }
    RowOf row(int64_t r) const { return few.row(begins, batch, kv, r); }

    void take_query(int64_t r) {
      const am_attention& a = few.a;
      RowOf at = row(r);
      const T* x = HeadRows<T>(a.query, batch, at.head, a.queries, a.width).row(at.row);
      float* to = query + r * few.deep;
      poisoned[r] = false;
      flawed[r] = !is_finite(x, a.width);
      if (flawed[r]) {
        memset(to, 0, (size_t)few.deep * 4);
        return;
      }
      row_to_words(Singles(), x, a.width, query_factor(at, x), to);
    }

    // Scores of all rows against the keys of a tile, `many` of them, and -infinity up to whole vectors.
    void tile_scores(int64_t from, int64_t many) {
      for (int64_t r = 0; r < few.rows;) {
        int64_t left = few.rows - r;
        if (left >= 4)
          r += dots<4>(r, from, many);
        else if (left >= 2)
          r += dots<2>(r, from, many);
        else
          r += dots<1>(r, from, many);
      }
      F off = set1(0);
      for (int64_t r = 0; r < few.rows; ++r) {
        float* s = scores + r * KEY_TILE;
        for (int64_t j = many; j < up_to(many, W); ++j) s[j] = 0;
        for (int64_t j = 0; j < many; j += W) {
          F v = load(s + j);
          off = off + (v - v);
        }
      }
      bool suspicious = !(sum_of_lanes(widen(off)) == 0);
      if (few.a.cosine) take_lengths(from, many);
      for (int64_t r = 0; r < few.rows; ++r) {
        if (suspicious || flawed[r]) look_for_poison(r, from, many);
        finish_scores(r, from, many, scores + r * KEY_TILE, suspicious);
      }
    }
    // VECTORS: of a key, where the usual widths let the compiler know; or 0.
    template <int ROWS>
    int64_t dots(int64_t r, int64_t from, int64_t many) const {
      switch (few.a.width) {
        case 4 * W: return dots_of<ROWS, 4>(r, from, many);
        case 8 * W: return dots_of<ROWS, 8>(r, from, many);
        default: return dots_of<ROWS, 0>(r, from, many);
      }
    }
    template <int VECTORS, class Step>
    void each_vector_of(const T* x, const Step& step) const {
      if (VECTORS > 0)
        for (int i = 0; i < VECTORS; ++i) step(load(x + i * W), i * W);
      else
        each_vector(x, 0, few.a.width, 0, [&](F v, int, int64_t d) { step(v, d); });
    }
    template <int ROWS, int VECTORS>
    int64_t dots_of(int64_t r, int64_t from, int64_t many) const {
      constexpr int KEYS = W / ROWS;
      const float* q = query + r * few.deep;
      for (int64_t j = 0; j < many; j += KEYS) {
        F sum[W];
        for (int i = 0; i < KEYS; ++i) {
          const T* k = key.row(from + least(j + i, many - 1));
          if (r == 0) fetch_ahead(k, key.step, few.a.width);
          F of_row[ROWS];
          for (int l = 0; l < ROWS; ++l) of_row[l] = set1(0);
          each_vector_of<VECTORS>(k, [&](F right, int64_t d) {
            for (int l = 0; l < ROWS; ++l) of_row[l] = fma(load(q + l * few.deep + d), right, of_row[l]);
          });
          for (int l = 0; l < ROWS; ++l) sum[l * KEYS + i] = of_row[l];
        }
        float all[W];
        store(all, sums_by_lane(sum));
        for (int l = 0; l < ROWS; ++l) memcpy(scores + (r + l) * KEY_TILE + j, all + l * KEYS, KEYS * 4);
      }
      return ROWS;
    }
    // 1 / the lengths of the keys of a tile, up to whole vectors of them.
    void take_lengths(int64_t from, int64_t many) {
      for (int64_t j = 0; j < many; j += W) {
        F sum[W];
        for (int i = 0; i < W; ++i) {
          sum[i] = set1(0);
          each_vector(key.row(from + least(j + i, many - 1)), 0, few.a.width, 0, [&](F k, int, int64_t) { sum[i] = fma(k, k, sum[i]); });
        }
        store(over_length + j, sums_by_lane(sum));
      }
      for (int64_t j = 0; j < up_to(many, W); ++j) {
        float square = over_length[j];
        bool ordinary = square > 1e-30f && square < 1e30f;
        over_length[j] = ordinary ? 1 / sqrtf(square) : one_over_length(key.row(from + least(j, many - 1)), few.a.width);
      }
    }
    // Rows are read one after the other, keys and values in turns: where a processor by itself does not go on
    // to the next, this does.
    static void fetch_ahead(const T* x, int64_t step, int64_t width) {
      const char* p = (const char*)(x + ROWS_AHEAD * step);
      for (int64_t i = 0; i < width * (int64_t)sizeof(T); i += 64) prefetch(p + i);
    }
    void finish_scores(int64_t r, int64_t from, int64_t many, float* s, bool suspicious) {
      const am_attention& a = few.a;
      int64_t whole = up_to(many, W);
      if (a.cosine)
        for (int64_t j = 0; j < whole; j += W) store(s + j, load(s + j) * load(over_length + j));
      if (suspicious)
        for (int64_t j = 0; j < many; ++j)
          if (!sound(from + j)) s[j] = 0;
      RowOf at = row(r);
      RowView view(a.visible, batch, at.head, at.row, a.keys);
      view.shift(s, from, whole);
      if (!all_see_all(a.visible, at.row, 1, from, many, a.keys)) view.hide(s, from, whole);
      for (int64_t j = many; j < whole; ++j) s[j] = -INFINITY;
    }
    // Whether the row sees a flaw in a tile.
    void look_for_poison(int64_t r, int64_t from, int64_t many) {
      float seen[KEY_TILE] = {};
      RowOf at = row(r);
      RowView(few.a.visible, batch, at.head, at.row, few.a.keys).hide(seen, from, up_to(many, W));
      for (int64_t j = 0; j < many; ++j)
        if (seen[j] != -INFINITY && (flawed[r] || !sound(from + j))) poisoned[r] = true;
    }
    bool sound(int64_t j) const {
      return is_finite(key.row(j), few.a.width) && is_finite(value.row(j), few.a.value_width);
    }

    // Values of a tile, weighted, added to what is there.
    void add_values(int64_t from, int64_t many) {
      for (int64_t i = 0; i < few.a.value_width; i += 4 * W)
        for (int64_t r = 0; r < few.rows;) {
          int64_t left = few.rows - r;
          if (left >= 4)
            r += add_columns<4>(r, from, many, i);
          else if (left >= 2)
            r += add_columns<2>(r, from, many, i);
          else
            r += add_columns<1>(r, from, many, i);
        }
    }
    template <int ROWS>
    int64_t add_columns(int64_t r, int64_t from, int64_t many, int64_t column) {
      switch ((least(few.a.value_width - column, 4 * W) + W - 1) / W) {
        case 1: return add_vectors<ROWS, 1>(r, from, many, column);
        case 2: return add_vectors<ROWS, 2>(r, from, many, column);
        case 3: return add_vectors<ROWS, 3>(r, from, many, column);
        default: return add_vectors<ROWS, 4>(r, from, many, column);
      }
    }
    template <int ROWS, int VECTORS>
    int64_t add_vectors(int64_t r, int64_t from, int64_t many, int64_t column) {
      F sum[ROWS][VECTORS], off = set1(0);
      sum_vectors<ROWS, VECTORS, false>(r, from, many, column, sum);
      for (int l = 0; l < ROWS; ++l)
        for (int i = 0; i < VECTORS; ++i) off = off + (sum[l][i] - sum[l][i]);
      if (!(sum_of_lanes(widen(off)) == 0)) {
        for (int l = 0; l < ROWS; ++l) look_for_poison(r + l, from, many);
        sum_vectors<ROWS, VECTORS, true>(r, from, many, column, sum);
      }
      for (int l = 0; l < ROWS; ++l)
        for (int i = 0; i < VECTORS; ++i) {
          float* to = out + (r + l) * few.wide + column + i * W;
          store(to, load(to) + sum[l][i]);
        }
      return ROWS;
    }
    template <int ROWS, int VECTORS, bool SoundOnly>
    void sum_vectors(int64_t r, int64_t from, int64_t many, int64_t column, F (*sum)[VECTORS]) const {
      const float* w = weights + r * KEY_TILE;
      int last = (int)least(few.a.value_width - column - (VECTORS - 1) * W, W);
      for (int l = 0; l < ROWS; ++l)
        for (int i = 0; i < VECTORS; ++i) sum[l][i] = set1(0);
      for (int64_t j = 0; j < many; ++j) {
        if (SoundOnly && !sound(from + j)) continue;
        const T* v = value.row(from + j) + column;
        if (r == 0) fetch_ahead(v, value.step, least(few.a.value_width - column, VECTORS * W));
        F right[VECTORS];
        for (int i = 0; i < VECTORS - 1; ++i) right[i] = load(v + i * W);
        right[VECTORS - 1] = load_lanes(v + (VECTORS - 1) * W, last, 0);
        for (int l = 0; l < ROWS; ++l)
          for (int i = 0; i < VECTORS; ++i) sum[l][i] = fma(set1(w[l * KEY_TILE + j]), right[i], sum[l][i]);
      }
    }
  };

  RowOf row(bool first_split, int64_t batch, int64_t kv, int64_t r) const {
    return {first_split ? &a : &without_sink, batch, kv * group + r / a.queries, r % a.queries};
  }

  // ---- all splits ----

  // What a split leaves of a row, beside its sums.
  template <class Map>
  struct Part {
    typename Map::State state;
    double total;
    bool poisoned;
  };
  int64_t heads() const { return a.batch * a.kv_heads; }
  template <class X>
  static int64_t floats_for(int64_t many) {
    return many * (int64_t)sizeof(X) / 4;
  }

  template <class Map>
  int stream(am_parallel with) {
    Scratch sums(heads() * splits * rows * wide), memory(floats_for<Part<Map>>(heads() * splits * rows));
    if (!sums.data || !memory.data) return 1;
    Part<Map>* parts = (Part<Map>*)memory.data;
    int failed = share(with, heads() * splits, Split::room(*this), [&](int64_t i, float* room) {
      Split split(*this, i / splits, i % splits, room, sums.data + i * rows * wide);
      Part<Map>* part = parts + i * rows;
      for (int64_t r = 0; r < rows; ++r) Map::open(part[r].state, split.row(r));
      for (int64_t from = split.first; from < split.end; from += KEY_TILE) {
        int64_t many = least(KEY_TILE, split.end - from);
        split.tile_scores(from, many);
        for (int64_t r = 0; r < rows; ++r)
          scale_row(split.out + r * wide, wide,
                    Map::template weigh<Singles>(part[r].state, split.scores + r * KEY_TILE, split.weights + r * KEY_TILE,
                                                 up_to(many, W)));
        split.add_values(from, many);
      }
      for (int64_t r = 0; r < rows; ++r) part[r].poisoned = split.poisoned[r];
    });
    if (failed) return failed;
    for (int64_t head = 0; head < heads(); ++head)
      for (int64_t r = 0; r < rows; ++r) {
        Part<Map>* whole = parts + head * splits * rows + r;
        float* out = sums.data + (head * splits * rows + r) * wide;
        for (int64_t k = 1; k < splits; ++k) {
          const Part<Map>& part = whole[k * rows];
          float of_whole = 1, of_part = 1;
          Map::merge(whole->state, part.state, &of_whole, &of_part);
          whole->poisoned |= part.poisoned;
          add_up(out, of_whole, out + k * rows * wide, of_part);
        }
        float nothing[AM_STATS];
        RowOf at = row(true, head / a.kv_heads, head % a.kv_heads, r);
        store_row(at, out, Map::close(whole->state, at, nothing), whole->poisoned);
      }
    return 0;
  }
  void add_up(float* x, float of_x, const float* y, float of_y) const {
    F f = set1(of_x), g = set1(of_y);
    for (int64_t i = 0; i < wide; i += W) store(x + i, fma(load(y + i), g, load(x + i) * f));
  }
  void store_row(const RowOf& at, const float* out, float factor, bool poisoned) const {
    store_out_row<T>(a.out, at, out, poisoned ? NAN : factor, a.value_width);
  }

  // Maps that have to see their row first leave it in a strip, and come back to it.
  template <class Map>
  int by_strip(am_parallel with) {
    int64_t length = splits * split_keys;
    Scratch sums(heads() * splits * rows * wide), memory(floats_for<Part<Map>>(heads() * splits * rows));
    Scratch strips(heads() * rows * length), states(floats_for<typename Map::State>(heads() * rows));
    if (!sums.data || !memory.data || !strips.data || !states.data) return 1;
    Part<Map>* parts = (Part<Map>*)memory.data;
    typename Map::State* merged = (typename Map::State*)states.data;  // of whole rows
    auto strip_of = [&](int64_t head, int64_t r, int64_t from) { return strips.data + (head * rows + r) * length + from; };
    auto each_split = [&](auto step) {
      return share(with, heads() * splits, Split::room(*this), [&](int64_t i, float* room) {
        Split split(*this, i / splits, i % splits, room, sums.data + i * rows * wide);
        step(split, i / splits, parts + i * rows);
      });
    };

    int failed = each_split([&](Split& split, int64_t head, Part<Map>* part) {
      for (int64_t r = 0; r < rows; ++r) Map::open(part[r].state, split.row(r));
      for (int64_t from = split.first; from < split.end; from += KEY_TILE) {
        int64_t many = least(KEY_TILE, split.end - from), whole = up_to(many, W);
        split.tile_scores(from, many);
        for (int64_t r = 0; r < rows; ++r) {
          float *s = strip_of(head, r, from), *before = strip_of(head, r, split.first);
          memcpy(s, split.scores + r * KEY_TILE, (size_t)whole * 4);
          Map::first(part[r].state, s, whole, before, from - split.first);
        }
      }
      for (int64_t r = 0; r < rows; ++r) part[r].poisoned = split.poisoned[r];
    });
    if (failed) return failed;
    for (int64_t i = 0; i < heads() * rows; ++i) {
      const Part<Map>* part = parts + i / rows * splits * rows + i % rows;
      merged[i] = part->state;
      for (int64_t k = 1; k < splits; ++k) Map::merge(merged[i], part[k * rows].state);
    }
    failed = each_split([&](Split& split, int64_t head, Part<Map>* part) {
      D total[FEW_ROWS];
      for (int64_t r = 0; r < rows; ++r) total[r] = zero();
      for (int64_t from = split.first; from < split.end; from += KEY_TILE) {
        int64_t many = least(KEY_TILE, split.end - from);
        for (int64_t r = 0; r < rows; ++r) {
          typename Map::Row row = Map::settle(merged[head * rows + r], part[r].state, split.row(r));
          for (int64_t j = 0; j < many; j += W) {
            F w = row.of(load(strip_of(head, r, from + j)));
            store(split.weights + r * KEY_TILE + j, w);
            total[r] = total[r] + widen(w);
          }
        }
        split.add_values(from, many);
      }
      for (int64_t r = 0; r < rows; ++r) {
        part[r].total = sum_of_lanes(total[r]);
        part[r].poisoned |= split.poisoned[r];
      }
    });
    if (failed) return failed;
    for (int64_t i = 0; i < heads() * rows; ++i) {
      int64_t head = i / rows, r = i % rows;
      Part<Map>* whole = parts + head * splits * rows + r;
      float *out = sums.data + (head * splits * rows + r) * wide, nothing[AM_STATS], extra;
      for (int64_t k = 1; k < splits; ++k) {
        whole->total += whole[k * rows].total;
        whole->poisoned |= whole[k * rows].poisoned;
        add_up(out, 1, out + k * rows * wide, 1);
      }
      RowOf at = row(true, head / a.kv_heads, head % a.kv_heads, r);
      float factor = Map::close(merged[i], Map::settle(merged[i], merged[i], at), at, whole->total, 0, nothing, &extra);
      store_row(at, out, factor, whole->poisoned);
    }
    return 0;
  }
};

template <class T>
static int attend_few(const am_attention* a, am_parallel with) {
  FewQueries<T> few(a);
  switch (a->map) {
    case AM_MAP_SOFTMAX: return few.template stream<SoftmaxMap>(with);
    case AM_MAP_SIGMOID: return few.template stream<SigmoidMap>(with);
    case AM_MAP_RELU: return few.template stream<ReluMap>(with);
    case AM_MAP_SOFTPLUS: return few.template stream<SoftplusMap>(with);
    case AM_MAP_LSSAR: return few.template by_strip<LssarMap>(with);
    case AM_MAP_CLIPPED: break;
  }
  return few.template by_strip<ClippedMap>(with);
}

}  // namespace AM_ISA
