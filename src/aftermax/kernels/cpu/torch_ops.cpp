// The core as torch operators: unpacks tensors into places, allocates results, calls the body in use.
//
// The schemas stand in ops.py; this file gives their CPU implementations through torch's stable ABI.
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"
#include "torch_shim.h"

namespace aftermax {
namespace {

Torch torch;

void check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("aftermax: torch could not ") + what);
}
[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("aftermax: " + message); }

// A tensor that this file owns.
class Tensor {
 public:
  explicit Tensor(Value v) : Tensor(reinterpret_cast<Handle>(v)) {}
  explicit Tensor(Handle h) : handle_(h) {
    try {
      look();
    } catch (...) {
      torch.aoti_torch_delete_tensor_object(handle_);
      throw;
    }
  }
  Tensor(Tensor&& t) noexcept
      : data(t.data), fresh(t.fresh), dim(t.dim), count(t.count), sizes(t.sizes), strides(t.strides), dtype(t.dtype),
        handle_(t.handle_) {
    t.handle_ = nullptr;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) torch.aoti_torch_delete_tensor_object(handle_);
  }
  Value release() {
    Value v = reinterpret_cast<Value>(handle_);
    handle_ = nullptr;
    return v;
  }

  void* data = nullptr;
  int64_t fresh = 0;  // see am_place
  int64_t dim = 0, count = 1;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;

  bool is(int32_t t) const { return dtype == t; }
  bool contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != step) return count == 0;
      step *= sizes[d];
    }
    return true;
  }
  int64_t bytes_each() const {
    if (is(torch.aoti_torch_dtype_float64()) || is(torch.aoti_torch_dtype_int64())) return 8;
    if (is(torch.aoti_torch_dtype_bool())) return 1;
    return is(torch.aoti_torch_dtype_float32()) ? 4 : 2;
  }
  // first and last byte that it may touch
  void extent(const char** low, const char** high) const {
    int64_t last = 0;
    for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
    *low = (const char*)data;
    *high = *low + (count == 0 ? 0 : (last + 1) * bytes_each());
  }

 private:
  void look() {
    int32_t device = 0;
    check(torch.aoti_torch_get_device_type(handle_, &device), "tell a tensor's device");
    if (device != torch.aoti_torch_device_type_cpu()) fail("a tensor that is not on the CPU came to a CPU kernel");
    check(torch.aoti_torch_get_data_ptr(handle_, &data), "give a tensor's memory");
    check(torch.aoti_torch_get_dim(handle_, &dim), "tell a tensor's dimensions");
    check(torch.aoti_torch_get_sizes(handle_, &sizes), "tell a tensor's sizes");
    check(torch.aoti_torch_get_strides(handle_, &strides), "tell a tensor's strides");
    check(torch.aoti_torch_get_dtype(handle_, &dtype), "tell a tensor's dtype");
    if (dim > AM_MAX_DIMS) fail("a tensor of more than 64 dimensions");
    for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
  }
  Handle handle_;
};

// A new tensor. Most of what a large one costs is its pages.
Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  Handle h;
  check(torch.aoti_torch_empty_strided(dim, sizes, strides, dtype, torch.aoti_torch_device_type_cpu(), 0, &h),
        "allocate a result");
  Tensor t(h);
  int64_t bytes = t.count * t.bytes_each();
  if (am_is_fresh(t.data, bytes)) t.fresh = bytes;
  return t;
}
Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype) {
  int64_t strides[AM_MAX_DIMS], step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty_strided(dim, sizes, strides, dtype);
}
Tensor empty_like(const Tensor& t) { return empty(t.dim, t.sizes, t.dtype); }

am_dtype dtype_of(const Tensor& t) {
  if (t.is(torch.aoti_torch_dtype_float32())) return AM_FLOAT32;
  if (t.is(torch.aoti_torch_dtype_bfloat16())) return AM_BFLOAT16;
  if (t.is(torch.aoti_torch_dtype_float16())) return AM_FLOAT16;
  fail("the kernels take float32, bfloat16 and float16");
}

am_parallel threads() {
  uint32_t n = 1;
  torch.torch_get_num_threads(&n);
  auto run = [](int64_t count, int64_t grain, am_task task, void* context) {
    if (count <= grain)
      task(0, count, context);
    else
      torch.torch_parallel_for(0, count, grain, task, context);
  };
  return {run, (int32_t)n};
}

int64_t wrapped(int64_t dim, int64_t dims) {
  if (dims == 0) dims = 1;
  if (dim < -dims || dim >= dims) fail("dim is out of range");
  return dim < 0 ? dim + dims : dim;
}

// The rows of several tensors of one shape along `dim`: outer dims of size 1 left out, and those that
// follow each other in all tensors made one.
void rows_of(std::initializer_list<const Tensor*> tensors, std::initializer_list<am_place*> places, int64_t dim,
             am_shape* shape) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* t : tensors) {
    if (t->dim != first.dim || t->dtype != first.dtype) fail("tensors of one call differ in dimensions or dtype");
    for (int64_t d = 0; d < t->dim; ++d)
      if (t->sizes[d] != first.sizes[d]) fail("tensors of one call differ in shape");
  }
  shape->length = first.dim ? first.sizes[dim] : 1;
  shape->rows = 1;
  shape->dims = 0;
  auto place = places.begin();
  for (const Tensor* t : tensors) {
    (*place)->data = t->data;
    (*place)->fresh = t->fresh;
    (*place)->stride = first.dim && shape->length > 1 ? t->strides[dim] : 1;
    ++place;
  }
  for (int64_t d = 0; d < first.dim; ++d) {
    int64_t size = first.sizes[d];
    if (d == dim || size == 1) continue;
    shape->rows *= size;
    bool follows = shape->dims > 0;
    int last = shape->dims - 1;
    place = places.begin();
    for (const Tensor* t : tensors) follows = follows && (*place++)->step[last] == size * t->strides[d];
    int at = follows ? last : shape->dims++;
    shape->size[at] = follows ? shape->size[at] * size : size;
    place = places.begin();
    for (const Tensor* t : tensors) (*place++)->step[at] = t->strides[d];
  }
}

// The dimensions with more than one element, by step.
int64_t by_step(const Tensor& t, int64_t* order) {
  int64_t dims = 0;
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] > 1) order[dims++] = d;
  std::sort(order, order + dims, [&](int64_t a, int64_t b) { return t.strides[a] < t.strides[b]; });
  return dims;
}

// Whether its elements lie apart for sure: every step is beyond all that smaller steps reach.
bool spaced(const Tensor& t, const int64_t* order, int64_t dims) {
  int64_t reach = 0;
  for (int64_t i = 0; i < dims; ++i) {
    if (t.strides[order[i]] <= reach) return false;
    reach += (t.sizes[order[i]] - 1) * t.strides[order[i]];
  }
  return true;
}

// Whether two tensors of the same sizes and steps, `delta` elements apart, share an element: whether delta is
// a sum of whole multiples of the steps, each smaller than the size. Steps from the largest down; with
// spaced steps only two multiples come near.
bool meets(int64_t delta, const Tensor& t, const int64_t* order, int64_t dims) {
  if (dims == 0) return delta == 0;
  int64_t size = t.sizes[order[dims - 1]], step = t.strides[order[dims - 1]];
  int64_t below = delta >= 0 ? delta / step : -((-delta + step - 1) / step);
  for (int64_t many : {below, below + 1})
    if (many > -size && many < size && meets(delta - many * step, t, order, dims - 1)) return true;
  return false;
}

// Marks the places of the elements, from `low` on; false where one is marked already.
bool mark(const Tensor& t, const char* low, bool read_only, std::vector<bool>* marks) {
  for (int64_t i = 0; i < t.count; ++i) {
    int64_t rest = i, at = ((const char*)t.data - low) / t.bytes_each();
    for (int64_t d = t.dim - 1; d >= 0; --d) {
      at += rest % t.sizes[d] * t.strides[d];
      rest /= t.sizes[d];
    }
    if ((*marks)[(size_t)at]) return false;
    if (!read_only) (*marks)[(size_t)at] = true;
  }
  return true;
}

void check_out(const Tensor& in, const Tensor& out) {
  static const char* itself = "out has several elements in one place (it was expanded, or overlaps itself)";
  static const char* input = "out overlaps the input; give the input itself, or memory of its own";
  if (in.dtype != out.dtype) fail("out has another dtype than the input");
  const char *a, *b, *c, *d;
  in.extent(&a, &b);
  out.extent(&c, &d);
  int64_t order[AM_MAX_DIMS], dims = by_step(out, order);
  bool alike = in.dim == out.dim;
  for (int64_t k = 0; alike && k < in.dim; ++k)
    alike = in.sizes[k] == out.sizes[k] && (in.sizes[k] <= 1 || in.strides[k] == out.strides[k]);
  bool apart = a >= d || c >= b || (alike && a == c);
  if (out.count == 0) return;
  if (spaced(out, order, dims)) {
    if (apart) return;
    if (alike) {
      if (meets((c - a) / out.bytes_each(), out, order, dims)) fail(input);
      return;
    }
  }
  // the usual cases are settled; of the others, tell element by element
  const char* low = apart || c < a ? c : a;
  std::vector<bool> marks((size_t)(((apart || d > b ? d : b) - low) / out.bytes_each()));
  if (!mark(out, low, false, &marks)) fail(itself);
  if (!apart && !mark(in, low, true, &marks)) fail(input);
}

void ran(int failed) {
  if (failed) fail("no memory for scratch");
}

int64_t integer(Value v) { return (int64_t)v; }
double real(Value v) {
  double d;
  memcpy(&d, &v, 8);
  return d;
}
bool truth(Value v) { return (v & 0xff) != 0; }

void softmax_into(const Tensor& in, const Tensor& out, const Value* options) {
  am_softmax a;
  a.dtype = dtype_of(in);
  rows_of({&in, &out}, {&a.in, &a.out}, wrapped(integer(options[0]), in.dim), &a.shape);
  a.log = truth(options[1]);
  a.empty = (am_empty)integer(options[2]);
  a.algorithm = (am_algorithm)integer(options[3]);
  a.store = (am_store)integer(options[4]);
  if (a.algorithm < AM_AUTO || a.algorithm > AM_ONLINE) fail("no such algorithm");
  if (in.count > 0) ran(am_body()->softmax(&a, threads()));
}

// (input, dim, log, empty, algorithm, store) -> out
void softmax(Value* stack, uint64_t, uint64_t) {
  Tensor in(stack[0]), out = empty_like(in);
  softmax_into(in, out, stack + 1);
  stack[0] = out.release();
}

// (input, out, dim, log, empty, algorithm, store) -> ()
void softmax_out(Value* stack, uint64_t, uint64_t) {
  Tensor in(stack[0]), out(stack[1]);
  check_out(in, out);
  softmax_into(in, out, stack + 2);
}

// (grad, result, dim, log) -> grad of the input
void softmax_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), result(stack[1]), out = empty_like(result);
  am_softmax_backward a;
  a.dtype = dtype_of(result);
  a.of = truth(stack[3]) ? AM_OF_LOG_SOFTMAX : AM_OF_SOFTMAX;
  rows_of({&grad, &result, &out}, {&a.grad, &a.result, &a.out}, wrapped(integer(stack[2]), result.dim), &a.shape);
  if (out.count > 0) ran(am_body()->softmax_backward(&a, threads()));
  stack[0] = out.release();
}

// am_lse of the rows as a float64 tensor (rows, 2).
Tensor empty_lse(int64_t rows) {
  const int64_t sizes[] = {rows, 2};
  return empty(2, sizes, torch.aoti_torch_dtype_float64());
}
const am_lse* saved_lse(const Tensor& lse, int64_t rows) {
  if (!lse.is(torch.aoti_torch_dtype_float64()) || !lse.contiguous() || lse.count != 2 * rows) fail("lse does not fit");
  return (const am_lse*)lse.data;
}

// (input, dim) -> logsumexp over dim, the same as am_lse
void logsumexp(Value* stack, uint64_t, uint64_t) {
  Tensor in(stack[0]);
  int64_t dim = wrapped(integer(stack[1]), in.dim), sizes[AM_MAX_DIMS], dims = 0;
  for (int64_t d = 0; d < in.dim; ++d)
    if (d != dim) sizes[dims++] = in.sizes[d];
  int64_t rows = 1;
  for (int64_t d = 0; d < dims; ++d) rows *= sizes[d];
  Tensor out = empty(dims, sizes, in.dtype), lse = empty_lse(rows);
  am_logsumexp a;
  a.dtype = dtype_of(in);
  rows_of({&in}, {&a.in}, dim, &a.shape);
  a.out = out.data;
  a.lse = (am_lse*)lse.data;
  if (out.count > 0) ran(am_body()->logsumexp(&a, threads()));
  stack[0] = out.release();
  stack[1] = lse.release();
}

// (grad, input, lse, dim) -> grad of the input
void logsumexp_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), in(stack[1]), lse(stack[2]), out = empty_like(in);
  am_logsumexp_backward a;
  a.dtype = dtype_of(in);
  rows_of({&in, &out}, {&a.in, &a.out}, wrapped(integer(stack[3]), in.dim), &a.shape);
  if (!grad.is(in.dtype) || !grad.contiguous() || grad.count != a.shape.rows) fail("grad does not fit the input");
  a.grad = grad.data;
  a.lse = saved_lse(lse, a.shape.rows);
  if (in.count > 0) ran(am_body()->logsumexp_backward(&a, threads()));
  stack[0] = out.release();
}

// options: ignore_index, label_smoothing, lse_square_scale, reduction
am_classes classes_of(const Tensor& target, const Tensor& weight, const Value* options, int64_t rows, int64_t count) {
  if (!target.is(torch.aoti_torch_dtype_int64()) || !target.contiguous() || target.count != rows)
    fail("target must be contiguous int64, one class for each row of logits");
  if (weight.count > 0 && (!weight.is(torch.aoti_torch_dtype_float32()) || !weight.contiguous() || weight.count != count))
    fail("weight must be contiguous float32, one number for each class");
  am_classes c = {(const int64_t*)target.data,
                  integer(options[0]),
                  weight.count > 0 ? (const float*)weight.data : nullptr,
                  real(options[1]),
                  real(options[2]),
                  (am_reduction)integer(options[3])};
  for (int64_t r = 0; r < rows; ++r)
    if (c.target[r] != c.ignore_index && (c.target[r] < 0 || c.target[r] >= count))
      fail("target " + std::to_string(c.target[r]) + " is out of bounds: there are " + std::to_string(count) +
           " classes");
  return c;
}

Tensor loss_for(am_reduction reduction, int64_t rows) {
  return empty(reduction == AM_NONE ? 1 : 0, &rows, torch.aoti_torch_dtype_float32());
}
const float* loss_grad(const Tensor& grad, am_reduction reduction, int64_t rows) {
  if (!grad.is(torch.aoti_torch_dtype_float32()) || !grad.contiguous() ||
      grad.count != (reduction == AM_NONE ? rows : 1))
    fail("grad does not fit the loss");
  return (const float*)grad.data;
}

// (logits, target, weight, dim, options...) -> loss, lse
void cross_entropy(Value* stack, uint64_t, uint64_t) {
  Tensor logits(stack[0]), target(stack[1]), weight(stack[2]);
  am_cross_entropy a;
  a.dtype = dtype_of(logits);
  rows_of({&logits}, {&a.logits}, wrapped(integer(stack[3]), logits.dim), &a.shape);
  a.classes = classes_of(target, weight, stack + 4, a.shape.rows, a.shape.length);
  Tensor loss = loss_for(a.classes.reduction, a.shape.rows);
  Tensor lse = empty_lse(a.shape.rows);
  a.loss = (float*)loss.data;
  a.lse = (am_lse*)lse.data;
  ran(am_body()->cross_entropy(&a, threads()));
  stack[0] = loss.release();
  stack[1] = lse.release();
}

// What both forms of the backward pass are given.
struct LogitsGradient {
  // all of them first: what stands on the stack is ours to release, whatever fails later
  explicit LogitsGradient(const Value* stack)
      : grad(stack[0]), logits(stack[1]), target(stack[2]), weight(stack[3]), lse(stack[4]), options(stack + 5) {}

  void into(const Tensor& out) const {
    am_cross_entropy_backward a;
    a.dtype = dtype_of(logits);
    rows_of({&logits, &out}, {&a.logits, &a.out}, wrapped(integer(options[0]), logits.dim), &a.shape);
    a.classes = classes_of(target, weight, options + 1, a.shape.rows, a.shape.length);
    a.grad = loss_grad(grad, a.classes.reduction, a.shape.rows);
    a.lse = saved_lse(lse, a.shape.rows);
    if (out.count > 0) ran(am_body()->cross_entropy_backward(&a, threads()));
  }

  Tensor grad, logits, target, weight, lse;
  const Value* options;
};

// (grad, logits, target, weight, lse, dim, options...) -> grad of the logits
void cross_entropy_backward(Value* stack, uint64_t, uint64_t) {
  LogitsGradient gradient(stack);
  Tensor out = empty_like(gradient.logits);
  gradient.into(out);
  stack[0] = out.release();
}

// (grad, logits, target, weight, lse, dim, options...) -> (), with the gradient where the logits were
void cross_entropy_backward_(Value* stack, uint64_t, uint64_t) {
  LogitsGradient gradient(stack);
  check_out(gradient.logits, gradient.logits);
  gradient.into(gradient.logits);
}

am_linear_cross_entropy linear(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& target,
                               const Tensor& class_weight, const Value* options) {
  am_linear_cross_entropy a;
  a.dtype = dtype_of(hidden);
  if (hidden.dim != 2 || weight.dim != 2 || hidden.sizes[1] != weight.sizes[1] || !weight.is(hidden.dtype))
    fail("hidden must be (N, D) and weight (C, D), of one dtype");
  a.rows = hidden.sizes[0];
  a.width = hidden.sizes[1];
  a.count = weight.sizes[0];
  if ((a.width > 1 && (hidden.strides[1] != 1 || weight.strides[1] != 1))) fail("hidden and weight must have unit stride");
  if (bias.count > 0 && (!bias.is(hidden.dtype) || !bias.contiguous() || bias.count != a.count))
    fail("bias must be (C,), contiguous, in the dtype of hidden");
  a.hidden = hidden.data;
  a.weight = weight.data;
  a.bias = bias.count > 0 ? bias.data : nullptr;
  a.hidden_step = hidden.strides[0];
  a.weight_step = weight.strides[0];
  a.classes = classes_of(target, class_weight, options, a.rows, a.count);
  return a;
}

// (hidden, weight, bias, target, class_weight, options...) -> loss, lse
void linear_cross_entropy(Value* stack, uint64_t, uint64_t) {
  Tensor hidden(stack[0]), weight(stack[1]), bias(stack[2]), target(stack[3]), class_weight(stack[4]);
  am_linear_cross_entropy a = linear(hidden, weight, bias, target, class_weight, stack + 5);
  Tensor loss = loss_for(a.classes.reduction, a.rows);
  Tensor lse = empty_lse(a.rows);
  a.loss = (float*)loss.data;
  a.lse = (am_lse*)lse.data;
  ran(am_body()->linear_cross_entropy(&a, threads()));
  stack[0] = loss.release();
  stack[1] = lse.release();
}

// The three gradients, those that are wanted; empty tensors stand for the others.
class LinearGradients {
 public:
  LinearGradients(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Value* wants)
      : hidden_(like(hidden, wants[0])), weight_(like(weight, wants[1])), bias_(like(bias, wants[2])) {
    for (int i = 0; i < 3; ++i) wants_[i] = truth(wants[i]);
    wants_[2] = wants_[2] && bias.count > 0;
  }
  void into(am_linear_cross_entropy_backward* b) const {
    b->grad_hidden = wants_[0] ? hidden_.data : nullptr;
    b->grad_weight = wants_[1] ? weight_.data : nullptr;
    b->grad_bias = wants_[2] ? bias_.data : nullptr;
  }
  void release(Value* stack) {
    stack[0] = hidden_.release();
    stack[1] = weight_.release();
    stack[2] = bias_.release();
  }

 private:
  static Tensor like(const Tensor& t, Value wanted) {
    const int64_t none = 0;
    return truth(wanted) ? empty_like(t) : empty(1, &none, t.dtype);
  }
  Tensor hidden_, weight_, bias_;
  bool wants_[3];
};

// (grad, hidden, weight, bias, target, class_weight, lse, options..., wants hidden, weight, bias)
// -> three gradients, empty where not wanted
void linear_cross_entropy_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), hidden(stack[1]), weight(stack[2]), bias(stack[3]), target(stack[4]), class_weight(stack[5]);
  Tensor lse(stack[6]);
  am_linear_cross_entropy_backward b;
  b.forward = linear(hidden, weight, bias, target, class_weight, stack + 7);
  b.forward.lse = const_cast<am_lse*>(saved_lse(lse, b.forward.rows));
  b.forward.loss = nullptr;
  b.grad = loss_grad(grad, b.forward.classes.reduction, b.forward.rows);
  LinearGradients out(hidden, weight, bias, stack + 11);
  out.into(&b);
  ran(am_body()->linear_cross_entropy_backward(&b, threads()));
  out.release(stack);
}

// (hidden, weight, bias, target, class_weight, options..., wants hidden, weight, bias)
// -> loss, lse, three gradients for a gradient of 1, empty where not wanted
void linear_cross_entropy_gradients(Value* stack, uint64_t, uint64_t) {
  Tensor hidden(stack[0]), weight(stack[1]), bias(stack[2]), target(stack[3]), class_weight(stack[4]);
  am_linear_cross_entropy_backward b;
  b.forward = linear(hidden, weight, bias, target, class_weight, stack + 5);
  if (b.forward.classes.reduction == AM_NONE || b.forward.dtype != AM_FLOAT32)
    fail("gradients in one go are for float32 and a loss that is one number");
  int64_t rows = b.forward.rows;
  Tensor loss = loss_for(b.forward.classes.reduction, rows);
  Tensor lse = empty_lse(rows);
  b.forward.loss = (float*)loss.data;
  b.forward.lse = (am_lse*)lse.data;
  b.grad = nullptr;
  LinearGradients out(hidden, weight, bias, stack + 9);
  out.into(&b);
  ran(am_body()->linear_cross_entropy_gradients(&b, threads()));
  stack[0] = loss.release();
  stack[1] = lse.release();
  out.release(stack + 2);
}

// ---- attention ---------------------------------------------------------------------------------

// (batch, heads, rows, width) as the tensor lies in memory.
am_heads heads_of(const Tensor& t) {
  if (t.dim != 4 || (t.sizes[3] > 1 && t.strides[3] != 1)) fail("heads must be (B, H, T, D) with unit stride");
  return {t.data, {t.strides[0], t.strides[1], t.strides[2]}};
}

// A new tensor (batch, heads, rows, width) with its tokens before its heads in memory, if `like` has them so.
Tensor empty_heads(const Tensor& like, const int64_t* sizes) {
  int64_t strides[4], order[4] = {0, 1, 2, 3}, step = 1;
  if (like.sizes[1] > 1 && like.sizes[2] > 1 && like.strides[1] < like.strides[2]) std::swap(order[1], order[2]);
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = step;
    step *= sizes[order[i]] > 0 ? sizes[order[i]] : 1;
  }
  return empty_strided(4, sizes, strides, like.dtype);
}

am_per_row per_row(const Tensor& t, const char* name) {
  if (t.count == 0) return {nullptr, {0, 0}};
  if (!t.is(torch.aoti_torch_dtype_float32()) || t.dim != 3 || (t.sizes[2] > 1 && t.strides[2] != 1))
    fail(std::string(name) + " must be float32 (B, H, T) with unit stride");
  return {(const float*)t.data, {t.strides[0], t.strides[1]}};
}

// What comes before all options: the tensors of a call, those that are not there with 0 elements.
enum { QUERY, KEY, VALUE, MASK, SLOPES, DISTANCE, ROW_SCALE, ROW_BIAS, ROW_WEIGHT, ROW_POWER, COUNT, SINK, TENSORS };
enum { MAP, COSINE, CAUSAL, OFFSET, WINDOW, HIDDEN_BELOW, ZERO, SCALE, POWER, OPTIONS };

am_visible visible_of(const Tensor& mask, const Tensor& slopes, const Tensor& distance, const Value* options) {
  am_visible v;
  memset(&v, 0, sizeof v);
  v.causal = truth(options[CAUSAL]);
  v.offset = integer(options[OFFSET]);
  v.window = integer(options[WINDOW]);
  v.hidden_below = (float)real(options[HIDDEN_BELOW]);
  if (mask.count > 0) {
    bool numbers = mask.is(torch.aoti_torch_dtype_float32());
    if (mask.dim != 4 || !(numbers || mask.is(torch.aoti_torch_dtype_bool()))) fail("mask must be bool or float32 (B, H, Tq, Tk)");
    v.kind = numbers ? AM_MASK_FLOAT : AM_MASK_BOOL;
    v.mask = mask.data;
    for (int d = 0; d < 4; ++d) v.mask_step[d] = mask.sizes[d] == 1 ? 0 : mask.strides[d];
  }
  auto floats = [](const Tensor& t, const char* name) {
    if (!t.is(torch.aoti_torch_dtype_float32()) || !t.contiguous()) fail(std::string(name) + " must be contiguous float32");
    return (const float*)t.data;
  };
  if (slopes.count > 0) v.slopes = floats(slopes, "slopes");
  if (distance.count > 0) {
    v.stretch = floats(distance, "distance");
    v.shift = v.stretch + distance.count / 2;
    v.zero = integer(options[ZERO]);
  }
  return v;
}

// The tensors of a call, from the stack, and the call itself without its results.
struct Attention {
  explicit Attention(const Value* stack)
      : query(stack[QUERY]), key(stack[KEY]), value(stack[VALUE]), mask(stack[MASK]), slopes(stack[SLOPES]),
        distance(stack[DISTANCE]), row_scale(stack[ROW_SCALE]), row_bias(stack[ROW_BIAS]), row_weight(stack[ROW_WEIGHT]),
        row_power(stack[ROW_POWER]), count(stack[COUNT]), sink(stack[SINK]) {}

  am_attention call(const Value* options) const {
    am_attention a;
    memset(&a, 0, sizeof a);
    a.query = heads_of(query);
    a.key = heads_of(key);
    a.value = heads_of(value);
    a.dtype = dtype_of(query);
    a.batch = query.sizes[0];
    a.heads = query.sizes[1];
    a.queries = query.sizes[2];
    a.width = query.sizes[3];
    a.kv_heads = key.sizes[1];
    a.keys = key.sizes[2];
    a.value_width = value.sizes[3];
    if (!key.is(query.dtype) || !value.is(query.dtype)) fail("query, key and value must have one dtype");
    if (key.sizes[0] != a.batch || value.sizes[0] != a.batch || value.sizes[1] != a.kv_heads || value.sizes[2] != a.keys ||
        key.sizes[3] != a.width || a.kv_heads == 0 || a.heads % a.kv_heads != 0)
      fail("query, key and value do not fit each other");
    if (a.width == 0 || a.value_width == 0) fail("heads without a width");
    a.visible = visible_of(mask, slopes, distance, options);
    if (mask.count > 0 && !fits(mask, {a.batch, a.heads, a.queries, a.keys})) fail("mask does not fit the scores");
    if (slopes.count > 0 && slopes.count != a.heads) fail("there must be one slope for each head");
    if (distance.count > 0 && (distance.count != 2 * (a.queries - 1 + a.keys) ||
                               a.visible.zero != a.queries - 1 + a.visible.offset))
      fail("distance must hold two numbers for each distance");
    a.map = (am_row_map)integer(options[MAP]);
    if (a.map < AM_MAP_SOFTMAX || a.map > AM_MAP_CLIPPED) fail("no such row map");
    a.cosine = truth(options[COSINE]);
    a.scale = (float)real(options[SCALE]);
    a.power = (float)real(options[POWER]);
    a.row_scale = per_row(row_scale, "row_scale");
    a.row_bias = per_row(row_bias, "row_bias");
    a.row_weight = per_row(row_weight, "row_weight");
    a.row_power = per_row(row_power, "row_power");
    a.count = per_row(count, "count");
    for (const Tensor* t : {&row_scale, &row_bias, &row_weight, &row_power, &count})
      if (t->count > 0 && !(t->sizes[0] == a.batch && t->sizes[1] == a.heads && t->sizes[2] == a.queries))
        fail("what belongs to rows must be (B, H, T)");
    if (a.map == AM_MAP_LSSAR && !a.count.data) fail("lssar needs the count of each row");
    if (sink.count > 0) {
      if (!sink.is(torch.aoti_torch_dtype_float32()) || !sink.contiguous() || sink.count != a.heads)
        fail("sink must be contiguous float32, one number for each head");
      a.sink = (const float*)sink.data;
    }
    return a;
  }

  static bool fits(const Tensor& t, std::initializer_list<int64_t> sizes) {
    int64_t d = 0;
    for (int64_t size : sizes) {
      if (t.sizes[d] != size && t.sizes[d] != 1) return false;
      ++d;
    }
    return true;
  }

  Tensor query, key, value, mask, slopes, distance, row_scale, row_bias, row_weight, row_power, count, sink;
};

// (tensors..., options...) -> out, stats, extra; stats and extra are for the backward pass
template <bool ForBackward>
void attention(Value* stack, uint64_t, uint64_t) {
  Attention of(stack);
  am_attention a = of.call(stack + TENSORS);
  const int64_t sizes[] = {a.batch, a.heads, a.queries, a.value_width}, stat_sizes[] = {a.batch, a.heads, a.queries, AM_STATS};
  const int64_t none = 0;
  int32_t floats = torch.aoti_torch_dtype_float32();
  Tensor out = empty_heads(of.query, sizes);
  Tensor stats = ForBackward ? empty(4, stat_sizes, floats) : empty(1, &none, floats);
  Tensor extra = ForBackward && am_sees_row_first(a.map) ? empty(4, sizes, floats) : empty(1, &none, floats);
  a.out = heads_of(out);
  a.stats = stats.count > 0 ? (float*)stats.data : nullptr;
  a.extra = extra.count > 0 ? (float*)extra.data : nullptr;
  if (out.count > 0) ran(am_body()->attention(&a, threads()));
  stack[0] = out.release();
  if (!ForBackward) return;
  stack[1] = stats.release();
  stack[2] = extra.release();
}

// (grad, out, stats, extra, tensors..., options...) -> grad of query, key, value, row_scale
void attention_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), out(stack[1]), stats(stack[2]), extra(stack[3]);
  Attention of(stack + 4);
  am_attention_backward b;
  b.forward = of.call(stack + 4 + TENSORS);
  const am_attention& a = b.forward;
  int64_t rows = a.batch * a.heads * a.queries, none = 0;
  auto wide = [&](const Tensor& t) {
    return t.dim == 4 && t.sizes[0] == a.batch && t.sizes[1] == a.heads && t.sizes[2] == a.queries && t.sizes[3] == a.value_width;
  };
  if (!wide(grad) || !wide(out) || !grad.is(of.query.dtype) || !out.is(of.query.dtype)) fail("grad does not fit the result");
  if (stats.count != rows * AM_STATS || !stats.contiguous()) fail("stats do not fit");
  if (am_sees_row_first(a.map) && (extra.count != rows * a.value_width || !extra.contiguous())) fail("extra does not fit");
  b.forward.out = heads_of(out);
  b.forward.stats = (float*)stats.data;
  b.forward.extra = extra.count > 0 ? (float*)extra.data : nullptr;
  b.grad = heads_of(grad);
  Tensor of_query = empty_heads(of.query, of.query.sizes), of_key = empty_heads(of.key, of.key.sizes);
  Tensor of_value = empty_heads(of.value, of.value.sizes);
  const int64_t row_sizes[] = {a.batch, a.heads, a.queries};
  bool scaled = of.row_scale.count > 0;
  Tensor of_scale = empty(scaled ? 3 : 1, scaled ? row_sizes : &none, torch.aoti_torch_dtype_float32());
  b.grad_query = heads_of(of_query);
  b.grad_key = heads_of(of_key);
  b.grad_value = heads_of(of_value);
  b.grad_row_scale = scaled ? (float*)of_scale.data : nullptr;
  ran(am_body()->attention_backward(&b, threads()));
  stack[0] = of_query.release();
  stack[1] = of_key.release();
  stack[2] = of_value.release();
  stack[3] = of_scale.release();
}

// (mask, causal, offset, window, hidden_below, batch, heads, queries, keys) -> float32 (batch, heads, queries)
void count_visible(Value* stack, uint64_t, uint64_t) {
  Tensor mask(stack[0]);
  const int64_t none = 0;
  Tensor nothing = empty(1, &none, torch.aoti_torch_dtype_float32());
  Value options[OPTIONS] = {};
  options[CAUSAL] = stack[1];
  options[OFFSET] = stack[2];
  options[WINDOW] = stack[3];
  options[HIDDEN_BELOW] = stack[4];
  am_count c = {integer(stack[5]), integer(stack[6]), integer(stack[7]), integer(stack[8]),
                visible_of(mask, nothing, nothing, options), nullptr};
  if (mask.count > 0 && !Attention::fits(mask, {c.batch, c.heads, c.queries, c.keys})) fail("mask does not fit the scores");
  const int64_t sizes[] = {c.batch, c.heads, c.queries};
  Tensor out = empty(3, sizes, torch.aoti_torch_dtype_float32());
  c.out = (float*)out.data;
  ran(am_body()->count(&c, threads()));
  stack[0] = out.release();
}

// ---- the linear family -------------------------------------------------------------------------

// (query, key, value, rate, state), rate with 0 elements where there is none.
struct LinearWalk {
  LinearWalk(const Value* stack, bool totals)
      : query(stack[0]), key(stack[1]), value(stack[2]), rate(stack[3]), state(stack[4]) {
    int32_t floats = torch.aoti_torch_dtype_float32();
    for (const Tensor* t : {&query, &key, &value, &rate, &state})
      if (!t->is(floats)) fail("the walk is for float32");
    memset(&a, 0, sizeof a);
    a.query = heads_of(query);
    a.key = heads_of(key);
    a.value = heads_of(value);
    a.batch = query.sizes[0];
    a.heads = query.sizes[1];
    a.tokens = query.sizes[2];
    a.width = query.sizes[3];
    a.kv_heads = key.sizes[1];
    a.value_width = value.sizes[3];
    a.totals = totals;
    if (key.sizes[0] != a.batch || value.sizes[0] != a.batch || value.sizes[1] != a.kv_heads || key.sizes[2] != a.tokens ||
        value.sizes[2] != a.tokens || key.sizes[3] != a.width || a.kv_heads == 0 || a.heads % a.kv_heads != 0)
      fail("query, key and value do not fit each other");
    if (a.width == 0 || a.value_width == 0) fail("heads without a width");
    if (rate.count > 0 && (rate.count != a.heads || a.heads != a.kv_heads || !rate.contiguous()))
      fail("there must be one rate for each head, and as many heads of keys");
    a.rate = rate.count > 0 ? (const float*)rate.data : nullptr;
    if (!is_state(state)) fail("the state must be contiguous (B, Hkv, D, Dv)");
    a.state = (const float*)state.data;
  }
  bool is_state(const Tensor& t) const {
    return t.dim == 4 && t.sizes[0] == a.batch && t.sizes[1] == a.kv_heads && t.sizes[2] == a.width &&
           t.sizes[3] == a.value_width + a.totals && t.contiguous() && t.is(torch.aoti_torch_dtype_float32());
  }

  Tensor query, key, value, rate, state;
  am_walk a;
};

// (query, key, value, rate, state, totals) -> out, total, new state
void linear_walk(Value* stack, uint64_t, uint64_t) {
  LinearWalk walk(stack, truth(stack[5]));
  am_walk& a = walk.a;
  const int64_t sizes[] = {a.batch, a.heads, a.tokens, a.value_width}, total_sizes[] = {a.batch, a.heads, a.tokens};
  const int64_t none = 0;
  Tensor out = empty_heads(walk.query, sizes);
  Tensor total = a.totals ? empty(3, total_sizes, walk.query.dtype) : empty(1, &none, walk.query.dtype);
  Tensor state = empty_like(walk.state);
  a.out = heads_of(out);
  a.total = (float*)total.data;
  a.new_state = (float*)state.data;
  ran(am_body()->linear_walk(&a, threads()));
  stack[0] = out.release();
  stack[1] = total.release();
  stack[2] = state.release();
}

// (grad, grad of total, grad of new state, query, key, value, rate, state, totals) -> grads of query, key, value, state
void linear_walk_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), of_total(stack[1]), of_new_state(stack[2]);
  LinearWalk walk(stack + 3, truth(stack[8]));
  const am_walk& a = walk.a;
  int32_t floats = torch.aoti_torch_dtype_float32();
  if (grad.dim != 4 || grad.sizes[0] != a.batch || grad.sizes[1] != a.heads || grad.sizes[2] != a.tokens ||
      grad.sizes[3] != a.value_width || !grad.is(floats))
    fail("grad does not fit the result");
  if (a.totals && (of_total.count != a.batch * a.heads * a.tokens || !of_total.contiguous() || !of_total.is(floats)))
    fail("the gradient of the totals does not fit");
  if (of_new_state.count > 0 && !walk.is_state(of_new_state)) fail("the gradient of the state does not fit");
  Tensor of_query = empty_heads(walk.query, walk.query.sizes), of_key = empty_heads(walk.key, walk.key.sizes);
  Tensor of_value = empty_heads(walk.value, walk.value.sizes), of_state = empty_like(walk.state);
  am_walk_backward b;
  memset(&b, 0, sizeof b);
  b.forward = a;
  b.grad = heads_of(grad);
  b.grad_total = (const float*)of_total.data;
  b.grad_state = of_new_state.count > 0 ? (const float*)of_new_state.data : nullptr;
  b.grad_query = heads_of(of_query);
  b.grad_key = heads_of(of_key);
  b.grad_value = heads_of(of_value);
  b.grad_of_state = (float*)of_state.data;
  ran(am_body()->linear_walk_backward(&b, threads()));
  stack[0] = of_query.release();
  stack[1] = of_key.release();
  stack[2] = of_value.release();
  stack[3] = of_state.release();
}

// ---- selection ---------------------------------------------------------------------------------

const int64_t* integers(const Tensor& t, int64_t rows, int64_t each) {
  if (t.dim != 2 || t.sizes[0] != rows || t.sizes[1] != each || !t.contiguous() || !t.is(torch.aoti_torch_dtype_int64()))
    fail("int64 (rows, items), contiguous, is what was to come");
  return (const int64_t*)t.data;
}
const double* doubles(const Tensor& t) {
  if (t.dim != 2 || !t.contiguous() || !t.is(torch.aoti_torch_dtype_float64()))
    fail("float64 (rows, items), contiguous, is what was to come");
  return (const double*)t.data;
}

// (scores, k, top, carried, cap) -> tau, fractions, leaves_ones, leaves_top, leaves_support, capped
void thresholds(Value* stack, uint64_t, uint64_t) {
  Tensor scores(stack[0]);
  am_thresholds a;
  memset(&a, 0, sizeof a);
  a.scores = doubles(scores);
  a.rows = scores.sizes[0];
  a.items = scores.sizes[1];
  a.k = real(stack[1]);
  a.top = integer(stack[2]);
  a.carried = integer(stack[3]);
  a.cap = integer(stack[4]);
  if (!(a.k > 0) || a.top < 1 || a.carried < 0 || a.carried > a.items) fail("no such selection");
  const int64_t of_queries[] = {a.rows, a.items - a.carried}, of_items[] = {a.rows, a.items}, of_rows[] = {a.rows};
  int32_t whole = torch.aoti_torch_dtype_int64();
  Tensor tau = empty(2, of_queries, scores.dtype), fractions = empty(2, of_queries, whole);
  Tensor ones = empty(2, of_items, whole), top = empty(2, of_items, whole), support = empty(2, of_items, whole);
  Tensor capped = empty(1, of_rows, whole);
  a.tau = (double*)tau.data;
  a.fractions = (int64_t*)fractions.data;
  a.leaves_ones = (int64_t*)ones.data;
  a.leaves_top = (int64_t*)top.data;
  a.leaves_support = (int64_t*)support.data;
  a.capped = (int64_t*)capped.data;
  ran(am_run_thresholds(&a, threads()));
  stack[0] = tau.release();
  stack[1] = fractions.release();
  stack[2] = ones.release();
  stack[3] = top.release();
  stack[4] = support.release();
  stack[5] = capped.release();
}

// (grad, fractions, leaves_ones, leaves_support, carried) -> grad of scores
void thresholds_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), fractions(stack[1]), ones(stack[2]), support(stack[3]);
  am_thresholds_backward a;
  a.grad = doubles(grad);
  a.rows = grad.sizes[0];
  a.carried = integer(stack[4]);
  a.items = grad.sizes[1] + a.carried;
  a.fractions = integers(fractions, a.rows, grad.sizes[1]);
  a.leaves_ones = integers(ones, a.rows, a.items);
  a.leaves_support = integers(support, a.rows, a.items);
  const int64_t of_items[] = {a.rows, a.items};
  Tensor out = empty(2, of_items, grad.dtype);
  a.out = (double*)out.data;
  int failed = am_run_thresholds_backward(&a);
  if (failed == 2) fail("a score leaves at a query that is not there");
  ran(failed);
  stack[0] = out.release();
}

// (start, stop, block, blocks, width) -> items of each block
void spans(Value* stack, uint64_t, uint64_t) {
  Tensor start(stack[0]), stop(stack[1]);
  am_spans a;
  if (start.dim != 2) fail("start and stop are (rows, items)");
  a.rows = start.sizes[0];
  a.items = start.sizes[1];
  a.start = integers(start, a.rows, a.items);
  a.stop = integers(stop, a.rows, a.items);
  a.block = integer(stack[2]);
  a.blocks = integer(stack[3]);
  a.width = integer(stack[4]);
  if (a.block < 1 || a.blocks < 0 || a.width < 0) fail("no such blocks");
  const int64_t sizes[] = {a.rows, a.blocks, a.width};
  Tensor out = empty(3, sizes, start.dtype);
  a.out = (int64_t*)out.data;
  int failed = am_run_spans(&a);
  if (failed == 2) fail("an item has no place in its block");
  ran(failed);
  stack[0] = out.release();
}

// ---- experts -----------------------------------------------------------------------------------

// (x, index, weights, w1, b1, w2, b2, capacity, capacity_factor), biases with 0 elements where there are none.
struct Experts {
  static constexpr int TENSORS = 7;

  explicit Experts(const Value* stack)
      : x(stack[0]), index(stack[1]), weights(stack[2]), w1(stack[3]), b1(stack[4]), w2(stack[5]), b2(stack[6]) {
    memset(&a, 0, sizeof a);
    if (x.dim != 2 || index.dim != 2 || w1.dim != 3 || w2.dim != 3) fail("experts: x, index, w1 and w2 have 2, 2, 3 and 3 dims");
    a.dtype = dtype_of(x);
    if (a.dtype == AM_FLOAT16) fail("experts: the kernel takes float32 and bfloat16");
    a.tokens = x.sizes[0];
    a.width = x.sizes[1];
    a.choices = index.sizes[1];
    a.experts = w1.sizes[0];
    a.hidden = w1.sizes[1];
    if (a.width == 0 || a.hidden == 0 || a.choices == 0 || a.experts == 0) fail("experts: nothing to multiply");
    if (w1.sizes[2] != a.width || w2.sizes[0] != a.experts || w2.sizes[1] != a.width || w2.sizes[2] != a.hidden ||
        !w1.is(x.dtype) || !w2.is(x.dtype))
      fail("experts: w1 and w2 do not fit x or each other");
    for (const Tensor* t : {&x, &w1, &w2})
      if (t->count > 0 && t->sizes[t->dim - 1] > 1 && t->strides[t->dim - 1] != 1) fail("experts: rows must be whole");
    if (index.sizes[0] != a.tokens || !index.contiguous() || !index.is(torch.aoti_torch_dtype_int64()) ||
        weights.count != index.count || !weights.contiguous() || !weights.is(torch.aoti_torch_dtype_float32()))
      fail("experts: index must be int64 and weights float32, (tokens, choices), contiguous");
    a.x = x.data;
    a.w1 = w1.data;
    a.w2 = w2.data;
    a.b1 = bias_of(b1, a.hidden);
    a.b2 = bias_of(b2, a.width);
    a.x_step = x.strides[0];
    a.w1_step[0] = w1.strides[0];
    a.w1_step[1] = w1.strides[1];
    a.w2_step[0] = w2.strides[0];
    a.w2_step[1] = w2.strides[1];
    a.index = (const int64_t*)index.data;
    a.weights = (const float*)weights.data;
    a.capacity = integer(stack[TENSORS]);
    a.capacity_factor = real(stack[TENSORS + 1]);
    for (int64_t i = 0; i < index.count; ++i)
      if (a.index[i] < -1 || a.index[i] >= a.experts)
        fail("experts: index " + std::to_string(a.index[i]) + ", where there are " + std::to_string(a.experts) + " experts");
  }
  const void* bias_of(const Tensor& b, int64_t rows) const {
    if (b.count == 0) return nullptr;
    if (b.count != a.experts * rows || !b.contiguous() || !b.is(x.dtype)) fail("experts: a bias does not fit its weight");
    return b.data;
  }

  Tensor x, index, weights, w1, b1, w2, b2;
  am_experts a;
};

// (tensors..., capacity, capacity_factor) -> out, and what the backward pass needs
template <bool ForBackward>
void experts(Value* stack, uint64_t, uint64_t) {
  Experts of(stack);
  am_experts& a = of.a;
  const int64_t sizes[] = {a.tokens, a.width}, saved_sizes[] = {a.tokens * a.choices, a.hidden}, none = 0;
  Tensor out = empty(2, sizes, of.x.dtype);
  int32_t floats = torch.aoti_torch_dtype_float32();
  Tensor saved = ForBackward ? empty(2, saved_sizes, floats) : empty(1, &none, floats);
  a.out = out.data;
  a.saved = ForBackward ? (float*)saved.data : nullptr;
  ran(am_body()->experts(&a, threads()));
  stack[0] = out.release();
  if (ForBackward) stack[1] = saved.release();
}

// (grad, saved, tensors..., capacity, capacity_factor, wanted) -> grads of x, weights, w1, b1, w2, b2
void experts_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), saved(stack[1]);
  Experts of(stack + 2);
  am_experts_backward b;
  memset(&b, 0, sizeof b);
  b.forward = of.a;
  const am_experts& a = of.a;
  if (grad.dim != 2 || grad.sizes[0] != a.tokens || grad.sizes[1] != a.width || !grad.is(of.x.dtype) ||
      (grad.count > 0 && a.width > 1 && grad.strides[1] != 1))
    fail("experts: grad does not fit the result");
  if (saved.count != a.tokens * a.choices * a.hidden || !saved.contiguous() || !saved.is(torch.aoti_torch_dtype_float32()))
    fail("experts: what was saved does not fit");
  b.forward.saved = (float*)saved.data;
  b.grad = grad.data;
  b.grad_step = grad.strides[0];
  const Tensor* tensors[] = {&of.x, &of.weights, &of.w1, &of.b1, &of.w2, &of.b2};
  const Value* wanted = stack + 2 + Experts::TENSORS + 2;
  const int64_t none = 0;
  std::vector<Tensor> grads;
  for (int i = 0; i < 6; ++i) grads.push_back(truth(wanted[i]) ? empty_like(*tensors[i]) : empty(1, &none, tensors[i]->dtype));
  auto data = [&](int i) { return grads[(size_t)i].count > 0 ? grads[(size_t)i].data : nullptr; };
  b.grad_x = data(0);
  b.grad_weights = (float*)data(1);
  b.grad_w1.data = data(2);
  b.grad_w1.fresh = grads[2].fresh;
  b.grad_b1 = data(3);
  b.grad_w2.data = data(4);
  b.grad_w2.fresh = grads[4].fresh;
  b.grad_b2 = data(5);
  ran(am_body()->experts_backward(&b, threads()));
  for (size_t i = 0; i < 6; ++i) stack[i] = grads[i].release();
}

struct Op {
  const char* name;
  Boxed run;
};
const Op ops[] = {
    {"softmax", softmax},
    {"softmax_forward", softmax},
    {"softmax_out", softmax_out},
    {"softmax_backward", softmax_backward},
    {"logsumexp", logsumexp},
    {"logsumexp_backward", logsumexp_backward},
    {"cross_entropy", cross_entropy},
    {"cross_entropy_backward", cross_entropy_backward},
    {"cross_entropy_inplace", cross_entropy},
    {"cross_entropy_backward_", cross_entropy_backward_},
    {"linear_cross_entropy", linear_cross_entropy},
    {"linear_cross_entropy_backward", linear_cross_entropy_backward},
    {"linear_cross_entropy_gradients", linear_cross_entropy_gradients},
    {"attention", attention<true>},
    {"attention_forward", attention<false>},
    {"attention_backward", attention_backward},
    {"count_visible", count_visible},
    {"linear_walk", linear_walk},
    {"linear_walk_backward", linear_walk_backward},
    {"thresholds", thresholds},
    {"thresholds_backward", thresholds_backward},
    {"spans", spans},
    {"experts", experts<true>},
    {"experts_forward", experts<false>},
    {"experts_backward", experts_backward},
};

#if defined(__APPLE__)
constexpr const char* TORCH_LIBRARY_FILE = "libtorch_cpu.dylib";
#else
constexpr const char* TORCH_LIBRARY_FILE = "libtorch_cpu.so";
#endif

}  // namespace
}  // namespace aftermax

// Reads n floats at x on torch's threads, and where y is not null writes them there past the cache:
// the bound that benchmarks compare with.
extern "C" AM_EXPORT void am_memory(const float* x, float* y, int64_t n) {
  am_body()->memory(x, y, n, aftermax::threads());
}

// Registers the CPU implementations with the torch whose library file is at `path`, which must be
// loaded. Returns null, or what went wrong.
extern "C" AM_EXPORT const char* am_register(const char* path) {
  using namespace aftermax;
  static std::string problem;
  static bool done = false;
  if (done) return nullptr;
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) {
    problem = std::string(TORCH_LIBRARY_FILE) + " is not loaded from " + path;
    return problem.c_str();
  }
#define AM_FIND(name, result, arguments)                                     \
  torch.name = reinterpret_cast<result(*) arguments>(dlsym(library, #name)); \
  if (!torch.name) {                                                         \
    problem = "this torch has no " #name " (torch 2.10 or newer is needed)"; \
    return problem.c_str();                                                  \
  }
  AM_TORCH_FUNCTIONS(AM_FIND)
#undef AM_FIND
  TorchLibraryOpaque* registry = nullptr;
  if (torch.aoti_torch_library_init_impl("aftermax", "CPU", "aftermax", 0, &registry) != 0) {
    problem = "torch did not open the library `aftermax`";
    return problem.c_str();
  }
  for (const Op& op : ops)
    if (torch.torch_library_impl(registry, op.name, op.run, TORCH_2_10) != 0) {
      problem = std::string("torch did not take the kernel of ") + op.name;
      return problem.c_str();
    }
  done = true;  // the registry lives as long as the process
  return nullptr;
}
