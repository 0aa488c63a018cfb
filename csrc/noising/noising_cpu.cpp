// Noising on a CPU: from clean tokens and log-SNR to noised tokens and the numbers of their rows, in one pass.
//
// Nothing in between reaches memory: the words, thresholds and weights live in registers and a block of the cache. Per
// token, with int64 ids and one log-SNR per sequence: 8 + 1 bytes read, 8 + 4*4 written, 33 in all.
//
// What follows from the log-SNR alone is computed once per sequence where there is one log-SNR per sequence, so the
// cost of a token is that of its ten Philox rounds. These go over a block of positions at a time, in a loop of integer
// arithmetic that the compiler turns into vector code.
#include <algorithm>

#include "noising/noising_ops.h"

// Versions for newer instruction sets, of which the loader takes the best; without them the same code, slower.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define MD_VERSIONS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MD_VERSIONS
#endif

namespace megadiff {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kLeastTokensPerThread = 4096;

// `size` tokens of one sequence, at most kBlock.
template <class Id>
MD_FN void noise_block(const NoisingTask<Id>& task, int64_t row, int64_t begin, int64_t size, Level level) {
  uint32_t position[kBlock], keep[kBlock], kind[kBlock], id[kBlock];
  uint64_t seed = task.seed, ordinal = element_at(task.ordinal, row, 0);
  uint32_t purpose = task.purpose;
  for (int64_t i = 0; i < size; ++i) position[i] = position_at(task, begin + i);
  for (int64_t i = 0; i < size; ++i) {
    PhiloxWords words = random_words(seed, ordinal, position[i], purpose);
    keep[i] = words.second;
    kind[i] = words.third;
    id[i] = words.fourth;
  }
  bool level_per_token = task.log_snr.column_stride != 0 || task.log_snr_pdf.column_stride != 0;
  for (int64_t i = 0; i < size; ++i) {
    if (level_per_token) level = level_at(task, row, begin + i);
    noise_token(task, row, begin + i, keep[i], kind[i], id[i], level);
  }
}

// Tokens [begin, end) of all, counted row by row.
template <class Id>
MD_VERSIONS void noise_range(const NoisingTask<Id>& task, int64_t begin, int64_t end) {
  while (begin < end) {
    int64_t row = begin / task.num_tokens, column = begin % task.num_tokens;
    int64_t row_end = std::min(column + end - begin, task.num_tokens);
    begin += row_end - column;
    Level level = level_at(task, row, column);
    for (; column < row_end; column += kBlock)
      noise_block(task, row, column, std::min(kBlock, row_end - column), level);
  }
}

struct CpuBackend {
  explicit CpuBackend(const Tensor&) {}

  template <class Id>
  void noise_rows(const NoisingTask<Id>& task) const {
    torch::stable::parallel_for(0, task.batch_size * task.num_tokens, kLeastTokensPerThread,
                                [&](int64_t begin, int64_t end) { noise_range(task, begin, end); });
  }
};

}  // namespace
}  // namespace megadiff

STABLE_TORCH_LIBRARY_IMPL(megadiff, CPU, library) { megadiff::register_noising<megadiff::CpuBackend>(library); }
