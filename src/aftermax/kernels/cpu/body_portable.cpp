#define AM_ISA aftermax_portable
#define AM_NAME "portable"
#include "vec_portable.h"
#include "body.h"
