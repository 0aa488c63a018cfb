// The noising operator for CUDA tensors: device and stream of torch, the kernel of noising_kernel.cuh.
#include "common/torch_device.cuh"
#include "noising/noising_kernel.cuh"
#include "noising/noising_ops.h"

namespace megadiff {
namespace {

struct CudaBackend : TorchDevice {
  using TorchDevice::TorchDevice;

  template <class Id>
  void noise_rows(const NoisingTask<Id>& task) const {
    noise_rows_on_gpu(task, stream);
  }
};

}  // namespace
}  // namespace megadiff

STABLE_TORCH_LIBRARY_IMPL(megadiff, CUDA, library) { megadiff::register_noising<megadiff::CudaBackend>(library); }
