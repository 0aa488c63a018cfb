// The noising operator for CUDA tensors: current device and stream of torch, the kernel of noising_kernel.cuh.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "noising/noising_kernel.cuh"
#include "noising/noising_ops.h"

namespace megadiff {
namespace {

struct CudaBackend {
  explicit CudaBackend(const Tensor& tokens) : guard(tokens.get_device()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tokens.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <class Id>
  void noise_rows(const NoisingTask<Id>& task) const {
    noise_rows_on_gpu(task, stream);
  }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace
}  // namespace megadiff

STABLE_TORCH_LIBRARY_IMPL(megadiff, CUDA, library) { megadiff::register_noising<megadiff::CudaBackend>(library); }
