// What a thread handles at once, 16 bytes of float, bfloat16 or half, and the special functions behind one instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include "common/portable.h"

namespace megadiff {

// The instructions themselves, without the handling of denormals that exp2f and division wrap around them: results
// below 2^-126 are 0. Errors are 2 and 1 units in the last place.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef MEGADIFF_CUDA_EMULATOR
  return cuda_emulator::ex2_approx_ftz(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef MEGADIFF_CUDA_EMULATOR
  return cuda_emulator::rcp_approx_ftz(x);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// The larger one, NaN where either is: fmaxf would drop it.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#ifdef MEGADIFF_CUDA_EMULATOR
  return a > b || a != a ? a : b;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

template <class Scalar>
constexpr int kPack = 16 / sizeof(Scalar);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void store_float(float* place, float x) { *place = x; }
__device__ __forceinline__ void store_float(__nv_bfloat16* place, float x) { *place = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_float(__half* place, float x) { *place = __float2half_rn(x); }

// One 32-bit word of a pack to floats and back; `words` is the first float of the word.
__device__ __forceinline__ void unpack_word(unsigned word, float* values, float) { values[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack_word(unsigned word, float* values, __nv_bfloat16) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(unsigned word, float* values, __half) {
  float2 both = __half22float2(*reinterpret_cast<__half2*>(&word));
  values[0] = both.x;
  values[1] = both.y;
}

__device__ __forceinline__ unsigned pack_word(const float* values, float) { return __float_as_uint(values[0]); }
__device__ __forceinline__ unsigned pack_word(const float* values, __nv_bfloat16) {
  __nv_bfloat162 both = __floats2bfloat162_rn(values[0], values[1]);
  return *reinterpret_cast<unsigned*>(&both);
}
__device__ __forceinline__ unsigned pack_word(const float* values, __half) {
  __half2 both = __floats2half2_rn(values[0], values[1]);
  return *reinterpret_cast<unsigned*>(&both);
}

template <class Scalar>
__device__ __forceinline__ void unpack(const uint4& pack, float* values) {
  constexpr int kPerWord = 4 / sizeof(Scalar);
  unpack_word(pack.x, values, Scalar{});
  unpack_word(pack.y, values + kPerWord, Scalar{});
  unpack_word(pack.z, values + 2 * kPerWord, Scalar{});
  unpack_word(pack.w, values + 3 * kPerWord, Scalar{});
}

template <class Scalar>
__device__ __forceinline__ uint4 pack(const float* values) {
  constexpr int kPerWord = 4 / sizeof(Scalar);
  return {pack_word(values, Scalar{}), pack_word(values + kPerWord, Scalar{}),
          pack_word(values + 2 * kPerWord, Scalar{}), pack_word(values + 3 * kPerWord, Scalar{})};
}

}  // namespace megadiff
