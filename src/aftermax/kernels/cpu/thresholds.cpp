// Thresholds of the projection onto { 0 <= p <= 1, sum p = k }, of all prefixes of a row, in one walk.
//
// Of the scores so far p_j = min(max(z_j - tau, 0), 1). A new score can only raise tau, so that each one goes from p = 1 over
// 0 < p < 1 to p = 0 and never back: two heaps hold the ones and the fractions, and no score moves more than twice. A third
// heap holds the `top` largest.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "core.h"

namespace {

struct Item {
  double score;
  int64_t number;  // in the row
  int64_t later;   // among equal scores the larger one wins
};

// The smallest at the front.
struct Smallest {
  bool operator()(const Item& a, const Item& b) const {
    return a.score != b.score ? a.score > b.score : a.later > b.later;
  }
};

struct Heap {
  Item* items;
  int64_t count;
  const Item& front() const { return items[0]; }
  void push(Item x) {
    items[count++] = x;
    std::push_heap(items, items + count, Smallest());
  }
  Item pop() {
    std::pop_heap(items, items + count, Smallest());
    return items[--count];
  }
};

const int64_t PAUSE = 1024;  // changes of a sum before it is taken anew

struct Walk {
  const am_thresholds& a;
  Heap ones, fractions, top;
  int64_t *leaves_ones, *leaves_top, *leaves_support;
  double sum = 0, tau = -INFINITY;
  int64_t changes = 0;
  int64_t now = 0, capped = 0;

  int64_t count() const { return ones.count + fractions.count; }

  void add(double by) {
    sum += by;
    if (++changes < PAUSE) return;
    changes = 0;
    sum = 0;
    for (int64_t i = 0; i < fractions.count; ++i) sum += fractions.items[i].score;
  }
  void into_fractions(Item x) {
    leaves_ones[x.number] = now;
    fractions.push(x);
    add(x.score);
  }
  void out_of_fractions() {
    Item x = fractions.pop();
    leaves_support[x.number] = now;
    add(-x.score);
  }

  void see(Item x) {
    leaves_ones[x.number] = leaves_top[x.number] = leaves_support[x.number] = now;
    if (!(x.score > -INFINITY)) return;  // hidden
    int64_t never = (int64_t)(a.items - a.carried);
    if (top.count < a.top || Smallest()(x, top.front())) {
      leaves_top[x.number] = never;
      top.push(x);
      if (top.count > a.top) leaves_top[top.pop().number] = now;
    }
    if (count() >= a.k && x.score <= tau) return;
    leaves_support[x.number] = never;
    if (count() < a.k || x.score >= tau + 1) {
      leaves_ones[x.number] = never;
      ones.push(x);
    } else {
      into_fractions(x);
    }
    settle();
    if (a.cap > 0 && count() > a.cap && fractions.count > 0) {
      capped = 1;
      while (count() > a.cap && fractions.count > 0) out_of_fractions();
      settle();
    }
  }

  // Restores: ones are at least tau + 1, fractions above tau and below tau + 1, and the sum of all p is k.
  void settle() {
    while ((double)count() > a.k) {
      if (fractions.count == 0) {
        if ((double)ones.count <= a.k) break;
        into_fractions(ones.pop());
      }
      tau = (sum + (double)ones.count - a.k) / (double)fractions.count;
      // in this order: one that becomes a fraction lowers tau, and may save the least fraction
      if (ones.count > 0 && tau > ones.front().score - 1)
        into_fractions(ones.pop());
      else if (tau >= fractions.front().score)
        out_of_fractions();
      else
        return;
    }
    // all p are 1 or 0: any tau from the next score on to the least one less 1
    if (fractions.count == 0) tau = ones.count > 0 ? ones.front().score - 1 : 0;
  }
};

void row(const am_thresholds& a, int64_t r, Item* room) {
  Walk walk = {a,
               {room, 0},
               {room + a.items + 1, 0},
               {room + 2 * (a.items + 1), 0},
               a.leaves_ones + r * a.items,
               a.leaves_top + r * a.items,
               a.leaves_support + r * a.items};
  const double* scores = a.scores + r * a.items;
  int64_t offered = a.items - a.carried;
  for (int64_t i = 0; i < a.carried; ++i) walk.see({scores[i], (int64_t)i, (int64_t)-i});
  for (int64_t i = 0; i < offered; ++i) {
    walk.now = (int64_t)i;
    walk.see({scores[a.carried + i], (int64_t)(a.carried + i), (int64_t)(i + 1)});
    a.tau[r * offered + i] = walk.count() > 0 ? walk.tau : 0;
    a.fractions[r * offered + i] = (int64_t)walk.fractions.count;
  }
  a.capped[r] = walk.capped;
}

struct Rows {
  const am_thresholds* a;
  int failed;
};

void rows(int64_t begin, int64_t end, void* context) {
  Rows* work = (Rows*)context;
  Item* room = (Item*)malloc(sizeof(Item) * (size_t)(3 * work->a->items + 3));
  if (!room) {
    __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t r = begin; r < end; ++r) row(*work->a, r, room);
  free(room);
}

}  // namespace

int am_run_thresholds(const am_thresholds* a, am_parallel with) {
  Rows work = {a, 0};
  with.run(a->rows, 1, rows, &work);
  return work.failed;
}

// tau_i = (sum of the fractions + ones - k) / fractions: of each fraction the slope is 1 / fractions, and it is one in the
// queries from leaves_ones to leaves_support.
int am_run_thresholds_backward(const am_thresholds_backward* a) {
  int64_t offered = a->items - a->carried;
  double* before = (double*)malloc(sizeof(double) * (size_t)(offered + 1));
  if (!before) return 1;
  for (int64_t r = 0; r < a->rows; ++r) {
    before[0] = 0;
    for (int64_t i = 0; i < offered; ++i) {
      int64_t many = a->fractions[r * offered + i];
      before[i + 1] = before[i] + (many > 0 ? a->grad[r * offered + i] / many : 0);
    }
    for (int64_t j = 0; j < a->items; ++j) {
      int64_t at = r * a->items + j, ones = a->leaves_ones[at], support = a->leaves_support[at];
      if (ones < 0 || ones > offered || support < 0 || support > offered) {
        free(before);
        return 2;
      }
      a->out[at] = before[support] - before[ones];
    }
  }
  free(before);
  return 0;
}

// Which of the items stand in which block of queries: item j is there from start[j] to stop[j].
int am_run_spans(const am_spans* a) {
  int64_t* filled = (int64_t*)malloc(sizeof(int64_t) * (size_t)(a->blocks + 1));
  if (!filled) return 1;
  for (int64_t r = 0; r < a->rows; ++r) {
    int64_t* out = a->out + r * a->blocks * a->width;
    memset(filled, 0, sizeof(int64_t) * (size_t)a->blocks);
    for (int64_t j = 0; j < a->items; ++j) {
      int64_t start = a->start[r * a->items + j], stop = a->stop[r * a->items + j];
      if (start < 0 || stop > a->blocks * a->block) {
        free(filled);
        return 2;
      }
      for (int64_t b = start / a->block; start < stop && b * a->block < stop; ++b) {
        if (filled[b] == a->width) {
          free(filled);
          return 2;
        }
        out[b * a->width + filled[b]++] = (int64_t)j;
      }
    }
    for (int64_t b = 0; b < a->blocks; ++b)
      for (int64_t i = filled[b]; i < a->width; ++i) out[b * a->width + i] = -1;
  }
  free(filled);
  return 0;
}
