// Experts, expert by expert: out = sum over a token's choices of weight (W2 gelu(W1 x + b1) + b2).
//
// The tokens of an expert are its queue. W of them at a time lie across the lanes of a panel, and the rows of a weight are
// broadcast as they come: weights are never packed, and read from memory once, while the next are asked for. What is left of
// a queue, where a panel would be mostly empty, is multiplied along the rows, W sums at once, which are added up across
// their lanes at the end. A token's choices are added up in their order: the result does not depend on the threads.
#pragma once
#include <math.h>

#include "functions.h"
#include "tasks.h"

namespace AM_ISA {

// Rows of a weight that a task takes, and rows and tokens that are multiplied at a time: W sums.
constexpr int64_t ROW_BLOCK = 32;
constexpr int DOT_ROWS = 4, DOT_TOKENS = W / DOT_ROWS;
// Bytes of a row that are multiplied at a time: DOT_ROWS of them stay in the first cache while the tokens pass.
constexpr int64_t ROW_BYTES = 3072;
// Tokens that a block of rows meets before it goes on to its next rows: as many as stay in the second cache beside it.
constexpr int64_t MOST_TOKENS = 128, TOKEN_BYTES = 1 << 18;

// Tokens of the rest of a queue from which on they have a panel of their own.
constexpr int64_t WORTH_A_PANEL = W * 5 / 8;
// Rows that are multiplied with panels at a time, and words of them.
constexpr int64_t PANEL_ROWS = 8, PANEL_WORDS = 256;
constexpr int64_t MOST_PANELS = MOST_TOKENS / W;

// The tokens of each expert, one queue after another, in the order of the tokens.
struct Queues {
  int64_t pairs = 0;
  int64_t* offsets = nullptr;  // (experts + 1)
  int64_t* pair = nullptr;     // token * choices + choice, of each place
  int64_t* place = nullptr;    // of each pair, or -1
  int64_t choices = 1;

  ~Queues() { free(offsets); }
  bool make(const am_experts& a) {
    int64_t all = a.tokens * a.choices, chosen = 0, limit = all;
    offsets = (int64_t*)malloc(sizeof(int64_t) * (size_t)(2 * (a.experts + 1) + 2 * all));
    if (!offsets) return false;
    int64_t* next = offsets + a.experts + 1;
    pair = next + a.experts + 1;
    place = pair + all;
    choices = a.choices;
    memset(next, 0, sizeof(int64_t) * (size_t)(a.experts + 1));
    for (int64_t i = 0; i < all; ++i)
      if (a.index[i] >= 0) ++next[a.index[i]], ++chosen;
    if (a.capacity > 0) limit = a.capacity;
    if (a.capacity_factor > 0) limit = (int64_t)least_of(ceil((double)chosen * a.capacity_factor / (double)a.experts), (double)all);
    for (int64_t e = 0; e < a.experts; ++e) {
      int64_t many = least(next[e], limit);
      offsets[e] = next[e] = pairs;
      pairs += many;
    }
    offsets[a.experts] = pairs;
    for (int64_t i = 0; i < all; ++i) {
      int64_t e = a.index[i];
      place[i] = e >= 0 && next[e] < offsets[e + 1] ? next[e]++ : -1;
      if (place[i] >= 0) pair[place[i]] = i;
    }
    return true;
  }
  int64_t token(int64_t at) const { return pair[at] / choices; }
  static double least_of(double a, double b) { return a < b ? a : b; }
};

// How rows are read along: a vector of words at a time.
template <class Words, class T>
struct Along {
  static constexpr int64_t STEP = W;
  static inline F whole(const T* p) { return load(p); }
  static inline F part(const T* p, int64_t n) { return load_part(p, (int)n, 0); }
};
#if defined(AM_PAIRS)
template <>
struct Along<Pairs, bf16> {
  static constexpr int64_t STEP = 2 * W;
  static inline F whole(const bf16* p) { return load((const float*)p); }
  static inline F part(const bf16* p, int64_t n) {
    float words[W] = {};
    memcpy(words, p, (size_t)n * sizeof(bf16));
    return load(words);
  }
};
#endif

// What is asked for while something else is multiplied: `count` lines side by side in each step whose place along the rows
// has none of the bits of `skip`.
struct Ahead {
  const char* from;
  int64_t skip;
  int count;
};

// out(token, row) of DOT_ROWS rows and TOKENS <= DOT_TOKENS tokens, over [begin, depth) of them; out's rows are ROW_BLOCK
// apart, and where begin > 0 they are added to.
template <class Words, class T, class X, int TOKENS>
static inline void dot_tile(const T* const* w, const X* const* x, int64_t begin, int64_t depth, Ahead ahead, float* out) {
  using Row = Along<Words, T>;
  using Token = Along<Words, X>;
  F sum[W];
  for (F& s : sum) s = set1(0);
  const T *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  int64_t k = begin;
  for (; k + Row::STEP <= depth; k += Row::STEP) {
    if (((k - begin) & ahead.skip) == 0)
      for (int i = 0; i < ahead.count; ++i, ahead.from += 64) prefetch_l2(ahead.from);
    F a = Row::whole(w0 + k), b = Row::whole(w1 + k), c = Row::whole(w2 + k), d = Row::whole(w3 + k);
    for (int t = 0; t < TOKENS; ++t) {
      F v = Token::whole(x[t] + k);
      sum[t * 4] = Words::add_product(a, v, sum[t * 4]);
      sum[t * 4 + 1] = Words::add_product(b, v, sum[t * 4 + 1]);
      sum[t * 4 + 2] = Words::add_product(c, v, sum[t * 4 + 2]);
      sum[t * 4 + 3] = Words::add_product(d, v, sum[t * 4 + 3]);
    }
  }
  if (k < depth) {
    int64_t rest = depth - k;
    F a = Row::part(w0 + k, rest), b = Row::part(w1 + k, rest), c = Row::part(w2 + k, rest), d = Row::part(w3 + k, rest);
    for (int t = 0; t < TOKENS; ++t) {
      F v = Token::part(x[t] + k, rest);
      sum[t * 4] = Words::add_product(a, v, sum[t * 4]);
      sum[t * 4 + 1] = Words::add_product(b, v, sum[t * 4 + 1]);
      sum[t * 4 + 2] = Words::add_product(c, v, sum[t * 4 + 2]);
      sum[t * 4 + 3] = Words::add_product(d, v, sum[t * 4 + 3]);
    }
  }
  float lanes[W] = {};
  F all = sums_by_lane(sum);
  if (begin > 0) {
    for (int t = 0; t < TOKENS; ++t) memcpy(lanes + t * 4, out + t * ROW_BLOCK, 16);
    all = all + load(lanes);
  }
  store(lanes, all);
  for (int t = 0; t < TOKENS; ++t) memcpy(out + t * ROW_BLOCK, lanes + t * 4, 16);
}

// The next DOT_ROWS rows at `w`, which lie side by side, while `steps` steps of one piece pass for each of some groups of
// tokens: all lines of that piece, evenly over what is done meanwhile.
template <class T>
static inline Ahead next_rows(const T* w, int64_t groups, int64_t group, int64_t steps, int64_t step) {
  int64_t each = (DOT_ROWS + groups - 1) / groups, skip = 1;
  while (2 * skip * DOT_ROWS <= groups) skip *= 2;
  int64_t line = group * (steps * each / skip);
  return {(const char*)w + line * 64, (skip - 1) * step, line < steps * DOT_ROWS ? (int)each : 0};
}

// out(token, row), rows ROW_BLOCK apart, of up to ROW_BLOCK rows of w. `follow` rows come behind them in memory.
template <class Words, class T, class X>
static void dot_block(const T* w, int64_t w_step, int64_t rows, int64_t follow, const X* const* x, int64_t tokens, int64_t depth,
                      float* out) {
  constexpr int64_t STEP = Along<Words, T>::STEP;
  int64_t pieces = (depth * (int64_t)sizeof(T) + ROW_BYTES - 1) / ROW_BYTES, piece = up_to((depth + pieces - 1) / pieces, STEP);
  int64_t groups = (tokens + DOT_TOKENS - 1) / DOT_TOKENS;
  for (int64_t i = 0; i < rows; i += DOT_ROWS) {
    const T* row[DOT_ROWS];
    for (int r = 0; r < DOT_ROWS; ++r) row[r] = w + least(i + r, rows - 1) * w_step;
    bool more = w_step == depth && i + 2 * DOT_ROWS <= rows + follow;
    for (int64_t k = 0; k < depth; k += piece) {
      int64_t end = least(k + piece, depth);
      for (int64_t t = 0; t < tokens; t += DOT_TOKENS) {
        Ahead ahead = {nullptr, 0, 0};
        if (more) ahead = next_rows(w + (i + DOT_ROWS) * w_step + k * DOT_ROWS, groups, t / DOT_TOKENS, (end - k) / STEP, STEP);
        float* to = out + t * ROW_BLOCK + i;
        switch (least(tokens - t, DOT_TOKENS)) {
          case 1: dot_tile<Words, T, X, 1>(row, x + t, k, end, ahead, to); break;
          case 2: dot_tile<Words, T, X, DOT_TOKENS < 2 ? DOT_TOKENS : 2>(row, x + t, k, end, ahead, to); break;
          case 3: dot_tile<Words, T, X, DOT_TOKENS < 3 ? DOT_TOKENS : 3>(row, x + t, k, end, ahead, to); break;
          default: dot_tile<Words, T, X, DOT_TOKENS>(row, x + t, k, end, ahead, to);
        }
      }
    }
  }
}

#if defined(AM_PAIRS)
static inline F word_rounded(Pairs, F low, F high) { return pair_up(round_to_pairs(low), round_to_pairs(high)); }
#endif
static inline F word_rounded(Singles, F low, F) { return low; }

// Whether rows of T are words as they lie, so that one can be broadcast.
template <class Words, class T>
constexpr bool IN_WORDS = sizeof(T) * Words::IN_WORD == sizeof(float);

// Of each expert the panels of its queue: [word][W], token after token across the lanes, the last one filled up with 0.
template <class Words, class T>
struct Panels {
  const Queues& q;
  int64_t experts, words, *first;  // (experts + 1), of each expert its first panel
  Scratch memory;

  // depth 0: no panels.
  Panels(const Queues& queues, int64_t experts_, int64_t depth) : q(queues), experts(experts_), words(depth / Words::IN_WORD) {
    first = (int64_t*)calloc((size_t)(experts + 1), sizeof(int64_t));
    for (int64_t e = 0; first && e < experts; ++e) {
      int64_t n = depth > 0 && depth % Words::IN_WORD == 0 ? q.offsets[e + 1] - q.offsets[e] : 0;
      first[e + 1] = first[e] + n / W + (n % W >= WORTH_A_PANEL ? 1 : 0);
    }
  }
  ~Panels() { free(first); }
  int64_t count(int64_t e) const { return first[e + 1] - first[e]; }
  // Tokens of the queue that have a place in a panel.
  int64_t covered(int64_t e) const { return least(count(e) * W, q.offsets[e + 1] - q.offsets[e]); }
  float* panel(int64_t e, int64_t i) const { return memory.data + (first[e] + i) * words * W; }

  bool any() const { return first && first[experts] > 0; }
  bool make() { return first && (!any() || memory.grow(first[experts] * words * W)); }
  void fill(const T* const* x, am_parallel with) {
    if (!any()) return;
    parallel(with, experts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        for (int64_t i = 0; i < count(e); ++i)
          pack(x + q.offsets[e] + i * W, least(W, covered(e) - i * W), panel(e, i));
    });
  }
  void pack(const T* const* x, int64_t tokens, float* out) {
    for (int64_t k = 0; k < words; k += W) {
      int64_t many = least(W, words - k);
      F v[W];
      for (int64_t t = 0; t < W; ++t)
        v[t] = t < tokens ? load_part((const float*)(const void*)x[t] + k, (int)many, 0) : set1(0);
      transpose(v);
      for (int64_t i = 0; i < many; ++i) store(out + (k + i) * W, v[i]);
    }
  }
};

// out(row, token) of PANEL_ROWS rows and VECTORS panels over `words` of them, added to what is there or in its place.
template <class Words, int VECTORS>
static inline void panel_tile(const char* const* w, const float* panel, int64_t panel_step, int64_t words, const char* const* next,
                              float* out, int64_t out_step, bool add) {
  F sum[PANEL_ROWS][VECTORS];
  for (auto& row : sum)
    for (F& v : row) v = set1(0);
  for (int64_t k = 0; k < words; ++k) {
    if (next && k % 2 == 0) {  // a line of 16 words for each of the rows, two steps apart
      int64_t line = k / 2;
      prefetch_l2(next[line % PANEL_ROWS] + line / PANEL_ROWS * 64);
    }
    F right[VECTORS];
    for (int j = 0; j < VECTORS; ++j) right[j] = load(panel + j * panel_step + k * W);
    for (int i = 0; i < PANEL_ROWS; ++i) {
      float word;  // which may lie anywhere
      memcpy(&word, w[i] + k * (int64_t)sizeof(word), sizeof(word));
      F factor = set1(word);
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = Words::add_product(factor, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < PANEL_ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* to = out + i * out_step + j * W;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// room(row, token), rows `panels` vectors apart, of up to ROW_BLOCK rows of w and some panels. `follow` rows come behind
// them in memory.
template <class Words, class T>
static void panel_block(const T* w, int64_t w_step, int64_t rows, int64_t follow, const float* panel, int64_t panels, int64_t words,
                        float* room) {
  int64_t step = panels * W, panel_step = words * W;
  auto word_at = [&](int64_t i, int64_t word) { return (const char*)(w + i * w_step) + word * (int64_t)sizeof(float); };
  for (int64_t from = 0; from < words; from += PANEL_WORDS) {
    int64_t many = least(PANEL_WORDS, words - from);
    for (int64_t i = 0; i < rows; i += PANEL_ROWS) {
      const char *row[PANEL_ROWS], *next[PANEL_ROWS];
      // the next rows of these words, or these rows' next words, or the first of the rows that follow
      int64_t then = i + PANEL_ROWS, word = from;
      if (then >= rows && from + many < words) then = 0, word = from + many;
      if (then >= rows && follow > 0) word = 0;
      bool more = then < rows + follow;
      for (int64_t r = 0; r < PANEL_ROWS; ++r) {
        row[r] = word_at(least(i + r, rows - 1), from);
        next[r] = more ? word_at(least(then + r, rows + follow - 1), word) : nullptr;
      }
      for (int64_t j = 0; j < panels;) {
        const float* at = panel + j * panel_step + from * W;
        float* to = room + i * step + j * W;
        const char* const* ask = more && j == 0 ? next : nullptr;
        if (panels - j == 1 || W < 16) {
          panel_tile<Words, 1>(row, at, panel_step, many, ask, to, step, from > 0);
          j += 1;
        } else if (panels - j == 3) {
          panel_tile<Words, 3>(row, at, panel_step, many, ask, to, step, from > 0);
          j += 3;
        } else {
          panel_tile<Words, 2>(row, at, panel_step, many, ask, to, step, from > 0);
          j += 2;
        }
      }
    }
  }
}

// room(row, token) as out(token, row), whose rows are ROW_BLOCK apart.
static void turn(const float* room, int64_t rows, int64_t panels, float* out) {
  for (int64_t j = 0; j < panels; ++j)
    for (int64_t i = 0; i < rows; i += W) {
      F v[W];
      for (int64_t r = 0; r < W; ++r) v[r] = load(room + (i + r) * panels * W + j * W);
      transpose(v);
      for (int64_t t = 0; t < W; ++t) store(out + (j * W + t) * ROW_BLOCK + i, v[t]);
    }
}

// Calls finish(place, row, lanes, sums) for `lanes` rows from `row` on of W_e x + b_e, of every expert e and its queue. Tokens
// of panels come to across(e, panel, row, rows, sums, step, bias) before, across the lanes; those that it takes go no further.
template <class Words, class T, class X, class Across, class Finish>
static int each_product(const Queues& q, int64_t experts, const T* w, const int64_t* w_step, const void* bias, int64_t rows,
                        int64_t depth, const X* const* x, const Panels<Words, X>& panels, am_parallel with, const Across& across,
                        const Finish& finish) {
  int64_t blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, bytes = depth * (int64_t)sizeof(X);
  int64_t chunk = most(DOT_TOKENS, least(MOST_TOKENS, TOKEN_BYTES / bytes / DOT_TOKENS * DOT_TOKENS));
  return share(with, experts * blocks, 2 * MOST_TOKENS * ROW_BLOCK, [&](int64_t task, float* sums) {
    int64_t e = task / blocks, row = task % blocks * ROW_BLOCK, many = least(rows - row, ROW_BLOCK), follow = rows - row - many;
    const T* from = w + e * w_step[0] + row * w_step[1];
    float add[ROW_BLOCK] = {}, *room = sums + MOST_TOKENS * ROW_BLOCK;
    if (bias)
      for (int64_t i = 0; i < many; ++i) add[i] = to_float(((const T*)bias)[e * rows + row + i]);
    auto finished = [&](int64_t first, int64_t tokens) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < many; i += W) {
          int lanes = (int)least(many - i, W);
          finish(first + t, row + i, lanes, load(sums + t * ROW_BLOCK + i) + load(add + i));
        }
    };
    int64_t covered = panels.covered(e);
    for (int64_t i = 0; i < panels.count(e); i += MOST_PANELS) {
      int64_t some = least(MOST_PANELS, panels.count(e) - i);
      panel_block<Words>(from, w_step[1], many, follow, panels.panel(e, i), some, panels.words, room);
      bool taken = true;
      for (int64_t j = 0; j < some; ++j) taken &= across(e, i + j, row, many, room + j * W, some * W, add);
      if (taken) continue;
      turn(room, many, some, sums);
      finished(q.offsets[e] + i * W, least(some * W, covered - i * W));
    }
    for (int64_t first = q.offsets[e] + covered; first < q.offsets[e + 1]; first += chunk) {
      int64_t tokens = least(chunk, q.offsets[e + 1] - first);
      dot_block<Words>(from, w_step[1], many, follow, x + first, tokens, depth, sums);
      finished(first, tokens);
    }
  });
}

// out of each token from y, a row for each place.
template <class T>
static void add_choices(const am_experts& a, const Queues& q, const float* y, int64_t y_step, T* out, const float* weights,
                        am_parallel with) {
  parallel(with, a.tokens, grain_of(a.width * a.choices), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t* place = q.place + token * a.choices;
      for (int64_t i = 0; i < a.width; i += W) {
        F sum = set1(0);
        for (int64_t c = 0; c < a.choices; ++c)
          if (place[c] >= 0) {
            F v = load(y + place[c] * y_step + i);
            sum = weights ? fma(set1(weights[token * a.choices + c]), v, sum) : sum + v;
          }
        put(out + token * a.width + i, sum, (int)least(a.width - i, W));
      }
    }
  });
}

// H: what hidden vectors are kept as.
template <class Words, class T, class H>
static int experts_as(const am_experts* a, am_parallel with) {
  Queues q;
  if (!q.make(*a)) return 1;
  Panels<Words, T> tokens(q, a->experts, IN_WORDS<Words, T> ? a->width : 0);
  // these are filled from those
  Panels<Words, H> hidden(q, a->experts, tokens.any() && IN_WORDS<Words, H> ? a->hidden : 0);
  if (!tokens.make() || !hidden.make()) return 1;
  int64_t hidden_step = up_to(a->hidden, 2 * W), y_step = up_to(a->width, W), alone = 0;
  for (int64_t e = 0; e < a->experts; ++e) alone += q.offsets[e + 1] - q.offsets[e] - hidden.covered(e);
  Scratch rows(alone * hidden_step), y(q.pairs * y_step), memory(q.pairs * 4);
  if (!rows.data || !y.data || !memory.data) return 1;
  const T** x = (const T**)memory.data;
  const H** h = (const H**)(x + q.pairs);  // null where hidden vectors are in a panel
  alone = 0;
  for (int64_t e = 0; e < a->experts; ++e)
    for (int64_t p = q.offsets[e]; p < q.offsets[e + 1]; ++p) {
      x[p] = (const T*)a->x + q.token(p) * a->x_step;
      h[p] = p - q.offsets[e] < hidden.covered(e) ? nullptr : (const H*)rows.data + alone++ * hidden_step;
    }
  tokens.fill(x, with);
  if (a->saved) {  // rows that nothing was queued for
    int64_t rest = a->tokens * a->choices - q.pairs;
    memset(a->saved + q.pairs * a->hidden, 0, sizeof(float) * (size_t)(rest * a->hidden));
  }
  int failed = each_product(
      q, a->experts, (const T*)a->w1, a->w1_step, a->b1, a->hidden, a->width, x, tokens, with,
      [&](int64_t e, int64_t panel, int64_t row, int64_t many, const float* sums, int64_t step, const float* add) {
        if (hidden.count(e) == 0) return false;
        float* to = hidden.panel(e, panel) + row / Words::IN_WORD * W;
        for (int64_t i = 0; i < many; i += Words::IN_WORD, to += W) {
          constexpr int64_t LAST = Words::IN_WORD - 1;
          F low = Gelu(load(sums + i * step) + set1(add[i])).value;
          F high = LAST ? Gelu(load(sums + (i + LAST) * step) + set1(add[i + LAST])).value : low;
          store(to, word_rounded(Words(), low, high));
        }
        return a->saved == nullptr;
      },
      [&](int64_t p, int64_t i, int lanes, F z) {
        if (a->saved) put(a->saved + p * a->hidden + i, z, lanes);
        if (h[p]) put((H*)h[p] + i, Gelu(z).value, lanes);
      });
  if (failed) return failed;
  failed = each_product(
      q, a->experts, (const T*)a->w2, a->w2_step, a->b2, a->width, a->hidden, h, hidden, with,
      [](int64_t, int64_t, int64_t, int64_t, const float*, int64_t, const float*) { return false; },
      [&](int64_t p, int64_t i, int, F v) { store(y.data + p * y_step + i, v); });
  if (failed) return failed;
  add_choices(*a, q, y.data, y_step, (T*)a->out, a->weights, with);
  return 0;
}

static int experts(const am_experts* a, am_parallel with) {
  if (a->dtype == AM_FLOAT32) return experts_as<Singles, float, float>(a, with);
#if defined(AM_PAIRS)
  return experts_as<Pairs, bf16, bf16>(a, with);
#else
  return experts_as<Singles, bf16, float>(a, with);
#endif
}

}  // namespace AM_ISA
