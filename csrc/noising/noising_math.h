// Noising in scalars: what one log-SNR means for a token, and what becomes of the token. Both back ends inline it.
//
// Bit for bit the same everywhere. All of it is double, rounded to float at the very end, and made of +, -, *, /
// (correctly rounded by IEEE 754 on CPU and GPU), explicit fma, and the exponential below, which is made of these. No
// product is left beside a sum for a compiler to fuse, or it is exact; so no flag about contraction matters, and no
// library's exp takes part.
//
// Formulas: megadiff/diffusion/process.py, which computes them in float64 as well, but with other last bits. Its
// thresholds then differ from these with probability ~2^-20, by 1, and a token only if its word is that very number:
// with probability below 2^-50. The numbers of the rows are within one unit in the last place of float.
#pragma once

#include <math.h>
#include <string.h>

#include "philox/philox.h"

namespace megadiff {

MD_FN double double_of_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MD_FN uint64_t bits_of_double(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// exp(x) for x <= 0, wrong by less than 0.7 units in the last place; 0 below -708, where a double's normal numbers end.
//
// x = k*ln 2 + r with |r| <= ln(2)/2, and exp(r) = (1 + r) + r^2 * (1/2! + r/3! + ... + r^11/13!), of which the part
// left out is below 0.05 units. k*ln 2 is subtracted in two parts, the first difference being exact; what 1 + r and r
// itself lose in rounding is carried along.
MD_FN double exp_of_negative(double x) {
  const double round_to_integer = 0x1.8p52;  // adding it leaves an integer in the low bits
  double shifted = fma(x, 0x1.71547652b82fep+0, round_to_integer);
  double k = shifted - round_to_integer;
  double from_high = fma(-k, 0x1.62e42fefa39efp-1, x);
  double r = fma(-k, 0x1.abc9e3b39803fp-56, from_high);
  double r_low = fma(-k, 0x1.abc9e3b39803fp-56, from_high - r);

  double q = 1.0 / 6227020800.0;
  q = fma(q, r, 1.0 / 479001600.0);
  q = fma(q, r, 1.0 / 39916800.0);
  q = fma(q, r, 1.0 / 3628800.0);
  q = fma(q, r, 1.0 / 362880.0);
  q = fma(q, r, 1.0 / 40320.0);
  q = fma(q, r, 1.0 / 5040.0);
  q = fma(q, r, 1.0 / 720.0);
  q = fma(q, r, 1.0 / 120.0);
  q = fma(q, r, 1.0 / 24.0);
  q = fma(q, r, 1.0 / 6.0);
  q = fma(q, r, 1.0 / 2.0);

  double sum = 1.0 + r;
  double lost = (r - (sum - 1.0)) + r_low;
  double mantissa = sum + fma(r * r, q, lost);
  double power_of_two = double_of_bits((bits_of_double(shifted) + 1023) << 52);  // 2^k, a normal number
  return x < -708.0 ? 0.0 : mantissa * power_of_two;
}

// sigma(x) and sigma(-x), the smaller one without cancellation.
struct Sigmoids {
  double of_plus;
  double of_minus;
};

MD_FN Sigmoids sigmoids(double x) {
  double decay = exp_of_negative(-fabs(x));
  double larger = 1.0 / (1.0 + decay), smaller = decay / (1.0 + decay);
  return x >= 0.0 ? Sigmoids{larger, smaller} : Sigmoids{smaller, larger};
}

// A mixing distribution (megadiff/diffusion/mixing.py): uniform against masked noise has log-odds scale*lambda + shift.
struct Mixing {
  double scale;
  double shift;  // -inf: masks alone, +inf: uniform noise alone
  int64_t mask_id;
  uint32_t num_uniform_states;
  bool mask_is_uniform_state;
};

struct Weights {
  float loss;
  float elbo;
};

// Everything about a token that follows from its log-SNR alone.
struct Level {
  uint64_t keep_below;
  uint64_t uniform_below;
  float alpha;
  float uniform_mass;
  Weights at_mask;   // where z is the mask
  Weights at_clean;  // where z = x
  Weights at_noise;  // where z is another token
};

MD_FN Weights weights(double loss_weight, double log_snr_pdf) {
  return {static_cast<float>(loss_weight), static_cast<float>(loss_weight / log_snr_pdf)};
}

MD_FN Level level_of(double log_snr, double log_snr_pdf, const Mixing& mixing) {
  Sigmoids alpha = sigmoids(log_snr);
  double log_odds = isinf(mixing.shift) ? mixing.shift : fma(mixing.scale, log_snr, mixing.shift);
  double share = sigmoids(log_odds).of_plus;
  double states = mixing.num_uniform_states;
  double at_noise = fma(mixing.scale, share, 1.0 - mixing.scale);
  double at_clean = share * at_noise / fma(states, alpha.of_plus / alpha.of_minus, share);
  Level level;
  level.keep_below = threshold(alpha.of_plus);
  level.uniform_below = threshold(share);
  level.alpha = static_cast<float>(alpha.of_plus);
  level.uniform_mass = static_cast<float>(alpha.of_minus * share / states);
  level.at_mask = weights(fma(mixing.scale, share, 1.0), log_snr_pdf);
  level.at_clean = weights(at_clean, log_snr_pdf);
  level.at_noise = weights(at_noise, log_snr_pdf);
  return level;
}

// A matrix of any layout; strides are 0 where a number holds for a whole row.
template <class Element>
struct Strided {
  const Element* data;
  int64_t row_stride;
  int64_t column_stride;
};

template <class Element>
MD_FN Element element_at(const Strided<Element>& matrix, int64_t row, int64_t column) {
  return matrix.data[row * matrix.row_stride + column * matrix.column_stride];
}

// Everything one call reads and writes; B sequences of L tokens.
template <class Id>
struct NoisingTask {
  int64_t batch_size;
  int64_t num_tokens;
  Strided<Id> tokens;
  Strided<double> log_snr;
  Strided<double> log_snr_pdf;
  Strided<bool> counted;
  Strided<int64_t> ordinal;   // column stride 0
  Strided<int64_t> position;  // row stride 0; data null for 0 ... L - 1
  uint64_t seed;
  uint32_t purpose;
  Mixing mixing;
  Id* noised_BL;
  float* numbers_4BL;  // alpha, uniform mass, loss weight, ELBO weight
};

template <class Id>
MD_FN Level level_at(const NoisingTask<Id>& task, int64_t row, int64_t column) {
  return level_of(element_at(task.log_snr, row, column), element_at(task.log_snr_pdf, row, column), task.mixing);
}

// The place inside the sample, of which the low 32 bits count.
template <class Id>
MD_FN uint32_t position_at(const NoisingTask<Id>& task, int64_t column) {
  return static_cast<uint32_t>(task.position.data ? element_at(task.position, 0, column) : column);
}

MD_FN int64_t noised_id(int64_t token, uint32_t keep_word, uint32_t kind_word, uint32_t id_word, const Level& level,
                        const Mixing& mixing) {
  int64_t drawn = multiply_high(id_word, mixing.num_uniform_states);
  drawn += !mixing.mask_is_uniform_state && drawn >= mixing.mask_id;
  int64_t noise = kind_word < level.uniform_below ? drawn : mixing.mask_id;
  return keep_word < level.keep_below ? token : noise;
}

// Noises one token and writes its numbers.
template <class Id>
MD_FN void noise_token(const NoisingTask<Id>& task, int64_t row, int64_t column, uint32_t keep_word, uint32_t kind_word,
                       uint32_t id_word, const Level& level) {
  int64_t index = row * task.num_tokens + column, plane = task.batch_size * task.num_tokens;
  int64_t token = element_at(task.tokens, row, column);
  int64_t noised = noised_id(token, keep_word, kind_word, id_word, level, task.mixing);
  Weights weights = noised == token ? level.at_clean : level.at_noise;
  if (noised == task.mixing.mask_id && !task.mixing.mask_is_uniform_state) weights = level.at_mask;
  if (!element_at(task.counted, row, column)) weights = {0.0f, 0.0f};
  task.noised_BL[index] = static_cast<Id>(noised);
  task.numbers_4BL[index] = level.alpha;
  task.numbers_4BL[plane + index] = level.uniform_mass;
  task.numbers_4BL[2 * plane + index] = weights.loss;
  task.numbers_4BL[3 * plane + index] = weights.elbo;
}

}  // namespace megadiff
