#define AM_ISA aftermax_avx2
#define AM_NAME "avx2"
#include "vec_avx2.h"
#include "body.h"
