// The core of the CPU kernels: plain C functions over pointers, sizes and strides.
//
// No torch and no Python in here: whoever calls brings the memory and a way to run a loop on several
// threads. Every function exists once per instruction set (a "body"); `am_body()` gives the one in
// use. Nothing throws, nothing allocates what it returns.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*am_task)(int64_t begin, int64_t end, void* context);

// Runs task over [0, count) on several threads, each one contiguous range of at least `grain`.
typedef struct {
  void (*run)(int64_t count, int64_t grain, am_task task, void* context);
  int32_t threads;
} am_parallel;

typedef enum { AM_FLOAT32 = 0, AM_BFLOAT16 = 1, AM_FLOAT16 = 2 } am_dtype;

// How a softmax walks its row.
typedef enum {
  AM_AUTO = 0,
  AM_THREE_PASS_RECOMPUTE = 1,  // max | sum of exp | exp again, scaled
  AM_THREE_PASS_RELOAD = 2,     // max | exp, stored, and its sum | scale what was stored
  AM_TWO_PASS = 3,              // sum of (mantissa, exponent) pairs | exp, scaled
  AM_ONLINE = 4,                // running max and sum | exp, scaled
} am_algorithm;

// How the result is written: through the cache, or past it.
typedef enum { AM_STORE_AUTO = 0, AM_STORE_CACHED = 1, AM_STORE_STREAMED = 2 } am_store;

// What a row of nothing but -inf gives.
typedef enum { AM_EMPTY_NAN = 0, AM_EMPTY_ZERO = 1 } am_empty;

typedef enum { AM_MEAN = 0, AM_SUM = 1, AM_NONE = 2 } am_reduction;

enum { AM_MAX_DIMS = 64 };

// A logsumexp as shift + rest. The shift is 0, or the row's maximum where that is so large that its
// digits would leave none for the rest.
typedef struct {
  double shift, rest;
} am_lse;

// `rows` rows of `length` elements. A row's place is given by the outer dims (sizes, and steps in
// elements, the last one runs fastest); its elements lie `stride` elements apart. `fresh` counts the
// bytes from `data` on whose pages the system has yet to give (0: none): asking for many of them at
// once, ahead of the writes, costs less than a fault for each.
typedef struct {
  void* data;
  int64_t fresh;
  int64_t stride;
  int64_t step[AM_MAX_DIMS];
} am_place;

typedef struct {
  int64_t rows, length;
  int32_t dims;
  int64_t size[AM_MAX_DIMS];
} am_shape;

typedef struct {
  am_shape shape;
  am_place in, out;
  am_dtype dtype;
  am_algorithm algorithm;
  am_store store;
  am_empty empty;
  int32_t log;  // 1: write log(softmax)
} am_softmax;

typedef struct {
  am_shape shape;
  am_place in;
  am_dtype dtype;
  void* out;    // one value per row, in dtype
  am_lse* lse;  // the same, not rounded to dtype
} am_logsumexp;

// in[0] = gradient of the output; in[1] = the output (softmax, log-softmax) or the input (logsumexp)
typedef enum { AM_OF_SOFTMAX = 0, AM_OF_LOG_SOFTMAX = 1 } am_backward_of;

typedef struct {
  am_shape shape;
  am_place grad, result, out;
  am_dtype dtype;
  am_backward_of of;
} am_softmax_backward;

typedef struct {
  am_shape shape;
  am_place in, out;
  am_dtype dtype;
  const void* grad;  // one value per row, in dtype
  const am_lse* lse;
} am_logsumexp_backward;

// What the classes of a cross-entropy have in common. `weight` may be null.
typedef struct {
  const int64_t* target;
  int64_t ignore_index;
  const float* weight;
  double label_smoothing, lse_square_scale;
  am_reduction reduction;
} am_classes;

typedef struct {
  am_shape shape;
  am_place logits;
  am_dtype dtype;
  am_classes classes;
  float* loss;  // one value per row (none) or one in all
  am_lse* lse;  // one per row
} am_cross_entropy;

typedef struct {
  am_shape shape;
  am_place logits, out;
  am_dtype dtype;
  am_classes classes;
  const float* grad;  // one value per row (none) or one in all
  const am_lse* lse;
} am_cross_entropy_backward;

// logits = hidden weight^T + bias, never whole. hidden (rows, width), weight (classes, width).
typedef struct {
  int64_t rows, width, count;  // count: the number of classes
  const void *hidden, *weight, *bias;  // bias may be null
  int64_t hidden_step, weight_step;    // elements from one row to the next
  am_dtype dtype;
  am_classes classes;
  float* loss;
  am_lse* lse;
} am_linear_cross_entropy;

typedef struct {
  am_linear_cross_entropy forward;  // loss is not read
  const float* grad;
  void *grad_hidden, *grad_weight, *grad_bias;  // contiguous, in dtype; null where not wanted
} am_linear_cross_entropy_backward;

// ---- attention ---------------------------------------------------------------------------------

// Rows of heads: a width of elements side by side, and the steps from one batch, head and row to the next.
typedef struct {
  void* data;
  int64_t step[3];
} am_heads;

// A float for each row, rows side by side; steps from one batch and head to the next. May be null.
typedef struct {
  const float* data;
  int64_t step[2];
} am_per_row;

typedef enum { AM_NO_MASK = 0, AM_MASK_BOOL = 1, AM_MASK_FLOAT = 2 } am_mask_kind;

// What query i may see, and what is added to its scores. All parts restrict together.
typedef struct {
  int32_t causal;          // key j only if j <= i + offset
  int64_t offset, window;  // key j only if |i + offset - j| < window, where window > 0
  am_mask_kind kind;
  const void* mask;        // bool (not 0 = may be seen), or float32 that is added to the scores
  int64_t mask_step[4];    // batch, head, query, key
  float hidden_below;      // a float mask up to this hides
  const float* slopes;     // of each head: -slope |i + offset - j| is added; may be null
  // scores become stretch[j - i - offset + zero] s + shift[same]; may be null, both
  const float *stretch, *shift;
  int64_t zero;
} am_visible;

// How many keys each query may see: (batch, heads, queries).
typedef struct {
  int64_t batch, heads, queries, keys;
  am_visible visible;
  float* out;
} am_count;

// How scores s become weights. N is the number of keys that the row sees.
typedef enum {
  AM_MAP_SOFTMAX = 0,   // e^s / (e^sink + sum e^s); without sink, no such term
  AM_MAP_SIGMOID = 1,   // 1 / (1 + e^-(s + row_bias))
  AM_MAP_RELU = 2,      // max(s, 0)^power row_weight
  AM_MAP_SOFTPLUS = 3,  // f / sum f, f = ln(1 + e^s)
  AM_MAP_LSSAR = 4,     // r^p / sum r^p, r = max(f - mean f, 0); no mean is taken off in rows with N <= 3
  AM_MAP_CLIPPED = 5,   // softmax p becomes min(max(row_stretch p + row_bias, 0), 1)
} am_row_map;

// Whether a map has to see its row first, and needs a second weighted sum of the values for its backward pass.
static inline int am_sees_row_first(am_row_map map) { return map == AM_MAP_LSSAR || map == AM_MAP_CLIPPED; }

enum { AM_STATS = 4 };

typedef struct {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  am_dtype dtype;
  am_heads query, key, value, out;
  am_visible visible;
  am_row_map map;
  int32_t cosine;  // 1: queries and keys are divided by their length first
  float scale;     // of the scores
  am_per_row row_scale;   // also of the scores
  am_per_row row_bias;    // sigmoid, clipped
  am_per_row row_weight;  // relu; clipped: the stretch
  am_per_row row_power;   // lssar, in place of `power`
  am_per_row count;       // lssar: N
  const float* sink;      // softmax: of each head
  float power;
  float* stats;  // AM_STATS for each row of each head, for the backward pass; may be null
  float* extra;  // lssar and clipped: a second weighted sum of the values, (batch, heads, queries, value_width); may be null
} am_attention;

typedef struct {
  am_attention forward;  // out, stats and extra hold what the forward pass left
  am_heads grad;         // of out, in dtype
  am_heads grad_query, grad_key, grad_value;  // in dtype
  float* grad_row_scale;  // (batch, heads, queries); may be null
} am_attention_backward;

// ---- the linear family -------------------------------------------------------------------------

// out_i = sum_{j <= i} g^(i - j) (q_i . k_j) v_j, all float32. The state is (batch, kv_heads, width, value_width + totals),
// contiguous.
typedef struct {
  int64_t batch, heads, kv_heads, tokens, width, value_width;
  int32_t totals;  // 1: as if every value had one more element, 1; its sums go to `total`
  am_heads query, key, value, out;
  const float* rate;   // g = e^-rate of each head; may be null. Then heads == kv_heads
  const float* state;  // before the first token; may be null: zeros
  float* total;        // (batch, heads, tokens)
  float* new_state;
} am_walk;

typedef struct {
  am_walk forward;  // out, total and new_state are not read
  am_heads grad;
  const float *grad_total, *grad_state;  // of total (with totals), of new_state (may be null: zeros)
  am_heads grad_query, grad_key, grad_value;
  float* grad_of_state;  // of the state before
} am_walk_backward;

// ---- selection ---------------------------------------------------------------------------------

// For each row of scores, `carried` of them and then one for each query: the threshold tau of the projection onto
// { 0 <= p <= 1, sum p = k } of all scores up to that query, how many p lie between 0 and 1, and the query at which each
// score is no longer one of the ones, of the `top` largest (among equals the later ones), of p > 0. A score of -inf or NaN
// is none. Not more than `cap` scores are kept (0: as many as there are); `capped` tells that it was so.
typedef struct {
  int64_t rows, items, carried, top, cap;
  double k;
  const double* scores;  // (rows, items)
  double* tau;           // (rows, items - carried)
  int64_t* fractions;    // the same
  int64_t *leaves_ones, *leaves_top, *leaves_support;  // (rows, items)
  int64_t* capped;       // (rows,)
} am_thresholds;

typedef struct {
  int64_t rows, items, carried;
  const double* grad;  // of tau
  const int64_t *fractions, *leaves_ones, *leaves_support;
  double* out;  // of the scores
} am_thresholds_backward;

// For each block of queries the items that stand in one of them, [start, stop) each, in order; -1 behind them.
typedef struct {
  int64_t rows, items, block, blocks, width;
  const int64_t *start, *stop;  // (rows, items)
  int64_t* out;                 // (rows, blocks, width)
} am_spans;

// These have no vectors, and one body. They return 0, 1 where scratch memory could not be had, 2 where an item or a query has no place.
int am_run_thresholds(const am_thresholds*, am_parallel);
int am_run_thresholds_backward(const am_thresholds_backward*);
int am_run_spans(const am_spans*);

// ---- experts -----------------------------------------------------------------------------------

// out = sum over a token's choices of weight (W2 gelu(W1 x + b1) + b2), float32 or bfloat16. x (tokens, width), W1 (experts,
// hidden, width), W2 (experts, width, hidden), their rows whole and the steps in elements.
typedef struct {
  int64_t tokens, width, hidden, experts, choices;
  am_dtype dtype;
  const void *x, *w1, *b1, *w2, *b2;  // b1 (experts, hidden) and b2 (experts, width) may be null
  int64_t x_step, w1_step[2], w2_step[2];  // from one expert, and from one row to the next
  const int64_t* index;  // (tokens, choices): an expert, or -1 for none
  const float* weights;  // the same
  int64_t capacity;        // the most tokens that an expert takes; 0: as many as come
  double capacity_factor;  // the same as a multiple of choices / experts, rounded up; 0: none
  void* out;     // (tokens, width)
  float* saved;  // W1 x + b1 in the order of experts, up to tokens * choices rows; may be null
} am_experts;

typedef struct {
  am_experts forward;  // out is not read; saved holds what the forward pass left
  const void* grad;    // of out, in dtype
  int64_t grad_step;
  void *grad_x, *grad_b1, *grad_b2;  // contiguous, in dtype; null where not wanted
  float* grad_weights;               // (tokens, choices)
  am_place grad_w1, grad_w2;         // contiguous: data and fresh alone are read
} am_experts_backward;

// Returns 0, or 1 where scratch memory could not be had (then the result is worth nothing).
typedef struct {
  const char* name;
  int (*softmax)(const am_softmax*, am_parallel);
  int (*softmax_backward)(const am_softmax_backward*, am_parallel);
  int (*logsumexp)(const am_logsumexp*, am_parallel);
  int (*logsumexp_backward)(const am_logsumexp_backward*, am_parallel);
  int (*cross_entropy)(const am_cross_entropy*, am_parallel);
  int (*cross_entropy_backward)(const am_cross_entropy_backward*, am_parallel);
  int (*linear_cross_entropy)(const am_linear_cross_entropy*, am_parallel);
  int (*linear_cross_entropy_backward)(const am_linear_cross_entropy_backward*, am_parallel);
  // what memory can do at best: reads x, and where y is not null writes it there past the cache
  int (*memory)(const float* x, float* y, int64_t n, am_parallel);
  // loss, lse and gradients in one go: for float32, AM_MEAN and AM_SUM; `grad` is not read (1 is meant)
  int (*linear_cross_entropy_gradients)(const am_linear_cross_entropy_backward*, am_parallel);
  int (*attention)(const am_attention*, am_parallel);
  int (*attention_backward)(const am_attention_backward*, am_parallel);
  int (*count)(const am_count*, am_parallel);
  int (*linear_walk)(const am_walk*, am_parallel);
  int (*linear_walk_backward)(const am_walk_backward*, am_parallel);
  // what the multipliers can do at best, in float32 and in pairs of bfloat16: runs a loop of nothing but products that are
  // added up, and returns their number of operations (0 where there are no such multipliers)
  int64_t (*multiply_adds)(int64_t rounds);
  int64_t (*multiply_pairs)(int64_t rounds);
  int (*experts)(const am_experts*, am_parallel);
  int (*experts_backward)(const am_experts_backward*, am_parallel);
} am_body_table;

#if defined(__GNUC__)
#define AM_EXPORT __attribute__((visibility("default")))
#else
#define AM_EXPORT
#endif

// The body in use. Picked when the library is loaded: the best that the processor has.
AM_EXPORT const am_body_table* am_body(void);
// Its name: "avx512bf16", "avx512", "avx2" or "portable".
AM_EXPORT const char* am_isa(void);
// Switches to the body of that name. Returns 0, 1 where no body has that name, 2 where the processor
// (or the build) lacks it. Not while a kernel runs.
AM_EXPORT int am_use_isa(const char* name);

// Sizes of this processor's caches in bytes, as far as it tells: L2 of one core, and the last level.
AM_EXPORT int64_t am_l2_bytes(void);
AM_EXPORT int64_t am_last_level_bytes(void);

// The table's multiply_adds and multiply_pairs, of the body in use.
AM_EXPORT int64_t am_multiply_adds(int64_t rounds);
AM_EXPORT int64_t am_multiply_pairs(int64_t rounds);

// Whether a result of that size has yet to get its pages from the system, and the request for them: large
// ones where those come quickly, unless AFTERMAX_HUGE_PAGES=0.
AM_EXPORT int am_is_fresh(const void* data, int64_t bytes);
AM_EXPORT void am_ask_for_pages(void* data, int64_t bytes);

#ifdef __cplusplus
}
#endif
