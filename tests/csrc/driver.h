// What every emulated driver offers to ctypes beside its kernels: guarded memory, the device, how the last launch went.
#pragma once

#include <stdint.h>

#include <exception>
#include <string>

#include "cuda_emulator.h"

inline std::string last_error;

// Null, or what went wrong; valid until the next call.
template <class Function>
const char* outcome(Function function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

extern "C" {

// See new_guarded() of the emulator.
void* guarded_new(int64_t size, int64_t alignment, bool at_end, void** mapping, int64_t* mapped) {
  auto memory = cuda_emulator::new_guarded(size, alignment, at_end);
  *mapping = memory.mapping;
  *mapped = memory.mapped;
  return memory.data;
}

void guarded_free(void* mapping, int64_t mapped) {
  cuda_emulator::free_guarded({nullptr, static_cast<unsigned char*>(mapping), size_t(mapped)});
}

// From now on nothing of it may be touched.
void guarded_forbid(void* mapping, int64_t mapped) { mprotect(mapping, mapped, PROT_NONE); }

void set_device(const cuda_emulator::Device* device) { cuda_emulator::device = *device; }
void set_seed(unsigned seed) { cuda_emulator::random_order.seed(seed); }
void get_last_launch(cuda_emulator::LaunchRecord* record) { *record = cuda_emulator::last_launch; }
}
