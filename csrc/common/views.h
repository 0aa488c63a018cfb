// Plain views of tensors: what a kernel sees. No torch in here; shapes and types are checked in common/tensors.h.
#pragma once

#include "common/portable.h"

namespace megadiff {

// T rows of W columns; a row is contiguous, rows are `stride` elements apart.
template <class Scalar>
struct Matrix {
  Scalar* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

// Token ids, int32 or int64.
struct Ids {
  const void* data;
  bool is_wide;
};

MD_FN int64_t id_at(const Ids& ids, int64_t index) {
  return ids.is_wide ? static_cast<const int64_t*>(ids.data)[index] : static_cast<const int32_t*>(ids.data)[index];
}

// The numbers of the row loss, one per row; see megadiff/ops/eager.py.
struct RowTargets {
  Ids target;
  Ids noised;
  const float* alpha;
  const float* uniform_mass;
  const float* kl_weight;
  const float* is_weight;
};

// Vocabulary-wide quantities of each row after the collectives.
struct RowSums {
  const float* log_sum_exp;
  const float* target_logit;
  const float* noised_logit;
  const float* softplus_sum;
  const float* sigmoid_sum;
};

// Which of the local columns take part: [0, live_end) without mask_column (-1 where another rank holds the mask).
struct Columns {
  int64_t vocab_start;
  int64_t live_end;
  int64_t mask_column;
  int64_t mask_id;
};

MD_FN Columns local_columns(int64_t num_columns, int64_t vocab_start, int64_t vocab_size, int64_t mask_id) {
  int64_t live_end = vocab_size - vocab_start;
  live_end = live_end < 0 ? 0 : (live_end > num_columns ? num_columns : live_end);
  int64_t mask_column = mask_id - vocab_start;
  return {vocab_start, live_end, mask_column >= 0 && mask_column < live_end ? mask_column : -1, mask_id};
}

// Local column of an id, -1 for the mask and for ids that another rank holds.
MD_FN int64_t column_of(const Columns& columns, int64_t id) {
  int64_t column = id - columns.vocab_start;
  return id != columns.mask_id && column >= 0 && column < columns.live_end ? column : -1;
}

}  // namespace megadiff
