// The row loss on a CPU. Compiled once per instruction set (MEGADIFF_ISA); nelbo_cpu.cpp chooses at run time.
//
// Fused: softmax statistics, both divergences and the gradient of a row, while the row is in the core's cache.
// Never materialised: probabilities, marginals, log-ratios; a thread keeps one row of numerators (4 bytes a column).
// Memory: `whole` reads each logit once and writes each gradient once, 8 bytes per element in fp32, 4 in 16 bit. Where
// ranks share the vocabulary, `statistics`, `partial_sums` and `gradient` read it once each.
// Arithmetic per element: one exp; a quarter of a log1p and a quarter of a division for the sums (nelbo_math.h); half
// a division for the gradient.
//
// A row is cut into chunks that fit the first-level cache. Numerators are exp(l - m) with m the maximum of the lane in
// its chunk, so one pass over memory gives them and nothing has to be recomputed when a larger logit comes later; a
// chunk is brought to the row's scale by one factor per lane.
//
// Nothing of the C++ library with linkage may be instantiated here: the linker keeps one copy of it, perhaps one that
// uses instructions this machine lacks.
#include "nelbo/nelbo_cpu_kernels.h"

#include <float.h>

#include "common/simd.h"
#include "nelbo/nelbo_rows.h"

namespace megadiff {
namespace {

constexpr int64_t kChunk = 1024;

MD_FN int64_t chunks_of(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

// Logits of one row, chunk by chunk; dead columns (the mask, padding, what lies past the end) read as -inf.
template <class Scalar>
struct RowReader {
  const Scalar* row;
  Columns columns;

  // All logits of the chunk as floats, in `buffer` unless they already lie in memory as such.
  const float* chunk(int64_t index, float* buffer) const {
    int64_t start = index * kChunk;
    bool is_whole = start + kChunk <= columns.live_end;
    if constexpr (sizeof(Scalar) == sizeof(float)) {
      if (is_whole && !holds_mask(start)) return row + start;
    }
    if (is_whole) {
      for (int64_t i = 0; i < kChunk; i += kLanes) store(buffer + i, load(row + start + i));
    } else {
      for (int64_t i = 0; i < kChunk; ++i)
        buffer[i] = start + i < columns.live_end ? to_float(row[start + i]) : -INFINITY;
    }
    if (holds_mask(start)) buffer[columns.mask_column - start] = -INFINITY;
    return buffer;
  }

  bool holds_mask(int64_t start) const { return columns.mask_column >= start && columns.mask_column < start + kChunk; }

  float logit(int64_t column) const { return column < 0 ? -INFINITY : to_float(row[column]); }
};

// Maximum and sum of exp(l - maximum), lane by lane, over chunks that come one after another.
struct RunningSum {
  Vec maximum = broadcast(-FLT_MAX);
  Vec sum = broadcast(0.0f);

  MD_FN void add(RunningSum& total, const Vec& maximum, const Vec& sum) {
    Vec larger = megadiff::maximum(total.maximum, maximum);
    total.sum = total.sum * exp(total.maximum - larger) + sum * exp(maximum - larger);
    total.maximum = larger;
  }
};

// Numerators of a chunk and what they are relative to, and their part of the running sum.
MD_FN Vec chunk_numerators(const float* logits, float* numerators, RunningSum& total) {
  Vec maxima[4] = {broadcast(-FLT_MAX), broadcast(-FLT_MAX), broadcast(-FLT_MAX), broadcast(-FLT_MAX)};
  for (int64_t i = 0; i < kChunk; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) maxima[j] = maximum(maxima[j], load(logits + i + j * kLanes));
  Vec reference = maximum(maximum(maxima[0], maxima[1]), maximum(maxima[2], maxima[3]));
  Vec sums[4] = {};
  for (int64_t i = 0; i < kChunk; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      Vec numerator = exp(load(logits + i + j * kLanes) - reference);
      store(numerators + i + j * kLanes, numerator);
      sums[j] += numerator;
    }
  }
  RunningSum::add(total, reference, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  return reference;
}

struct MaxSum {
  float maximum;
  float sum;
};

MD_FN MaxSum over_lanes(const RunningSum& total) {
  float maximum = -FLT_MAX;
  for (int lane = 0; lane < kLanes; ++lane) maximum = total.maximum[lane] > maximum ? total.maximum[lane] : maximum;
  return {maximum, sum_of_lanes(total.sum * exp(total.maximum - maximum))};
}

// Sums of log1p(y) and y/(1 + y) over a chunk whose odds are numerator * scale.
MD_FN void add_odds(const float* numerators, const Vec& scale, bool is_grouped, Vec& softplus, Vec& sigmoid) {
  if (is_grouped) {
    for (int64_t i = 0; i < kChunk; i += 4 * kLanes) {
      const float* at = numerators + i;
      Odds<Vec> odds = join(join(load(at) * scale, load(at + kLanes) * scale),
                            join(load(at + 2 * kLanes) * scale, load(at + 3 * kLanes) * scale));
      softplus += log1p(odds.sum);
      sigmoid += odds.share / (odds.sum + 1.0f);
    }
  } else {
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      Vec odds = load(numerators + i) * scale;
      softplus += log1p(odds);
      sigmoid += odds / (odds + 1.0f);
    }
  }
}

// Gradients of a chunk whose probabilities are numerator * scale.
template <class Scalar>
MD_FN void chunk_gradient(const float* numerators, const Vec& scale, float ratio, const RowTerms& terms, Scalar* out) {
  if (terms.everywhere == 0.0f) {
    Vec factor = scale * -terms.total;
    for (int64_t i = 0; i < kChunk; i += kLanes) store(out + i, load(numerators + i) * factor);
  } else if (ratio <= kLargestGroupedRatio) {
    for (int64_t i = 0; i < kChunk; i += 2 * kLanes) {
      Vec a = load(numerators + i) * scale, b = load(numerators + i + kLanes) * scale;
      Vec a1 = a * ratio + 1.0f, b1 = b * ratio + 1.0f;
      Vec inverse = 1.0f / (a1 * b1);
      store(out + i, gradient_at(a, inverse * b1, terms.everywhere, terms.total));
      store(out + i + kLanes, gradient_at(b, inverse * a1, terms.everywhere, terms.total));
    }
  } else {
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      Vec prob = load(numerators + i) * scale;
      store(out + i, gradient_at(prob, 1.0f / (prob * ratio + 1.0f), terms.everywhere, terms.total));
    }
  }
}

// Gradient of a chunk into its place in the row: exactly 0 in dead columns, nothing past the end of the row.
template <class Scalar>
MD_FN void write_chunk(const float* numerators, const Vec& scale, float ratio, const RowTerms& terms,
                       const Columns& columns, int64_t start, int64_t row_end, Scalar* row) {
  if (start + kChunk <= columns.live_end) {
    chunk_gradient(numerators, scale, ratio, terms, row + start);
  } else {
    Scalar buffer[kChunk];
    chunk_gradient(numerators, scale, ratio, terms, buffer);
    int64_t live = columns.live_end - start, stored = row_end - start < kChunk ? row_end - start : kChunk;
    memcpy(row + start, buffer, sizeof(Scalar) * live);
    memset(row + start + live, 0, sizeof(Scalar) * (stored - live));
  }
}

// What the chunks do not give: the mask's column, x and z, which have a term more, and padding beyond the last chunk.
// Written after them.
template <class Scalar>
MD_FN void write_rest(const RowTask& task, const RowTerms& terms, float ratio, const Columns& columns,
                      float target_prob, float noised_prob, int64_t row_end, Scalar* out) {
  auto write = [&](int64_t column, float prob, float term) {
    float everyone = gradient_at(prob, 1.0f / (prob * ratio + 1.0f), terms.everywhere, terms.total);
    if (column >= 0) store_one(out + column, everyone + term);
  };
  int64_t written = chunks_of(columns.live_end) * kChunk;
  if (written < row_end) memset(out + written, 0, sizeof(Scalar) * (row_end - written));
  if (columns.mask_column >= 0) memset(out + columns.mask_column, 0, sizeof(Scalar));
  write(task.target_column, target_prob, terms.target_term + (task.row.is_kept ? terms.noised_term : 0.0f));
  if (!task.row.is_kept) write(task.noised_column, noised_prob, terms.noised_term);
}

template <class Scalar>
void whole(const Matrix<const Scalar>& logits, const RowTargets& targets, const Columns& columns, float* terms_3T,
           const Matrix<Scalar>& gradient, int64_t begin, int64_t end, float* scratch) {
  int64_t num_chunks = chunks_of(columns.live_end);
  float* references = scratch + num_chunks * kChunk;
  for (int64_t t = begin; t < end; ++t) {
    Scalar* out = gradient.data ? gradient.data + t * gradient.stride : nullptr;
    RowTask task = row_task(targets, columns, t);
    const Row& row = task.row;
    if (!is_active(row)) {
      write_terms({}, logits.rows, t, terms_3T);
      if (out) memset(out, 0, sizeof(Scalar) * logits.columns);
      continue;
    }

    RowReader<Scalar> reader = {logits.data + t * logits.stride, columns};
    RunningSum running;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      float buffer[kChunk];
      Vec reference = chunk_numerators(reader.chunk(chunk, buffer), scratch + chunk * kChunk, running);
      store(references + chunk * kLanes, reference);
    }
    MaxSum total = over_lanes(running);

    float ratio = signal_to_mass(row);
    Vec softplus = broadcast(0.0f), sigmoid = broadcast(0.0f);
    if (has_mass(row)) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        Vec scale = exp(load(references + chunk * kLanes) - total.maximum) * (ratio / total.sum);
        add_odds(scratch + chunk * kChunk, scale, ratio <= kLargestGroupedRatio, softplus, sigmoid);
      }
    }

    float target_distance = reader.logit(task.target_column) - total.maximum;
    float target_log_prob = target_distance - logf(total.sum);
    float target_prob = expf(target_distance) / total.sum;
    float noised_prob = expf(reader.logit(task.noised_column) - total.maximum) / total.sum;
    RowTerms terms = row_terms(row, target_log_prob, target_prob, noised_prob, sum_of_lanes(softplus),
                               sum_of_lanes(sigmoid));
    write_terms(terms, logits.rows, t, terms_3T);
    if (!out) continue;

    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      Vec scale = exp(load(references + chunk * kLanes) - total.maximum) / total.sum;
      write_chunk(scratch + chunk * kChunk, scale, ratio, terms, columns, chunk * kChunk, logits.columns, out);
    }
    write_rest(task, terms, ratio, columns, target_prob, noised_prob, logits.columns, out);
  }
}

template <class Scalar>
void statistics(const Matrix<const Scalar>& logits, const Ids& target, const Ids& noised, const Columns& columns,
                float* statistics_4T, int64_t begin, int64_t end, float* scratch) {
  int64_t num_chunks = chunks_of(columns.live_end);
  for (int64_t t = begin; t < end; ++t) {
    RowReader<Scalar> reader = {logits.data + t * logits.stride, columns};
    RunningSum running;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      float buffer[kChunk];
      chunk_numerators(reader.chunk(chunk, buffer), scratch, running);
    }
    MaxSum total = over_lanes(running);
    // A shard of nothing but padding has no maximum and no sum.
    statistics_4T[t] = total.maximum == -FLT_MAX ? -INFINITY : total.maximum;
    statistics_4T[logits.rows + t] = total.sum;
    statistics_4T[2 * logits.rows + t] = reader.logit(column_of(columns, id_at(target, t)));
    statistics_4T[3 * logits.rows + t] = reader.logit(column_of(columns, id_at(noised, t)));
  }
}

// Probabilities of a chunk from the log-sum-exp.
MD_FN void chunk_probs(const float* logits, float log_sum_exp, float* probs) {
  for (int64_t i = 0; i < kChunk; i += kLanes) store(probs + i, exp(load(logits + i) - log_sum_exp));
}

template <class Scalar>
void partial_sums(const Matrix<const Scalar>& logits, const float* log_sum_exp, const RowTargets& targets,
                  const Columns& columns, float* sums_2T, int64_t begin, int64_t end, float* scratch) {
  for (int64_t t = begin; t < end; ++t) {
    Row row = row_task(targets, columns, t).row;
    Vec softplus = broadcast(0.0f), sigmoid = broadcast(0.0f);
    if (is_active(row) && has_mass(row)) {
      RowReader<Scalar> reader = {logits.data + t * logits.stride, columns};
      float ratio = signal_to_mass(row);
      for (int64_t chunk = 0; chunk < chunks_of(columns.live_end); ++chunk) {
        float buffer[kChunk];
        chunk_probs(reader.chunk(chunk, buffer), log_sum_exp[t], scratch);
        add_odds(scratch, broadcast(ratio), ratio <= kLargestGroupedRatio, softplus, sigmoid);
      }
    }
    sums_2T[t] = sum_of_lanes(softplus);
    sums_2T[logits.rows + t] = sum_of_lanes(sigmoid);
  }
}

template <class Scalar>
void gradient(const Matrix<const Scalar>& logits, const RowSums& sums, const RowTargets& targets,
              const Columns& columns, const Matrix<Scalar>& gradient, int64_t begin, int64_t end, float* scratch) {
  int64_t num_chunks = chunks_of(columns.live_end);
  for (int64_t t = begin; t < end; ++t) {
    Scalar* out = gradient.data + t * gradient.stride;
    RowTask task = row_task(targets, columns, t);
    if (!is_active(task.row)) {
      memset(out, 0, sizeof(Scalar) * logits.columns);
      continue;
    }
    RowReader<Scalar> reader = {logits.data + t * logits.stride, columns};
    RowTerms terms = terms_of_sums(task.row, sums, t);
    float ratio = signal_to_mass(task.row);
    float target_prob = expf(sums.target_logit[t] - sums.log_sum_exp[t]);
    float noised_prob = expf(sums.noised_logit[t] - sums.log_sum_exp[t]);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      float buffer[kChunk];
      chunk_probs(reader.chunk(chunk, buffer), sums.log_sum_exp[t], scratch);
      write_chunk(scratch, broadcast(1.0f), ratio, terms, columns, chunk * kChunk, logits.columns, out);
    }
    write_rest(task, terms, ratio, columns, target_prob, noised_prob, logits.columns, out);
  }
}

void loss(const RowSums& sums, const RowTargets& targets, int64_t mask_id, int64_t rows, float* terms_3T,
          int64_t begin, int64_t end) {
  Columns no_columns = {0, 0, -1, mask_id};
  for (int64_t t = begin; t < end; ++t)
    write_terms(terms_of_sums(row_task(targets, no_columns, t).row, sums, t), rows, t, terms_3T);
}

template <class Scalar>
void scale(const Matrix<Scalar>& matrix, const float* factor, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (factor[t] == 1.0f) continue;
    Scalar* row = matrix.data + t * matrix.stride;
    int64_t i = 0;
    for (; i + kLanes <= matrix.columns; i += kLanes) store(row + i, load(row + i) * factor[t]);
    for (; i < matrix.columns; ++i) store_one(row + i, to_float(row[i]) * factor[t]);
  }
}

int64_t scratch_floats(int64_t columns) { return (chunks_of(columns) + 1) * (kChunk + kLanes); }

template <class Scalar>
constexpr RowKernels<Scalar> kernels_of() {
  return {scratch_floats,   statistics<Scalar>, partial_sums<Scalar>,
          gradient<Scalar>, whole<Scalar>,      scale<Scalar>};
}

}  // namespace

#define MD_JOIN(a, b) a##b
#define MD_NAME(isa) MD_JOIN(nelbo_kernels_, isa)

const NelboKernels* MD_NAME(MEGADIFF_ISA)() {
  static const NelboKernels kernels = {MD_TEXT(MEGADIFF_ISA), kernels_of<float>(), kernels_of<BFloat16>(),
                                       kernels_of<Half>(), loss};
  return &kernels;
}

}  // namespace megadiff
