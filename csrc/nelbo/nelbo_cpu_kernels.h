// The CPU kernels of the row loss as a table of functions, one table per instruction set.
#pragma once

#include "common/elements.h"
#include "common/views.h"

namespace megadiff {

// Kernels over the rows [begin, end) of matrices of one element type; `scratch` holds `scratch_floats` floats.
template <class Scalar>
struct RowKernels {
  int64_t (*scratch_floats)(int64_t columns);
  void (*statistics)(const Matrix<const Scalar>& logits, const Ids& target, const Ids& noised, const Columns& columns,
                     float* statistics_4T, int64_t begin, int64_t end, float* scratch);
  void (*partial_sums)(const Matrix<const Scalar>& logits, const float* log_sum_exp, const RowTargets& targets,
                       const Columns& columns, float* sums_2T, int64_t begin, int64_t end, float* scratch);
  void (*gradient)(const Matrix<const Scalar>& logits, const RowSums& sums, const RowTargets& targets,
                   const Columns& columns, const Matrix<Scalar>& gradient, int64_t begin, int64_t end, float* scratch);
  void (*whole)(const Matrix<const Scalar>& logits, const RowTargets& targets, const Columns& columns, float* terms_3T,
                const Matrix<Scalar>& gradient, int64_t begin, int64_t end, float* scratch);
  void (*scale)(const Matrix<Scalar>& matrix, const float* factor, int64_t begin, int64_t end);
};

struct NelboKernels {
  const char* instruction_set;
  RowKernels<float> of_float;
  RowKernels<BFloat16> of_bfloat16;
  RowKernels<Half> of_half;
  // Value of rows from their sums: numbers per row only, of no element type.
  void (*loss)(const RowSums& sums, const RowTargets& targets, int64_t mask_id, int64_t rows, float* terms_3T,
               int64_t begin, int64_t end);
};

const NelboKernels* nelbo_kernels_baseline();
#ifdef __x86_64__
const NelboKernels* nelbo_kernels_avx2();
const NelboKernels* nelbo_kernels_avx512();
#endif

}  // namespace megadiff
