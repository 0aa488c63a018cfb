// Element types of logits on a CPU beside float, as their bits; common/simd.h knows what they mean.
#pragma once

#include <stdint.h>

#include "common/portable.h"

namespace megadiff {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace megadiff
