// The launches of csrc/nelbo/row_kernels.cuh with a C interface, for the emulator.
#include "driver.h"
#include "nelbo/row_kernels.cuh"

using namespace megadiff;

namespace {

// Calls function(kernels, Scalar{}) for element type 0 float, 1 bfloat16, 2 half.
template <class Function>
const char* run(int dtype, Function function) {
  return outcome([&] {
    DeviceLimits limits = query_device_limits(0);
    RowKernels kernels = {limits, nullptr};
    if (dtype == 0) function(kernels, float{});
    if (dtype == 1) function(kernels, __nv_bfloat16{});
    if (dtype == 2) function(kernels, __half{});
  });
}

template <class Scalar>
Matrix<Scalar> typed(const Matrix<void>& matrix) {
  return {static_cast<Scalar*>(matrix.data), matrix.rows, matrix.columns, matrix.stride};
}

}  // namespace

extern "C" {

const char* row_statistics(int dtype, Matrix<void>* logits, Ids* target, Ids* noised, int64_t vocab_start,
                           int64_t vocab_size, int64_t mask_id, float* statistics_4T) {
  return run(dtype, [&](const RowKernels& kernels, auto scalar) {
    kernels.row_statistics(typed<const decltype(scalar)>(*logits), *target, *noised,
                           local_columns(logits->columns, vocab_start, vocab_size, mask_id), statistics_4T);
  });
}

const char* row_partial_sums(int dtype, Matrix<void>* logits, float* log_sum_exp, RowTargets* targets,
                             int64_t vocab_start, int64_t vocab_size, int64_t mask_id, float* sums_2T) {
  return run(dtype, [&](const RowKernels& kernels, auto scalar) {
    kernels.row_partial_sums(typed<const decltype(scalar)>(*logits), log_sum_exp, *targets,
                             local_columns(logits->columns, vocab_start, vocab_size, mask_id), sums_2T);
  });
}

const char* row_loss(int64_t num_rows, RowSums* sums, RowTargets* targets, int64_t mask_id, float* terms_3T) {
  return run(0, [&](const RowKernels& kernels, auto) {
    kernels.row_loss(num_rows, *sums, *targets, mask_id, terms_3T);
  });
}

const char* row_gradient(int dtype, Matrix<void>* logits, RowSums* sums, RowTargets* targets, int64_t vocab_start,
                         int64_t vocab_size, int64_t mask_id, Matrix<void>* gradient) {
  return run(dtype, [&](const RowKernels& kernels, auto scalar) {
    kernels.row_gradient(typed<const decltype(scalar)>(*logits), *sums, *targets,
                         local_columns(logits->columns, vocab_start, vocab_size, mask_id),
                         typed<decltype(scalar)>(*gradient));
  });
}

const char* whole_row(int dtype, Matrix<void>* logits, RowTargets* targets, int64_t vocab_size, int64_t mask_id,
                      float* terms_3T, Matrix<void>* gradient) {
  return run(dtype, [&](const RowKernels& kernels, auto scalar) {
    kernels.whole_row(typed<const decltype(scalar)>(*logits), *targets,
                      local_columns(logits->columns, 0, vocab_size, mask_id), terms_3T,
                      typed<decltype(scalar)>(*gradient));
  });
}

const char* scale_rows(int dtype, Matrix<void>* matrix, float* factor) {
  return run(dtype, [&](const RowKernels& kernels, auto scalar) {
    kernels.scale_rows(typed<decltype(scalar)>(*matrix), factor);
  });
}
}
