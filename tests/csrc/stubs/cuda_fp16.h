// Half precision, for tests/csrc/cuda_emulator.h: torch's own conversions, rounding to nearest even.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

using __half = c10::Half;
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
