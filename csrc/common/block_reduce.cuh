// Reductions over the threads of a block and over the blocks of a cluster, in a fixed order: equal bits every time.
//
//     Pair total = reduce_over(team, my_pair, Join{}, scratch);     // every thread of the team gets it
//
// A Join has identity() and joins two pairs, commutative to the bit. Each reduction has a scratch of its own in shared
// memory. Where a team has several blocks, each pushes its part into the shared memory of all the others before the one
// barrier: after it every block reads only its own, and may exit without waiting. Pushing asks that the others have
// started, so a kernel calls team.arrive() when it begins and team.wait_for_start() before its first reduction.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "common/portable.h"

namespace megadiff {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;
constexpr int kMostTeamBlocks = 8;  // what every whole device with clusters can run, if not its smallest partitions
constexpr unsigned kAllLanes = 0xffffffffu;

struct Pair {
  float first;
  float second;
};

struct AddPairs {
  static __device__ Pair identity() { return {0.0f, 0.0f}; }
  __device__ Pair operator()(const Pair& a, const Pair& b) const { return {a.first + b.first, a.second + b.second}; }
};

struct ReduceScratch {
  Pair warps[kMostWarps];
  Pair blocks[kMostTeamBlocks];
};

// The blocks that share a row: a cluster, or one block, as on devices without clusters.
class Team {
 public:
  __device__ explicit Team(int num_blocks) : size(num_blocks), rank(0) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size > 1) rank = cooperative_groups::this_cluster().block_rank();
#else
    if (size > 1) __trap();  // DeviceLimits::capability keeps this from happening
#endif
  }

  __device__ void arrive() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size > 1) __cluster_barrier_arrive_relaxed();  // nothing is handed over, so nothing has to be flushed
#endif
  }

  __device__ void wait_for_start() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  // Lane r of the calling warp gives `mine` to block r, which finds it at slots[rank of this block].
  __device__ void push(const Pair& mine, Pair* slots) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    int lane = threadIdx.x % kWarp;
    if (lane < size) cooperative_groups::this_cluster().map_shared_rank(slots, lane)[rank] = mine;
#endif
  }

  __device__ void sync() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }

  int size;
  int rank;
};

// Joins the values of `width` neighbouring lanes, a power of two; each of them gets the result.
template <class Join>
__device__ __forceinline__ Pair reduce_over_lanes(Pair value, int width, Join join) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    float first = __shfl_xor_sync(kAllLanes, value.first, distance);
    float second = __shfl_xor_sync(kAllLanes, value.second, distance);
    value = join(value, Pair{first, second});
  }
  return value;
}

template <class Join>
__device__ __forceinline__ Pair reduce_over(const Team& team, Pair value, Join join, ReduceScratch& scratch) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  value = reduce_over_lanes(value, kWarp, join);
  if (lane == 0) scratch.warps[warp] = value;
  __syncthreads();
  if (team.size == 1 || warp == 0)
    value = reduce_over_lanes(lane < num_warps ? scratch.warps[lane] : Join::identity(), kWarp, join);
  if (team.size == 1) return value;
  if (warp == 0) team.push(value, scratch.blocks);
  team.sync();
  return reduce_over_lanes(scratch.blocks[lane % team.size], team.size, join);
}

}  // namespace megadiff
