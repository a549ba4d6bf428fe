// Test only: what csrc/cuda/device.cuh and launch.h need, on the host, so that g++ compiles the
// kernels as they are. Threads of a block (of a cluster) are fibers that run one at a time, from
// one synchronisation to the next, in ascending or descending order. Shared memory is poisoned
// before a block starts and fenced; asynchronous copies land when they are waited for; vector
// accesses must be 16-byte aligned. A violation, or a barrier that not all threads reach, aborts.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace pk_emulation {

struct Index {
  unsigned x;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t phase = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];
};

struct Block {
  Index index;
  int rank;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<uint4> shared;
};

struct Copy {
  uint4* to;
  const uint4* from;
};

struct Fiber {
  jmp_buf state;
  ucontext_t start;
  bool started = false;
  bool done = true;
  Index thread;
  Block* block = nullptr;
  uint64_t cluster_phase = 0;
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first, then the open one
};

struct Machine {
  std::mutex mutex;
  int major = 9;
  int max_cluster = 8;
  bool backward = false;
  Index block_dim;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  std::vector<Block> cluster;
  Barrier cluster_barrier;
  uint64_t progress = 0;
};

inline Machine machine;

inline void yield() {
  if (_setjmp(machine.running->state) == 0) _longjmp(machine.scheduler, 1);
}

inline uint64_t arrive(Barrier& barrier) {
  const uint64_t phase = barrier.phase;
  ++machine.progress;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  return phase;
}

inline void wait(const Barrier& barrier, uint64_t phase) {
  while (barrier.phase == phase) yield();
}

// A fiber takes one thread after the other; it is made once.
inline void run_fiber() {
  for (;;) {
    machine.body();
    for (const auto& group : machine.running->copies) {
      if (!group.empty()) fail("a thread ended with asynchronous copies under way");
    }
    machine.running->done = true;
    ++machine.progress;
    yield();
  }
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  constexpr size_t kStack = 1 << 16;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber.start.uc_stack.ss_sp == MAP_FAILED) fail("no memory for a stack");
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

constexpr size_t kFence = 64;  // vectors after the block's shared memory that stay poisoned

inline void run_cluster(int64_t first, int size, int threads, size_t shared) {
  machine.cluster.resize(size_t(size));
  machine.cluster_barrier = {size * threads, 0, 0};
  const size_t total = size_t(size) * size_t(threads);
  while (machine.fibers.size() < total) machine.fibers.push_back(std::make_unique<Fiber>());
  const size_t vectors = (shared + sizeof(uint4) - 1) / sizeof(uint4);
  for (int rank = 0; rank < size; ++rank) {
    Block& block = machine.cluster[size_t(rank)];
    block.index = {unsigned(first + rank)};
    block.rank = rank;
    block.barrier = {threads, 0, 0};
    block.warps.assign(size_t(threads / 32), Warp());
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
    block.shared.resize(vectors + kFence);
    std::memset(static_cast<void*>(block.shared.data()), 0xff, block.shared.size() * sizeof(uint4));
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *machine.fibers[size_t(rank * threads + t)];
      fiber.thread = {unsigned(t)};
      fiber.block = &block;
      fiber.done = false;
      fiber.copies.assign(1, {});
    }
  }
  for (size_t left = total; left > 0;) {
    const uint64_t before = machine.progress;
    for (size_t i = 0; i < total; ++i) {
      Fiber& fiber = *machine.fibers[machine.backward ? total - 1 - i : i];
      if (fiber.done) continue;
      resume(fiber);
      if (fiber.done) --left;
    }
    if (machine.progress == before) fail("a barrier or shuffle that not all its threads reach");
  }
  for (const Block& block : machine.cluster) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(block.shared.data());
    for (size_t i = shared; i < block.shared.size() * sizeof(uint4); ++i) {
      if (bytes[i] != 0xff) fail("a write past the end of shared memory");
    }
  }
}

template <class Pointer>
inline void check_aligned(Pointer at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("a misaligned vector access");
}

// What every lane of the warp passed, indexed by lane.
template <class Value>
inline const uint64_t* exchange(Value value) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  const unsigned thread = machine.running->thread.x;
  Warp& warp = machine.running->block->warps[thread / 32];
  // Two sets of slots: nobody is two exchanges ahead of a lane that still reads.
  uint64_t* slots = warp.slots[warp.barrier.phase % 2];
  std::memcpy(&slots[thread % 32], &value, sizeof value);
  wait(warp.barrier, arrive(warp.barrier));
  return slots;
}

}  // namespace pk_emulation

#define threadIdx (pk_emulation::machine.running->thread)
#define blockIdx (pk_emulation::machine.running->block->index)
#define blockDim (pk_emulation::machine.block_dim)

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

inline float __uint_as_float(uint32_t bits) {
  return pk::as_float(bits);
}

inline uint32_t __float_as_uint(float x) {
  return pk::as_bits(x);
}

inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline int min(int a, int b) {
  return a < b ? a : b;
}

inline int max(int a, int b) {
  return a > b ? a : b;
}

inline void __syncthreads() {
  pk_emulation::Barrier& barrier = pk_emulation::machine.running->block->barrier;
  pk_emulation::wait(barrier, pk_emulation::arrive(barrier));
}

template <class Value>
inline Value __shfl_xor_sync(unsigned, Value value, int step) {
  const uint64_t* slots = pk_emulation::exchange(value);
  std::memcpy(&value, &slots[(threadIdx.x % 32) ^ unsigned(step)], sizeof value);
  return value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* slots = pk_emulation::exchange(uint64_t(vote));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(slots[lane]) << lane;
  return votes;
}

namespace pk {

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(pk_emulation::machine.running->block->shared.data());
}

inline uint4 load_vector(const uint4* at) {
  pk_emulation::check_aligned(at);
  return *at;
}

inline uint4 load_streaming(const uint4* at) {
  return load_vector(at);
}

inline void store_vector(uint4* at, const uint4& vector) {
  pk_emulation::check_aligned(at);
  *at = vector;
}

inline void copy_async(uint4* shared, const uint4* global) {
  pk_emulation::check_aligned(shared);
  pk_emulation::check_aligned(global);
  pk_emulation::machine.running->copies.back().push_back({shared, global});
}

inline void commit_copies() {
  pk_emulation::machine.running->copies.emplace_back();
}

inline void wait_copies(int pending) {
  auto& copies = pk_emulation::machine.running->copies;
  while (int(copies.size()) - 1 > pending) {
    for (const auto& copy : copies.front()) *copy.to = *copy.from;
    copies.erase(copies.begin());
  }
}

inline int cluster_size() {
  return int(pk_emulation::machine.cluster.size());
}

inline int cluster_rank() {
  return pk_emulation::machine.running->block->rank;
}

inline void cluster_arrive() {
  auto& machine = pk_emulation::machine;
  machine.running->cluster_phase = pk_emulation::arrive(machine.cluster_barrier);
}

inline void cluster_wait() {
  auto& machine = pk_emulation::machine;
  pk_emulation::wait(machine.cluster_barrier, machine.running->cluster_phase);
}

inline float read_peer(const float* own, int rank) {
  auto& machine = pk_emulation::machine;
  if (machine.fibers[size_t(rank) * machine.block_dim.x]->done)
    pk_emulation::fail("a read of the shared memory of a block that has ended");
  auto& peer = machine.cluster[size_t(rank)];
  const ptrdiff_t at = reinterpret_cast<const unsigned char*>(own) - dynamic_shared();
  float value;
  std::memcpy(&value, reinterpret_cast<unsigned char*>(peer.shared.data()) + at, sizeof value);
  return value;
}

template <class T>
inline void unpack_pair(uint32_t bits, float& low, float& high) {
  low = to_float(T{uint16_t(bits)});
  high = to_float(T{uint16_t(bits >> 16)});
}

template <class T>
inline uint32_t pack_pair(float low, float high) {
  T l, h;
  from_float(low, l);
  from_float(high, h);
  return uint32_t(l.bits) | uint32_t(h.bits) << 16;
}

inline const char* error_text(int32_t code) {
  return code == 0 ? "no error" : code == 1 ? "invalid argument" : "unknown error";
}

inline int32_t has_code(void (*)()) {
  return 0;
}

}  // namespace pk
