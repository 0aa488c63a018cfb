// Small kernels, sound ones and broken ones, which the emulator must tell apart.
#include "common/block_reduce.cuh"
#include "common/cuda_launch.cuh"
#include "common/device_vectors.cuh"
#include "driver.h"

using namespace megadiff;

namespace {

enum Fault {
  kNone,
  kNoBarrier,
  kDivergence,
  kEarlyExit,
  kShuffleByHalf,
  kOutOfBounds,
  kOutOfShared,
  kMisaligned,
  kNoStart,
  kLateRead
};

// out[i] = number of the thread at the other end of its cluster; 64 threads a block, one float each in shared memory.
__global__ void reverse_kernel(Fault fault, float* out, int team_size) {
  Team team(team_size);
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  int threads = blockDim.x, thread = threadIdx.x;
  if (fault != kNoStart) {
    team.arrive();
    team.wait_for_start();
  }
  float* theirs = shared;
  if (team_size > 1) theirs = cooperative_groups::this_cluster().map_shared_rank(shared, team_size - 1 - team.rank);
  theirs[threads - 1 - thread + (fault == kOutOfShared ? 64 : 0)] = float(team.rank * threads + thread);

  if (fault == kEarlyExit && thread == 7) return;
  if (fault == kDivergence && thread >= 32) __syncthreads();
  if (fault != kNoBarrier) team.sync();
  float value = shared[thread];
  for (int there_and_back = 0; there_and_back < 2; ++there_and_back)
    if (fault != kShuffleByHalf || thread % 2) value = __shfl_xor_sync(kAllLanes, value, 5);
  out += blockIdx.x * threads;
  out[thread + (fault == kOutOfBounds ? 1 : 0)] = value;
  if (fault == kMisaligned) __stwb(reinterpret_cast<uint4*>(out + 1), __ldcg(reinterpret_cast<uint4*>(out)));
  if (fault == kLateRead) out[thread] += theirs[thread] - theirs[thread];  // nothing keeps the other block alive
}

}  // namespace

extern "C" const char* reverse(int64_t fault, float* out, int64_t blocks, int64_t team_size, int64_t shared_bytes) {
  return outcome([&] {
    LaunchShape shape = {blocks, 64, size_t(shared_bytes), int(team_size), int(shared_bytes)};
    launch(reverse_kernel, shape, nullptr, Fault(fault), out, int(team_size));
  });
}
