// Noising on a GPU: from clean tokens and log-SNR to noised tokens and the numbers of their rows, in one launch.
//
// Fused is all of it: the eager version is some 250 launches, most of them for the Philox rounds, each with a tensor of
// 64-bit words in memory. Per token, with int64 ids and one log-SNR per sequence: 8 + 1 bytes read, 8 + 4*4 written.
//
// A thread takes a token and computes everything from its log-SNR, also where the whole sequence has the same one:
// about 130 instructions in double, well below the cost of a launch for any micro-batch; sharing them would cost a barrier.
#pragma once

#include "common/cuda_launch.cuh"
#include "noising/noising_math.h"

namespace megadiff {

constexpr int kNoisingThreads = 256;

template <class Id>
__global__ void noise_rows_kernel(NoisingTask<Id> task, int64_t blocks_per_row) {
  int64_t row = blockIdx.x / static_cast<uint32_t>(blocks_per_row);
  int64_t column = (blockIdx.x - row * blocks_per_row) * kNoisingThreads + threadIdx.x;
  if (column >= task.num_tokens) return;
  uint64_t ordinal = element_at(task.ordinal, row, 0);
  PhiloxWords words = random_words(task.seed, ordinal, position_at(task, column), task.purpose);
  noise_token(task, row, column, words.second, words.third, words.fourth, level_at(task, row, column));
}

template <class Id>
void noise_rows_on_gpu(const NoisingTask<Id>& task, cudaStream_t stream) {
  int64_t blocks_per_row = (task.num_tokens + kNoisingThreads - 1) / kNoisingThreads;
  launch(noise_rows_kernel<Id>, {task.batch_size * blocks_per_row, kNoisingThreads}, stream, task, blocks_per_row);
}

}  // namespace megadiff
