// Random calls of the plain C core, held against naive loops in double: no torch, no Python.
//
//   fuzz_core [rounds] [first]      rounds first, first + 1, ...; each one depends on its number alone
//
// Every array ends (or begins) where its memory does, at a page that may not be touched; what lies
// around it and between its elements is watched. Each call runs serially and on several threads,
// which must give the same bits.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#endif

namespace {

std::string what;  // the call that runs

// What is left to say when the process dies of a signal or a sanitizer.
void last_words() {
  ssize_t written = ::write(STDOUT_FILENO, what.data(), what.size());
  written = ::write(STDOUT_FILENO, "\n", 1);
  (void)written;
}
void die(int signal) {
  last_words();
  std::signal(signal, SIG_DFL);
  raise(signal);
}

int problems = 0;
struct Stop {};

void complain(const std::string& problem) {
  printf("%s\n  %s\n", what.c_str(), problem.c_str());
  fflush(stdout);
  ++problems;
}
[[noreturn]] void fail(const std::string& problem) {
  complain(problem);
  throw Stop();
}
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char out[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(out, sizeof out, format, arguments);
  va_end(arguments);
  return out;
}

// ---- chance ------------------------------------------------------------------------------------

std::mt19937_64 chance;

int64_t below(int64_t n) { return (int64_t)(chance() % (uint64_t)n); }
int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
bool one_in(int64_t n) { return below(n) == 0; }
double uniform() { return (double)(chance() >> 11) * 0x1p-53; }
double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
template <class T>
T pick(std::initializer_list<T> from) {
  return from.begin()[below((int64_t)from.size())];
}

// ---- the formats -------------------------------------------------------------------------------

struct Format {
  const char* name;
  int bytes, digits, lowest, highest;  // digits of the fraction with its leading one; exponents
};
const Format FORMATS[] = {
    {"float32", 4, 24, -126, 127}, {"bfloat16", 2, 8, -126, 127}, {"float16", 2, 11, -14, 15}};
const Format DOUBLE = {"float64", 8, 53, -1022, 1023};

double rounded(double x, const Format& f) {
  if (x == 0 || !std::isfinite(x)) return x;
  double quantum = std::ldexp(1, std::max(std::ilogb(x), f.lowest) - f.digits + 1);
  double r = std::nearbyint(x / quantum) * quantum;
  return f.highest < 1023 && std::fabs(r) >= std::ldexp(1, f.highest + 1) ? std::copysign(INFINITY, x) : r;
}

double read(const void* from, const Format& f) {
  if (f.bytes == 8) {
    double d;
    memcpy(&d, from, 8);
    return d;
  }
  if (f.bytes == 4) {
    float a;
    memcpy(&a, from, 4);
    return a;
  }
  uint16_t u;
  memcpy(&u, from, 2);
  int fraction = f.digits - 1, exponent = u >> fraction & ((1 << (15 - fraction)) - 1);
  double part = u & ((1 << fraction) - 1), sign = u & 0x8000 ? -1 : 1;
  if (exponent == (1 << (15 - fraction)) - 1) return part != 0 ? NAN : sign * INFINITY;
  if (exponent != 0) part += 1 << fraction;
  return sign * std::ldexp(part, std::max(exponent, 1) + f.lowest - 1 - fraction);
}

// x is a number of the format.
void write(double x, void* to, const Format& f) {
  if (f.bytes == 8) {
    memcpy(to, &x, 8);
  } else if (f.bytes == 4) {
    float a = (float)x;
    memcpy(to, &a, 4);
  } else {
    int fraction = f.digits - 1, top = (1 << (15 - fraction)) - 1;
    uint16_t u = std::signbit(x) ? 0x8000 : 0;
    double a = std::fabs(x);
    if (x != x) {
      u |= (uint16_t)(top << fraction | 1 << (fraction - 1));
    } else if (std::isinf(x)) {
      u |= (uint16_t)(top << fraction);
    } else if (a != 0) {
      int e = std::max(std::ilogb(a), f.lowest);
      auto digits = (int64_t)std::ldexp(a, fraction - e);
      u = (uint16_t)(u + ((e - f.lowest) << fraction) + digits);  // the leading one adds to the exponent
    }
    memcpy(to, &u, 2);
  }
}

// Whether `got`, rounded to the format, may stand for a number within `error` of `want`.
bool fits(double got, double want, double error, const Format& f) {
  if (want != want) return got != got;
  if (std::isinf(want)) return got == want;
  return got >= rounded(want - error, f) && got <= rounded(want + error, f);
}

// ---- memory ------------------------------------------------------------------------------------

// Bytes with a page on either side that may not be touched, lying against one of the two.
class Block {
 public:
  Block(int64_t bytes, int fill) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    room_ = (bytes + page - 1) / page * page + page;
    base_ = (char*)mmap(nullptr, (size_t)(room_ + 2 * page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) fail("no memory");
    mprotect(base_, (size_t)page, PROT_NONE);
    mprotect(base_ + page + room_, (size_t)page, PROT_NONE);
    whole_ = room_ + 2 * page;
    inside_ = base_ + page;
    data = one_in(4) ? inside_ : inside_ + room_ - bytes;
    memset(inside_, AROUND, (size_t)room_);
    memset(data, fill, (size_t)bytes);
    ASAN_POISON_MEMORY_REGION(inside_, (size_t)(data - inside_));
    ASAN_POISON_MEMORY_REGION(data + bytes, (size_t)(inside_ + room_ - data - bytes));
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    ASAN_UNPOISON_MEMORY_REGION(inside_, (size_t)room_);
    for (char* p = inside_; p < inside_ + room_; ++p)
      if ((p < data || p >= data + bytes_) && *p != AROUND) {
        complain("something was written beside an array");
        break;
      }
    munmap(base_, (size_t)whole_);
  }
  std::vector<char> copy() const { return std::vector<char>(data, data + bytes_); }
  void restore(const std::vector<char>& from) { std::copy(from.begin(), from.end(), data); }

  char* data;

 private:
  static constexpr char AROUND = 0x5a;
  int64_t bytes_, room_, whole_;
  char *base_, *inside_;
};

// A plain row of numbers.
template <class T>
struct Array : Block {
  explicit Array(int64_t n) : Block(n * (int64_t)sizeof(T), 0xff), size(n) {}
  T* begin() { return (T*)data; }
  T& operator[](int64_t i) { return ((T*)data)[i]; }
  int64_t size;
};

// Where rows lie: their steps, and the room that they take.
struct Layout {
  am_place place;
  int64_t room;
};

bool beside;  // whether the rows of this call lie side by side, mostly

Layout layout(const am_shape& shape, bool repeats) {
  int order[AM_MAX_DIMS + 1], dims = shape.dims + 1;
  for (int d = 0; d < dims; ++d) order[d] = d;  // dims - 1 is the row itself
  if (beside && dims > 1 && !one_in(8))
    std::swap(order[dims - 1], order[dims - 2]);
  else if (one_in(3))
    std::shuffle(order, order + dims, chance);
  Layout out;
  memset(&out.place, 0, sizeof out.place);
  int64_t step = one_in(beside ? 30 : 8) ? between(2, 5) : 1;
  out.room = 1;
  bool none = false;
  for (int i = dims - 1; i >= 0; --i) {
    int d = order[i];
    int64_t size = d == dims - 1 ? shape.length : shape.size[d];
    int64_t here = repeats && one_in(12) ? 0 : step;
    (d == dims - 1 ? out.place.stride : out.place.step[d]) = here;
    none = none || size == 0;
    if (here == 0 || size == 0) continue;
    out.room += (size - 1) * here;
    step = size * here + (one_in(4) ? between(0, 20) : 0);
  }
  if (none) out.room = 0;
  return out;
}

int64_t offset(const am_shape& shape, const am_place& place, int64_t row, int64_t k) {
  int64_t at = k * place.stride;
  for (int d = shape.dims - 1; d >= 0; --d) {
    at += row % shape.size[d] * place.step[d];
    row /= shape.size[d];
  }
  return at;
}

// Rows in memory. What lies between them is NaN, and stays as it is.
struct Rows {
  const am_shape& shape;
  const Format& format;
  Layout where;
  Block block;

  Rows(const am_shape& s, const Format& f, const Layout& l) : shape(s), format(f), where(l), block(l.room * f.bytes, 0xff) {
    where.place.data = block.data;
  }
  void* at(int64_t row, int64_t k) const { return block.data + offset(shape, where.place, row, k) * format.bytes; }
  double get(int64_t row, int64_t k) const { return read(at(row, k), format); }
  void set(int64_t row, int64_t k, double x) { write(rounded(x, format), at(row, k), format); }
  std::vector<double> row(int64_t r) const {
    std::vector<double> out((size_t)shape.length);
    for (int64_t k = 0; k < shape.length; ++k) out[(size_t)k] = get(r, k);
    return out;
  }
  void check_between() const {
    std::vector<char> left = block.copy();
    for (int64_t r = 0; r < shape.rows; ++r)
      for (int64_t k = 0; k < shape.length; ++k)
        memset(left.data() + ((char*)at(r, k) - block.data), 0xff, (size_t)format.bytes);
    for (char c : left)
      if (c != (char)0xff) fail("something was written between the elements");
  }
};

int64_t some_length() {
  switch (below(12)) {
    case 0: return between(1, 4);
    case 1: return pick<int64_t>({8, 16, 32, 64, 128, 256, 512}) + between(-2, 2);
    case 2: return between(1000, 5000);
    case 3: return one_in(3) ? 32768 * between(1, 3) + between(-40, 40) : between(1, 700);
    default: return between(1, 300);
  }
}

am_shape some_shape() {
  am_shape s;
  memset(&s, 0, sizeof s);
  s.length = some_length();
  s.dims = (int32_t)below(4);
  s.rows = 1;
  beside = one_in(3);
  int64_t most = s.length > 20000 ? 3 : s.length > 700 ? 9 : beside && one_in(2) ? 300 : 40;
  for (int d = 0; d < s.dims; ++d) {
    s.size[d] = between(1, std::max<int64_t>(1, most / s.rows));
    s.rows *= s.size[d];
  }
  return s;
}

// One row of values, of every kind that the kernels tell apart.
void fill_row(Rows& x, int64_t row, bool special) {
  static const double scales[] = {0, 1e-3, 1, 1, 3, 10, 30, 100, 1e3, 2e4, 1e6, 1e30};
  static const double centres[] = {0, 0, 0, 0, 5, -50, 88, -104, 700, -1.2e5, 1.22e5, -1.31e5, 1.3e5, 2e6, -1e9};
  double scale = scales[below(special ? 12 : 8)], centre = centres[below(special ? 15 : 9)];
  for (int64_t k = 0; k < x.shape.length; ++k) x.set(row, k, centre + scale * normal());
  if (!special) return;
  int64_t n = x.shape.length;
  double odd = pick<double>({NAN, INFINITY, -INFINITY, -INFINITY, 3e38, -3e38, 1e-41, -0.0, 65504, -65504});
  switch (below(6)) {
    case 0: x.set(row, below(n), odd); break;
    case 1:
      for (int64_t k = 0; k < n; ++k)
        if (one_in(3)) x.set(row, k, odd);
      break;
    case 2:
      if (one_in(3))
        for (int64_t k = 0; k < n; ++k) x.set(row, k, odd);
      if (one_in(2)) x.set(row, below(n), pick<double>({NAN, INFINITY, 0, 1}));
      break;
    default: break;
  }
}
void fill(Rows& x, bool special) {
  for (int64_t r = 0; r < x.shape.rows; ++r) fill_row(x, r, special);
}

// ---- threads -----------------------------------------------------------------------------------

void run_serially(int64_t count, int64_t, am_task task, void* context) { task(0, count, context); }

int threads_now = 1;
void run_on_threads(int64_t count, int64_t grain, am_task task, void* context) {
  int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads_now, count / std::max<int64_t>(grain, 1)));
  std::vector<std::thread> running;
  for (int64_t i = 0; i < parts; ++i)
    running.emplace_back(task, count * i / parts, count * (i + 1) / parts, context);
  for (std::thread& t : running) t.join();
}

// Runs the call serially and on threads; `written` must come out the same.
template <class Call>
void run(std::initializer_list<Block*> written, Call call) {
  std::vector<std::vector<char>> before, serial;
  for (Block* b : written) before.push_back(b->copy());
  if (call({run_serially, 1}) != 0) fail("no memory, it says");
  for (Block* b : written) serial.push_back(b->copy());
  size_t i = 0;
  for (Block* b : written) b->restore(before[i++]);
  threads_now = (int)between(2, 5);
  if (call({run_on_threads, threads_now}) != 0) fail("no memory, it says");
  i = 0;
  for (Block* b : written)
    if (b->copy() != serial[i++]) fail(text("%d threads give another result than one", threads_now));
}

// ---- what is right -----------------------------------------------------------------------------

constexpr double ULP = 0x1p-23, TINY = 0x1p-148;
// Error of a sum or a quotient of exponentials, relative; and of the log of one, absolute.
constexpr double RELATIVE = 6 * ULP, OF_LOG = 6 * ULP;

struct Lse {
  double top = -INFINITY, sum = 0, rest = 0, value;
  bool nan = false;
  explicit Lse(const std::vector<double>& x) {
    for (double v : x) {
      nan = nan || v != v;
      top = std::max(top, v == v ? v : -INFINITY);
    }
    if (std::isfinite(top))
      for (double v : x) sum += std::exp(v - top);
    rest = std::log(sum);
    value = nan ? NAN : std::isinf(top) ? top : top + rest;
  }
  double below(double x) const { return (x - top) - rest; }
  bool finite() const { return std::isfinite(value); }
  // Beyond the reach of the pairs the maximum is subtracted, and the difference rounded.
  bool shifted() const { return std::fabs(value) > 1.1e5; }
};
double value(const am_lse& lse) { return lse.shift + lse.rest; }
double below(double x, const am_lse& lse) { return (x - lse.shift) - lse.rest; }
// The relative error of e^d that rounding d costs.
double of_difference(double d) { return std::min(std::fabs(d), 150.0) * ULP; }

void check(double got, double want, double error, const Format& f, const char* name, int64_t row, int64_t k) {
  if (!fits(got, want, error, f))
    fail(text("%s[%lld, %lld] is %.9g, not %.9g within %.2g", name, (long long)row, (long long)k, got, want, error));
}

std::string describe(const am_shape& s, const am_place& p) {
  std::string out = text("length %lld (step %lld), rows", (long long)s.length, (long long)p.stride);
  for (int d = 0; d < s.dims; ++d) out += text(" %lld (step %lld)", (long long)s.size[d], (long long)p.step[d]);
  return out;
}

void try_softmax(const am_body_table* body) {
  am_softmax a;
  memset(&a, 0, sizeof a);
  a.shape = some_shape();
  a.dtype = (am_dtype)below(3);
  a.algorithm = (am_algorithm)below(5);
  a.store = (am_store)below(3);
  a.empty = (am_empty)below(2);
  a.log = (int32_t)below(2);
  const Format& f = FORMATS[a.dtype];
  bool inplace = one_in(4);
  Rows in(a.shape, f, layout(a.shape, !inplace)), apart(a.shape, f, layout(a.shape, false));
  Rows& out = inplace ? in : apart;
  fill(in, true);
  a.in = in.where.place;
  a.out = out.where.place;
  what += text("softmax: %s, log %d, algorithm %d, store %d, empty %d%s\n  in: ", f.name, a.log, a.algorithm, a.store,
               a.empty, inplace ? ", in place" : "") +
          describe(a.shape, a.in) + "\n  out: " + describe(a.shape, a.out);
  std::vector<std::vector<double>> x;
  for (int64_t r = 0; r < a.shape.rows; ++r) x.push_back(in.row(r));
  run({&out.block}, [&](am_parallel with) { return body->softmax(&a, with); });
  out.check_between();
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    const std::vector<double>& v = x[(size_t)r];
    Lse lse(v);
    bool shifts = a.algorithm == AM_ONLINE || lse.shifted() || std::fabs(lse.top) > 1.1e5;
    for (int64_t k = 0; k < a.shape.length; ++k) {
      double want = NAN, error = 0, d = v[(size_t)k] - lse.top;
      if (lse.value == -INFINITY) {
        want = a.empty == AM_EMPTY_NAN ? NAN : a.log ? -INFINITY : 0;
      } else if (lse.finite() && a.log) {
        want = lse.below(v[(size_t)k]);
        error = OF_LOG + 2 * ULP * std::fabs(want);
      } else if (lse.finite()) {
        want = std::exp(d) / lse.sum;
        error = want * (RELATIVE + (shifts ? of_difference(d) + 2 * ULP : 0)) + TINY;
      }
      check(out.get(r, k), want, error, f, "out", r, k);
    }
  }
}

void try_softmax_backward(const am_body_table* body) {
  am_softmax_backward a;
  memset(&a, 0, sizeof a);
  a.shape = some_shape();
  a.dtype = (am_dtype)below(3);
  a.of = (am_backward_of)below(2);
  const Format& f = FORMATS[a.dtype];
  Rows grad(a.shape, f, layout(a.shape, true)), result(a.shape, f, layout(a.shape, true)),
      out(a.shape, f, layout(a.shape, false));
  for (int64_t r = 0; r < a.shape.rows; ++r)
    for (int64_t k = 0; k < a.shape.length; ++k) {
      grad.set(r, k, normal());
      double y = -10 * uniform();
      result.set(r, k, a.of == AM_OF_SOFTMAX ? std::exp(y) : y);
    }
  a.grad = grad.where.place;
  a.result = result.where.place;
  a.out = out.where.place;
  what += text("softmax_backward: %s, of %d\n  grad: ", f.name, a.of) + describe(a.shape, a.grad) +
          "\n  result: " + describe(a.shape, a.result) + "\n  out: " + describe(a.shape, a.out);
  run({&out.block}, [&](am_parallel with) { return body->softmax_backward(&a, with); });
  out.check_between();
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < a.shape.length; ++k) {
      double term = grad.get(r, k) * (a.of == AM_OF_SOFTMAX ? result.get(r, k) : 1);
      sum += term;
      size += std::fabs(term);
    }
    for (int64_t k = 0; k < a.shape.length; ++k) {
      double g = grad.get(r, k), y = result.get(r, k);
      double want = a.of == AM_OF_SOFTMAX ? y * (g - sum) : g - std::exp(y) * sum;
      double parts = a.of == AM_OF_SOFTMAX ? y * (std::fabs(g) + size) : std::fabs(g) + std::exp(y) * size;
      check(out.get(r, k), want, parts * RELATIVE + TINY, f, "out", r, k);
    }
  }
}

void try_logsumexp(const am_body_table* body) {
  am_logsumexp a;
  memset(&a, 0, sizeof a);
  a.shape = some_shape();
  if (one_in(30)) a.shape.length = 0;
  a.dtype = (am_dtype)below(3);
  const Format& f = FORMATS[a.dtype];
  Rows in(a.shape, f, layout(a.shape, true));
  if (a.shape.length > 0) fill(in, true);
  Block out(a.shape.rows * f.bytes, 0xff);
  Array<am_lse> lse(a.shape.rows);
  a.in = in.where.place;
  a.out = out.data;
  a.lse = lse.begin();
  what += text("logsumexp: %s\n  in: ", f.name) + describe(a.shape, a.in);
  run({&out, &lse}, [&](am_parallel with) { return body->logsumexp(&a, with); });
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    Lse want(in.row(r));
    double error = OF_LOG + 2 * ULP * std::fabs(want.value);
    check(read(out.data + r * f.bytes, f), want.value, error, f, "out", r, 0);
    check(value(lse[r]), want.value, OF_LOG + 1e-12 * std::fabs(want.value), DOUBLE, "lse", r, 0);
  }
}

void try_logsumexp_backward(const am_body_table* body) {
  am_logsumexp_backward a;
  memset(&a, 0, sizeof a);
  a.shape = some_shape();
  a.dtype = (am_dtype)below(3);
  const Format& f = FORMATS[a.dtype];
  Rows in(a.shape, f, layout(a.shape, true)), out(a.shape, f, layout(a.shape, false));
  fill(in, true);
  Block grad(a.shape.rows * f.bytes, 0xff);
  Array<am_lse> lse(a.shape.rows);
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    write(rounded(normal(), f), grad.data + r * f.bytes, f);
  }
  Block rounded_lse(a.shape.rows * f.bytes, 0xff);
  am_logsumexp forward = {a.shape, in.where.place, a.dtype, rounded_lse.data, lse.begin()};
  if (body->logsumexp(&forward, {run_serially, 1}) != 0) fail("no memory, it says");
  a.in = in.where.place;
  a.out = out.where.place;
  a.grad = grad.data;
  a.lse = lse.begin();
  what += text("logsumexp_backward: %s\n  in: ", f.name) + describe(a.shape, a.in) +
          "\n  out: " + describe(a.shape, a.out);
  run({&out.block}, [&](am_parallel with) { return body->logsumexp_backward(&a, with); });
  out.check_between();
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    Lse of(in.row(r));
    if (!of.finite()) continue;
    double g = read(grad.data + r * f.bytes, f);
    for (int64_t k = 0; k < a.shape.length; ++k) {
      double d = of.below(in.get(r, k)), want = g * std::exp(d);
      double error = std::fabs(want) * (RELATIVE + (of.shifted() ? of_difference(d) : 0));
      check(out.get(r, k), want, error + TINY * (1 + std::fabs(g)), f, "out", r, k);
    }
  }
}

// ---- cross-entropy -----------------------------------------------------------------------------

// Targets, weights and options, and the loss of rows of logits as the formula of the kernels says.
struct Classes {
  int64_t rows, count;
  Array<int64_t> target;
  Array<float> weight;
  am_classes c;

  Classes(int64_t rows, int64_t count) : rows(rows), count(count), target(rows), weight(count) {
    memset(&c, 0, sizeof c);
    c.ignore_index = pick<int64_t>({-100, 0, count - 1, 1 << 20});
    int64_t often = pick<int64_t>({1, 3, 1 << 20, 1 << 20});  // 1: all rows are ignored
    for (int64_t r = 0; r < rows; ++r) target[r] = one_in(often) || count == 0 ? c.ignore_index : below(count);
    for (int64_t k = 0; k < count; ++k) weight[k] = one_in(5) ? 0 : (float)(2 * uniform());
    c.target = target.begin();
    c.weight = one_in(2) && count > 0 ? weight.begin() : nullptr;
    c.label_smoothing = pick({0.0, 0.0, 0.1, 1.0});
    c.lse_square_scale = pick({0.0, 0.0, 1e-2});
    c.reduction = (am_reduction)below(3);
  }
  bool counts(int64_t r) { return target[r] != c.ignore_index; }
  bool smooths() const { return c.label_smoothing != 0; }
  double of(int64_t k) { return c.weight ? weight[k] : 1; }
  double smooth() const { return count ? c.label_smoothing / (double)count : 0; }
  double all() {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += of(k);
    return sum;
  }
  // What the reduction multiplies the two parts of the loss with.
  void scales(double* scale, double* square) {
    *scale = *square = 1;
    if (c.reduction != AM_MEAN) return;
    double weights = 0, many = 0;
    for (int64_t r = 0; r < rows; ++r)
      if (counts(r)) {
        weights += of(target[r]);
        many += 1;
      }
    *scale = 1 / weights;
    *square = 1 / many;
  }
  std::string describe() const {
    return text("smoothing %g, square %g, reduction %d, weights %d, ignored %lld", c.label_smoothing, c.lse_square_scale,
                c.reduction, c.weight != nullptr, (long long)c.ignore_index);
  }

  // logits(row) gives a row; of_logit is the error of each of its numbers.
  template <class Logits>
  void check_loss(const Logits& logits, Array<float>& loss, Array<am_lse>& saved, double of_logit) {
    double scale, square, total = 0, error = 0;
    scales(&scale, &square);
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      double here = 0, of_here = 0, want_lse = 0;
      if (counts(r)) {
        any = true;
        std::vector<double> x = logits(r);
        Lse lse(x);
        double l = want_lse = lse.finite() ? lse.value : NAN, w = (1 - c.label_smoothing) * of(target[r]);
        double weighted = 0, size = 0;
        for (int64_t k = 0; k < count && smooths(); ++k) {
          weighted += of(k) * x[(size_t)k];
          size += std::fabs(of(k) * x[(size_t)k]);
        }
        here = -scale * w * lse.below(x[(size_t)target[r]]);
        if (!lse.finite()) here = NAN;
        if (smooths()) here += scale * smooth() * (all() * l - weighted);
        if (c.lse_square_scale != 0) here += square * c.lse_square_scale * l * l;
        of_here = scale * (w + smooth() * all()) * (OF_LOG + 2 * of_logit) + scale * smooth() * size * ULP +
                  square * c.lse_square_scale * (2 * std::fabs(l) + of_logit) * (OF_LOG + of_logit) +
                  scale * w * (std::fabs(l) + std::fabs(x[(size_t)target[r]])) * 1e-12;
        if (smooths() && !lse.finite()) return;  // torch and we differ in which of NaN and infinity
      }
      check(value(saved[r]), want_lse, OF_LOG + of_logit + 1e-12 * std::fabs(want_lse), DOUBLE, "lse", r, 0);
      if (c.reduction == AM_NONE) check(loss[r], here, of_here + ULP * std::fabs(here), FORMATS[0], "loss", r, 0);
      total += here;
      error += of_here;
    }
    if (c.reduction == AM_NONE) return;
    if (c.reduction == AM_MEAN && !any) total = NAN;
    check(loss[0], total, error + ULP * std::fabs(total), FORMATS[0], "loss", 0, 0);
  }

  // The gradient of the loss at each logit of a row, and its error.
  void gradient(int64_t r, const std::vector<double>& x, const am_lse& lse, double grad, double of_logit,
                std::vector<double>* out, std::vector<double>* error) {
    out->assign((size_t)count, 0);
    error->assign((size_t)count, 0);
    if (!counts(r)) return;
    double scale, square;
    scales(&scale, &square);
    double hit = grad * scale * (1 - c.label_smoothing) * of(target[r]);
    double spread = grad * scale * smooth() * all();
    double squared = c.lse_square_scale != 0 ? grad * square * 2 * c.lse_square_scale * value(lse) : 0;
    for (int64_t k = 0; k < count; ++k) {
      double d = below(x[(size_t)k], lse), p = std::exp(d), share = smooths() ? of(k) * grad * scale * smooth() : 0;
      double h = k == target[r] ? hit : 0;
      (*out)[(size_t)k] = p * (hit + spread + squared) - share - h;
      double size = std::fabs(hit) + std::fabs(spread) + std::fabs(squared);
      (*error)[(size_t)k] = p * size * (RELATIVE + 2 * of_logit + (std::fabs(value(lse)) > 1.1e5 ? of_difference(d) : 0)) +
                            (std::fabs(share) + std::fabs(h)) * 2 * ULP + TINY * (1 + size);
    }
  }
};

void try_cross_entropy(const am_body_table* body) {
  am_cross_entropy a;
  memset(&a, 0, sizeof a);
  a.shape = some_shape();
  if (one_in(40)) {
    a.shape.dims = 1;
    a.shape.rows = a.shape.size[0] = 0;
  }
  a.dtype = (am_dtype)below(3);
  const Format& f = FORMATS[a.dtype];
  Classes classes(a.shape.rows, a.shape.length);
  bool repeats = one_in(4);
  Rows logits(a.shape, f, layout(a.shape, repeats));
  bool special = one_in(3);
  for (int64_t r = 0; r < a.shape.rows; ++r)
    if (classes.counts(r) || repeats) fill_row(logits, r, special);  // else it stays NaN
  Array<float> loss(classes.c.reduction == AM_NONE ? a.shape.rows : 1);
  Array<am_lse> lse(a.shape.rows);
  a.logits = logits.where.place;
  a.classes = classes.c;
  a.loss = loss.begin();
  a.lse = lse.begin();
  const std::string before = what;
  what += text("cross_entropy: %s, %s\n  logits: ", f.name, classes.describe().c_str()) + describe(a.shape, a.logits);
  run({&loss, &lse}, [&](am_parallel with) { return body->cross_entropy(&a, with); });
  double scale, square;
  classes.scales(&scale, &square);
  if (std::isfinite(scale)) classes.check_loss([&](int64_t r) { return logits.row(r); }, loss, lse, 0);
  if (a.shape.rows == 0) return;

  am_cross_entropy_backward b;
  memset(&b, 0, sizeof b);
  b.shape = a.shape;
  b.dtype = a.dtype;
  bool inplace = !repeats && one_in(4);
  Rows apart(a.shape, f, layout(a.shape, false));
  Rows& out = inplace ? logits : apart;
  Array<float> grad(loss.size);
  for (int64_t r = 0; r < grad.size; ++r) grad[r] = (float)normal();
  b.logits = logits.where.place;
  b.out = out.where.place;
  b.classes = classes.c;
  b.grad = grad.begin();
  b.lse = lse.begin();
  what = before + text("cross_entropy_backward: %s, %s%s\n  logits: ", f.name, classes.describe().c_str(),
                       inplace ? ", in place" : "") +
         describe(b.shape, b.logits) + "\n  out: " + describe(b.shape, b.out);
  std::vector<std::vector<double>> x;
  for (int64_t r = 0; r < b.shape.rows; ++r) x.push_back(logits.row(r));
  run({&out.block}, [&](am_parallel with) { return body->cross_entropy_backward(&b, with); });
  out.check_between();
  std::vector<double> want, error;
  for (int64_t r = 0; r < b.shape.rows; ++r) {
    if (!std::isfinite(value(lse[r])) || !std::isfinite(scale)) continue;
    classes.gradient(r, x[(size_t)r], lse[r], grad[classes.c.reduction == AM_NONE ? r : 0], 0, &want, &error);
    for (int64_t k = 0; k < b.shape.length; ++k)
      check(out.get(r, k), want[(size_t)k], error[(size_t)k], f, "out", r, k);
  }
}

// With e^x = 1 everywhere the gradient beside the target is `grad`, rounded to the format: ties, subnormal
// numbers and overflow show here.
void try_rounding(const am_body_table* body) {
  am_cross_entropy_backward a;
  memset(&a, 0, sizeof a);
  a.shape.dims = 1;
  a.shape.rows = a.shape.size[0] = between(1, 60);
  a.shape.length = between(2, 50);
  a.dtype = (am_dtype)below(3);
  const Format& f = FORMATS[a.dtype];
  Rows logits(a.shape, f, layout(a.shape, true)), out(a.shape, f, layout(a.shape, false));
  Array<int64_t> target(a.shape.rows);
  Array<float> grad(a.shape.rows);
  Array<am_lse> lse(a.shape.rows);
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    for (int64_t k = 0; k < a.shape.length; ++k) logits.set(r, k, 0);
    target[r] = below(a.shape.length);
    lse[r] = {0, 0};
    char bits[4];
    for (char& b : bits) b = (char)below(256);
    double low = read(bits, f), step = std::ldexp(1, std::max(low == 0 ? -999 : std::ilogb(low), f.lowest) - f.digits);
    grad[r] = (float)(std::isfinite(low) && f.bytes == 2 ? low + step : low);  // halfway to the next
    if (one_in(2)) grad[r] = std::nextafter(grad[r], pick({-INFINITY, INFINITY}));
  }
  a.logits = logits.where.place;
  a.out = out.where.place;
  a.classes.target = target.begin();
  a.classes.ignore_index = -100;
  a.classes.reduction = AM_NONE;
  a.grad = grad.begin();
  a.lse = lse.begin();
  what += text("rounding: %s\n  logits: ", f.name) + describe(a.shape, a.logits) + "\n  out: " + describe(a.shape, a.out);
  run({&out.block}, [&](am_parallel with) { return body->cross_entropy_backward(&a, with); });
  for (int64_t r = 0; r < a.shape.rows; ++r)
    for (int64_t k = 0; k < a.shape.length; ++k)
      if (k != target[r]) check(out.get(r, k), rounded(grad[r], f), 0, f, "out", r, k);
}

// ---- cross-entropy of a product ----------------------------------------------------------------

am_shape matrix(int64_t rows, int64_t columns) {
  am_shape s;
  memset(&s, 0, sizeof s);
  s.dims = 1;
  s.rows = s.size[0] = rows;
  s.length = columns;
  return s;
}
// Rows of a matrix one after the other, with a gap where asked.
Layout lines(const am_shape& s, bool gap) {
  Layout out;
  memset(&out.place, 0, sizeof out.place);
  out.place.stride = 1;
  out.place.step[0] = s.length + (gap && one_in(3) ? between(1, 20) : 0);
  out.room = s.rows == 0 || s.length == 0 ? 0 : (s.rows - 1) * out.place.step[0] + s.length;
  return out;
}

struct Linear {
  const Format& f;
  am_shape of_hidden, of_weight, of_bias;
  Rows hidden, weight, bias, grad_hidden, grad_weight, grad_bias;
  Classes classes;
  Array<float> loss, grad;
  Array<am_lse> lse;
  am_linear_cross_entropy a;
  am_linear_cross_entropy_backward b;
  std::vector<std::vector<double>> logits;
  double of_logit = 0;

  Linear(am_dtype dtype, int64_t rows, int64_t width, int64_t count)
      : f(FORMATS[dtype]), of_hidden(matrix(rows, width)), of_weight(matrix(count, width)), of_bias(matrix(1, count)),
        hidden(of_hidden, f, lines(of_hidden, true)), weight(of_weight, f, lines(of_weight, true)),
        bias(of_bias, f, lines(of_bias, false)), grad_hidden(of_hidden, f, lines(of_hidden, false)),
        grad_weight(of_weight, f, lines(of_weight, false)), grad_bias(of_bias, f, lines(of_bias, false)),
        classes(rows, count), loss(classes.c.reduction == AM_NONE ? rows : 1), grad(loss.size), lse(rows) {
    double scale = pick({1.0, 1.0, 5.0}) / std::sqrt((double)width + 1);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < width && classes.counts(r); ++k) hidden.set(r, k, normal());  // else NaN
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < width; ++k) weight.set(r, k, scale * normal());
    for (int64_t k = 0; k < count; ++k) bias.set(0, k, normal());
    for (int64_t r = 0; r < grad.size; ++r) grad[r] = (float)normal();
    memset(&a, 0, sizeof a);
    a.rows = rows;
    a.width = width;
    a.count = count;
    a.hidden = hidden.block.data;
    a.weight = weight.block.data;
    a.bias = one_in(2) && count > 0 ? bias.block.data : nullptr;
    a.hidden_step = hidden.where.place.step[0];
    a.weight_step = weight.where.place.step[0];
    a.dtype = dtype;
    a.classes = classes.c;
    a.loss = loss.begin();
    a.lse = lse.begin();
    memset(&b, 0, sizeof b);
    b.grad = grad.begin();
    b.grad_hidden = one_in(4) ? nullptr : grad_hidden.block.data;
    b.grad_weight = one_in(4) ? nullptr : grad_weight.block.data;
    b.grad_bias = !a.bias || one_in(4) ? nullptr : grad_bias.block.data;

    logits.resize((size_t)rows);
    for (int64_t r = 0; r < rows; ++r) {
      if (!classes.counts(r)) continue;
      std::vector<double> h = hidden.row(r);
      for (int64_t c = 0; c < count; ++c) {
        double sum = a.bias ? bias.get(0, c) : 0, size = std::fabs(sum);
        for (int64_t k = 0; k < width; ++k) {
          double term = h[(size_t)k] * weight.get(c, k);
          sum += term;
          size += std::fabs(term);
        }
        logits[(size_t)r].push_back(sum);
        of_logit = std::max(of_logit, 2 * std::sqrt((double)width + 1) * 0x1p-24 * size);
      }
    }
  }
  std::string describe() const {
    return text("%s, hidden (%lld, %lld; step %lld), weight (%lld; step %lld), bias %d, wanted %d %d %d, %s", f.name,
                (long long)a.rows, (long long)a.width, (long long)a.hidden_step, (long long)a.count,
                (long long)a.weight_step, a.bias != nullptr, b.grad_hidden != nullptr, b.grad_weight != nullptr,
                b.grad_bias != nullptr, classes.describe().c_str());
  }
  bool comparable() {
    double scale, square;
    classes.scales(&scale, &square);
    return std::isfinite(scale);
  }
  void check_loss() {
    if (comparable()) classes.check_loss([&](int64_t r) { return logits[(size_t)r]; }, loss, lse, of_logit);
  }
  void check_gradients(bool given) {
    bool any = false;
    for (int64_t r = 0; r < a.rows; ++r) any = any || classes.counts(r);
    if (any && !comparable()) return;
    int64_t rows = a.rows, width = a.width, count = a.count;
    auto at = [&](int64_t i, int64_t k) { return (size_t)(i * width + k); };
    std::vector<double> hidden_sum((size_t)(rows * width)), hidden_error(hidden_sum), weight_sum((size_t)(count * width)),
        weight_error(weight_sum), bias_sum((size_t)count), bias_error(bias_sum), g, error;
    double many = ULP * 2 * std::sqrt((double)std::max(rows, count));
    for (int64_t r = 0; r < rows; ++r) {
      if (!classes.counts(r)) continue;
      double grad_here = !given ? 1 : grad[classes.c.reduction == AM_NONE ? r : 0];
      Lse of(logits[(size_t)r]);
      classes.gradient(r, logits[(size_t)r], {of.top, of.rest}, grad_here, of_logit, &g, &error);
      std::vector<double> h = hidden.row(r);
      for (int64_t c = 0; c < count; ++c) {
        double gc = g[(size_t)c], of_gc = error[(size_t)c] + std::fabs(gc) * many;
        bias_sum[(size_t)c] += gc;
        bias_error[(size_t)c] += of_gc;
        for (int64_t k = 0; k < width; ++k) {
          double w = weight.get(c, k);
          hidden_sum[at(r, k)] += gc * w;
          hidden_error[at(r, k)] += of_gc * std::fabs(w);
          weight_sum[at(c, k)] += gc * h[(size_t)k];
          weight_error[at(c, k)] += of_gc * std::fabs(h[(size_t)k]);
        }
      }
    }
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t r = 0; r < rows && b.grad_hidden; ++r)
        check(grad_hidden.get(r, k), hidden_sum[at(r, k)], hidden_error[at(r, k)] + TINY, f, "grad_hidden", r, k);
      for (int64_t c = 0; c < count && b.grad_weight; ++c)
        check(grad_weight.get(c, k), weight_sum[at(c, k)], weight_error[at(c, k)] + TINY, f, "grad_weight", c, k);
    }
    for (int64_t c = 0; c < count && b.grad_bias; ++c)
      check(grad_bias.get(0, c), bias_sum[(size_t)c], bias_error[(size_t)c] + TINY, f, "grad_bias", 0, c);
  }
};

void try_linear(const am_body_table* body, bool large) {
  int64_t rows = between(1, 40), width = between(1, 40), count = between(1, 200);
  if (large) {  // more logits than are kept at a time
    rows = between(129, 140);
    width = between(1, 3);
    count = 160000 + between(0, 300);
  } else switch (below(8)) {
    case 0: rows = 128 + between(-2, 40); break;
    case 1: width = 256 + between(-2, 20); break;
    case 2: count = 512 + between(-2, 30); break;
    case 3: (one_in(2) ? rows : one_in(2) ? width : count) = 0; break;
    default: break;
  }
  Linear l((am_dtype)below(3), rows, width, count);
  const std::string before = what;
  what = before + "linear_cross_entropy: " + l.describe();
  run({&l.loss, &l.lse}, [&](am_parallel with) { return body->linear_cross_entropy(&l.a, with); });
  l.check_loss();

  what = before + "linear_cross_entropy_backward: " + l.describe();
  l.b.forward = l.a;
  l.b.forward.loss = nullptr;
  std::initializer_list<Block*> gradients = {&l.grad_hidden.block, &l.grad_weight.block, &l.grad_bias.block};
  run(gradients, [&](am_parallel with) { return body->linear_cross_entropy_backward(&l.b, with); });
  l.check_gradients(true);

  if (l.classes.c.reduction == AM_NONE || l.a.dtype != AM_FLOAT32) return;
  what = before + "linear_cross_entropy_gradients: " + l.describe();
  l.b.forward = l.a;
  l.b.grad = nullptr;
  for (Block* b : {(Block*)&l.loss, (Block*)&l.lse}) b->restore(std::vector<char>(b->copy().size(), (char)0xff));
  run({&l.loss, &l.lse, &l.grad_hidden.block, &l.grad_weight.block, &l.grad_bias.block},
      [&](am_parallel with) { return body->linear_cross_entropy_gradients(&l.b, with); });
  l.check_loss();
  l.check_gradients(false);
}

// ---- attention ---------------------------------------------------------------------------------

am_shape heads_shape(int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  am_shape s;
  memset(&s, 0, sizeof s);
  s.dims = 3;
  s.size[0] = batch;
  s.size[1] = heads;
  s.size[2] = rows;
  s.rows = batch * heads * rows;
  s.length = width;
  return s;
}
// Widths side by side, batches, heads and rows in any order, with gaps and repeats where asked.
Layout heads_layout(const am_shape& s, bool repeats) {
  int order[3] = {0, 1, 2};
  std::shuffle(order, order + 3, chance);
  Layout out;
  memset(&out.place, 0, sizeof out.place);
  out.place.stride = 1;
  out.room = s.length;
  int64_t step = s.length + (one_in(4) ? between(1, 9) : 0);
  for (int i = 2; i >= 0; --i) {
    int64_t here = repeats && one_in(12) ? 0 : step;
    out.place.step[order[i]] = here;
    if (here == 0) continue;
    out.room += (s.size[order[i]] - 1) * here;
    step = s.size[order[i]] * here + (one_in(4) ? between(0, 20) : 0);
  }
  return out;
}
struct OwnShape {
  am_shape own;
};
struct Heads : OwnShape, Rows {
  Heads(int64_t batch, int64_t heads, int64_t rows, int64_t width, const Format& f, bool repeats)
      : OwnShape{heads_shape(batch, heads, rows, width)}, Rows(own, f, heads_layout(own, repeats)) {}
  am_heads heads() const { return {block.data, {where.place.step[0], where.place.step[1], where.place.step[2]}}; }
  int64_t index(int64_t b, int64_t h, int64_t r) const { return (b * own.size[1] + h) * own.size[2] + r; }
  std::vector<double> at_row(int64_t b, int64_t h, int64_t r) const { return row(index(b, h, r)); }
};

// A number of each row of each head, or of all batches or heads together.
struct PerRow {
  int64_t steps[2];
  Array<float> data;
  PerRow(int64_t batch, int64_t heads, int64_t rows, double low, double high)
      : PerRow(one_in(3) ? 1 : batch, one_in(3) ? 1 : heads, rows) {
    for (int64_t i = 0; i < data.size; ++i) data[i] = (float)(low + (high - low) * uniform());
  }
  am_per_row get() { return {data.begin(), {steps[0], steps[1]}}; }
  double at(int64_t b, int64_t h, int64_t r) { return data[b * steps[0] + h * steps[1] + r]; }

 private:
  PerRow(int64_t batch, int64_t heads, int64_t rows)
      : steps{batch > 1 ? heads * rows : 0, heads > 1 ? rows : 0}, data(batch * heads * rows) {}
};

struct Seen {
  am_visible v;
  int64_t batch, heads, queries, keys, sizes[4];
  Array<char> mask;
  Array<float> slopes, stretch, shift;

  static int64_t room(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
  Seen(int64_t b, int64_t h, int64_t q, int64_t k, bool numbers) : Seen(b, h, q, k, numbers, one_in(4) ? 0 : 1 + below(2), between(0, k), nullptr) {}
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) {
    int64_t d = i + v.offset - j;
    if ((v.causal && d < 0) || (v.window > 0 && std::llabs(d) >= v.window)) return false;
    if (v.kind == AM_MASK_BOOL) return mask[at(b, h, i, j)] != 0;
    return v.kind != AM_MASK_FLOAT || number(b, h, i, j) > v.hidden_below;
  }
  int64_t at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * v.mask_step[0] + h * v.mask_step[1] + i * v.mask_step[2] + j * v.mask_step[3];
  }
  double number(int64_t b, int64_t h, int64_t i, int64_t j) { return ((float*)mask.data)[at(b, h, i, j)]; }
  // What is added to a score, in all and in absolute terms.
  void bias(int64_t b, int64_t h, int64_t i, int64_t j, double* sum, double* size) {
    *sum = *size = 0;
    auto add = [&](double x) {
      *sum += x;
      *size += std::fabs(x);
    };
    if (v.shift) add(shift[v.zero + j - i - v.offset]);
    if (v.slopes) add(-(double)slopes[h] * (double)std::llabs(i + v.offset - j));
    if (v.kind == AM_MASK_FLOAT) add(number(b, h, i, j));
  }
  double stretched(int64_t i, int64_t j) { return v.stretch ? stretch[v.zero + j - i - v.offset] : 1; }
  std::string describe() const {
    return text("causal %d, offset %lld, window %lld, mask %d (%lld, %lld, %lld, %lld; steps %lld, %lld, %lld, %lld), slopes %d, "
                "distances %d", v.causal, (long long)v.offset, (long long)v.window, v.kind, (long long)sizes[0],
                (long long)sizes[1], (long long)sizes[2], (long long)sizes[3], (long long)v.mask_step[0], (long long)v.mask_step[1],
                (long long)v.mask_step[2], (long long)v.mask_step[3], v.slopes != nullptr, v.stretch != nullptr);
  }

 private:
  Seen(int64_t b, int64_t h, int64_t q, int64_t k, bool numbers, int64_t kind, int64_t offset, void*)
      : batch(b), heads(h), queries(q), keys(k),
        sizes{one_in(2) ? 1 : b, one_in(2) ? 1 : h, one_in(3) ? 1 : q, one_in(5) ? 1 : k},
        mask(kind == 0 ? 0 : room(sizes) * (kind == AM_MASK_FLOAT ? 4 : 1)), slopes(h), stretch(q - 1 + offset + k),
        shift(q - 1 + offset + k) {
    memset(&v, 0, sizeof v);
    v.causal = one_in(2);
    v.offset = offset;
    v.window = one_in(2) ? 0 : between(1, k + 3);
    v.kind = (am_mask_kind)kind;
    v.mask = kind == 0 ? nullptr : mask.data;
    v.hidden_below = -1e30f;
    int order[4] = {0, 1, 2, 3};
    if (one_in(3)) std::shuffle(order, order + 4, chance);
    int64_t step = 1;
    for (int i = 3; i >= 0; --i) {
      v.mask_step[order[i]] = sizes[order[i]] == 1 ? 0 : step;
      step *= sizes[order[i]];
    }
    double share = pick({0.05, 0.5, 0.95});
    for (int64_t i = 0; i < room(sizes) && kind != 0; ++i) {
      bool seen = uniform() < share;
      if (kind == AM_MASK_BOOL)
        mask[i] = (char)(seen ? between(1, 255) : 0);
      else
        ((float*)mask.data)[i] = seen ? (float)normal() : pick({-INFINITY, -3e38f, -1e30f});
    }
    if (!numbers) return;
    if (one_in(4)) v.slopes = slopes.begin();
    for (int64_t i = 0; i < h; ++i) slopes[i] = (float)(0.1 * uniform());
    if (one_in(4)) v.stretch = stretch.begin(), v.shift = shift.begin();
    v.zero = q - 1 + offset;
    for (int64_t i = 0; i < stretch.size; ++i) {
      stretch[i] = (float)(0.5 + uniform());
      shift[i] = (float)-uniform();
    }
  }
};

void try_count(const am_body_table* body) {
  int64_t batch = between(1, 3), heads = between(1, 3), queries = between(1, 40), keys = between(1, one_in(2) ? 20 : 300);
  Seen seen(batch, heads, queries, keys, false);
  Array<float> out(batch * heads * queries);
  am_count a = {batch, heads, queries, keys, seen.v, out.begin()};
  what += text("count: (%lld, %lld, %lld, %lld), ", (long long)batch, (long long)heads, (long long)queries, (long long)keys) +
          seen.describe();
  run({&out}, [&](am_parallel with) { return body->count(&a, with); });
  for (int64_t i = 0; i < out.size; ++i) {
    int64_t n = 0;
    for (int64_t j = 0; j < keys; ++j) n += seen.sees(i / queries / heads, i / queries % heads, i % queries, j);
    check(out[i], (double)n, 0, FORMATS[0], "count", i, 0);
  }
}

// A number that float32 holds in its stead may be off by `error`.
struct About {
  double value = 0, error = 0;
  void add(double x, double e) {
    value += x;
    error += e;
  }
};

double dot(const std::vector<double>& a, const std::vector<double>& b, double* size) {
  double sum = 0;
  *size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += a[i] * b[i];
    *size += std::fabs(a[i] * b[i]);
  }
  return sum;
}
double length_of(const std::vector<double>& x) {
  double square = 0;
  for (double v : x) square += v * v;
  return square > 0 ? std::sqrt(square) : 1;
}
bool finite(const std::vector<double>& x) {
  for (double v : x)
    if (!std::isfinite(v)) return false;
  return true;
}
// By how much x^p may be off for x >= 0 that is off by e; a step at 0 where p is 0.
double of_power(double x, double e, double p) {
  if (p == 0) return x > e ? 0 : 1;
  return std::pow(x + e, p) - std::pow(std::max(x - e, 0.0), p);
}

struct Attention {
  int64_t batch, kv_heads, heads, queries, keys, width, value_width;
  const Format& f;
  am_row_map map;
  Seen seen;
  Heads query, key, value, out, grad, grad_query, grad_key, grad_value;
  PerRow row_scale, row_bias, row_weight, row_power;
  Array<float> count, sink, stats, extra, grad_scale;
  am_attention a;
  bool pairs;  // whether weights are rounded to bfloat16

  Attention(am_dtype dtype, int64_t b, int64_t kv, int64_t group, int64_t q, int64_t k, int64_t d, int64_t dv)
      : batch(b), kv_heads(kv), heads(kv * group), queries(q), keys(k), width(d), value_width(dv), f(FORMATS[dtype]),
        map((am_row_map)below(6)), seen(b, heads, q, k, true), query(b, heads, q, d, f, true), key(b, kv, k, d, f, true),
        value(b, kv, k, dv, f, true), out(b, heads, q, dv, f, false), grad(b, heads, q, dv, f, true),
        grad_query(b, heads, q, d, f, false), grad_key(b, kv, k, d, f, false), grad_value(b, kv, k, dv, f, false),
        row_scale(b, heads, q, 0.5, 1.5), row_bias(b, heads, q, -2, -0.01), row_weight(b, heads, q, 0.5, 3),
        row_power(b, heads, q, 1, 6), count(b * heads * q), sink(heads), stats(b * heads * q * AM_STATS),
        extra(b * heads * q * dv), grad_scale(b * heads * q),
        pairs(dtype == AM_BFLOAT16 && std::string(am_isa()) == "avx512bf16") {
    for (Heads* x : {&query, &key, &value, &grad})
      for (int64_t r = 0; r < x->own.rows; ++r)
        for (int64_t i = 0; i < x->own.length; ++i) x->set(r, i, normal());
    double flaw = pick({NAN, INFINITY, -INFINITY});
    for (Heads* x : {&query, &key, &value})
      if (one_in(4))
        for (int64_t n = between(1, 3); n > 0; --n) x->set(below(x->own.rows), below(x->own.length), flaw);
    for (int64_t i = 0; i < heads; ++i) sink[i] = (float)(3 * normal());
    for (int64_t i = 0; i < count.size; ++i) {
      int64_t n = 0;
      for (int64_t j = 0; j < k; ++j) n += seen.sees(i / q / heads, i / q % heads, i % q, j);
      count[i] = (float)n;
    }
    memset(&a, 0, sizeof a);
    a.batch = b;
    a.heads = heads;
    a.kv_heads = kv;
    a.queries = q;
    a.keys = k;
    a.width = d;
    a.value_width = dv;
    a.dtype = dtype;
    a.query = query.heads();
    a.key = key.heads();
    a.value = value.heads();
    a.out = out.heads();
    a.visible = seen.v;
    a.map = map;
    a.cosine = one_in(3);
    a.scale = (float)(a.cosine ? pick({1.0, 4.0, 10.0}) : pick({1.0, 3.0}) / std::sqrt((double)d));
    if (one_in(3)) a.row_scale = row_scale.get();
    if (map == AM_MAP_SIGMOID || (map == AM_MAP_CLIPPED && one_in(2))) a.row_bias = row_bias.get();
    if ((map == AM_MAP_RELU || map == AM_MAP_CLIPPED) && one_in(2)) a.row_weight = row_weight.get();
    if (map == AM_MAP_LSSAR && one_in(3)) a.row_power = row_power.get();
    if (map == AM_MAP_LSSAR) a.count = {count.begin(), {heads * q, q}};
    if (map == AM_MAP_SOFTMAX && one_in(3)) a.sink = sink.begin();
    a.power = (float)pick({1.0, 2.0, 3.0, 2.5, 15.0});
    if (map == AM_MAP_RELU) a.power = (float)pick({1.0, 2.0, 2.5});
    a.stats = stats.begin();
    if (twice()) a.extra = extra.begin();
  }
  bool twice() const { return map == AM_MAP_LSSAR || map == AM_MAP_CLIPPED; }
  std::string describe() const {
    return text("%s, map %d, power %g, (%lld, %lld/%lld, %lld x %lld, %lld, %lld), cosine %d, scale %g, row scale %d, bias %d, "
                "weight %d, power %d, sink %d\n  ", f.name, map, a.power, (long long)batch, (long long)heads, (long long)kv_heads,
                (long long)queries, (long long)keys, (long long)width, (long long)value_width, a.cosine, a.scale,
                a.row_scale.data != nullptr, a.row_bias.data != nullptr, a.row_weight.data != nullptr,
                a.row_power.data != nullptr, a.sink != nullptr) + seen.describe();
  }
  double per(const am_per_row& there, PerRow& rows, int64_t b, int64_t h, int64_t i, double otherwise) {
    return there.data ? rows.at(b, h, i) : otherwise;
  }

  // One row: its scores, weights and the slopes that its gradients are made of.
  struct Row {
    std::vector<int64_t> sees;
    std::vector<About> score, weight;
    std::vector<About> slope;   // weight by score, or what stands for it in front of (dp - delta)
    std::vector<About> second;  // weights of the second sum
    double common = 0, of_common = 0, power = 1;  // lssar: power / N, and the sum of `second`
    bool poisoned = false, flat = false;
    double loose = 0;  // more than this row can be held to
  };
  Row row(int64_t b, int64_t h, int64_t i) {
    Row r;
    int64_t kv = h / (heads / kv_heads);
    std::vector<double> q = query.at_row(b, h, i);
    double factor = a.scale * per(a.row_scale, row_scale, b, h, i, 1);
    for (int64_t j = 0; j < keys; ++j) {
      if (!seen.sees(b, h, i, j)) continue;
      std::vector<double> k = key.at_row(b, kv, j);
      if (!finite(q) || !finite(k) || !finite(value.at_row(b, kv, j))) r.poisoned = true;
      double size, s = dot(q, k, &size), bias, of_bias, over = a.cosine ? 1 / (length_of(q) * length_of(k)) : 1;
      double stretch = seen.stretched(i, j);
      seen.bias(b, h, i, j, &bias, &of_bias);
      r.sees.push_back(j);
      r.score.push_back({s * over * factor * stretch + bias,
                         ULP * ((std::sqrt((double)width) + 4) * size * over * factor * stretch + 2 * of_bias)});
    }
    if (!r.poisoned) weigh(r, b, h, i);
    return r;
  }
  void weigh(Row& r, int64_t b, int64_t h, int64_t i) {
    size_t n = r.sees.size();
    double worst = 0, top = -INFINITY;
    for (About& s : r.score) {
      worst = std::max(worst, s.error);
      top = std::max(top, s.value);
    }
    double relative = 2 * worst + 8 * ULP, bias = per(a.row_bias, row_bias, b, h, i, 0);
    r.weight.resize(n);
    r.slope.resize(n);
    r.second.resize(n);
    if (map == AM_MAP_SOFTMAX || map == AM_MAP_CLIPPED) {
      double beside = a.sink ? (double)sink[h] : -INFINITY, sum = 0, weight = per(a.row_weight, row_weight, b, h, i, 1);
      top = std::max(top, beside);
      for (About& s : r.score) sum += std::exp(s.value - top);
      if (n > 0) sum += std::exp(beside - top);
      relative += ULP * (a.sink ? std::fabs(top) : 0);
      for (size_t j = 0; j < n; ++j) {
        double p = std::exp(r.score[j].value - top) / sum, u = weight * p + bias, of_u = weight * p * relative + ULP * std::fabs(bias);
        bool inside = u > 0 && u < 1, edge = std::min(std::fabs(u), std::fabs(u - 1)) <= of_u;
        if (map == AM_MAP_SOFTMAX) {
          r.weight[j] = r.slope[j] = {p, p * relative};
        } else {
          r.weight[j] = {std::min(std::max(u, 0.0), 1.0), of_u + 4 * ULP};
          r.second[j] = {inside ? weight * p : 0, edge ? weight * p * (1 + relative) : inside ? weight * p * relative : 0};
          r.slope[j] = {p, p * relative};
        }
      }
      return;
    }
    if (map == AM_MAP_SIGMOID || map == AM_MAP_RELU) {
      double p = a.power, weight = per(a.row_weight, row_weight, b, h, i, 1);
      for (size_t j = 0; j < n; ++j) {
        double s = r.score[j].value, e = r.score[j].error;
        if (map == AM_MAP_SIGMOID) {
          double w = 1 / (1 + std::exp(-s - bias)), of_w = w * (e + ULP * (8 + std::fabs(bias)));
          r.weight[j] = {w, of_w};
          r.slope[j] = {w * (1 - w), of_w + 4 * ULP * w};
        } else {
          double x = std::max(s, 0.0);
          if (s < -e) continue;
          r.weight[j] = {std::pow(x, p) * weight, (of_power(x, e, p) + 8 * ULP * (1 + p) * std::pow(x, p)) * weight};
          double below = x > 0 ? std::pow(x, p - 1) : 0;
          r.slope[j] = {p * below * weight, p * weight * (of_power(x, e, p - 1) + 8 * ULP * (1 + p) * below)};
        }
      }
      return;
    }
    // softplus and lssar
    std::vector<About> x(n);
    double sum = 0, of_sum = 0, of_top = 0;
    top = 0;
    for (size_t j = 0; j < n; ++j) {
      double s = r.score[j].value, of_f = 0;
      x[j].value = std::max(s, 0.0) + std::log1p(std::exp(-std::fabs(s)));
      of_f = r.score[j].error / (1 + std::exp(-s)) + 4 * ULP * x[j].value;
      x[j].error = of_f;
      sum += x[j].value;
      of_sum += of_f;
    }
    double mean = n > 0 ? sum / (double)n : 0, of_mean = n > 0 ? of_sum / (double)n + ULP * mean : 0;
    auto slope_of_f = [&](size_t j) { return 1 / (1 + std::exp(-r.score[j].value)); };
    if (map == AM_MAP_LSSAR) {
      double above = n > 3 ? mean : 0;
      for (size_t j = 0; j < n; ++j) {
        x[j] = {std::max(x[j].value - above, 0.0), x[j].error + (n > 3 ? of_mean : 0)};
        top = std::max(top, x[j].value);
        of_top = std::max(of_top, x[j].error);
      }
      r.flat = !(top > 1e-6 * mean);
      // flat or not is decided by rounding where it is near; nothing is said of what is sharpened there
      if (n > 3 && top < 50 * of_top + 1e-5 * mean) r.loose = 1e30;
      if (!r.flat) {
        double p = per(a.row_power, row_power, b, h, i, a.power), total = 0, of_total = 0;
        for (size_t j = 0; j < n; ++j) {
          x[j] = {x[j].value / top, (x[j].error + x[j].value / top * of_top) / top};
          total += std::pow(x[j].value, p);
          of_total += of_power(x[j].value, x[j].error, p) + 16 * ULP * (1 + p) * std::pow(x[j].value, p);
        }
        for (size_t j = 0; j < n; ++j) {
          double w = std::pow(x[j].value, p), less = x[j].value > 0 ? std::pow(x[j].value, p - 1) : 0;
          r.weight[j] = {w / total, (of_power(x[j].value, x[j].error, p) + 16 * ULP * (1 + p) * w + w * of_total / total) / total};
          double of_less = of_power(x[j].value, x[j].error, p - 1) + less * (16 * ULP * (1 + p) + of_total / total + of_top / top);
          r.second[j] = {less / (top * total), of_less / (top * total)};
          r.common += r.second[j].value;
          r.of_common += r.second[j].error;
        }
        r.power = p;
        return;
      }
    }
    for (size_t j = 0; j < n; ++j) {
      double f0 = std::max(r.score[j].value, 0.0) + std::log1p(std::exp(-std::fabs(r.score[j].value)));
      r.weight[j] = {f0 / sum, f0 / sum * (2 * worst + 16 * ULP)};
      r.slope[j] = {slope_of_f(j) / sum, slope_of_f(j) / sum * (2 * worst + 16 * ULP)};
    }
  }

  // As it is called where no backward pass follows: few rows go another way then.
  void without_backward(const am_body_table* body) {
    a.stats = a.extra = nullptr;
    forward(body);
    a.stats = stats.begin();
    if (twice()) a.extra = extra.begin();
  }
  void forward(const am_body_table* body) {
    run({&out.block, &stats, &extra}, [&](am_parallel with) { return body->attention(&a, with); });
    out.check_between();
    double rounding = pairs ? 0x1p-8 : 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < queries; ++i) {
          Row r = row(b, h, i);
          int64_t at = out.index(b, h, i), kv = h / (heads / kv_heads);
          std::vector<About> sum((size_t)value_width), second((size_t)value_width);
          for (size_t j = 0; j < r.sees.size() && !r.poisoned; ++j) {
            std::vector<double> v = value.at_row(b, kv, r.sees[j]);
            for (size_t d = 0; d < v.size(); ++d) {
              sum[d].add(r.weight[j].value * v[d],
                         (r.weight[j].error + r.weight[j].value * (rounding + 8 * ULP)) * std::fabs(v[d]) + r.loose);
              second[d].add(r.second[j].value * v[d],
                            (r.second[j].error * (1 + rounding) + r.second[j].value * (rounding + 8 * ULP)) * std::fabs(v[d]) + r.loose);
            }
          }
          if (a.stats && r.poisoned && stats[at * AM_STATS] == stats[at * AM_STATS]) fail("a row that gave NaN does not say so");
          for (int64_t d = 0; d < value_width; ++d) {
            check(out.get(at, d), r.poisoned ? NAN : sum[(size_t)d].value, sum[(size_t)d].error + 1e-37, f, "out", at, d);
            if (a.extra && !r.poisoned)
              check(extra[at * value_width + d], second[(size_t)d].value, second[(size_t)d].error + 1e-37, FORMATS[0], "extra", at, d);
          }
        }
  }

  void backward(const am_body_table* body) {
    am_attention_backward g;
    memset(&g, 0, sizeof g);
    g.forward = a;
    g.grad = grad.heads();
    g.grad_query = grad_query.heads();
    g.grad_key = grad_key.heads();
    g.grad_value = grad_value.heads();
    if (a.row_scale.data) g.grad_row_scale = grad_scale.begin();
    run({&grad_query.block, &grad_key.block, &grad_value.block, &grad_scale},
        [&](am_parallel with) { return body->attention_backward(&g, with); });
    for (Heads* x : {&grad_query, &grad_key, &grad_value}) x->check_between();

    std::vector<std::vector<About>> of_key((size_t)key.own.rows, std::vector<About>((size_t)width)),
        of_value((size_t)value.own.rows, std::vector<About>((size_t)value_width));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < queries; ++i) differentiate(b, h, i, g.grad_row_scale != nullptr, of_key, of_value);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t kv = 0; kv < kv_heads; ++kv)
        for (int64_t j = 0; j < keys; ++j) {
          int64_t at = key.index(b, kv, j);
          std::vector<double> k = key.at_row(b, kv, j);
          bool sound = finite(k) && finite(value.at_row(b, kv, j));
          if (!sound) k.assign(k.size(), 0);
          project(k, of_key[(size_t)at]);
          for (int64_t d = 0; d < width; ++d)
            check(grad_key.get(at, d), sound ? of_key[(size_t)at][(size_t)d].value : 0, of_key[(size_t)at][(size_t)d].error + 1e-37, f, "grad_key", at, d);
          for (int64_t d = 0; d < value_width; ++d)
            check(grad_value.get(at, d), sound ? of_value[(size_t)at][(size_t)d].value : 0,
                  of_value[(size_t)at][(size_t)d].error + 1e-37, f, "grad_value", at, d);
        }
  }
  // From the gradient of x / |x| to that of x, where cosines are compared.
  void project(const std::vector<double>& x, std::vector<About>& g) const {
    if (!a.cosine) return;
    double n = length_of(x), along = 0, of_along = 0;
    for (size_t d = 0; d < x.size(); ++d) {
      along += g[d].value * x[d] / n;
      of_along += (g[d].error + 4 * ULP * std::fabs(g[d].value)) * std::fabs(x[d]) / n;
    }
    for (size_t d = 0; d < x.size(); ++d)
      g[d] = {(g[d].value - along * x[d] / n) / n,
              (g[d].error + 4 * ULP * std::fabs(g[d].value) + (of_along + 4 * ULP * std::fabs(along)) * std::fabs(x[d]) / n) / n};
  }
  void differentiate(int64_t b, int64_t h, int64_t i, bool scaled, std::vector<std::vector<About>>& of_key,
                     std::vector<std::vector<About>>& of_value) {
    Row r = row(b, h, i);
    int64_t at = out.index(b, h, i), kv = h / (heads / kv_heads);
    std::vector<double> q = query.at_row(b, h, i), g = grad.at_row(b, h, i), y, z;
    bool dead = r.poisoned || !finite(q);
    std::vector<About> of_query((size_t)width);
    About of_scale;
    if (!dead) {
      // the result and the second sum as they were stored
      y = out.at_row(b, h, i);
      for (int64_t d = 0; d < value_width; ++d) z.push_back(a.extra ? extra[at * value_width + d] : 0);
      double of_delta, of_z, delta = dot(g, y, &of_delta), by_z = dot(g, z, &of_z), q_length = a.cosine ? length_of(q) : 1;
      double n = (double)r.sees.size(), own = per(a.row_scale, row_scale, b, h, i, 1), factor = a.scale * own;
      for (size_t j = 0; j < r.sees.size(); ++j) {
        int64_t k_at = key.index(b, kv, r.sees[j]);
        std::vector<double> k = key.row(k_at), v = value.row(k_at);
        double of_dp, dp = dot(g, v, &of_dp), s = r.score[j].value, f1 = 1 / (1 + std::exp(-s));
        About w = r.weight[j], c = r.slope[j], ds;
        of_dp *= ULP * (std::sqrt((double)value_width) + 4);
        double of_d = 4 * ULP * of_delta;
        if (map == AM_MAP_SOFTMAX || map == AM_MAP_SOFTPLUS || (map == AM_MAP_LSSAR && r.flat)) {
          ds = {c.value * (dp - delta), c.error * std::fabs(dp - delta) + c.value * (of_dp + of_d)};
        } else if (map == AM_MAP_SIGMOID || map == AM_MAP_RELU) {
          ds = {c.value * dp, c.error * std::fabs(dp) + c.value * of_dp};
        } else if (map == AM_MAP_CLIPPED) {
          double weight = per(a.row_weight, row_weight, b, h, i, 1), m = c.value > 0 ? r.second[j].value / c.value : 0;
          ds = {c.value * (m * dp - by_z), c.error * std::fabs(m * dp - by_z) + r.second[j].error * std::fabs(dp) +
                                               c.value * (weight * of_dp + 4 * ULP * of_z)};
        } else {
          double p = r.power, by_r = p * r.second[j].value * (dp - delta);
          double of_r = p * (r.second[j].error * std::fabs(dp - delta) + r.second[j].value * (of_dp + of_d));
          double common = n > 3 ? p * (by_z - delta * r.common) / n : 0;
          double of_c = n > 3 ? p * (4 * ULP * of_z + (of_d + 4 * ULP * std::fabs(delta)) * r.common + std::fabs(delta) * r.of_common) / n : 0;
          ds = {(by_r - common) * f1, (of_r + of_c + (std::fabs(by_r) + std::fabs(common)) * (r.score[j].error + 8 * ULP)) * f1};
        }
        ds.error += r.loose + 4 * ULP * std::fabs(ds.value);
        double stretch = seen.stretched(i, r.sees[j]), k_length = a.cosine ? length_of(k) : 1, size;
        ds = {ds.value * stretch, ds.error * stretch};
        double product = dot(q, k, &size) / (q_length * k_length);
        of_scale.add(ds.value * a.scale * product, (ds.error + 16 * ULP * std::fabs(ds.value)) * a.scale * size / (q_length * k_length));
        for (size_t d = 0; d < q.size(); ++d) {
          double by_q = factor * k[d] / k_length, by_k = factor * q[d] / q_length;
          of_query[d].add(ds.value * by_q, (ds.error + 8 * ULP * std::fabs(ds.value)) * std::fabs(by_q));
          of_key[(size_t)k_at][d].add(ds.value * by_k, (ds.error + 8 * ULP * std::fabs(ds.value)) * std::fabs(by_k));
        }
        for (size_t d = 0; d < v.size(); ++d)
          of_value[(size_t)k_at][d].add(w.value * g[d], (w.error + 8 * ULP * w.value + r.loose) * std::fabs(g[d]));
      }
      project(q, of_query);
    }
    for (int64_t d = 0; d < width; ++d)
      check(grad_query.get(at, d), of_query[(size_t)d].value, of_query[(size_t)d].error + 1e-37, f, "grad_query", at, d);
    if (scaled) check(grad_scale[at], of_scale.value, of_scale.error + 1e-37, FORMATS[0], "grad_row_scale", at, 0);
  }
};

void try_attention(const am_body_table* body) {
  auto some = [] { return one_in(3) ? between(1, 12) : one_in(2) ? pick<int64_t>({16, 32, 64, 128}) + between(-2, 2) : between(1, 150); };
  int64_t queries = some(), keys = one_in(4) ? between(1, 600) : some(), width = some(), wide = some();
  if (one_in(6)) queries = between(1, 3), keys = between(1000, 2600);  // in several parts
  int64_t batch = between(1, 2), kv_heads = between(1, 2), group = between(1, 3);
  while (batch * kv_heads * group * queries * keys * (width + wide) > 600000) {
    if (batch * kv_heads * group > 1) batch = kv_heads = group = 1;
    else if (width + wide > 20) width = (width + 1) / 2, wide = (wide + 1) / 2;
    else queries = (queries + 1) / 2;
  }
  Attention x((am_dtype)below(3), batch, kv_heads, group, queries, keys, width, wide);
  const std::string before = what;
  what = before + "attention: " + x.describe();
  x.without_backward(body);
  x.forward(body);
  what = before + "attention_backward: " + x.describe();
  x.backward(body);
}

// The walk of the linear family, forward and backward, as a sum over pairs of tokens.
struct Walk {
  int64_t batch, kv_heads, heads, tokens, width, value_width, totals, values;
  const Format& f = FORMATS[0];
  Heads query, key, value, out, grad, grad_query, grad_key, grad_value;
  Array<float> rate, state, total, new_state, of_total, of_new_state, of_state;
  am_walk a;
  bool goes_on;  // whether there is a gradient of the new state

  Walk(int64_t b, int64_t kv, int64_t group, int64_t t, int64_t d, int64_t dv, int64_t sums)
      : batch(b), kv_heads(kv), heads(kv * group), tokens(t), width(d), value_width(dv), totals(sums), values(dv + sums),
        query(b, heads, t, d, f, true), key(b, kv, t, d, f, true), value(b, kv, t, dv, f, true), out(b, heads, t, dv, f, false),
        grad(b, heads, t, dv, f, true), grad_query(b, heads, t, d, f, false), grad_key(b, kv, t, d, f, false),
        grad_value(b, kv, t, dv, f, false), rate(heads), state(b * kv * d * values), total(sums * b * heads * t),
        new_state(state.size), of_total(total.size), of_new_state(state.size), of_state(state.size), goes_on(!one_in(3)) {
    for (Heads* x : {&query, &key, &value, &grad})
      for (int64_t r = 0; r < x->own.rows; ++r)
        for (int64_t i = 0; i < x->own.length; ++i) x->set(r, i, normal());
    for (Array<float>* x : {&state, &of_total, &of_new_state})
      for (int64_t i = 0; i < x->size; ++i) (*x)[i] = (float)normal();
    for (int64_t h = 0; h < heads; ++h) rate[h] = (float)pick({0.0, uniform() / 50, uniform(), 8 * uniform(), 1e4});
    memset(&a, 0, sizeof a);
    a.batch = b;
    a.heads = heads;
    a.kv_heads = kv;
    a.tokens = t;
    a.width = d;
    a.value_width = dv;
    a.totals = (int32_t)sums;
    a.query = query.heads();
    a.key = key.heads();
    a.value = value.heads();
    if (group == 1 && one_in(2)) a.rate = rate.begin();
    if (!one_in(3)) a.state = state.begin();
  }
  std::string describe() const {
    return text("(%lld, %lld/%lld, %lld, %lld, %lld), totals %lld, rate %d, state %d, gradient of the state %d", (long long)batch,
                (long long)heads, (long long)kv_heads, (long long)tokens, (long long)width, (long long)value_width,
                (long long)totals, a.rate != nullptr, a.state != nullptr, goes_on);
  }
  double decay(int64_t h, int64_t steps) { return a.rate ? std::exp(-(double)rate[h] * (double)steps) : 1; }
  int64_t number(int64_t b, int64_t h) const { return b * kv_heads + h / (heads / kv_heads); }
  double before(int64_t b, int64_t h, int64_t d, int64_t e) {
    return a.state ? (double)state[(number(b, h) * width + d) * values + e] : 0;
  }
  double after(int64_t b, int64_t h, int64_t d, int64_t e) {
    return goes_on ? (double)of_new_state[(number(b, h) * width + d) * values + e] : 0;
  }
  std::vector<double> values_of(int64_t b, int64_t h, int64_t j) const {
    std::vector<double> v = value.at_row(b, h / (heads / kv_heads), j);
    if (totals) v.push_back(1);
    return v;
  }
  std::vector<double> grads_of(int64_t b, int64_t h, int64_t i) {
    std::vector<double> g = grad.at_row(b, h, i);
    if (totals) g.push_back(of_total[(b * heads + h) * tokens + i]);
    return g;
  }
  // Of the absolute terms: a sum in one lane goes on for a chunk, or for a width, and rounds at each step; the largest of
  // many lies six root mean squares out.
  void hold(double got, About want, const char* name, int64_t row, int64_t k) const {
    double steps = (double)std::max<int64_t>(64, std::max(width, values));
    check(got, want.value, 6 * std::sqrt(steps / 12) * ULP * want.error + 1e-37, f, name, row, k);
  }
  static void add(About& to, double x) { to.add(x, std::fabs(x)); }
  static void add(About& to, double factor, About x) { to.add(factor * x.value, std::fabs(factor) * x.error); }
  static About product(const std::vector<double>& x, const std::vector<double>& y) {
    About out;
    out.value = dot(x, y, &out.error);
    return out;
  }

  void forward(const am_body_table* body) {
    a.out = out.heads();
    a.total = total.begin();
    a.new_state = new_state.begin();
    run({&out.block, &total, &new_state}, [&](am_parallel with) { return body->linear_walk(&a, with); });
    out.check_between();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < tokens; ++i) {
          std::vector<double> q = query.at_row(b, h, i);
          std::vector<About> sum((size_t)values);
          for (int64_t e = 0; e < values; ++e)
            for (int64_t d = 0; d < width; ++d) add(sum[(size_t)e], decay(h, i + 1) * q[(size_t)d] * before(b, h, d, e));
          for (int64_t j = 0; j <= i; ++j) {
            About s = product(q, key.at_row(b, h / (heads / kv_heads), j));
            std::vector<double> v = values_of(b, h, j);
            for (size_t e = 0; e < v.size(); ++e) add(sum[e], decay(h, i - j) * v[e], s);
          }
          int64_t at = out.index(b, h, i);
          for (int64_t e = 0; e < value_width; ++e) hold(out.get(at, e), sum[(size_t)e], "out", at, e);
          if (totals) hold(total[at], sum[(size_t)value_width], "total", at, 0);
        }
        if (h % (heads / kv_heads) != 0) continue;
        std::vector<About> left((size_t)(width * values));
        for (int64_t d = 0; d < width; ++d)
          for (int64_t e = 0; e < values; ++e) add(left[(size_t)(d * values + e)], decay(h, tokens) * before(b, h, d, e));
        for (int64_t j = 0; j < tokens; ++j) {
          std::vector<double> k = key.at_row(b, h / (heads / kv_heads), j), v = values_of(b, h, j);
          for (size_t d = 0; d < k.size(); ++d)
            for (size_t e = 0; e < v.size(); ++e) add(left[d * v.size() + e], decay(h, tokens - 1 - j) * k[d] * v[e]);
        }
        for (size_t i = 0; i < left.size(); ++i)
          hold(new_state[number(b, h) * width * values + (int64_t)i], left[i], "new_state", number(b, h), (int64_t)i);
      }
  }

  void backward(const am_body_table* body) {
    am_walk_backward g;
    memset(&g, 0, sizeof g);
    g.forward = a;
    memset(&g.forward.out, 0, sizeof g.forward.out);  // not read
    g.forward.total = g.forward.new_state = nullptr;
    g.grad = grad.heads();
    g.grad_total = of_total.begin();
    g.grad_state = goes_on ? of_new_state.begin() : nullptr;
    g.grad_query = grad_query.heads();
    g.grad_key = grad_key.heads();
    g.grad_value = grad_value.heads();
    g.grad_of_state = of_state.begin();
    run({&grad_query.block, &grad_key.block, &grad_value.block, &of_state},
        [&](am_parallel with) { return body->linear_walk_backward(&g, with); });
    for (Heads* x : {&grad_query, &grad_key, &grad_value}) x->check_between();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t kv = 0; kv < kv_heads; ++kv) differentiate(b, kv);
  }
  void differentiate(int64_t b, int64_t kv) {
    int64_t group = heads / kv_heads, first = kv * group;
    auto nothing = [](int64_t rows, int64_t row) { return std::vector<std::vector<About>>((size_t)rows, std::vector<About>((size_t)row)); };
    std::vector<std::vector<About>> of_key = nothing(tokens, width), of_value = nothing(tokens, values),
                                    of_before = nothing(width, values);
    for (int64_t d = 0; d < width; ++d)
      for (int64_t e = 0; e < values; ++e)
        add(of_before[(size_t)d][(size_t)e], decay(first, tokens) * after(b, first, d, e));
    for (int64_t j = 0; j < tokens; ++j) {  // what the state after the last token asks of each
      std::vector<double> k = key.at_row(b, kv, j), v = values_of(b, first, j);
      for (int64_t d = 0; d < width; ++d)
        for (int64_t e = 0; e < values; ++e) {
          double x = decay(first, tokens - 1 - j) * after(b, first, d, e);
          add(of_key[(size_t)j][(size_t)d], x * v[(size_t)e]);
          add(of_value[(size_t)j][(size_t)e], x * k[(size_t)d]);
        }
    }
    for (int64_t h = first; h < first + group; ++h)
      for (int64_t i = 0; i < tokens; ++i) {
        std::vector<double> q = query.at_row(b, h, i), g = grads_of(b, h, i);
        std::vector<About> of_query((size_t)width);
        for (int64_t d = 0; d < width; ++d)
          for (int64_t e = 0; e < values; ++e) {
            add(of_query[(size_t)d], decay(h, i + 1) * g[(size_t)e] * before(b, h, d, e));
            add(of_before[(size_t)d][(size_t)e], decay(h, i + 1) * q[(size_t)d] * g[(size_t)e]);
          }
        for (int64_t j = 0; j <= i; ++j) {
          std::vector<double> k = key.at_row(b, kv, j);
          About slope = product(g, values_of(b, h, j)), s = product(q, k);
          double near = decay(h, i - j);
          for (size_t d = 0; d < q.size(); ++d) {
            add(of_query[d], near * k[d], slope);
            add(of_key[(size_t)j][d], near * q[d], slope);
          }
          for (size_t e = 0; e < g.size(); ++e) add(of_value[(size_t)j][e], near * g[e], s);
        }
        int64_t at = query.index(b, h, i);
        for (int64_t d = 0; d < width; ++d) hold(grad_query.get(at, d), of_query[(size_t)d], "grad_query", at, d);
      }
    for (int64_t j = 0; j < tokens; ++j) {
      int64_t at = key.index(b, kv, j);
      for (int64_t d = 0; d < width; ++d) hold(grad_key.get(at, d), of_key[(size_t)j][(size_t)d], "grad_key", at, d);
      for (int64_t e = 0; e < value_width; ++e) hold(grad_value.get(at, e), of_value[(size_t)j][(size_t)e], "grad_value", at, e);
    }
    for (int64_t d = 0; d < width; ++d)
      for (int64_t e = 0; e < values; ++e)
        hold(of_state[((b * kv_heads + kv) * width + d) * values + e], of_before[(size_t)d][(size_t)e], "grad_of_state", d, e);
  }
};

void try_walk(const am_body_table* body) {
  auto some = [] { return one_in(3) ? between(1, 12) : one_in(2) ? pick<int64_t>({16, 32, 64, 128}) + between(-2, 2) : between(1, 100); };
  int64_t tokens = one_in(4) ? between(1, 300) : some(), width = some(), wide = some();
  int64_t batch = between(1, 2), kv_heads = between(1, 3), group = between(1, 3);
  while (batch * kv_heads * group * tokens * (tokens * (width + wide) + 4 * width * wide) > 4000000) {
    if (batch * kv_heads * group > 2) batch = 1, kv_heads = (kv_heads + 1) / 2, group = (group + 1) / 2;
    else if (width + wide > 30) width = (width + 1) / 2, wide = (wide + 1) / 2;
    else tokens = (tokens + 1) / 2;
  }
  Walk x(batch, kv_heads, group, tokens, width, wide, below(2));
  const std::string before = what;
  what = before + "linear_walk: " + x.describe();
  x.forward(body);
  what = before + "linear_walk_backward: " + x.describe();
  x.backward(body);
}

// Numbers of a format, in rows that may lie apart.
struct Numbers {
  const Format& f;
  int64_t rows, length, step;
  Block block;
  Numbers(int64_t r, int64_t n, const Format& format, bool given)
      : f(format), rows(r), length(n), step(given && one_in(3) ? n + between(1, 20) : n),
        block((r > 0 ? (r - 1) * step + n : 0) * format.bytes, 0xff) {
    if (!given) return;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < length; ++k) write(rounded(normal(), f), at(i, k), f);
  }
  void* at(int64_t row, int64_t k) const { return block.data + (row * step + k) * f.bytes; }
  double get(int64_t row, int64_t k) const { return read(at(row, k), f); }
};

// The experts, forward and backward: every sum with the sum of its absolute terms.
struct Experts {
  int64_t tokens, width, hidden, experts, choices;
  const Format& f;
  bool pairs;  // whether hidden vectors and their gradients are rounded to bfloat16
  Numbers x, w1, b1, w2, b2, weights, grad;
  Array<int64_t> index;
  am_experts a;
  std::vector<std::vector<int64_t>> queues;  // of pairs

  Experts(int64_t t, int64_t d, int64_t h, int64_t e, int64_t k, am_dtype dtype, bool rounds)
      : tokens(t), width(d), hidden(h), experts(e), choices(k), f(FORMATS[dtype]), pairs(rounds && dtype == AM_BFLOAT16),
        x(t, d, f, true), w1(e * h, d, f, true), b1(e * h, 1, f, false), w2(e * d, h, f, true), b2(e * d, 1, f, false),
        weights(t * k, 1, FORMATS[0], false), grad(t, d, f, true), index(t * k), queues((size_t)e) {
    for (Numbers* n : {&b1, &b2, &weights})
      for (int64_t i = 0; i < n->rows; ++i) write(rounded(normal(), n->f), n->at(i, 0), n->f);
    int64_t nobody = between(-1, e - 1), chosen = 0;
    for (int64_t i = 0; i < t * k; ++i) {
      index[i] = one_in(5) ? -1 : below(e);
      if (index[i] == nobody) index[i] = -1;
      chosen += index[i] >= 0;
    }
    memset(&a, 0, sizeof a);
    a.tokens = t;
    a.width = d;
    a.hidden = h;
    a.experts = e;
    a.choices = k;
    a.dtype = dtype;
    a.x = x.block.data;
    a.w1 = w1.block.data;
    a.w2 = w2.block.data;
    a.b1 = one_in(3) ? nullptr : b1.block.data;
    a.b2 = one_in(3) ? nullptr : b2.block.data;
    a.x_step = x.step;
    a.w1_step[1] = w1.step;
    a.w1_step[0] = h * w1.step;
    a.w2_step[1] = w2.step;
    a.w2_step[0] = d * w2.step;
    a.index = index.begin();
    a.weights = (const float*)weights.block.data;
    int64_t limit = t * k;
    if (one_in(4)) limit = a.capacity = between(1, 6);
    else if (one_in(4)) {
      a.capacity_factor = 0.25 * (double)between(1, 6);
      limit = (int64_t)std::ceil((double)chosen * a.capacity_factor / (double)e);
    }
    for (int64_t i = 0; i < t * k; ++i)
      if (index[i] >= 0 && (int64_t)queues[(size_t)index[i]].size() < limit) queues[(size_t)index[i]].push_back(i);
  }
  std::string describe() const {
    return text("%s (%lld, %lld, %lld), %lld experts, %lld choices, steps %lld %lld %lld, biases %d %d, capacity %lld or %g", f.name,
                (long long)tokens, (long long)width, (long long)hidden, (long long)experts, (long long)choices, (long long)x.step,
                (long long)w1.step, (long long)w2.step, a.b1 != nullptr, a.b2 != nullptr, (long long)a.capacity, a.capacity_factor);
  }
  static double phi(double z) { return std::erfc(-z / std::sqrt(2.0)) / 2; }
  static double slope(double z) { return phi(z) + z * std::exp(-z * z / 2) / std::sqrt(6.283185307179586); }
  // the error of a sum of terms of that size, some of whose factors were rounded
  double allowed(double size) const { return (6 * ULP + (pairs ? 0x1p-8 : 0)) * size + 1e-37; }

  void run_all(const am_body_table* body) {
    Numbers out(tokens, width, f, false), of_x(tokens, width, f, false), of_w1(experts * hidden, width, f, false),
        of_b1(experts * hidden, 1, f, false), of_w2(experts * width, hidden, f, false), of_b2(experts * width, 1, f, false),
        of_weights(tokens * choices, 1, FORMATS[0], false);
    Array<float> saved(tokens * choices * hidden);
    a.out = out.block.data;
    run({&out.block}, [&](am_parallel with) { return body->experts(&a, with); });
    std::vector<char> plain = out.block.copy();
    a.saved = saved.begin();
    run({&out.block, &saved}, [&](am_parallel with) { return body->experts(&a, with); });
    if (plain != out.block.copy()) fail("the result hangs on whether z is kept");
    am_experts_backward b;
    memset(&b, 0, sizeof b);
    b.forward = a;
    b.forward.out = nullptr;
    b.grad = grad.block.data;
    b.grad_step = grad.step;
    bool all = one_in(2);
    auto some = [&](Numbers& n) { return all || one_in(2) ? (void*)n.block.data : nullptr; };
    b.grad_x = some(of_x);
    b.grad_b1 = some(of_b1);
    b.grad_b2 = some(of_b2);
    b.grad_weights = (float*)some(of_weights);
    b.grad_w1.data = some(of_w1);
    b.grad_w2.data = some(of_w2);
    run({&of_x.block, &of_b1.block, &of_b2.block, &of_weights.block, &of_w1.block, &of_w2.block},
        [&](am_parallel with) { return body->experts_backward(&b, with); });

    std::vector<About> y((size_t)(tokens * width)), dx(y.size()), dweight((size_t)(tokens * choices));
    for (int64_t e = 0; e < experts; ++e) {
      std::vector<About> dw1((size_t)(hidden * width)), db1((size_t)hidden), dw2(dw1.size()), db2((size_t)width);
      for (int64_t pair : queues[(size_t)e]) {
        int64_t t = pair / choices;
        double weight = weights.get(pair, 0), size = std::fabs(weight);
        std::vector<double> z((size_t)hidden), zs(z.size()), g(z.size()), gs(z.size());
        for (int64_t h = 0; h < hidden; ++h) {
          double bias = a.b1 ? b1.get(e * hidden + h, 0) : 0;
          z[(size_t)h] = bias;
          zs[(size_t)h] = std::fabs(bias);
          for (int64_t d = 0; d < width; ++d) {
            double term = w1.get(e * hidden + h, d) * x.get(t, d), back = w2.get(e * width + d, h) * grad.get(t, d);
            z[(size_t)h] += term;
            zs[(size_t)h] += std::fabs(term);
            g[(size_t)h] += back;
            gs[(size_t)h] += std::fabs(back);
          }
        }
        for (int64_t d = 0; d < width; ++d) {
          double up = grad.get(t, d), bias = a.b2 ? b2.get(e * width + d, 0) : 0;
          y[(size_t)(t * width + d)].add(weight * bias, size * std::fabs(bias));
          dweight[(size_t)pair].add(up * bias, std::fabs(up * bias));
          db2[(size_t)d].add(weight * up, size * std::fabs(up));
          for (int64_t h = 0; h < hidden; ++h) {
            double v = w2.get(e * width + d, h), act = z[(size_t)h] * phi(z[(size_t)h]);
            y[(size_t)(t * width + d)].add(weight * v * act, size * std::fabs(v) * zs[(size_t)h]);
            dw2[(size_t)(d * hidden + h)].add(weight * up * act, size * std::fabs(up) * zs[(size_t)h]);
          }
        }
        for (int64_t h = 0; h < hidden; ++h) {
          double s = slope(z[(size_t)h]), dz = weight * g[(size_t)h] * s;
          // the slope's own slope is below 0.8
          double dzs = size * gs[(size_t)h] * (1.13 + 0.8 * zs[(size_t)h]);
          dweight[(size_t)pair].add(g[(size_t)h] * z[(size_t)h] * phi(z[(size_t)h]), gs[(size_t)h] * zs[(size_t)h]);
          db1[(size_t)h].add(dz, dzs);
          for (int64_t d = 0; d < width; ++d) {
            dw1[(size_t)(h * width + d)].add(dz * x.get(t, d), dzs * std::fabs(x.get(t, d)));
            double w = w1.get(e * hidden + h, d);
            dx[(size_t)(t * width + d)].add(dz * w, dzs * std::fabs(w));
          }
        }
      }
      if (b.grad_w1.data) hold(of_w1, e * hidden, dw1, width, "grad_w1");
      if (b.grad_b1) hold(of_b1, e * hidden, db1, 1, "grad_b1");
      if (b.grad_w2.data) hold(of_w2, e * width, dw2, hidden, "grad_w2");
      if (b.grad_b2) hold(of_b2, e * width, db2, 1, "grad_b2");
    }
    hold(out, 0, y, width, "out");
    if (b.grad_x) hold(of_x, 0, dx, width, "grad_x");
    if (b.grad_weights) hold(of_weights, 0, dweight, 1, "grad_weights");
  }
  void hold(const Numbers& got, int64_t first, const std::vector<About>& want, int64_t length, const char* name) const {
    for (size_t i = 0; i < want.size(); ++i) {
      int64_t row = (int64_t)i / length, k = (int64_t)i % length;
      check(got.get(first + row, k), want[i].value, allowed(want[i].error), got.f, name, first + row, k);
    }
  }
};

void try_experts(const am_body_table* body) {
  auto some = [] { return one_in(3) ? between(1, 12) : one_in(2) ? pick<int64_t>({16, 32, 48, 64}) + between(-2, 2) : between(1, 100); };
  int64_t tokens = one_in(20) ? 0 : one_in(4) ? between(1, 300) : some(), width = some(), hidden = some(), experts = between(1, 6);
  int64_t choices = between(1, 4);
  if (one_in(8)) (one_in(2) ? width : hidden) = between(700, 1700);
  while (tokens * choices * width * hidden > 800000) {
    if (choices > 1) choices = 1;
    else if (tokens > 4) tokens /= 2;
    else if (width > hidden) width = (width + 1) / 2;
    else hidden = (hidden + 1) / 2;
  }
  Experts e(tokens, width, hidden, experts, choices, (am_dtype)below(2), strcmp(body->name, "avx512bf16") == 0);
  what += "experts: " + e.describe();
  e.run_all(body);
}

void try_memory(const am_body_table* body) {
  int64_t n = one_in(2) ? some_length() : between(1, 200000);
  Array<float> x(n), y(n);
  for (int64_t i = 0; i < n; ++i) x[i] = (float)i;
  what += text("memory: %lld", (long long)n);
  run({&y}, [&](am_parallel with) { return body->memory(x.begin(), nullptr, n, with); });
  run({&y}, [&](am_parallel with) { return body->memory(x.begin(), y.begin(), n, with); });
  if (x.copy() != y.copy()) fail("the copy differs");
}

// Memory that says to be fresh is written another way, with the same result up to the order of sums.
void try_fresh(const am_body_table* body) {
  am_softmax a;
  memset(&a, 0, sizeof a);
  a.shape.dims = 1;
  a.shape.length = pick<int64_t>({1000, 30000, 70000, 1 << 20, 1600000});
  a.shape.rows = a.shape.size[0] = 1 + 1600000 / a.shape.length;
  a.in.stride = a.out.stride = 1;
  a.in.step[0] = a.out.step[0] = a.shape.length;
  int64_t n = a.shape.rows * a.shape.length;
  Array<float> x(n), y(n), z(n);
  for (int64_t i = 0; i < n; ++i) x[i] = (float)(i * 7919 % 1000) / 100;
  a.in.data = x.begin();
  a.out.data = y.begin();
  what += "softmax into given memory: " + describe(a.shape, a.out);
  run({&y}, [&](am_parallel with) { return body->softmax(&a, with); });
  what += ", into fresh memory";
  a.out.data = z.begin();
  a.out.fresh = n * 4;
  run({&z}, [&](am_parallel with) { return body->softmax(&a, with); });
  for (int64_t i = 0; i < n; ++i) check(z[i], y[i], y[i] * 2 * ULP, FORMATS[0], "z", i / a.shape.length, i % a.shape.length);
}

void try_something(const am_body_table* body, long round) {
  if (round % 3000 == 1000) return try_linear(body, true);
  if (round % 500 == 250) return try_fresh(body);
  switch (below(22)) {
    case 0: case 1: case 2: case 3: return try_softmax(body);
    case 4: return try_softmax_backward(body);
    case 5: return try_logsumexp(body);
    case 6: return try_logsumexp_backward(body);
    case 7: case 8: return try_cross_entropy(body);
    case 9: case 10: return try_linear(body, false);
    case 11: return try_rounding(body);
    case 12: case 13: case 14: case 15: return try_attention(body);
    case 16: return try_count(body);
    case 17: case 18: return try_walk(body);
    case 19: case 20: return try_experts(body);
    default: return try_memory(body);
  }
}

}  // namespace

int main(int count, char** arguments) {
  long rounds = count > 1 ? atol(arguments[1]) : 2000, first = count > 2 ? atol(arguments[2]) : 0;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(last_words);
#else
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(signal, die);
#endif
  std::signal(SIGABRT, die);
  std::vector<const char*> isas;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512bf16"})
    if (am_use_isa(isa) == 0) isas.push_back(isa);
  for (long round = first; round < first + rounds && problems < 20; ++round) {
    chance.seed((uint64_t)round);
    const char* isa = isas[(size_t)below((int64_t)isas.size())];
    am_use_isa(isa);
    what = text("round %ld, %s: ", round, isa);
    try {
      try_something(am_body(), round);
    } catch (const Stop&) {
    }
  }
  if (problems == 0) printf("%ld rounds with %zu bodies hold\n", rounds, isas.size());
  return problems != 0;
}
