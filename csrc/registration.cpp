// The operators of megadiff, each schema once. Implementations register beside their kernels, for CPU in
// libmegadiff_cpu and for CUDA in libmegadiff_cuda; shapes under tracing in megadiff/ops/fakes.py.
//
// LibTorch's stable ABI only: one binary serves every torch from 2.10 on, and nothing here needs CUDA to compile.
#include <torch/csrc/stable/library.h>

#include "common/portable.h"

#define TARGETS \
  "Tensor target, Tensor noised, Tensor alpha, Tensor uniform_mass, Tensor kl_weight, Tensor is_weight"
#define SUMS "Tensor log_sum_exp, Tensor target_logit, Tensor noised_logit, Tensor softplus_sum, Tensor sigmoid_sum"
#define COLUMNS "int vocab_start, int vocab_size, int mask_id"

STABLE_TORCH_LIBRARY(megadiff, library) {
  // Where the vocabulary is divided over ranks: one operator per stretch between two collectives.
  library.def("row_statistics(Tensor logits, Tensor target, Tensor noised, " COLUMNS ") -> Tensor");
  library.def("row_partial_sums(Tensor logits, Tensor log_sum_exp, " TARGETS ", " COLUMNS ") -> Tensor");
  library.def("row_loss(" SUMS ", " TARGETS ", int mask_id) -> Tensor");
  library.def("row_gradient(Tensor logits, " SUMS ", " TARGETS ", " COLUMNS ") -> Tensor");
  library.def("row_gradient_(Tensor(a!) logits, " SUMS ", " TARGETS ", " COLUMNS ") -> ()");

  // Where one rank holds all columns: the whole of it, each logit read once.
  library.def("whole_row_loss(Tensor logits, " TARGETS ", int vocab_size, int mask_id) -> Tensor");
  library.def("whole_row_gradient(Tensor logits, " TARGETS ", int vocab_size, int mask_id) -> (Tensor, Tensor)");
  library.def("whole_row_gradient_(Tensor(a!) logits, " TARGETS ", int vocab_size, int mask_id) -> Tensor");

  library.def("scale_rows_(Tensor(a!) matrix, Tensor factor) -> ()");

  library.def("noise_rows(Tensor tokens, Tensor log_snr, Tensor log_snr_pdf, Tensor ordinal, Tensor? position, "
              "Tensor counted, int seed, int purpose, float scale, float shift, int num_uniform_states, int mask_id, "
              "bool mask_is_uniform_state) -> (Tensor, Tensor)");
}

// What this library was built from (megadiff/ops/_sources.py): one older or newer than the package is not used.
extern "C" const char* megadiff_cpu_sources() { return MD_TEXT(MEGADIFF_SOURCES); }
