// The walk of the linear family in chunks, forward and backward: out_i = q_i^T S_i, S_i = g S_{i-1} + k_i v_i^T.
//
// A task is one head of keys and the queries that read it, from the first token to the last (backward: there and
// back). All products are those of gemm.h on chunks that lie in the first caches; no more than the state of one
// head is kept, whatever the number of tokens. `totals` is one more column of the values, which is 1.
#pragma once
#include <math.h>

#include <initializer_list>

#include "tasks.h"

namespace AM_ISA {

constexpr int64_t CHUNK = 64;  // a multiple of TILE_COLUMNS

struct Walk {
  const am_walk& a;
  int64_t batch, kv, group, deep, wide, values;

  Walk(const am_walk& walk, int64_t task)
      : a(walk), batch(task / walk.kv_heads), kv(task % walk.kv_heads), group(walk.heads / walk.kv_heads),
        deep(up_to(walk.width, TILE_COLUMNS)), wide(up_to(walk.value_width + walk.totals, TILE_COLUMNS)),
        values(walk.value_width + walk.totals) {}

  int64_t chunks() const { return (a.tokens + CHUNK - 1) / CHUNK; }
  int64_t head(int64_t g) const { return kv * group + g; }
  int64_t number() const { return batch * a.kv_heads + kv; }

  // ---- decay: powers of g, from 0 to CHUNK, and the same backwards ----

  float rate() const { return a.rate ? a.rate[kv] : 0; }
  void powers(float* up, float* down) const {
    for (int64_t i = 0; i <= CHUNK; ++i) up[i] = down[CHUNK - i] = (float)exp(-(double)rate() * (double)i);
  }

  // ---- chunks of rows ----

  static const float* row_of(const am_heads& from, int64_t batch, int64_t head, int64_t row) {
    return (const float*)from.data + batch * from.step[0] + head * from.step[1] + row * from.step[2];
  }
  // Rows [first, first + many) of a head, `room` floats apart, zeros beyond them. The rows that are `ahead` of them are
  // asked for, so that memory works while the products are made.
  static void take(const am_heads& from, int64_t batch, int64_t head, int64_t first, int64_t many, int64_t width, int64_t room,
                   float* to, int64_t ahead) {
    for (int64_t r = 0; r < many; ++r, to += room) {
      int64_t end = up_to(width, W);
      const float* x = row_of(from, batch, head, first + r);
      const char* next = (const char*)((uintptr_t)x + (uintptr_t)(ahead * from.step[2]) * 4);
      for (int64_t i = 0; i < width; i += 16) prefetch_l2(next + 4 * i);
      each_vector(x, 0, width, 0, [&](F v, int, int64_t i) { store(to + i, v); });
      memset(to + end, 0, (size_t)(room - end) * 4);
    }
    memset(to, 0, (size_t)((CHUNK - many) * room) * 4);
  }
  void take_values(int64_t first, int64_t many, float* to, int64_t ahead) const {
    take(a.value, batch, kv, first, many, a.value_width, wide, to, ahead);
    for (int64_t r = 0; a.totals && r < many; ++r) to[r * wide + a.value_width] = 1;
  }
  static void give(const am_heads& to, int64_t batch, int64_t head, int64_t first, int64_t many, int64_t width, int64_t room,
                   const float* from) {
    for (int64_t r = 0; r < many; ++r) {
      float* y = (float*)to.data + batch * to.step[0] + head * to.step[1] + (first + r) * to.step[2];
      each_vector(from + r * room, 0, width, 0, [&](F v, int lanes, int64_t i) { put(y + i, v, lanes); });
    }
  }
  void take_state(const float* from, float* to) const {
    memset(to, 0, (size_t)(deep * wide) * 4);
    if (!from) return;
    from += number() * a.width * values;
    for (int64_t d = 0; d < a.width; ++d) memcpy(to + d * wide, from + d * values, (size_t)values * 4);
  }
  void give_state(const float* from, float* to) const {
    to += number() * a.width * values;
    for (int64_t d = 0; d < a.width; ++d) memcpy(to + d * values, from + d * wide, (size_t)values * 4);
  }
  // y = x, row r times factor[r].
  static void scaled(const float* x, const float* factor, int64_t room, float* y) {
    for (int64_t r = 0; r < CHUNK; ++r) {
      F f = set1(factor[r]);
      for (int64_t i = 0; i < room; i += W) store(y + r * room + i, load(x + r * room + i) * f);
    }
  }
  static void shrink(float* x, float factor, int64_t count) {
    F f = set1(factor);
    for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i) * f);
  }

  // ---- products ----

  // (left rows) (right rows)^T, decayed, and 0 where the right row is later: CHUNK x CHUNK, of which no more is written
  // than a band of TILE_ROWS rows sees. `across` holds the right rows, packed by pack_transposed.
  void scores(const float* left, int64_t room, const float* across, int64_t depth, const float* down, float* s) const {
    for (int64_t i = 0; i < CHUNK; i += TILE_ROWS) {
      int64_t many = up_to(i + TILE_ROWS, W);
      multiply<Singles>(left + i * room, room, 1, across, TILE_COLUMNS * depth, depth, s + i * CHUNK, CHUNK, TILE_ROWS, many,
                        false);
      for (int64_t r = i; r < i + TILE_ROWS; ++r) {
        float* row = s + r * CHUNK;
        if (a.rate)  // g^(r - j)
          for (int64_t j = 0; j <= r; j += W) store(row + j, load(row + j) * load(down + CHUNK - r + j));
        memset(row + r + 1, 0, (size_t)(many - r - 1) * 4);
      }
    }
  }
  // c += s x: (CHUNK x CHUNK, lower triangle) (CHUNK x width)
  static void lower(const float* s, const float* x, int64_t room, int64_t width, float* c) {
    for (int64_t i = 0; i < CHUNK; i += TILE_ROWS)
      multiply<Singles>(s + i * CHUNK, CHUNK, 1, x, TILE_COLUMNS, i + TILE_ROWS, c + i * room, room, TILE_ROWS, width, true, room);
  }
  // c += s^T x
  static void lower_transposed(const float* s, const float* x, int64_t room, int64_t width, float* c) {
    for (int64_t i = 0; i < CHUNK; i += TILE_ROWS)
      multiply<Singles>(s + i * CHUNK + i, 1, CHUNK, x + i * room, TILE_COLUMNS, CHUNK - i, c + i * room, room, TILE_ROWS, width,
                        true, room);
  }
  // state (width x values) += x^T y
  void outer(const float* x, const float* y, float* state) const {
    multiply<Singles>(x, 1, deep, y, TILE_COLUMNS, CHUNK, state, wide, up_to(a.width, TILE_ROWS), values, true, wide);
  }
  // c (CHUNK x values) = or += x state
  void through(const float* x, const float* state, float* c, bool add) const {
    multiply<Singles>(x, deep, 1, state, TILE_COLUMNS, a.width, c, wide, CHUNK, values, add, wide);
  }
  // c (CHUNK x width) = y state^T; the state packed by pack_transposed
  void through_transposed(const float* y, const float* across, float* c) const {
    multiply<Singles>(y, wide, 1, across, TILE_COLUMNS * values, values, c, deep, CHUNK, a.width, false);
  }
};

struct WalkRoom {
  float *query, *key, *value, *grad;                  // chunks of rows
  float *query_into, *key_left, *value_left;          // the same, decayed
  float *keys_across, *values_across, *state_across;  // packed
  float *scores, *slopes, *out, *of_query, *of_key;
  float *state, *up, *down;
  int64_t size = 0;

  WalkRoom(const Walk& w, float* memory) {
    auto take = [&](float** at, int64_t n) {
      *at = memory ? memory + size : nullptr;
      size += up_to(n, 16);
    };
    for (float** rows : {&query, &query_into, &key, &key_left, &of_query, &of_key}) take(rows, CHUNK * w.deep);
    for (float** rows : {&value, &value_left, &grad, &out}) take(rows, CHUNK * w.wide);
    take(&keys_across, CHUNK * w.deep);
    take(&values_across, CHUNK * w.wide);
    take(&state_across, w.deep * w.wide);
    take(&scores, CHUNK * CHUNK);
    take(&slopes, CHUNK * CHUNK);
    take(&state, w.deep * w.wide);
    take(&up, CHUNK + 1);
    take(&down, 2 * CHUNK + W);
  }
};

static void walk_task(const am_walk& a, int64_t task, float* memory) {
  Walk w(a, task);
  WalkRoom room(w, memory);
  memset(room.down, 0, (size_t)(2 * CHUNK + W) * 4);
  w.powers(room.up, room.down);
  w.take_state(a.state, room.state);
  for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
    int64_t first = chunk * CHUNK, many = least(CHUNK, a.tokens - first);
    Walk::take(a.key, w.batch, w.kv, first, many, a.width, w.deep, room.key, CHUNK);
    w.take_values(first, many, room.value, CHUNK);
    pack_transposed(room.key, w.deep, CHUNK, CHUNK, a.width, room.keys_across);
    for (int64_t g = 0; g < w.group; ++g) {
      int64_t head = w.head(g);
      Walk::take(a.query, w.batch, head, first, many, a.width, w.deep, room.query, CHUNK);
      const float* into = room.query;
      if (a.rate) Walk::scaled(room.query, room.up + 1, w.deep, room.query_into), into = room.query_into;
      w.scores(room.query, w.deep, room.keys_across, a.width, room.down, room.scores);
      w.through(into, room.state, room.out, false);
      Walk::lower(room.scores, room.value, w.wide, w.values, room.out);
      Walk::give(a.out, w.batch, head, first, many, a.value_width, w.wide, room.out);
      for (int64_t r = 0; a.totals && r < many; ++r)
        a.total[(w.batch * a.heads + head) * a.tokens + first + r] = room.out[r * w.wide + a.value_width];
    }
    const float* left = room.key;
    if (a.rate) {  // g^(many - b) for b = 1..many
      Walk::scaled(room.key, room.down + CHUNK + 1 - many, w.deep, room.key_left);
      Walk::shrink(room.state, room.up[many], w.deep * w.wide);
      left = room.key_left;
    }
    w.outer(left, room.value, room.state);
  }
  w.give_state(room.state, a.new_state);
}

static void walk_backward_task(const am_walk_backward& b, int64_t task, float* memory) {
  const am_walk& a = b.forward;
  Walk w(a, task);
  WalkRoom room(w, memory);
  memset(room.down, 0, (size_t)(2 * CHUNK + W) * 4);
  w.powers(room.up, room.down);
  auto take_grad = [&](int64_t head, int64_t first, int64_t many, int64_t ahead) {
    Walk::take(b.grad, w.batch, head, first, many, a.value_width, w.wide, room.grad, ahead);
    for (int64_t r = 0; a.totals && r < many; ++r)
      room.grad[r * w.wide + a.value_width] = b.grad_total[(w.batch * a.heads + head) * a.tokens + first + r];
  };

  // there: the states come again, and with them the gradients of the queries
  w.take_state(a.state, room.state);
  for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
    int64_t first = chunk * CHUNK, many = least(CHUNK, a.tokens - first);
    Walk::take(a.key, w.batch, w.kv, first, many, a.width, w.deep, room.key, CHUNK);
    w.take_values(first, many, room.value, CHUNK);
    pack_transposed(room.value, w.wide, CHUNK, CHUNK, w.values, room.values_across);
    pack_transposed(room.state, w.wide, w.deep, w.deep, w.values, room.state_across);
    for (int64_t g = 0; g < w.group; ++g) {
      int64_t head = w.head(g);
      take_grad(head, first, many, CHUNK);
      w.scores(room.grad, w.wide, room.values_across, w.values, room.down, room.slopes);
      w.through_transposed(room.grad, room.state_across, room.of_query);
      if (a.rate) Walk::scaled(room.of_query, room.up + 1, w.deep, room.of_query);
      Walk::lower(room.slopes, room.key, w.deep, a.width, room.of_query);
      Walk::give(b.grad_query, w.batch, head, first, many, a.width, w.deep, room.of_query);
    }
    const float* left = room.key;
    if (a.rate) {
      Walk::scaled(room.key, room.down + CHUNK + 1 - many, w.deep, room.key_left);
      Walk::shrink(room.state, room.up[many], w.deep * w.wide);
      left = room.key_left;
    }
    w.outer(left, room.value, room.state);
  }

  // and back: room.state is the gradient of the state now
  w.take_state(b.grad_state, room.state);
  for (int64_t chunk = w.chunks() - 1; chunk >= 0; --chunk) {
    int64_t first = chunk * CHUNK, many = least(CHUNK, a.tokens - first);
    Walk::take(a.key, w.batch, w.kv, first, many, a.width, w.deep, room.key, -CHUNK);
    w.take_values(first, many, room.value, -CHUNK);
    pack_transposed(room.key, w.deep, CHUNK, CHUNK, a.width, room.keys_across);
    pack_transposed(room.value, w.wide, CHUNK, CHUNK, w.values, room.values_across);
    pack_transposed(room.state, w.wide, w.deep, w.deep, w.values, room.state_across);
    const float *key = room.key, *value = room.value;
    if (a.rate) {
      Walk::scaled(room.key, room.down + CHUNK + 1 - many, w.deep, room.key_left), key = room.key_left;
      Walk::scaled(room.value, room.down + CHUNK + 1 - many, w.wide, room.value_left), value = room.value_left;
    }
    float *of_key = room.of_key, *of_value = room.out;
    w.through_transposed(value, room.state_across, of_key);
    w.through(key, room.state, of_value, false);
    if (a.rate) Walk::shrink(room.state, room.up[many], w.deep * w.wide);
    for (int64_t g = 0; g < w.group; ++g) {
      int64_t head = w.head(g);
      Walk::take(a.query, w.batch, head, first, many, a.width, w.deep, room.query, -CHUNK);
      take_grad(head, first, many, -CHUNK);
      w.scores(room.grad, w.wide, room.values_across, w.values, room.down, room.slopes);
      w.scores(room.query, w.deep, room.keys_across, a.width, room.down, room.scores);
      Walk::lower_transposed(room.slopes, room.query, w.deep, a.width, of_key);
      Walk::lower_transposed(room.scores, room.grad, w.wide, w.values, of_value);
      const float* into = room.query;
      if (a.rate) Walk::scaled(room.query, room.up + 1, w.deep, room.query_into), into = room.query_into;
      w.outer(into, room.grad, room.state);
    }
    Walk::give(b.grad_key, w.batch, w.kv, first, many, a.width, w.deep, of_key);
    Walk::give(b.grad_value, w.batch, w.kv, first, many, a.value_width, w.wide, of_value);
  }
  w.give_state(room.state, b.grad_of_state);
}

static int linear_walk(const am_walk* a, am_parallel with) {
  Walk w(*a, 0);
  return share(with, a->batch * a->kv_heads, WalkRoom(w, nullptr).size,
               [&](int64_t task, float* memory) { walk_task(*a, task, memory); });
}
static int linear_walk_backward(const am_walk_backward* b, am_parallel with) {
  Walk w(b->forward, 0);
  return share(with, b->forward.batch * b->forward.kv_heads, WalkRoom(w, nullptr).size,
               [&](int64_t task, float* memory) { walk_backward_task(*b, task, memory); });
}

}  // namespace AM_ISA
