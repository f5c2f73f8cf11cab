// What a row may see of a tile of keys, and what is added to its scores: am_visible, one row at a time.
#pragma once
#include "rows.h"

namespace AM_ISA {

// Keys [low, high).
struct KeyRange {
  int64_t low, high;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Outside of which rows [first, first + count) see nothing, and inside of which each of them sees all keys that the
// mask allows.
static inline KeyRange some_see(const am_visible& v, int64_t first, int64_t count, int64_t keys) {
  KeyRange r = {0, keys};
  if (v.causal) r.high = least(r.high, v.offset + first + count);
  if (v.window > 0) {
    r.low = most(r.low, v.offset + first - v.window + 1);
    r.high = least(r.high, v.offset + first + count - 1 + v.window);
  }
  return r;
}
static inline KeyRange all_see(const am_visible& v, int64_t first, int64_t count, int64_t keys) {
  KeyRange r = {0, keys};
  if (v.causal) r.high = least(r.high, v.offset + first + 1);
  if (v.window > 0) {
    r.low = most(r.low, v.offset + first + count - v.window);
    r.high = least(r.high, v.offset + first + v.window);
  }
  return r;
}

// Whether each of the rows sees all of the keys [from, from + many).
static inline bool all_see_all(const am_visible& v, int64_t first, int64_t count, int64_t from, int64_t many, int64_t keys) {
  KeyRange all = all_see(v, first, count, keys);
  return !v.mask && all.low <= from && from + many <= all.high;
}

// The scores of one row against the keys from `from` on, `count` of them, a multiple of W; keys from `keys` on do not
// exist. The row's place in the mask and its distance to key 0 are found once.
struct RowView {
  const am_visible* v;
  int64_t keys, position;  // position: of the query among the keys
  KeyRange range;
  const char* mask;
  float slope;

  RowView(const am_visible& visible, int64_t batch, int64_t head, int64_t row, int64_t count)
      : v(&visible), keys(count), position(row + visible.offset), range(some_see(visible, row, 1, count)),
        mask((const char*)visible.mask), slope(visible.slopes ? visible.slopes[head] : 0) {
    if (mask) {
      int64_t at = batch * visible.mask_step[0] + head * visible.mask_step[1] + row * visible.mask_step[2];
      mask += at * (visible.kind == AM_MASK_FLOAT ? 4 : 1);
    }
  }

  // Bias and distance only; nothing is hidden.
  void shift(float* s, int64_t from, int64_t count) const {
    if (v->stretch) {
      int64_t zero = v->zero - position + from;
      for (int64_t j = 0; j < count && from + j < keys; j += W) {
        int lanes = (int)least(W, keys - from - j);
        F a = load_lanes(v->stretch + zero + j, lanes, 0), b = load_lanes(v->shift + zero + j, lanes, 0);
        store(s + j, fma(load(s + j), a, b));
      }
    }
    if (v->slopes) {
      F first = set1((float)(from - position)), factor = set1(-slope);
      for (int64_t j = 0; j < count; j += W)
        store(s + j, fma(absolute(first + (set1((float)j) + lane_numbers())), factor, load(s + j)));
    }
  }

  // The gradient of what shift() has stretched.
  void stretch(float* ds, int64_t from, int64_t count) const {
    int64_t zero = v->zero - position + from;
    for (int64_t j = 0; j < count && from + j < keys; j += W) {
      int lanes = (int)least(W, keys - from - j);
      store(ds + j, load(ds + j) * load_lanes(v->stretch + zero + j, lanes, 0));
    }
  }

  // -infinity where the row may not see, and the mask's numbers where they are added.
  void hide(float* s, int64_t from, int64_t count) const {
    if (mask && v->kind == AM_MASK_BOOL) hide_by_bool(s, from, count);
    if (mask && v->kind == AM_MASK_FLOAT) add_mask(s, from, count);
    int64_t low = least(most(range.low - from, 0), count), high = least(most(range.high - from, 0), count);
    for (int64_t j = 0; j < low; ++j) s[j] = -INFINITY;
    for (int64_t j = most(high, low); j < count; ++j) s[j] = -INFINITY;
  }

  void hide_by_bool(float* s, int64_t from, int64_t count) const {
    int64_t step = v->mask_step[3];
    const uint8_t* m = (const uint8_t*)mask + from * step;
    int64_t there = least(count, keys - from), j = 0;
    if (step == 0) {
      if (!*m)
        for (; j < count; ++j) s[j] = -INFINITY;
      return;
    }
    F none = set1(-INFINITY);
    if (step == 1)
      for (; j + W <= there; j += W) store(s + j, where_set(m + j, load(s + j), none));
    for (; j < there; ++j)
      if (!m[j * step]) s[j] = -INFINITY;
  }

  void add_mask(float* s, int64_t from, int64_t count) const {
    int64_t step = v->mask_step[3];
    const float* m = (const float*)mask + from * step;
    int64_t there = least(count, keys - from);
    F none = set1(-INFINITY), limit = set1(nextafterf(v->hidden_below, INFINITY));
    for (int64_t j = 0; j < there; j += W) {
      int lanes = (int)least(W, there - j);
      F b;
      if (step == 1) {
        b = load_lanes(m + j, lanes, 0);
      } else {
        float at[W] = {};
        for (int i = 0; i < lanes; ++i) at[i] = m[(j + i) * step];
        b = load(at);
      }
      store(s + j, select_below(b, limit, none, load(s + j) + b));
    }
  }
};

// How many of the keys [from, from + many) come up to the last one that any of the rows sees, in whole vectors.
static inline int64_t reach_of(const am_visible& v, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t from,
                               int64_t many, int64_t keys) {
  KeyRange some = some_see(v, first, count, keys);
  int64_t limit = some.low < from + many ? least(up_to(most(some.high - from, 0), W), many) : 0;
  if (!v.mask || limit == 0) return limit;
  int64_t reach = 0;
  bool same = v.mask_step[2] == 0 && !v.causal && v.window <= 0;  // for all rows
  for (int64_t r = 0; r < (same ? 1 : count); ++r) {
    RowView view(v, batch, head, first + r, keys);
    for (int64_t j = limit - W; j >= reach; j -= W) {
      float seen[W] = {};
      view.hide(seen, from + j, W);
      for (float b : seen)
        if (b != -INFINITY) reach = j + W;  // NaN is seen
    }
  }
  return reach;
}

static int count_visible(const am_count* a, am_parallel with) {
  parallel(with, a->batch * a->heads * a->queries, grain_of(a->keys), [&](int64_t begin, int64_t end) {
    float scores[4 * W];
    for (int64_t i = begin; i < end; ++i) {
      RowView view(a->visible, i / a->queries / a->heads, i / a->queries % a->heads, i % a->queries, a->keys);
      int64_t seen = most(view.range.high - view.range.low, 0);
      if (a->visible.mask) {
        seen = 0;
        for (int64_t from = most(view.range.low, 0); from < view.range.high; from += 4 * W) {
          for (int j = 0; j < 4 * W; ++j) scores[j] = 0;
          view.hide(scores, from, 4 * W);
          for (int j = 0; j < 4 * W; ++j) seen += scores[j] != -INFINITY;
        }
      }
      a->out[i] = (float)seen;
    }
  });
  return 0;
}

}  // namespace AM_ISA
