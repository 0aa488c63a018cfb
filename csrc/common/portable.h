// What lets one header serve g++ and nvcc: MD_FN marks a function that both back ends inline, so that the tests on a
// CPU exercise the arithmetic that a GPU runs. Internal linkage on purpose: CPU kernels are compiled once per
// instruction set, and the linker must never replace one version's function by another's.
#pragma once

#include <stdint.h>

#define MD_TEXT(macro) MD_TEXT_OF(macro)
#define MD_TEXT_OF(value) #value

#ifdef __CUDACC__
#define MD_FN static __host__ __device__ __forceinline__
#else
#define MD_FN static inline __attribute__((always_inline))
#endif
