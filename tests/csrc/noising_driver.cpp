// The launch of csrc/noising/noising_kernel.cuh with a C interface, for the emulator.
#include "driver.h"
#include "noising/noising_kernel.cuh"

extern "C" const char* noise_rows(bool is_wide, const megadiff::NoisingTask<int64_t>* task) {
  return outcome([&] {
    if (is_wide)
      megadiff::noise_rows_on_gpu(*task, nullptr);
    else  // the ids' type changes no offset
      megadiff::noise_rows_on_gpu(*reinterpret_cast<const megadiff::NoisingTask<int32_t>*>(task), nullptr);
  });
}
