// Runs the real source of our CUDA kernels on a CPU, thread by thread, to test it where there is no GPU.
//
//     g++ -std=c++17 -x c++ -include tests/csrc/cuda_emulator.h -Itests/csrc/stubs -Icsrc ... tests/csrc/my_driver.cpp
//
// stubs/ holds headers of CUDA's names that bring in this one; the driver includes a .cuh and calls its launchers.
// Every CUDA thread is a fiber with a stack of its own; the blocks of a cluster run together, clusters one by one. From
// barrier to barrier the fibers go on in a random order (seeded), and now and then a warp stands still for long while
// others go on, so that a missing barrier shows as a wrong result. Found are
//
//     barriers, cluster barriers and shuffles that some threads never reach   "barrier divergence"
//     accesses outside memory from new_guarded(), and outside shared memory   "access outside"
//     16-byte accesses at other addresses (with -fsanitize=alignment -fsanitize-undefined-trap-on-error)
//     shared memory that is read before it is written, or before its block has begun or after it has ended: holds NaN
//     launches with more shared memory than the device of `device` has or the kernel has asked for
//
// as exceptions from the launch. Not modelled: timing, memory order weaker than program order (a relaxed arrival is one
// like any other), races between fibers that no barrier would have ordered either, registers and launch bounds, code
// below __CUDA_ARCH__ (a device without clusters runs the code of one that has them), loading and carve-outs. Kernels get shared memory from dynamic_shared() of common/cuda_launch.cuh,
// and use warps with all their lanes. Not thread-safe.
#pragma once
#define MEGADIFF_CUDA_EMULATOR

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace cuda_emulator {

struct Device {
  int capability = 90;
  int multiprocessors = 132;
  int shared_bytes_per_block = 227 * 1024;
  int shared_bytes_per_multiprocessor = 228 * 1024;
  int code_capability = 0;  // of intermediate code that the device compiles for itself; 0 where it runs its own
};
inline Device device;

struct LaunchRecord {
  int64_t blocks;
  int threads;
  int cluster;
  int shared_bytes;
};
inline LaunchRecord last_launch;
inline std::mt19937 random_order(0);

// `size` bytes between two pages that may not be touched: against the second, but for alignment, or the first.
struct Guarded {
  unsigned char* data;
  unsigned char* mapping;
  size_t mapped;
};

inline Guarded new_guarded(size_t size, size_t alignment, bool at_end) {
  size_t page = sysconf(_SC_PAGESIZE), inner = (size + page - 1) / page * page;
  auto* mapping = static_cast<unsigned char*>(
      mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (inner) mprotect(mapping + page, inner, PROT_READ | PROT_WRITE);
  return {mapping + page + (at_end ? (inner - size) / alignment * alignment : 0), mapping, inner + 2 * page};
}

inline void free_guarded(const Guarded& memory) { munmap(memory.mapping, memory.mapped); }

struct Barrier {
  const char* name;
  int expected;
  int arrived = 0;
  int64_t phase = 0;

  int64_t arrive() {
    int64_t arrived_in = phase;
    if (++arrived == expected) arrived = 0, ++phase;
    return arrived_in;
  }
};

struct Block {
  unsigned index;
  int rank;
  Guarded shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<std::vector<uint64_t>> lanes;  // [warp][parity * 32 + lane], for shuffles
  int started = 0;
  int ended = 0;
};

struct Fiber {
  Block* block = nullptr;
  unsigned thread = 0;
  bool is_done = false;
  Barrier* waits_at = nullptr;
  int64_t awaited_phase = 0;
  int64_t cluster_phase = 0;
  bool shuffle_parity = false;
  bool has_context = false;
  int stalled_rounds = 0;  // of the warp, at its first thread
  ucontext_t first_context;
  jmp_buf context;
  std::unique_ptr<unsigned char[]> stack;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;  // of the cluster that runs
  Barrier cluster;
  size_t shared_bytes;
  std::function<void()> kernel;
  Fiber* running = nullptr;
  sigjmp_buf scheduler;
  std::string error;
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  machine.error = what;
  if (machine.running)
    machine.error += ", by thread " + std::to_string(machine.running->thread) + " of block " +
                     std::to_string(machine.running->block->index);
  siglongjmp(machine.scheduler, 1);
}

inline void yield() {
  if (_setjmp(machine.running->context) == 0) siglongjmp(machine.scheduler, 2);
}

inline void wait(Barrier& barrier, int64_t phase) {
  machine.running->waits_at = &barrier;
  machine.running->awaited_phase = phase;
  yield();
}

inline unsigned char* dynamic_shared() { return machine.running->block->shared.data; }

inline void fiber_main() {
  constexpr int kNoise = 0xff;  // makes NaN of floats
  for (;;) {
    Block& block = *machine.running->block;
    if (block.started++ == 0) memset(block.shared.data, kNoise, machine.shared_bytes);
    machine.kernel();
    if (++block.ended == int(blockDim.x)) memset(block.shared.data, kNoise, machine.shared_bytes);
    machine.running->is_done = true;
    yield();
  }
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  threadIdx = dim3(fiber.thread);
  blockIdx = dim3(fiber.block->index);
  if (fiber.has_context) _longjmp(fiber.context, 1);
  fiber.has_context = true;
  constexpr size_t kStackBytes = 64 * 1024;
  fiber.stack.reset(new unsigned char[kStackBytes]);
  getcontext(&fiber.first_context);
  fiber.first_context.uc_stack.ss_sp = fiber.stack.get();
  fiber.first_context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.first_context, fiber_main, 0);
  setcontext(&fiber.first_context);
}

inline std::string who_waits_where() {
  std::map<std::string, int> places;
  for (auto& fiber : machine.fibers)
    if (fiber->block) ++places[fiber->is_done ? "have ended" : std::string("wait at ") + fiber->waits_at->name];
  std::string text = "barrier divergence from block " + std::to_string(machine.blocks[0].index) + " on: of its threads";
  for (auto& [place, count] : places) text += " " + std::to_string(count) + " " + place + ",";
  text.pop_back();
  return text;
}

inline Fiber& first_of_warp(const Fiber& fiber) {
  return *machine.fibers[fiber.block->rank * blockDim.x + fiber.thread / 32 * 32];
}

inline void stall_some_warps() {
  for (auto& fiber : machine.fibers)
    if (fiber->block && fiber->thread % 32 == 0) {
      if (fiber->stalled_rounds > 0)
        --fiber->stalled_rounds;
      else if (random_order() % 16 == 0)
        fiber->stalled_rounds = random_order() % 48;
    }
}

// Runs the fibers of one cluster to their end; false and machine.error where they cannot get there.
inline bool run_cluster() {
  std::vector<Fiber*> order;
  for (auto& fiber : machine.fibers)
    if (fiber->block) order.push_back(fiber.get());
  static size_t next;  // static: survive the jumps
  static bool progressed, stalled;
  next = order.size();
  progressed = true;
  if (sigsetjmp(machine.scheduler, 0) == 1) return false;
  for (;;) {
    if (next == order.size()) {
      if (std::all_of(order.begin(), order.end(), [](Fiber* fiber) { return fiber->is_done; })) return true;
      machine.running = nullptr;
      if (!progressed && !stalled) fail(who_waits_where());
      std::shuffle(order.begin(), order.end(), random_order);
      next = 0;
      progressed = stalled = false;
      stall_some_warps();
    }
    Fiber& fiber = *order[next++];
    bool is_waiting = fiber.waits_at && fiber.waits_at->phase == fiber.awaited_phase;
    if (fiber.is_done || is_waiting) continue;
    if (first_of_warp(fiber).stalled_rounds > 0) {
      stalled = true;
      continue;
    }
    fiber.waits_at = nullptr;
    progressed = true;
    resume(fiber);  // comes back at sigsetjmp
  }
}

inline void on_signal(int signal, siginfo_t* info, void*) {
  char address[32];
  snprintf(address, sizeof(address), "%p", info->si_addr);
  bool is_trap = signal == SIGILL || signal == SIGTRAP;
  fail(is_trap ? std::string("misaligned access") : std::string("access outside memory at ") + address);
}

inline void run_grid(int64_t num_blocks, int threads, int cluster, size_t shared_bytes, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  machine.shared_bytes = shared_bytes;
  machine.blocks.resize(cluster);
  machine.fibers.resize(std::max(machine.fibers.size(), size_t(cluster) * threads));
  blockDim = dim3(threads);
  gridDim = dim3(unsigned(num_blocks));
  for (auto& block : machine.blocks) block.shared = new_guarded(shared_bytes, 16, true);

  static unsigned char signal_stack[64 * 1024];
  stack_t stack = {signal_stack, 0, sizeof(signal_stack)}, old_stack;
  struct sigaction action = {}, old_actions[4];
  const int signals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaltstack(&stack, &old_stack);
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &old_actions[i]);

  std::vector<int64_t> clusters(num_blocks / cluster);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), random_order);
  bool is_fine = true;
  for (size_t i = 0; i < clusters.size() && is_fine; ++i) {
    int num_warps = (threads + 31) / 32;
    machine.cluster = {"cluster.sync()", cluster * threads};
    for (int rank = 0; rank < cluster; ++rank) {
      Block& block = machine.blocks[rank];
      block = {unsigned(clusters[i] * cluster + rank), rank, block.shared, {"__syncthreads()", threads}, {}, {}};
      for (int warp = 0; warp < num_warps; ++warp)
        block.warps.push_back({"a shuffle", std::min(32, threads - 32 * warp)});
      block.lanes.assign(num_warps, std::vector<uint64_t>(64));
    }
    for (size_t number = 0; number < machine.fibers.size(); ++number) {
      auto& fiber = machine.fibers[number];
      if (!fiber) fiber.reset(new Fiber);
      fiber->block = number < size_t(cluster) * threads ? &machine.blocks[number / threads] : nullptr;
      fiber->thread = number % threads;
      fiber->is_done = fiber->shuffle_parity = false;
      fiber->waits_at = nullptr;
    }
    is_fine = run_cluster();
  }
  machine.running = nullptr;
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  for (auto& block : machine.blocks) free_guarded(block.shared);
  if (is_fine) return;
  machine.fibers.clear();  // they stand in the middle of something
  throw std::runtime_error(machine.error);
}

// Value that another lane of the warp gives in the same call.
template <class T>
T exchange(unsigned mask, T value, int source_of_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  if (mask != 0xffffffffu) fail("shuffle of a part of the warp, which the emulator does not model");
  Fiber& fiber = *machine.running;
  Barrier& warp = fiber.block->warps[fiber.thread / 32];
  uint64_t* lanes = fiber.block->lanes[fiber.thread / 32].data() + 32 * fiber.shuffle_parity;
  fiber.shuffle_parity = !fiber.shuffle_parity;  // the next call may begin before all have read this one's
  memcpy(&lanes[fiber.thread % 32], &value, sizeof(T));
  if (source_of_lane < 0 || source_of_lane >= warp.expected) fail("shuffle from a lane that the warp does not have");
  wait(warp, warp.arrive());
  memcpy(&value, &lanes[source_of_lane], sizeof(T));
  return value;
}

}  // namespace cuda_emulator

inline void __syncthreads() {
  auto& barrier = cuda_emulator::machine.running->block->barrier;
  cuda_emulator::wait(barrier, barrier.arrive());
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_emulator::exchange(mask, value, int(threadIdx.x % 32) ^ lane_mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_emulator::exchange(mask, value, lane);
}
