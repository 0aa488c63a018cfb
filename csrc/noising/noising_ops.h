// The noising operator over a back end: checks and outputs. Both libraries instantiate it.
//
// A Backend is constructed from the tokens (a GPU's takes their device and stream) and has, for ids of 32 or 64 bits,
//
//     noise_rows(const NoisingTask<Id>&)
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "common/tensors.h"
#include "noising/noising_math.h"

namespace megadiff {

inline void check_like_tokens(const Tensor& tensor, const char* name, ScalarType dtype, const char* dtype_name,
                              const Tensor& tokens) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype_name);
  STD_TORCH_CHECK(is_on_device_of(tensor, tokens), name, " must be on the same device as the tokens");
}

// [B, L] like the tokens, or, where one number may stand for a sequence, [B, 1]; any strides.
template <class Element>
Strided<Element> per_token(const Tensor& tensor, const char* name, const Tensor& tokens, bool or_per_sequence) {
  int64_t rows = tokens.size(0), columns = tokens.size(1);
  bool spread = or_per_sequence && tensor.dim() == 2 && tensor.size(1) == 1;
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && (tensor.size(1) == columns || spread), name,
                  " must have shape [", rows, ", ", columns, "]", or_per_sequence ? " or one column" : "",
                  " like the tokens; got ", tensor.dim(), " dimension(s) and ", tensor.numel(), " element(s)");
  return {static_cast<const Element*>(tensor.const_data_ptr()), tensor.stride(0), spread ? 0 : tensor.stride(1)};
}

inline int64_t stride_of_vector(const Tensor& tensor, const char* name, int64_t size, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], one ", what,
                  "; got ", tensor.dim(), " dimension(s) and ", tensor.numel(), " element(s)");
  return tensor.stride(0);
}

inline Mixing checked_mixing(double scale, double shift, int64_t num_uniform_states, int64_t mask_id,
                             bool mask_is_uniform_state) {
  STD_TORCH_CHECK(num_uniform_states >= 1 && num_uniform_states <= int64_t{1} << 31,
                  "num_uniform_states must be in [1, 2^31], got ", num_uniform_states);
  int64_t vocab_size = num_uniform_states + !mask_is_uniform_state;
  STD_TORCH_CHECK(mask_id >= 0 && mask_id < vocab_size, "mask_id must be in [0, ", vocab_size, "), got ", mask_id);
  return {scale, shift, mask_id, static_cast<uint32_t>(num_uniform_states), mask_is_uniform_state};
}

template <class Backend, class Id>
void run_noising(const Tensor& tokens, const Tensor& log_snr, const Tensor& log_snr_pdf, const Tensor& ordinal,
                 const std::optional<Tensor>& position, const Tensor& counted, int64_t seed, int64_t purpose,
                 const Mixing& mixing, const Tensor& noised, const Tensor& numbers) {
  int64_t rows = tokens.size(0), columns = tokens.size(1);
  STD_TORCH_CHECK(mixing.num_uniform_states <= std::numeric_limits<Id>::max(), "int32 tokens cannot hold ",
                  mixing.num_uniform_states, " noise ids: use int64");
  NoisingTask<Id> task = {
      rows,
      columns,
      per_token<Id>(tokens, "tokens", tokens, false),
      per_token<double>(log_snr, "log_snr", tokens, true),
      per_token<double>(log_snr_pdf, "log_snr_pdf", tokens, true),
      per_token<bool>(counted, "counted", tokens, false),
      {ordinal.const_data_ptr<int64_t>(), stride_of_vector(ordinal, "ordinal", rows, "number per sequence"), 0},
      {nullptr, 0, 0},
      static_cast<uint64_t>(seed),
      static_cast<uint32_t>(purpose),
      mixing,
      noised.mutable_data_ptr<Id>(),
      numbers.mutable_data_ptr<float>()};
  if (position)
    task.position = {position->const_data_ptr<int64_t>(), 0,
                     stride_of_vector(*position, "position", columns, "number per column of the tokens")};
  if (rows > 0 && columns > 0) Backend(tokens).noise_rows(task);
}

template <class Backend>
std::tuple<Tensor, Tensor> noise_rows(const Tensor& tokens, const Tensor& log_snr, const Tensor& log_snr_pdf,
                                      const Tensor& ordinal, const std::optional<Tensor>& position,
                                      const Tensor& counted, int64_t seed, int64_t purpose, double scale, double shift,
                                      int64_t num_uniform_states, int64_t mask_id, bool mask_is_uniform_state) {
  ScalarType id_type = tokens.scalar_type();
  STD_TORCH_CHECK(id_type == ScalarType::Long || id_type == ScalarType::Int, "tokens must be int32 or int64");
  STD_TORCH_CHECK(tokens.dim() == 2, "tokens must have shape [B, L], got ", tokens.dim(), " dimension(s)");
  check_like_tokens(log_snr, "log_snr", ScalarType::Double, "float64", tokens);
  check_like_tokens(log_snr_pdf, "log_snr_pdf", ScalarType::Double, "float64", tokens);
  check_like_tokens(ordinal, "ordinal", ScalarType::Long, "int64", tokens);
  check_like_tokens(counted, "counted", ScalarType::Bool, "bool", tokens);
  if (position) check_like_tokens(*position, "position", ScalarType::Long, "int64", tokens);
  STD_TORCH_CHECK(purpose >= 0 && purpose < 256, "purpose must be in [0, 256), got ", purpose);
  Mixing mixing = checked_mixing(scale, shift, num_uniform_states, mask_id, mask_is_uniform_state);

  Tensor noised = torch::stable::new_empty(tokens, {tokens.size(0), tokens.size(1)});
  Tensor numbers = new_floats(tokens, {4, tokens.size(0), tokens.size(1)});
  auto run = id_type == ScalarType::Long ? run_noising<Backend, int64_t> : run_noising<Backend, int32_t>;
  run(tokens, log_snr, log_snr_pdf, ordinal, position, counted, seed, purpose, mixing, noised, numbers);
  return {noised, numbers};
}

template <class Backend>
void register_noising(torch::stable::detail::StableLibrary& library) {
  library.impl("noise_rows", TORCH_BOX(&noise_rows<Backend>));
}

}  // namespace megadiff
