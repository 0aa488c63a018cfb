// The columns of a row on a GPU: how they are dealt to threads, read, kept as numerators of probabilities, and written.
//
// Chunks of eight columns, one or two 16-byte packs, go to a block's threads in turn. Columns are counted in "places"
// from the 16-byte boundary at or before the row's first logit, so that rows of any width and alignment move by vectors
// all the same; only packs that hold padding, the mask or another row are taken element by element.
//
// Numerators: e = 2^(logit*log2(e) - reference), where the reference is that of the chunk (its maximum) or of the row.
// A logit of -inf, a padded column and the mask have e = 0; NaN and +inf make the sum of the row NaN.
#pragma once

#include "common/device_vectors.cuh"
#include "common/views.h"

namespace megadiff {

constexpr int kChunk = 8;
constexpr float kLog2E = 1.44269504f;

template <class Scalar>
constexpr int kPacksPerChunk = kChunk / kPack<Scalar>;

// Base-2 logarithm of exp(x), rounded once and never contracted: numerators are relative to exactly this number.
__device__ __forceinline__ float log2_of_exp(float x) { return __fmul_rn(x, kLog2E); }

__device__ __forceinline__ float numerator(float logit, float reference) {
  return fast_exp2(fmaf(logit, kLog2E, -reference));
}

// Probabilities are factor * 2^(logit*log2(e) - reference + remainder).
struct Normalizer {
  float factor;
  float reference;
  float remainder;  // what rounding the reference has cost

  __device__ Normalizer times(float scale) const { return {factor * scale, reference, remainder}; }
  __device__ float probability(float logit) const {
    return factor * fast_exp2(fmaf(logit, kLog2E, -reference) + remainder);
  }
};

// The places [begin, end) of one block in a row, whose columns begin at place `shift`.
struct Slice {
  int shift;
  int begin;
  int end;
  int live_end;
  int mask;  // -1 where there is none

  template <class Scalar>
  __device__ int place(int chunk, int pack) const {
    return begin + ((chunk * kPacksPerChunk<Scalar> + pack) * int(blockDim.x) + int(threadIdx.x)) * kPack<Scalar>;
  }
};

// Elements between the 16-byte boundary at or before `row` and `row`.
template <class Scalar>
__device__ int shift_of(const Scalar* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Scalar));
}

template <class Scalar>
__device__ Slice slice_of(const Scalar* row, int64_t num_columns, const Columns& columns, int begin, int64_t size) {
  int shift = shift_of(row), end = int(min(begin + size, shift + num_columns));
  return {shift, begin, end, min(end, shift + int(columns.live_end)),
          columns.mask_column < 0 ? -1 : shift + int(columns.mask_column)};
}

// Reads the logits of a slice from memory, every time anew.
template <class Scalar>
struct Logits {
  static constexpr int kPacks = kPacksPerChunk<Scalar>;
  static constexpr int kInFlight = 4 / kPacks;  // chunks: 64 bytes a thread are asked for at once

  const Scalar* places;  // 16-byte aligned
  Slice slice;

  __device__ Logits(const Scalar* row, const Slice& slice) : places(row - slice.shift), slice(slice) {}

  // Calls function(chunk, logits) for the calling thread's chunks, -inf in columns that take no part.
  template <class Function>
  __device__ __forceinline__ void for_each_chunk(Function function) const {
    for (int chunk = 0; slice.place<Scalar>(chunk, 0) < slice.end; chunk += kInFlight) {
      if (is_plain(chunk, kInFlight)) {
        uint4 packs[kInFlight][kPacks];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) load(chunk + i, packs[i]);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          float logits[kChunk];
          unpack_chunk(packs[i], logits);
          function(chunk + i, logits);
        }
      } else {
        // Loads go out together here too: the block waits for the warp that holds the mask or the end of the row.
        uint4 packs[kInFlight][kPacks];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
          if (is_plain(chunk + i, 1)) load(chunk + i, packs[i]);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (slice.place<Scalar>(chunk + i, 0) >= slice.end) continue;
          float logits[kChunk];
          if (is_plain(chunk + i, 1))
            unpack_chunk(packs[i], logits);
          else
            load_singly(chunk + i, logits);
          function(chunk + i, logits);
        }
      }
    }
  }

  template <class Function>
  __device__ __forceinline__ void for_each_probability(const Normalizer& normalizer, Function function) const {
    for_each_chunk([&](int chunk, float (&values)[kChunk]) {
#pragma unroll
      for (float& value : values) value = normalizer.probability(value);
      function(chunk, values);
    });
  }

 private:
  // Whether all columns of the thread's next chunks take part.
  __device__ bool is_plain(int chunk, int num_chunks) const {
    bool plain = slice.place<Scalar>(chunk, 0) >= slice.shift &&
                 slice.place<Scalar>(chunk + num_chunks - 1, kPacks - 1) + kPack<Scalar> <= slice.live_end;
#pragma unroll
    for (int pack = 0; pack < num_chunks * kPacks; ++pack)
      plain &= unsigned(slice.mask - slice.place<Scalar>(chunk, pack)) >= unsigned(kPack<Scalar>);
    return plain;
  }

  __device__ void load(int chunk, uint4 (&packs)[kPacks]) const {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack)
      packs[pack] = __ldcg(reinterpret_cast<const uint4*>(places + slice.place<Scalar>(chunk, pack)));
  }

  __device__ static void unpack_chunk(const uint4 (&packs)[kPacks], float (&values)[kChunk]) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) unpack<Scalar>(packs[pack], values + pack * kPack<Scalar>);
  }

  __device__ void load_singly(int chunk, float (&values)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      int place = slice.place<Scalar>(chunk, i / kPack<Scalar>) + i % kPack<Scalar>;
      bool is_live = place >= slice.shift && place < slice.live_end && place != slice.mask;
      values[i] = is_live ? to_float(places[place]) : -INFINITY;
    }
  }
};

// Numerators of a slice in shared memory. A thread reads only what it wrote, so no barrier guards them; neighbouring
// threads have neighbouring float4, so no two of a quarter warp meet in a bank.
template <class Scalar>
struct Kept {
  float4* numerators;  // [chunk][half][thread]
  float* references;   // [chunk][thread]
  Slice slice;

  __device__ void keep(int chunk, const float (&values)[kChunk], float reference) {
    numerators[2 * chunk * blockDim.x + threadIdx.x] = {values[0], values[1], values[2], values[3]};
    numerators[(2 * chunk + 1) * blockDim.x + threadIdx.x] = {values[4], values[5], values[6], values[7]};
    references[chunk * blockDim.x + threadIdx.x] = reference;
  }

  template <class Function>
  __device__ __forceinline__ void for_each_probability(const Normalizer& normalizer, Function function) const {
#pragma unroll 2
    for (int chunk = 0; slice.place<Scalar>(chunk, 0) < slice.end; ++chunk) {
      float4 a = numerators[2 * chunk * blockDim.x + threadIdx.x];
      float4 b = numerators[(2 * chunk + 1) * blockDim.x + threadIdx.x];
      float scale = normalizer.factor * fast_exp2(references[chunk * blockDim.x + threadIdx.x] - normalizer.reference);
      float values[kChunk] = {a.x * scale, a.y * scale, a.z * scale, a.w * scale,
                              b.x * scale, b.y * scale, b.z * scale, b.w * scale};
      function(chunk, values);
    }
  }
};

// The gradient of a slice. Stores by vectors where its rows are as far from a 16-byte boundary as those of the logits.
template <class Scalar>
struct Gradient {
  Scalar* places;
  Slice slice;
  bool is_aligned;

  __device__ Gradient(Scalar* row, const Slice& slice)
      : places(row - slice.shift), slice(slice), is_aligned(shift_of(row) == slice.shift) {}

  __device__ void store(int chunk, const float (&values)[kChunk]) const {
#pragma unroll
    for (int pack_number = 0; pack_number < kPacksPerChunk<Scalar>; ++pack_number) {
      int place = slice.place<Scalar>(chunk, pack_number);
      const float* of_pack = values + pack_number * kPack<Scalar>;
      if (is_aligned && place >= slice.shift && place + kPack<Scalar> <= slice.end) {
        __stwb(reinterpret_cast<uint4*>(places + place), pack<Scalar>(of_pack));
      } else {
#pragma unroll
        for (int i = 0; i < kPack<Scalar>; ++i)
          if (place + i >= slice.shift && place + i < slice.end) store_float(places + place + i, of_pack[i]);
      }
    }
  }

  __device__ void fill_with_zeros() const {
    float zeros[kChunk] = {};
    for (int chunk = 0; slice.place<Scalar>(chunk, 0) < slice.end; ++chunk) store(chunk, zeros);
  }
};

}  // namespace megadiff
