// From torch tensors to the views of common/views.h: every check of shape, type, device and layout in one place.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "common/views.h"

namespace megadiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_on_device_of(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() == other.is_cuda() && (!other.is_cuda() || tensor.get_device() == other.get_device());
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size,
                  "], one number per row; got ", tensor.dim(), " dimension(s) and ", tensor.numel(), " element(s)");
  STD_TORCH_CHECK(is_on_device_of(tensor, like), name,
                  " must be on the device of the tensor that it belongs to: move it there");
  STD_TORCH_CHECK(size < 2 || tensor.stride(0) == 1, name, " must be contiguous, its stride is ", tensor.stride(0),
                  ": call .contiguous()");
}

inline const float* float_vector(const Tensor& tensor, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got ", tensor.scalar_type(),
                  ": call .float()");
  check_vector(tensor, name, size, like);
  return tensor.const_data_ptr<float>();
}

inline Ids id_vector(const Tensor& tensor, const char* name, int64_t size, const Tensor& like) {
  ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, name,
                  " must be int32 or int64, got ", dtype, ": call .long()");
  check_vector(tensor, name, size, like);
  return {tensor.const_data_ptr(), dtype == ScalarType::Long};
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have shape [rows, columns], got ", tensor.dim(), " dimension(s)");
  STD_TORCH_CHECK(tensor.size(1) < 2 || tensor.stride(1) == 1, name,
                  " must be contiguous along columns, its stride is ", tensor.stride(1), ": call .contiguous()");
  STD_TORCH_CHECK(tensor.size(0) < 2 || tensor.stride(0) >= tensor.size(1), "the rows of ", name,
                  " overlap in memory: call .contiguous()");
}

template <class Scalar>
Matrix<Scalar> matrix(const Tensor& tensor) {
  return {static_cast<Scalar*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

inline RowTargets row_targets(const Tensor& logits, const Tensor& target, const Tensor& noised, const Tensor& alpha,
                              const Tensor& uniform_mass, const Tensor& kl_weight, const Tensor& is_weight) {
  int64_t rows = logits.size(0);
  return {id_vector(target, "target", rows, logits),
          id_vector(noised, "noised", rows, logits),
          float_vector(alpha, "alpha", rows, logits),
          float_vector(uniform_mass, "uniform_mass", rows, logits),
          float_vector(kl_weight, "kl_weight", rows, logits),
          float_vector(is_weight, "is_weight", rows, logits)};
}

inline RowSums row_sums(const Tensor& logits, const Tensor& log_sum_exp, const Tensor& target_logit,
                        const Tensor& noised_logit, const Tensor& softplus_sum, const Tensor& sigmoid_sum) {
  int64_t rows = logits.size(0);
  return {float_vector(log_sum_exp, "log_sum_exp", rows, logits),
          float_vector(target_logit, "target_logit", rows, logits),
          float_vector(noised_logit, "noised_logit", rows, logits),
          float_vector(softplus_sum, "softplus_sum", rows, logits),
          float_vector(sigmoid_sum, "sigmoid_sum", rows, logits)};
}

// A new float32 tensor on the device of `like`.
inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

}  // namespace megadiff
