// Vectors of float and the three things that the compilers do not vectorise by themselves: exp, log1p, and the 16-bit
// formats. Written in the vector extension of g++ and clang, so one source serves AVX-512, AVX2, SSE2 and NEON: the
// width is that of the instruction set this file is compiled for. NaN passes through everything.
//
// The polynomials are minimax fits, their error far below the rounding of float: 3e-9 (exp), 6e-9 (log1p), relative.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/elements.h"

namespace megadiff {

#if defined(__AVX512F__) && defined(__AVX512BW__)
static constexpr int kLanes = 16;
#elif defined(__AVX2__)
static constexpr int kLanes = 8;
#else
static constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
MD_FN To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

MD_FN Vec broadcast(float value) { return Vec{} + value; }

MD_FN Vec load(const float* from) {
  Vec value;
  memcpy(&value, from, sizeof(Vec));
  return value;
}

MD_FN void store(float* to, const Vec& value) { memcpy(to, &value, sizeof(Vec)); }

MD_FN Vec maximum(const Vec& a, const Vec& b) { return a > b ? a : b; }

MD_FN float sum_of_lanes(const Vec& value) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

// exp(x) for x up to about 88; 0 below -87.3, where float's normal numbers end.
MD_FN Vec exp(const Vec& x) {
  const float least = -87.3f;
  const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  Vec clamped = x < least ? broadcast(least) : x;
  Vec shifted = clamped * 1.442695041f + round_to_integer;
  Vec exponent = shifted - round_to_integer;
  Vec r = clamped - exponent * 0.693359375f;  // ln 2 in two parts, the first of few bits: the product is exact
  r = r + exponent * 2.12194440e-4f;
  Vec tail = (((r * 1.38144666e-3f + 8.36874777e-3f) * r + 4.16683898e-2f) * r + 1.66665203e-1f) * r + 4.99999931e-1f;
  Vec mantissa = r * r * tail + r + 1.0f;
  Vec result = mantissa * bit_cast<Vec>((bit_cast<BitVec>(shifted) << 23) + 0x3f800000u);  // times 2^exponent
  return x < least ? broadcast(0.0f) : result;
}

// log(1 + x) for 0 <= x < 1e38, accurate relative to x however small it is.
MD_FN Vec log1p(const Vec& x) {
  const int32_t sqrt_half = 0x3f3504f3;
  Vec y = x + 1.0f;
  Vec rounding = x - (y - 1.0f);  // what y has lost of x; below, scaled along with y
  IntVec above = bit_cast<IntVec>(y) - sqrt_half;
  IntVec exponent = above >> 23;
  Vec mantissa = bit_cast<Vec>((above & 0x7fffff) + sqrt_half);  // in [sqrt(1/2), sqrt(2))
  Vec scale = bit_cast<Vec>((127 - exponent) << 23);
  Vec f = (mantissa - 1.0f) + rounding * scale;
  Vec e = __builtin_convertvector(exponent, Vec);
  Vec q = ((((((f * -7.63441892e-2f + 1.27619347e-1f) * f - 1.31603773e-1f) * f + 1.42017143e-1f) * f -
             1.66233348e-1f) * f + 2.00012281e-1f) * f - 2.50008215e-1f) * f + 3.33333321e-1f;
  Vec square = f * f;
  Vec tail = square * f * q + e * -2.12194440e-4f - square * 0.5f;
  return f + tail + e * 0.693359375f;
}

MD_FN float to_float(float value) { return value; }

MD_FN float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// Half to float by one exact multiplication, which places subnormals too; infinities and NaN are put back by hand.
MD_FN float to_float(Half value) {
  uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  float result = bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude + 0x70000000u : bit_cast<uint32_t>(result);
  return bit_cast<float>(bits | (value.bits & 0x8000u) << 16);
}

MD_FN Vec load(const BFloat16* from) {
  ShortVec bits;
  memcpy(&bits, from, sizeof(bits));
  return bit_cast<Vec>(__builtin_convertvector(bits, BitVec) << 16);
}

MD_FN Vec load(const Half* from) {
  ShortVec shorts;
  memcpy(&shorts, from, sizeof(shorts));
  BitVec bits = __builtin_convertvector(shorts, BitVec);
  BitVec magnitude = (bits & 0x7fffu) << 13;
  BitVec finite = bit_cast<BitVec>(bit_cast<Vec>(magnitude) * 0x1p112f);
  BitVec result = magnitude >= 0x0f800000u ? magnitude + 0x70000000u : finite;
  return bit_cast<Vec>(result | (bits & 0x8000u) << 16);
}

// Rounding to nearest, ties to even, as torch does.
MD_FN void store(BFloat16* to, const Vec& value) {
  BitVec bits = bit_cast<BitVec>(value);
  BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = value != value ? (bits >> 16) | 0x40u : rounded;
  ShortVec shorts = __builtin_convertvector(rounded, ShortVec);
  memcpy(to, &shorts, sizeof(shorts));
}

MD_FN void store(Half* to, const Vec& value) {
  BitVec bits = bit_cast<BitVec>(value);
  BitVec magnitude = bits & 0x7fffffffu;
  // Adding 0.5 leaves a subnormal half, already rounded, in the low bits of the sum.
  BitVec subnormal = bit_cast<BitVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  BitVec normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  BitVec result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? BitVec{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? BitVec{} + 0x7e00u : result;
  ShortVec shorts = __builtin_convertvector(result | (bits >> 16 & 0x8000u), ShortVec);
  memcpy(to, &shorts, sizeof(shorts));
}

template <class Scalar>
MD_FN void store_one(Scalar* to, float value) {
  Scalar lanes[kLanes];
  store(lanes, broadcast(value));
  *to = lanes[0];
}

}  // namespace megadiff
