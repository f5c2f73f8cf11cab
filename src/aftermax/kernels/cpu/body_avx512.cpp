#define AM_ISA aftermax_avx512
#define AM_NAME "avx512"
#include "vec_avx512.h"
#include "body.h"
