// One row of the row loss, from the operators' arguments to its numbers and back; the same on both back ends.
#pragma once

#include "common/views.h"
#include "nelbo/nelbo_math.h"

namespace megadiff {

// What is known of a row beside its logits and the sums over them.
struct RowTask {
  Row row;
  int64_t target_column;  // -1 for the mask and for ids that another rank holds
  int64_t noised_column;
};

MD_FN RowTask row_task(const RowTargets& targets, const Columns& columns, int64_t t) {
  int64_t target = id_at(targets.target, t), noised = id_at(targets.noised, t);
  return {{targets.alpha[t], targets.uniform_mass[t], targets.kl_weight[t], targets.is_weight[t],
           noised == columns.mask_id, noised == target},
          column_of(columns, target),
          column_of(columns, noised)};
}

MD_FN RowTerms terms_of_sums(const Row& row, const RowSums& sums, int64_t t) {
  float target_log_prob = sums.target_logit[t] - sums.log_sum_exp[t];
  return row_terms(row, target_log_prob, expf(target_log_prob), expf(sums.noised_logit[t] - sums.log_sum_exp[t]),
                   sums.softplus_sum[t], sums.sigmoid_sum[t]);
}

MD_FN void write_terms(const RowTerms& terms, int64_t rows, int64_t t, float* terms_3T) {
  terms_3T[t] = terms.loss;
  terms_3T[rows + t] = terms.kl_div;
  terms_3T[2 * rows + t] = terms.is_div;
}

}  // namespace megadiff
