// The row loss on a CPU as operators: rows are divided over torch's threads, kernels chosen for this processor.
#include <stdlib.h>
#include <string.h>

#include <memory>

#include "nelbo/nelbo_cpu_kernels.h"
#include "nelbo/nelbo_ops.h"

namespace megadiff {
namespace {

// The widest instruction set of this processor; MEGADIFF_CPU_ISA=baseline or avx2 asks for a narrower one.
const NelboKernels& choose_kernels() {
#ifdef __x86_64__
  const char* wish = getenv("MEGADIFF_CPU_ISA");
  auto allowed = [wish](const char* name) { return !wish || strcmp(wish, name) == 0; };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return *nelbo_kernels_avx512();
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return *nelbo_kernels_avx2();
#endif
  return *nelbo_kernels_baseline();
}

const NelboKernels& kernels() {
  static const NelboKernels& chosen = choose_kernels();
  return chosen;
}

template <class Scalar>
const RowKernels<Scalar>& kernels_of();
template <>
const RowKernels<float>& kernels_of() { return kernels().of_float; }
template <>
const RowKernels<BFloat16>& kernels_of() { return kernels().of_bfloat16; }
template <>
const RowKernels<Half>& kernels_of() { return kernels().of_half; }

// A thread's scratch, kept from call to call: a row of floats, which then stays in the core's cache.
float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* pointer) const { free(pointer); }
  };
  thread_local std::unique_ptr<float, Free> scratch;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    void* memory = nullptr;
    STD_TORCH_CHECK(posix_memalign(&memory, 64, floats * sizeof(float)) == 0, "cannot allocate ",
                    floats * sizeof(float), " bytes for a row of logits");
    scratch.reset(static_cast<float*>(memory));
    capacity = floats;
  }
  return scratch.get();
}

// Rows a thread takes at least: enough elements to be worth waking it.
int64_t grain(int64_t columns) { return 1 + 16384 / (columns + 1); }

struct CpuBackend {
  using BFloat16 = megadiff::BFloat16;
  using Half = megadiff::Half;

  explicit CpuBackend(const Tensor&) {}

  template <class Scalar, class Kernel>
  static void for_rows(const Matrix<Scalar>& logits, Kernel kernel) {
    int64_t floats = kernels_of<std::remove_const_t<Scalar>>().scratch_floats(logits.columns);
    torch::stable::parallel_for(0, logits.rows, grain(logits.columns), [&](int64_t begin, int64_t end) {
      kernel(begin, end, thread_scratch(floats));
    });
  }

  template <class Scalar>
  void row_statistics(const Matrix<const Scalar>& logits, const Ids& target, const Ids& noised, const Columns& columns,
                      float* statistics_4T) const {
    for_rows(logits, [&](int64_t begin, int64_t end, float* scratch) {
      kernels_of<Scalar>().statistics(logits, target, noised, columns, statistics_4T, begin, end, scratch);
    });
  }

  template <class Scalar>
  void row_partial_sums(const Matrix<const Scalar>& logits, const float* log_sum_exp, const RowTargets& targets,
                        const Columns& columns, float* sums_2T) const {
    for_rows(logits, [&](int64_t begin, int64_t end, float* scratch) {
      kernels_of<Scalar>().partial_sums(logits, log_sum_exp, targets, columns, sums_2T, begin, end, scratch);
    });
  }

  void row_loss(int64_t rows, const RowSums& sums, const RowTargets& targets, int64_t mask_id, float* terms_3T) const {
    torch::stable::parallel_for(0, rows, grain(0), [&](int64_t begin, int64_t end) {
      kernels().loss(sums, targets, mask_id, rows, terms_3T, begin, end);
    });
  }

  template <class Scalar>
  void row_gradient(const Matrix<const Scalar>& logits, const RowSums& sums, const RowTargets& targets,
                    const Columns& columns, const Matrix<Scalar>& gradient) const {
    for_rows(logits, [&](int64_t begin, int64_t end, float* scratch) {
      kernels_of<Scalar>().gradient(logits, sums, targets, columns, gradient, begin, end, scratch);
    });
  }

  template <class Scalar>
  void whole_row(const Matrix<const Scalar>& logits, const RowTargets& targets, const Columns& columns,
                 float* terms_3T, const Matrix<Scalar>& gradient) const {
    for_rows(logits, [&](int64_t begin, int64_t end, float* scratch) {
      kernels_of<Scalar>().whole(logits, targets, columns, terms_3T, gradient, begin, end, scratch);
    });
  }

  template <class Scalar>
  void scale_rows(const Matrix<Scalar>& matrix, const float* factor) const {
    torch::stable::parallel_for(0, matrix.rows, grain(matrix.columns), [&](int64_t begin, int64_t end) {
      kernels_of<Scalar>().scale(matrix, factor, begin, end);
    });
  }
};

}  // namespace
}  // namespace megadiff

STABLE_TORCH_LIBRARY_IMPL(megadiff, CPU, library) { megadiff::register_nelbo<megadiff::CpuBackend>(library); }

// For `megadiff doctor`.
extern "C" const char* megadiff_cpu_instruction_set() { return megadiff::kernels().instruction_set; }
