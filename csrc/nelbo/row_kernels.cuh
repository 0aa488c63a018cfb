// Kernels of the row loss and their launches; no torch tensors in here, see nelbo_cuda.cu.
//
// Fused: softmax, log-sum-exp, both divergences and their gradient. Never materialised in device memory: probabilities,
// the marginals q(.|x) and q(.|x_theta), anything of the vocabulary's width but the logits and their gradient.
//
// whole_row, one launch, for a rank that holds all columns. A row belongs to a cluster of 1, 2, 4 or 8 blocks that keep
// its fp32 numerators in shared memory (36 bytes for 8 columns), so memory sees each logit once and its gradient once:
// with bfloat16 2 + 2 bytes per element, 0 + 2 for rows of zero weight. Three blocks to a multiprocessor where they fit
// (V = 131 072: clusters of 8 blocks, 16 384 columns and 73 KB each), so that some read or write while others compute.
// The special-function unit gives 16 results a clock and multiprocessor, and would be the limit at some four per
// element; with bfloat16 the operations per element are
//
//     numerators   1 + 1/8   exp2 of each, and of the distance between two references
//     sums         1/8       exp2 of a reference; a reciprocal only now and then    rows with uniform mass
//     gradient     1 + 1/8   reciprocal of each, exp2 of a reference                rows with uniform mass; else 1/8
//
// so 2.4, and 1.25 for rows without uniform mass. log1p is a polynomial of some 25 instructions, which all odds of a
// thread share unless their product overflows (OddsSums). In all an element takes about 27 instructions, 15 without
// uniform mass, of the 35 that a multiprocessor can issue while 4 bytes pass through memory (H100).
//
// Rows that fit no cluster (before sm_90 those over some 36 000 columns) go through the same phases, but compute their
// numerators anew from the logits, 3 reads and 3 exp2 instead of one. One block of 640 threads to a multiprocessor
// then: of 16-bit rows so few are under way that most of the second and third read comes from the L2 cache.
//
// The others cut the work where tensor parallelism communicates: row_statistics (1 read), row_partial_sums (1 read,
// only rows with uniform mass), row_loss (T numbers), row_gradient (1 read, 1 write). scale_rows does not touch rows
// whose factor is 1. Nothing waits for the device or allocates, and results are equal to the bit from run to run.
#pragma once

#include <algorithm>

#include "common/cuda_launch.cuh"
#include "nelbo/row_phases.cuh"

namespace megadiff {

// A thread may have 65 536/768 -> 80 registers, so that a multiprocessor runs 3 blocks of 256 threads or 1 of 768; those
// that read their row anew need a few more.
constexpr int kMostRowThreads = 768;
constexpr int kMostRereadingThreads = 640;
constexpr int kMostSplitThreads = 256;
constexpr int kSliceGranularity = 64;  // slices begin on full lines of memory where their row does

struct WholeRowScratch {
  ReduceScratch statistics;
  ReduceScratch odds;
  float everywhere;
  float total;
  float2 unused;  // keeps the numerators behind it 16-byte aligned
};
static_assert(sizeof(WholeRowScratch) % 16 == 0, "numerators follow and are read as float4");

template <class Scalar, bool kKeeps>
__global__ void __launch_bounds__(kKeeps ? kMostRowThreads : kMostRereadingThreads, 1)
    whole_row_kernel(Matrix<const Scalar> logits, RowTargets targets, Columns columns, float* terms_3T,
                     Matrix<Scalar> gradient, int team_size, int slice_size, int num_chunks) {
  WholeRowScratch& scratch = *reinterpret_cast<WholeRowScratch*>(dynamic_shared());
  Team team(team_size);
  int64_t t = blockIdx.x / team_size;
  const Scalar* logits_row = logits.data + t * logits.stride;
  Scalar* gradient_row = gradient.data + t * gradient.stride;
  Slice slice = slice_of(logits_row, logits.columns, columns, team.rank * slice_size, slice_size);
  Gradient<Scalar> gradient_slice(gradient_row, slice);
  RowTask task = row_task(targets, columns, t);
  bool is_first = threadIdx.x == 0;

  if (!is_active(task.row)) {
    if (is_first && team.rank == 0) write_terms(RowTerms{}, logits.rows, t, terms_3T);
    if (gradient.data) gradient_slice.fill_with_zeros();
    return;
  }

  team.arrive();
  // The gradient may overwrite the logits: these two are read before the first barrier, all writing comes after it.
  // They are not looked at before the numerators are made, so that nothing waits for them.
  Scalar raw_target = Scalar(-INFINITY), raw_noised = Scalar(-INFINITY);
  if (is_first && task.target_column >= 0) raw_target = logits_row[task.target_column];
  if (is_first && task.noised_column >= 0) raw_noised = logits_row[task.noised_column];

  Logits<Scalar> read(logits_row, slice);
  float4* numerators = reinterpret_cast<float4*>(&scratch + 1);
  Kept<Scalar> kept = {numerators, reinterpret_cast<float*>(numerators + 2 * num_chunks * blockDim.x), slice};
  Pair statistics = gather_statistics(read, [&](int chunk, const float (&values)[kChunk], float reference) {
    if constexpr (kKeeps) kept.keep(chunk, values, reference);
  });
  float target_logit = to_float(raw_target), noised_logit = to_float(raw_noised);
  team.wait_for_start();
  statistics = reduce_over(team, statistics, JoinStatistics{}, scratch.statistics);
  Normalizer normalizer = normalizer_of_statistics(statistics);

  const auto& source = [&]() -> const auto& {
    if constexpr (kKeeps) return kept;
    else return read;
  }();
  float ratio = signal_to_mass(task.row);
  Pair odds = {0.0f, 0.0f};
  if (has_mass(task.row)) {
    odds = gather_odds(source, normalizer, ratio);
    odds = reduce_over(team, odds, AddPairs{}, scratch.odds);
  }

  RowTerms terms = {};
  float target_prob = 0.0f, noised_prob = 0.0f;
  auto terms_of_row = [&] {
    return row_terms(task.row, log_prob_of(target_logit, statistics), target_prob, noised_prob, odds.first,
                     odds.second);
  };
  // Called again for the losses, whose logarithms the gradient, and so the whole block, would wait for.
  auto write_losses = [&] {
    if (is_first && team.rank == 0) write_terms(terms_of_row(), logits.rows, t, terms_3T);
  };
  if (is_first) {
    target_prob = prob_of(target_logit, statistics);
    noised_prob = prob_of(noised_logit, statistics);
    terms = terms_of_row();
    scratch.everywhere = terms.everywhere;
    scratch.total = terms.total;
  }
  if (!gradient.data) return write_losses();
  __syncthreads();
  write_gradient(source, normalizer, ratio, scratch.everywhere, scratch.total, gradient_slice);
  write_losses();
  __syncthreads();
  if (is_first) write_target_and_noised(task, terms, target_prob, noised_prob, slice, gradient_row);
}

template <class Scalar>
__global__ void __launch_bounds__(kMostSplitThreads, 4)
    row_statistics_kernel(Matrix<const Scalar> logits, Ids target, Ids noised, Columns columns, float* statistics_4T) {
  ReduceScratch& scratch = *reinterpret_cast<ReduceScratch*>(dynamic_shared());
  int64_t t = blockIdx.x;
  const Scalar* logits_row = logits.data + t * logits.stride;
  Slice slice = slice_of(logits_row, logits.columns, columns, 0, INT_MAX);
  Pair statistics = gather_statistics(Logits<Scalar>(logits_row, slice), [](int, const float (&)[kChunk], float) {});
  statistics = reduce_over(Team(1), statistics, JoinStatistics{}, scratch);
  if (threadIdx.x > 0) return;

  float maximum = statistics.first;
  float sum = statistics.second * fast_exp2(-reference_remainder(statistics));
  int64_t target_column = column_of(columns, id_at(target, t)), noised_column = column_of(columns, id_at(noised, t));
  statistics_4T[t] = maximum == kLeastLogit ? -INFINITY : maximum;
  statistics_4T[logits.rows + t] = sum;
  statistics_4T[2 * logits.rows + t] = target_column < 0 ? -INFINITY : to_float(logits_row[target_column]);
  statistics_4T[3 * logits.rows + t] = noised_column < 0 ? -INFINITY : to_float(logits_row[noised_column]);
}

template <class Scalar>
__global__ void __launch_bounds__(kMostSplitThreads, 4)
    row_partial_sums_kernel(Matrix<const Scalar> logits, const float* log_sum_exp, RowTargets targets, Columns columns,
                            float* sums_2T) {
  ReduceScratch& scratch = *reinterpret_cast<ReduceScratch*>(dynamic_shared());
  int64_t t = blockIdx.x;
  Row row = row_task(targets, columns, t).row;
  Pair odds = {0.0f, 0.0f};
  if (is_active(row) && has_mass(row)) {
    const Scalar* logits_row = logits.data + t * logits.stride;
    Slice slice = slice_of(logits_row, logits.columns, columns, 0, INT_MAX);
    odds = gather_odds(Logits<Scalar>(logits_row, slice), normalizer_of_log_sum_exp(log_sum_exp[t]),
                       signal_to_mass(row));
    odds = reduce_over(Team(1), odds, AddPairs{}, scratch);
  }
  if (threadIdx.x > 0) return;
  sums_2T[t] = odds.first;
  sums_2T[logits.rows + t] = odds.second;
}

static __global__ void __launch_bounds__(kMostSplitThreads, 4)
    row_loss_kernel(int64_t num_rows, RowSums sums, RowTargets targets, Columns columns, float* terms_3T) {
  int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < num_rows) write_terms(terms_of_sums(row_task(targets, columns, t).row, sums, t), num_rows, t, terms_3T);
}

template <class Scalar>
__global__ void __launch_bounds__(kMostSplitThreads, 3)
    row_gradient_kernel(Matrix<const Scalar> logits, RowSums sums, RowTargets targets, Columns columns,
                        Matrix<Scalar> gradient) {
  struct Coefficients {
    float everywhere;
    float total;
  };
  Coefficients& shared = *reinterpret_cast<Coefficients*>(dynamic_shared());
  int64_t t = blockIdx.x;
  const Scalar* logits_row = logits.data + t * logits.stride;
  Scalar* gradient_row = gradient.data + t * gradient.stride;
  Slice slice = slice_of(logits_row, logits.columns, columns, 0, INT_MAX);
  Gradient<Scalar> gradient_slice(gradient_row, slice);
  RowTask task = row_task(targets, columns, t);
  if (!is_active(task.row)) return gradient_slice.fill_with_zeros();

  RowTerms terms = {};
  if (threadIdx.x == 0) {
    terms = terms_of_sums(task.row, sums, t);
    shared = {terms.everywhere, terms.total};
  }
  __syncthreads();
  Normalizer normalizer = normalizer_of_log_sum_exp(sums.log_sum_exp[t]);
  write_gradient(Logits<Scalar>(logits_row, slice), normalizer, signal_to_mass(task.row), shared.everywhere,
                 shared.total, gradient_slice);
  __syncthreads();
  if (threadIdx.x == 0)
    write_target_and_noised(task, terms, expf(sums.target_logit[t] - sums.log_sum_exp[t]),
                            expf(sums.noised_logit[t] - sums.log_sum_exp[t]), slice, gradient_row);
}

template <class Scalar>
__global__ void __launch_bounds__(kMostSplitThreads, 4) scale_rows_kernel(Matrix<Scalar> matrix, const float* factor) {
  int64_t t = blockIdx.x;
  float scale = factor[t];
  if (scale == 1.0f) return;
  Scalar* row = matrix.data + t * matrix.stride;
  Slice slice = slice_of(row, matrix.columns, {0, matrix.columns, -1, -1}, 0, INT_MAX);
  Gradient<Scalar> scaled(row, slice);
  Logits<Scalar>(row, slice).for_each_chunk([&](int chunk, float (&values)[kChunk]) {
#pragma unroll
    for (float& value : values) value *= scale;
    scaled.store(chunk, values);
  });
}

// How whole_row divides a row over blocks.
struct WholeRowShape {
  bool keeps;  // numerators fit in shared memory
  int team_size;
  int slice_size;
  int num_chunks;  // per thread
  int threads;
  size_t shared_bytes;
};

inline int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }
inline int round_up(int64_t a, int64_t b) { return divide_up(a, b) * int(b); }

inline WholeRowShape whole_row_shape(const DeviceLimits& limits, int64_t num_places) {
  for (int blocks_per_multiprocessor : {3, 2, 1}) {
    int share = limits.shared_bytes_per_multiprocessor / blocks_per_multiprocessor - limits.reserved_bytes_per_block;
    int most_bytes = std::min(limits.shared_bytes_per_block, share);
    for (int team_size = 1; team_size <= (limits.capability >= 90 ? kMostTeamBlocks : 1); team_size *= 2) {
      int slice_size = round_up(divide_up(num_places, team_size), kSliceGranularity);
      int num_chunks = divide_up(slice_size, kChunk * (kMostRowThreads / blocks_per_multiprocessor));
      int threads = round_up(divide_up(slice_size, kChunk * num_chunks), kWarp);
      size_t bytes_per_chunk = (kChunk + 1) * sizeof(float);
      size_t shared_bytes = sizeof(WholeRowScratch) + bytes_per_chunk * num_chunks * threads;
      if (shared_bytes <= size_t(most_bytes)) return {true, team_size, slice_size, num_chunks, threads, shared_bytes};
    }
  }
  return {false, 1, round_up(num_places, kSliceGranularity), 0, kMostRereadingThreads, sizeof(WholeRowScratch)};
}

// Launches on one device and stream: the operations of a Backend (nelbo_ops.h) but for torch.
struct RowKernels {
  const DeviceLimits& limits;
  cudaStream_t stream;

  template <class Scalar>
  void row_statistics(const Matrix<const Scalar>& logits, const Ids& target, const Ids& noised, const Columns& columns,
                      float* statistics_4T) const {
    launch(row_statistics_kernel<Scalar>, row_shape(logits, sizeof(ReduceScratch)), stream, logits, target, noised,
           columns, statistics_4T);
  }

  template <class Scalar>
  void row_partial_sums(const Matrix<const Scalar>& logits, const float* log_sum_exp, const RowTargets& targets,
                        const Columns& columns, float* sums_2T) const {
    launch(row_partial_sums_kernel<Scalar>, row_shape(logits, sizeof(ReduceScratch)), stream, logits, log_sum_exp,
           targets, columns, sums_2T);
  }

  void row_loss(int64_t num_rows, const RowSums& sums, const RowTargets& targets, int64_t mask_id,
                float* terms_3T) const {
    LaunchShape shape = {(num_rows + kMostSplitThreads - 1) / kMostSplitThreads, kMostSplitThreads};
    launch(row_loss_kernel, shape, stream, num_rows, sums, targets, Columns{0, 0, -1, mask_id}, terms_3T);
  }

  template <class Scalar>
  void row_gradient(const Matrix<const Scalar>& logits, const RowSums& sums, const RowTargets& targets,
                    const Columns& columns, const Matrix<Scalar>& gradient) const {
    launch(row_gradient_kernel<Scalar>, row_shape(logits, 2 * sizeof(float)), stream, logits, sums, targets, columns,
           gradient);
  }

  template <class Scalar>
  void whole_row(const Matrix<const Scalar>& logits, const RowTargets& targets, const Columns& columns,
                 float* terms_3T, const Matrix<Scalar>& gradient) const {
    check_width(logits);
    bool is_aligned = (reinterpret_cast<uintptr_t>(logits.data) | (logits.stride * sizeof(Scalar))) % 16 == 0;
    WholeRowShape shape = whole_row_shape(limits, logits.columns + (is_aligned ? 0 : kPack<Scalar> - 1));
    launch(shape.keeps ? whole_row_kernel<Scalar, true> : whole_row_kernel<Scalar, false>,
           {logits.rows * shape.team_size, shape.threads, shape.shared_bytes, shape.team_size,
            limits.shared_bytes_per_block},
           stream, logits, targets, columns, terms_3T, gradient, shape.team_size, shape.slice_size, shape.num_chunks);
  }

  template <class Scalar>
  void scale_rows(const Matrix<Scalar>& matrix, const float* factor) const {
    launch(scale_rows_kernel<Scalar>, row_shape(matrix, 0), stream, matrix, factor);
  }

 private:
  // One block per row.
  template <class Scalar>
  static LaunchShape row_shape(const Matrix<Scalar>& matrix, size_t shared_bytes) {
    check_width(matrix);
    int threads = std::clamp(round_up(divide_up(matrix.columns, kChunk), kWarp), kWarp, kMostSplitThreads);
    return {matrix.rows, threads, shared_bytes};
  }

  // Columns of one row are counted in 32 bits, elements of the matrix in 64.
  template <class Scalar>
  static void check_width(const Matrix<Scalar>& matrix) {
    STD_TORCH_CHECK(matrix.columns <= INT_MAX / 2, "rows may have at most ", INT_MAX / 2, " columns, got ",
                    matrix.columns);
  }
};

}  // namespace megadiff
