// The row-loss operators for CUDA tensors: current device and stream of torch, kernels of row_kernels.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "nelbo/nelbo_ops.h"
#include "nelbo/row_kernels.cuh"

namespace megadiff {

inline cudaStream_t current_stream(int device) {
  // The stable ABI's own Stream::nativeHandle is newer than the oldest torch that is served.
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct CudaBackend : RowKernels {
  using BFloat16 = __nv_bfloat16;
  using Half = __half;

  explicit CudaBackend(const Tensor& logits)
      : RowKernels{device_limits(logits.get_device()), current_stream(logits.get_device())},
        guard(logits.get_device()) {}

  torch::stable::accelerator::DeviceGuard guard;
};

}  // namespace megadiff

STABLE_TORCH_LIBRARY_IMPL(megadiff, CUDA, library) { megadiff::register_nelbo<megadiff::CudaBackend>(library); }

// As megadiff_cpu_sources.
extern "C" const char* megadiff_cuda_sources() { return MD_TEXT(MEGADIFF_SOURCES); }
