// Launching kernels: one way, that checks every error, and what there is to know about the device.
//
//     const DeviceLimits& limits = device_limits(device);                        // queried once per device
//     launch(my_kernel, {num_blocks, 256}, stream, arguments...);
//     launch(my_kernel, {num_blocks, 256, shared_bytes, 4}, stream, arguments...);  // clusters of 4 blocks
//
// After the first launch of a kernel, which loads it, nothing here waits for the device or allocates on it: launches may
// be captured in a CUDA graph.
//
// Kernels take their shared memory from dynamic_shared() alone: the tests run these sources on a CPU
// (tests/csrc/cuda_emulator.h), where a block's shared memory is a buffer of its own and not a static variable.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <mutex>
#include <utility>

namespace megadiff {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA failed to ", what, ": ", cudaGetErrorString(error));
}

// Asks nothing of a device: its attributes are those of the code that was compiled.
static __global__ void probe_kernel() {}

struct DeviceLimits {
  int capability;  // 90 for 9.0; of the device, or of the code that it compiles for itself where that is older
  int multiprocessors;
  int shared_bytes_per_block;
  int shared_bytes_per_multiprocessor;
  int reserved_bytes_per_block;  // of shared memory, taken by the system from each block
};

inline DeviceLimits query_device_limits(int device) {
  cudaFuncAttributes code;
  check_cuda(cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(probe_kernel)), "find code for this device");
  auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "read a device attribute");
    return value;
  };
  int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return {capability < code.ptxVersion ? capability : code.ptxVersion,
          attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
}

// Of the current device, whose index is `device`.
inline const DeviceLimits& device_limits(int device) {
  constexpr int kMostDevices = 128;
  static std::once_flag queried[kMostDevices];
  static DeviceLimits limits[kMostDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "CUDA device index must be in [0, ", kMostDevices, "), got ",
                  device);
  std::call_once(queried[device], [device] { limits[device] = query_device_limits(device); });
  return limits[device];
}

struct LaunchShape {
  int64_t blocks;  // a multiple of cluster
  int threads;     // per block
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks that run together and read each other's shared memory; more than 1 from sm_90 on
  // What any launch of the kernel may ask for: a constant, as threads that set different limits would race.
  int most_shared_bytes = 48 * 1024;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream, Arguments&&... arguments) {
  STD_TORCH_CHECK(shape.blocks <= INT_MAX, "one launch takes at most ", INT_MAX, " blocks, got ", shape.blocks,
                  ": split the rows");
  if (shape.blocks == 0) return;
  if (shape.most_shared_bytes > 48 * 1024) {
    const void* function = reinterpret_cast<const void*>(kernel);
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.most_shared_bytes),
               "raise a kernel's shared memory");
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "prefer shared memory to cache");
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch a kernel");
}

#ifdef MEGADIFF_CUDA_EMULATOR
inline unsigned char* dynamic_shared() { return cuda_emulator::dynamic_shared(); }
#elif defined(__CUDACC__)
// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#endif

}  // namespace megadiff
