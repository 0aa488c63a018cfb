// The row-loss operators over a back end: checks, outputs, choice of the element type. Both libraries instantiate it.
//
// A Backend is constructed from the logits (a GPU's takes their device and stream) and has BFloat16, Half and, for a
// Scalar of float or those two,
//
//     row_statistics(logits, target, noised, columns, float* statistics_4T)
//     row_partial_sums(logits, log_sum_exp, targets, columns, float* sums_2T)
//     row_loss(num_rows, sums, targets, mask_id, float* terms_3T)
//     row_gradient(logits, sums, targets, columns, gradient)               gradient may be the logits themselves
//     whole_row(logits, targets, columns, float* terms_3T, gradient)       likewise; gradient.data null: value only
//     scale_rows(matrix, const float* factor)
#pragma once

#include <tuple>

#include "common/tensors.h"

namespace megadiff {

// Calls function(Scalar{}) with the element type of the logits.
template <class Backend, class Function>
void with_scalar(const Tensor& logits, Function function) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(typename Backend::BFloat16{});
    case ScalarType::Half: return function(typename Backend::Half{});
    default:
      STD_TORCH_CHECK(false, "native operators take float32, bfloat16 and float16, got ", logits.scalar_type(),
                      ": convert, or call the eager twins (megadiff.ops.eager)");
  }
}

template <class Backend>
Tensor row_statistics(const Tensor& logits, const Tensor& target, const Tensor& noised, int64_t vocab_start,
                      int64_t vocab_size, int64_t mask_id) {
  check_matrix(logits, "logits");
  int64_t rows = logits.size(0);
  Ids targets = id_vector(target, "target", rows, logits), noised_ids = id_vector(noised, "noised", rows, logits);
  Columns columns = local_columns(logits.size(1), vocab_start, vocab_size, mask_id);
  Tensor statistics = new_floats(logits, {4, rows});
  if (rows == 0) return statistics;
  with_scalar<Backend>(logits, [&](auto scalar) {
    Backend(logits).row_statistics(matrix<const decltype(scalar)>(logits), targets, noised_ids, columns,
                                   statistics.mutable_data_ptr<float>());
  });
  return statistics;
}

template <class Backend>
Tensor row_partial_sums(const Tensor& logits, const Tensor& log_sum_exp, const Tensor& target, const Tensor& noised,
                        const Tensor& alpha, const Tensor& uniform_mass, const Tensor& kl_weight,
                        const Tensor& is_weight, int64_t vocab_start, int64_t vocab_size, int64_t mask_id) {
  check_matrix(logits, "logits");
  int64_t rows = logits.size(0);
  RowTargets targets = row_targets(logits, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  const float* lse = float_vector(log_sum_exp, "log_sum_exp", rows, logits);
  Columns columns = local_columns(logits.size(1), vocab_start, vocab_size, mask_id);
  Tensor sums = new_floats(logits, {2, rows});
  if (rows == 0) return sums;
  with_scalar<Backend>(logits, [&](auto scalar) {
    Backend(logits).row_partial_sums(matrix<const decltype(scalar)>(logits), lse, targets, columns,
                                     sums.mutable_data_ptr<float>());
  });
  return sums;
}

template <class Backend>
Tensor row_loss(const Tensor& log_sum_exp, const Tensor& target_logit, const Tensor& noised_logit,
                const Tensor& softplus_sum, const Tensor& sigmoid_sum, const Tensor& target, const Tensor& noised,
                const Tensor& alpha, const Tensor& uniform_mass, const Tensor& kl_weight, const Tensor& is_weight,
                int64_t mask_id) {
  STD_TORCH_CHECK(log_sum_exp.dim() == 1, "log_sum_exp must have shape [T]");
  RowSums sums = row_sums(log_sum_exp, log_sum_exp, target_logit, noised_logit, softplus_sum, sigmoid_sum);
  RowTargets targets = row_targets(log_sum_exp, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  Tensor terms = new_floats(log_sum_exp, {3, log_sum_exp.size(0)});
  if (log_sum_exp.size(0) > 0)
    Backend(log_sum_exp).row_loss(log_sum_exp.size(0), sums, targets, mask_id, terms.mutable_data_ptr<float>());
  return terms;
}

template <class Backend>
void write_row_gradient(const Tensor& logits, const Tensor& gradient, const RowSums& sums, const RowTargets& targets,
                        int64_t vocab_start, int64_t vocab_size, int64_t mask_id) {
  if (logits.numel() == 0) return;
  Columns columns = local_columns(logits.size(1), vocab_start, vocab_size, mask_id);
  with_scalar<Backend>(logits, [&](auto scalar) {
    Backend(logits).row_gradient(matrix<const decltype(scalar)>(logits), sums, targets, columns,
                                 matrix<decltype(scalar)>(gradient));
  });
}

template <class Backend>
Tensor row_gradient(const Tensor& logits, const Tensor& log_sum_exp, const Tensor& target_logit,
                    const Tensor& noised_logit, const Tensor& softplus_sum, const Tensor& sigmoid_sum,
                    const Tensor& target, const Tensor& noised, const Tensor& alpha, const Tensor& uniform_mass,
                    const Tensor& kl_weight, const Tensor& is_weight, int64_t vocab_start, int64_t vocab_size,
                    int64_t mask_id) {
  check_matrix(logits, "logits");
  RowSums sums = row_sums(logits, log_sum_exp, target_logit, noised_logit, softplus_sum, sigmoid_sum);
  RowTargets targets = row_targets(logits, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  Tensor gradient = torch::stable::new_empty(logits, logits.sizes());
  write_row_gradient<Backend>(logits, gradient, sums, targets, vocab_start, vocab_size, mask_id);
  return gradient;
}

template <class Backend>
void row_gradient_(const Tensor& logits, const Tensor& log_sum_exp, const Tensor& target_logit,
                   const Tensor& noised_logit, const Tensor& softplus_sum, const Tensor& sigmoid_sum,
                   const Tensor& target, const Tensor& noised, const Tensor& alpha, const Tensor& uniform_mass,
                   const Tensor& kl_weight, const Tensor& is_weight, int64_t vocab_start, int64_t vocab_size,
                   int64_t mask_id) {
  check_matrix(logits, "logits");
  RowSums sums = row_sums(logits, log_sum_exp, target_logit, noised_logit, softplus_sum, sigmoid_sum);
  RowTargets targets = row_targets(logits, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  write_row_gradient<Backend>(logits, logits, sums, targets, vocab_start, vocab_size, mask_id);
}

// Terms of every row; the gradient too where there is a tensor for it, which may be the logits.
template <class Backend>
Tensor whole_row(const Tensor& logits, const Tensor* gradient, const RowTargets& targets, int64_t vocab_size,
                 int64_t mask_id) {
  STD_TORCH_CHECK(logits.size(1) > 0, "logits must have at least one column, got none");
  Columns columns = local_columns(logits.size(1), 0, vocab_size, mask_id);
  Tensor terms = new_floats(logits, {3, logits.size(0)});
  if (logits.size(0) == 0) return terms;
  with_scalar<Backend>(logits, [&](auto scalar) {
    using Scalar = decltype(scalar);
    Matrix<Scalar> out = gradient ? matrix<Scalar>(*gradient) : Matrix<Scalar>{nullptr, 0, 0, 0};
    Backend(logits).whole_row(matrix<const Scalar>(logits), targets, columns, terms.mutable_data_ptr<float>(), out);
  });
  return terms;
}

template <class Backend>
Tensor whole_row_loss(const Tensor& logits, const Tensor& target, const Tensor& noised, const Tensor& alpha,
                      const Tensor& uniform_mass, const Tensor& kl_weight, const Tensor& is_weight, int64_t vocab_size,
                      int64_t mask_id) {
  check_matrix(logits, "logits");
  RowTargets targets = row_targets(logits, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  return whole_row<Backend>(logits, nullptr, targets, vocab_size, mask_id);
}

template <class Backend>
std::tuple<Tensor, Tensor> whole_row_gradient(const Tensor& logits, const Tensor& target, const Tensor& noised,
                                              const Tensor& alpha, const Tensor& uniform_mass, const Tensor& kl_weight,
                                              const Tensor& is_weight, int64_t vocab_size, int64_t mask_id) {
  check_matrix(logits, "logits");
  RowTargets targets = row_targets(logits, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  Tensor gradient = torch::stable::new_empty(logits, logits.sizes());
  Tensor terms = whole_row<Backend>(logits, &gradient, targets, vocab_size, mask_id);
  return {terms, gradient};
}

template <class Backend>
Tensor whole_row_gradient_(const Tensor& logits, const Tensor& target, const Tensor& noised, const Tensor& alpha,
                           const Tensor& uniform_mass, const Tensor& kl_weight, const Tensor& is_weight,
                           int64_t vocab_size, int64_t mask_id) {
  check_matrix(logits, "logits");
  RowTargets targets = row_targets(logits, target, noised, alpha, uniform_mass, kl_weight, is_weight);
  return whole_row<Backend>(logits, &logits, targets, vocab_size, mask_id);
}

template <class Backend>
void scale_rows_(const Tensor& rows, const Tensor& factor) {
  check_matrix(rows, "matrix");
  const float* factors = float_vector(factor, "factor", rows.size(0), rows);
  if (rows.numel() == 0) return;
  with_scalar<Backend>(rows, [&](auto scalar) { Backend(rows).scale_rows(matrix<decltype(scalar)>(rows), factors); });
}

template <class Backend>
void register_nelbo(torch::stable::detail::StableLibrary& library) {
  library.impl("row_statistics", TORCH_BOX(&row_statistics<Backend>));
  library.impl("row_partial_sums", TORCH_BOX(&row_partial_sums<Backend>));
  library.impl("row_loss", TORCH_BOX(&row_loss<Backend>));
  library.impl("row_gradient", TORCH_BOX(&row_gradient<Backend>));
  library.impl("row_gradient_", TORCH_BOX(&row_gradient_<Backend>));
  library.impl("whole_row_loss", TORCH_BOX(&whole_row_loss<Backend>));
  library.impl("whole_row_gradient", TORCH_BOX(&whole_row_gradient<Backend>));
  library.impl("whole_row_gradient_", TORCH_BOX(&whole_row_gradient_<Backend>));
  library.impl("scale_rows_", TORCH_BOX(&scale_rows_<Backend>));
}

}  // namespace megadiff
