// The row-loss operators for CUDA tensors: device and stream of torch, kernels of row_kernels.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/torch_device.cuh"
#include "nelbo/nelbo_ops.h"
#include "nelbo/row_kernels.cuh"

namespace megadiff {
namespace {

struct CudaBackend : TorchDevice, RowKernels {
  using BFloat16 = __nv_bfloat16;
  using Half = __half;

  explicit CudaBackend(const Tensor& logits)
      : TorchDevice(logits), RowKernels{device_limits(index), TorchDevice::stream} {}
};

}  // namespace
}  // namespace megadiff

STABLE_TORCH_LIBRARY_IMPL(megadiff, CUDA, library) { megadiff::register_nelbo<megadiff::CudaBackend>(library); }

// As megadiff_cpu_sources.
extern "C" const char* megadiff_cuda_sources() { return MD_TEXT(MEGADIFF_SOURCES); }

// Why the current device cannot run these kernels, empty where it can: no code for it, or too old a driver.
extern "C" const char* megadiff_cuda_obstacle() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(megadiff::probe_kernel));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
