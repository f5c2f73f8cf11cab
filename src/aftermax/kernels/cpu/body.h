// One body: all functions for one instruction set. A .cpp file per set says AM_ISA (the namespace) and
// AM_NAME, includes its vectors and then this.
#pragma once
#include "core.h"
#include "cross_entropy.h"
#include "linear_cross_entropy.h"
#include "softmax.h"

namespace AM_ISA {

#define AM_BY_DTYPE(name)                                       \
  static int name(const am_##name* a, am_parallel with) {      \
    switch (AM_DTYPE_OF(a)) {                                   \
      case AM_FLOAT32: return name##_of<float>(a, with);        \
      case AM_BFLOAT16: return name##_of<bf16>(a, with);        \
      case AM_FLOAT16: return name##_of<f16>(a, with);          \
    }                                                           \
    return 1;                                                   \
  }

#define AM_DTYPE_OF(a) (a)->dtype
AM_BY_DTYPE(softmax)
AM_BY_DTYPE(softmax_backward)
AM_BY_DTYPE(logsumexp)
AM_BY_DTYPE(logsumexp_backward)
AM_BY_DTYPE(cross_entropy)
AM_BY_DTYPE(cross_entropy_backward)
AM_BY_DTYPE(linear_cross_entropy)
#undef AM_DTYPE_OF
#define AM_DTYPE_OF(a) (a)->forward.dtype
AM_BY_DTYPE(linear_cross_entropy_backward)
#undef AM_DTYPE_OF

extern const am_body_table body;
const am_body_table body = {AM_NAME,       softmax,
                            softmax_backward, logsumexp,
                            logsumexp_backward, cross_entropy,
                            cross_entropy_backward, linear_cross_entropy,
                            linear_cross_entropy_backward};

}  // namespace AM_ISA
