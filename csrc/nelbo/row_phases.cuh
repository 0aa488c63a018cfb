// The row loss on a GPU, phase by phase: what the blocks of one row do between two barriers.
#pragma once

#include "common/block_reduce.cuh"
#include "nelbo/nelbo_rows.h"
#include "nelbo/row_columns.cuh"

namespace megadiff {

constexpr float kLn2 = 0.693147181f;
// Below every logit that can matter, and finite: a maximum of -inf would make NaN of -inf - -inf.
constexpr float kLeastLogit = -1e38f;

// (maximum, sum of numerators relative to the maximum's reference) of two sets of columns.
struct JoinStatistics {
  static __device__ Pair identity() { return {kLeastLogit, 0.0f}; }
  __device__ Pair operator()(const Pair& a, const Pair& b) const {
    float distance = log2_of_exp(a.first) - log2_of_exp(b.first);
    bool is_a_larger = distance >= 0.0f;
    float larger = is_a_larger ? a.second : b.second, smaller = is_a_larger ? b.second : a.second;
    return {max_or_nan(a.first, b.first), fmaf(smaller, fast_exp2(-fabsf(distance)), larger)};
  }
};

// The sum is relative to the rounded reference: there is no remainder.
__device__ __forceinline__ Normalizer normalizer_of_statistics(const Pair& statistics) {
  return {1.0f / statistics.second, log2_of_exp(statistics.first), 0.0f};
}

__device__ __forceinline__ Normalizer normalizer_of_log_sum_exp(float log_sum_exp) {
  float reference = log2_of_exp(log_sum_exp);
  return {1.0f, reference, fmaf(-log_sum_exp, kLog2E, reference)};
}

// Base-2 logarithm of exp(maximum) over its rounded reference, which sums of numerators are relative to.
__device__ __forceinline__ float reference_remainder(const Pair& statistics) {
  return fmaf(statistics.first, kLog2E, -log2_of_exp(statistics.first));
}

// Of single columns, x and z, as exactly as fp32 has it: the loss hangs on them.
__device__ __forceinline__ float log_prob_of(float logit, const Pair& statistics) {
  return logit - statistics.first + fmaf(kLn2, reference_remainder(statistics), -logf(statistics.second));
}

__device__ __forceinline__ float prob_of(float logit, const Pair& statistics) {
  return expf(logit - statistics.first) * (fast_exp2(reference_remainder(statistics)) / statistics.second);
}

// Phase 1: the calling thread's part of (maximum, sum of exp(logit - maximum)); keep(chunk, numerators, reference)
// gets the numerators on the way.
template <class Scalar, class Keep>
__device__ __forceinline__ Pair gather_statistics(const Logits<Scalar>& logits, Keep keep) {
  Pair statistics = JoinStatistics::identity();
  logits.for_each_chunk([&](int chunk, float (&values)[kChunk]) {
    float maximum = kLeastLogit;
#pragma unroll
    for (float value : values) maximum = max_or_nan(maximum, value);
    float reference = log2_of_exp(maximum), sum = 0.0f;
#pragma unroll
    for (float& value : values) {
      value = numerator(value, reference);
      sum += value;
    }
    statistics = JoinStatistics{}(statistics, {maximum, sum});
    keep(chunk, values, reference);
  });
  return statistics;
}

// Sums of log1p(y) and y/(1 + y) over many odds y, which share one logarithm and one division for as long as the
// product of their 1 + y is far from overflow: in most rows all odds of a thread do.
class OddsSums {
 public:
  __device__ __forceinline__ void add(const Odds<float>& odds) {
    // With up to 30 000 odds in the product and groups up to 1e36 that begin one, neither sum nor share overflows.
    constexpr float kLargestProduct = 1e34f;
    Odds<float> joined = join(product_, odds);
    if (joined.sum < kLargestProduct) {
      product_ = joined;
    } else {  // and where it is NaN, which thus reaches the sums
      take(product_);
      product_ = odds;
    }
  }

  __device__ Pair total() {
    take(product_);
    return sums_;
  }

 private:
  __device__ void take(const Odds<float>& odds) {
    sums_.first += log1pf(odds.sum);
    sums_.second += odds.share * fast_reciprocal(1.0f + odds.sum);
  }

  Odds<float> product_ = {0.0f, 0.0f};
  Pair sums_ = {0.0f, 0.0f};
};

// Phase 2: the calling thread's part of (sum log1p(y), sum y/(1 + y)) over the odds y = k*p.
template <class Source>
__device__ __forceinline__ Pair gather_odds(const Source& source, const Normalizer& normalizer, float ratio) {
  OddsSums sums;
  Normalizer odds_normalizer = normalizer.times(ratio);
  if (ratio <= kLargestGroupedRatio)
    source.for_each_probability(odds_normalizer, [&](int, const float (&y)[kChunk]) {
      sums.add(join(join(y[0], y[1]), join(y[2], y[3])));
      sums.add(join(join(y[4], y[5]), join(y[6], y[7])));
    });
  else
    source.for_each_probability(odds_normalizer, [&](int, const float (&y)[kChunk]) {
      for (float odds : y) sums.add({odds, odds});
    });
  return sums.total();
}

// Phase 3: the gradient of all columns, less the terms that only x and z have.
template <class Source, class Scalar>
__device__ __forceinline__ void write_gradient(const Source& source, const Normalizer& normalizer, float ratio,
                                               float everywhere, float total, const Gradient<Scalar>& gradient) {
  if (everywhere == 0.0f)
    source.for_each_probability(normalizer, [&](int chunk, float (&probs)[kChunk]) {
#pragma unroll
      for (float& prob : probs) prob = gradient_at(prob, 1.0f, 0.0f, total);
      gradient.store(chunk, probs);
    });
  else
    source.for_each_probability(normalizer, [&](int chunk, float (&probs)[kChunk]) {
#pragma unroll
      for (float& prob : probs)
        prob = gradient_at(prob, fast_reciprocal(fmaf(ratio, prob, 1.0f)), everywhere, total);
      gradient.store(chunk, probs);
    });
}

// Phase 4, one thread, after a barrier that orders it behind phase 3: the columns of x and z anew, with their terms.
template <class Scalar>
__device__ void write_target_and_noised(const RowTask& task, const RowTerms& terms, float target_prob,
                                        float noised_prob, const Slice& slice, Scalar* gradient_row) {
  float ratio = signal_to_mass(task.row);
  auto write = [&](int64_t column, float prob, float term) {
    if (column < 0 || slice.shift + column < slice.begin || slice.shift + column >= slice.end) return;
    float everyone = gradient_at(prob, 1.0f / (1.0f + ratio * prob), terms.everywhere, terms.total);
    store_float(gradient_row + column, everyone + term);
  };
  bool is_same = task.target_column == task.noised_column;
  write(task.target_column, target_prob, is_same ? terms.target_term + terms.noised_term : terms.target_term);
  if (!is_same) write(task.noised_column, noised_prob, terms.noised_term);
}

}  // namespace megadiff
