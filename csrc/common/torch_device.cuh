// Where a CUDA operator runs: the device of its tensors, made current while this lives, and torch's stream on it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_launch.cuh"

namespace megadiff {

struct TorchDevice {
  explicit TorchDevice(const torch::stable::Tensor& tensor) : index(tensor.get_device()), guard(index) {
    // The stable ABI's own Stream::nativeHandle is newer than the oldest torch that is served.
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  int index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace megadiff
