// The CUDA half of torch's C shim is missing from a CPU build of torch. Weak references let one
// binary load under both; the CUDA kernels are only ever reached through a CUDA tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
}
