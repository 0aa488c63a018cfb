// The CUDA runtime and the device functions that our sources use, for tests/csrc/cuda_emulator.h.
#pragma once

#include <math.h>

#include "../cuda_emulator.h"

using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }

namespace cuda_emulator {

// The value off by up to `bound` of itself, differently for every value, as an approximate instruction may have it.
inline float approximate(float value, float bound) {
  if (fabsf(value) < 1.17549435e-38f) return copysignf(0.0f, value);  // ftz
  float noise = int32_t(__float_as_uint(value) * 2654435761u) * 0x1p-31f;
  return value * (1.0 + double(bound) * noise);
}

// Error bounds are those of the PTX manual; 2^0 is exact there.
inline float ex2_approx_ftz(float x) { return x == 0.0f ? 1.0f : approximate(exp2f(x), 0x1p-22f); }
inline float rcp_approx_ftz(float x) { return approximate(1.0f / x, 0x1p-23f); }

}  // namespace cuda_emulator

inline uint4 __ldcg(const uint4* place) { return *place; }
inline void __stwb(uint4* place, uint4 value) { *place = value; }

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorInvalidClusterSize };
inline const char* cudaGetErrorString(cudaError_t error) {
  const char* names[] = {"no error", "invalid argument", "invalid configuration argument", "invalid cluster size"};
  return names[error];
}
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const auto& device = cuda_emulator::device;
  const int values[] = {device.capability / 10,        device.capability % 10,
                        device.multiprocessors,        device.shared_bytes_per_block,
                        device.shared_bytes_per_multiprocessor, 1024};
  *value = values[name];
  return cudaSuccess;
}

namespace cuda_emulator {
inline std::map<const void*, int> shared_bytes_asked_for;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const auto& device = cuda_emulator::device;
  attributes->ptxVersion = device.code_capability ? device.code_capability : device.capability;
  return cudaSuccess;
}

enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > cuda_emulator::device.shared_bytes_per_block) return cudaErrorInvalidValue;
  cuda_emulator::shared_bytes_asked_for[kernel] = value;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  int cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  int shared_bytes = int(config->dynamicSmemBytes);
  auto asked_for = cuda_emulator::shared_bytes_asked_for.find(reinterpret_cast<const void*>(kernel));
  int allowed = asked_for == cuda_emulator::shared_bytes_asked_for.end() ? 48 * 1024 : asked_for->second;
  if (shared_bytes > std::max(allowed, 48 * 1024) || shared_bytes > cuda_emulator::device.shared_bytes_per_block)
    return cudaErrorInvalidValue;
  if (blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (cluster > 8 || blocks % cluster || (config->numAttrs && cuda_emulator::device.capability < 90))
    return cudaErrorInvalidClusterSize;
  cuda_emulator::last_launch = {blocks, int(threads), cluster, shared_bytes};
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  cuda_emulator::run_grid(blocks, threads, cluster, shared_bytes, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
