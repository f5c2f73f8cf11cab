#define AM_ISA aftermax_avx512bf16
#define AM_NAME "avx512bf16"
#define AM_PAIRS
#include "vec_avx512.h"
#include "body.h"
