// The row loss, as scalar formulas that both back ends inline.
//
// A row has target x, noised token z, keep probability alpha, uniform mass c per token and two weights. With
// p = softmax over the vocabulary without the mask, k = alpha/c and odds y_v = k*p_v,
//
//     KL = alpha*log((1 + k)/(1 + y_x)) + c*(log1p(k) - sum_v log1p(y_v))         (c = 0: -alpha*log p_x)
//     IS = r - 1 - log r,    r = 1 | (1 + k)/(1 + y_x) | 1/(1 + y_z)              for z = mask | z = x | else
//
// (the derivation is in docs/notation.md). Every odds is positive, so four elements share one logarithm and one
// division without cancellation:
//
//     sum log1p(y_i) = log1p(Z),    1 + Z = prod (1 + y_i),     Z built from sums and products of the y_i alone
//     sum y_i/(1 + y_i) = N / (1 + Z),                          N likewise
//
// That leaves, per element, one exponential and a quarter of a logarithm and of a division.
#pragma once

#include <math.h>

#include "common/portable.h"

namespace megadiff {

// Uniform mass below this counts as none, so that k = alpha/c fits a float. That changes no digit of KL while
// p_x > 1e-30, and no process reaches it: a share of uniform noise that small is masked noise.
static constexpr float kLeastMass = 1e-30f;

// Up to this k, prod (1 + y_i) of four odds with sum y_i <= k stays below (1 + k/4)^4 < 1e36.
static constexpr float kLargestGroupedRatio = 4e9f;

struct Row {
  float alpha;
  float uniform_mass;
  float kl_weight;
  float is_weight;
  bool is_masked;  // z is the mask
  bool is_kept;    // z is x
};

MD_FN bool is_active(const Row& row) { return row.kl_weight != 0.0f || row.is_weight != 0.0f; }
MD_FN bool has_mass(const Row& row) { return row.uniform_mass > kLeastMass; }

// k = alpha/c, 0 where there is no uniform mass.
MD_FN float signal_to_mass(const Row& row) { return has_mass(row) ? row.alpha / row.uniform_mass : 0.0f; }

// Two elements of sum log1p(y) and sum y/(1 + y): sum = Z, share = N of the product above.
template <class Real>
struct Odds {
  Real sum;
  Real share;
};

template <class Real>
MD_FN Odds<Real> join(Real a, Real b) {
  Real product = a * b;
  Real sum = a + b + product;
  return {sum, sum + product};
}

template <class Real>
MD_FN Odds<Real> join(const Odds<Real>& a, const Odds<Real>& b) {
  Real sum = a.sum + b.sum + a.sum * b.sum;
  return {sum, a.share * (b.sum + 1.0f) + b.share * (a.sum + 1.0f)};
}

// Gradient of one logit for unit grad_loss: p*(everywhere/(1 + y) - total); x and z get one term more.
template <class Real>
MD_FN Real gradient_at(Real prob, Real one_over_one_plus_odds, float everywhere, float total) {
  return prob * (one_over_one_plus_odds * everywhere - total);
}

struct RowTerms {
  float loss;
  float kl_div;
  float is_div;
  // Gradient: what every column has, what is subtracted from every column, what x and z have beside it.
  float everywhere;
  float total;
  float target_term;
  float noised_term;
};

// Value and gradient coefficients of one row from its vocabulary-wide sums; all zero for a row of zero weight.
//
// target_log_prob = log p_x, target_prob = p_x; noised_prob = p_z, unused where z is the mask.
MD_FN RowTerms row_terms(const Row& row, float target_log_prob, float target_prob, float noised_prob,
                         float softplus_sum, float sigmoid_sum) {
  RowTerms terms = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  if (!is_active(row)) return terms;

  float target_share = 1.0f;  // y_x/(1 + y_x), 1 without mass
  float noised_share = 1.0f;
  float log_ratio = 0.0f;
  float ratio_minus_one = 0.0f;
  if (has_mass(row)) {
    float k = signal_to_mass(row);
    float target_odds = k * target_prob;
    target_share = target_odds / (1.0f + target_odds);
    // (1 + k)/(1 + y_x) - 1, the likelihood ratio of a kept token: no logarithms that cancel.
    float kept_ratio_minus_one = (k - target_odds) / (1.0f + target_odds);
    float kept_log_ratio = log1pf(kept_ratio_minus_one);
    terms.kl_div = row.alpha * kept_log_ratio + row.uniform_mass * (log1pf(k) - softplus_sum);
    if (row.is_kept) {
      noised_share = target_share;
      ratio_minus_one = kept_ratio_minus_one;
      log_ratio = kept_log_ratio;
    } else if (!row.is_masked) {
      float noised_odds = k * noised_prob;
      noised_share = noised_odds / (1.0f + noised_odds);
      ratio_minus_one = -noised_share;
      log_ratio = -log1pf(noised_odds);
    }
    terms.everywhere = -row.kl_weight * row.alpha;
  } else {
    terms.kl_div = -row.alpha * target_log_prob;
    if (row.is_kept) {  // without uniform mass a token is either kept or masked
      ratio_minus_one = expm1f(-target_log_prob);
      log_ratio = -target_log_prob;
    }
  }
  terms.is_div = ratio_minus_one - log_ratio;

  // A divergence may be infinite where its own weight is zero: no 0 * inf.
  if (row.kl_weight != 0.0f) {
    terms.loss = row.kl_weight * terms.kl_div;
    terms.target_term = -row.kl_weight * row.alpha * target_share;
    terms.total = terms.target_term - row.kl_weight * row.uniform_mass * sigmoid_sum;
  }
  if (row.is_weight != 0.0f) {
    terms.loss += row.is_weight * terms.is_div;
    terms.noised_term = -row.is_weight * ratio_minus_one * noised_share;
    terms.total += terms.noised_term;
  }
  return terms;
}

}  // namespace megadiff
