// Clusters of blocks, for tests/csrc/cuda_emulator.h.
#pragma once

#include "../cuda_emulator.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return cuda_emulator::machine.running->block->rank; }
  static unsigned num_blocks() { return cuda_emulator::machine.blocks.size(); }
  static void barrier_arrive() {
    cuda_emulator::machine.running->cluster_phase = cuda_emulator::machine.cluster.arrive();
  }
  static void barrier_wait() {
    cuda_emulator::wait(cuda_emulator::machine.cluster, cuda_emulator::machine.running->cluster_phase);
  }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }

  template <class T>
  static T* map_shared_rank(T* mine, int rank) {
    auto& machine = cuda_emulator::machine;
    size_t offset = reinterpret_cast<unsigned char*>(mine) - machine.running->block->shared.data;
    if (offset >= machine.shared_bytes) cuda_emulator::fail("map_shared_rank of an address outside shared memory");
    if (rank < 0 || rank >= int(machine.blocks.size())) cuda_emulator::fail("map_shared_rank beyond the cluster");
    return reinterpret_cast<T*>(machine.blocks[rank].shared.data + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

inline void __cluster_barrier_arrive_relaxed() { cooperative_groups::cluster_group::barrier_arrive(); }
