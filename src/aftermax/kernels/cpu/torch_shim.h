// The part of torch's stable C interface (torch >= 2.10) that the registration uses.
//
// The functions are looked up in the torch that is loaded, by name, when `register` runs: building
// needs no torch, and one library serves every torch that keeps the interface. The test
// tests/test_native_build.py holds these types against the headers of the torch installed.
#pragma once
#include <stdint.h>

struct AtenTensorOpaque;
class TorchLibraryOpaque;

namespace aftermax {

using Handle = AtenTensorOpaque*;
using Value = uint64_t;  // torch's StableIValue
using Boxed = void (*)(Value*, uint64_t, uint64_t);
constexpr uint64_t TORCH_2_10 = (2ULL << 56) | (10ULL << 48);

#define AM_TORCH_FUNCTIONS(X)                                                                         \
  X(aoti_torch_library_init_impl, int32_t, (const char*, const char*, const char*, uint32_t, TorchLibraryOpaque**)) \
  X(torch_library_impl, int32_t, (TorchLibraryOpaque*, const char*, Boxed, uint64_t))                 \
  X(aoti_torch_delete_tensor_object, int32_t, (Handle))                                               \
  X(aoti_torch_get_data_ptr, int32_t, (Handle, void**))                                               \
  X(aoti_torch_get_dim, int32_t, (Handle, int64_t*))                                                  \
  X(aoti_torch_get_sizes, int32_t, (Handle, int64_t**))                                               \
  X(aoti_torch_get_strides, int32_t, (Handle, int64_t**))                                             \
  X(aoti_torch_get_dtype, int32_t, (Handle, int32_t*))                                                \
  X(aoti_torch_get_device_type, int32_t, (Handle, int32_t*))                                          \
  X(aoti_torch_empty_strided, int32_t,                                                                \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))                    \
  X(aoti_torch_device_type_cpu, int32_t, ())                                                          \
  X(aoti_torch_dtype_float32, int32_t, ())                                                            \
  X(aoti_torch_dtype_float64, int32_t, ())                                                            \
  X(aoti_torch_dtype_bfloat16, int32_t, ())                                                           \
  X(aoti_torch_dtype_float16, int32_t, ())                                                            \
  X(aoti_torch_dtype_bool, int32_t, ())                                                               \
  X(aoti_torch_dtype_int64, int32_t, ())                                                              \
  X(torch_parallel_for, int32_t, (int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*)) \
  X(torch_get_num_threads, int32_t, (uint32_t*))

struct Torch {
#define AM_MEMBER(name, result, arguments) result(*name) arguments;
  AM_TORCH_FUNCTIONS(AM_MEMBER)
#undef AM_MEMBER
};

}  // namespace aftermax
