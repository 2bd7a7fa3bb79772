// Runs the CUDA C++ that TileLang generates for a plain SIMT kernel on the CPU, one block at a time, or the blocks of a cluster
// together. A thread is a fiber that is left at barriers and warp collectives only; the order in which fibers run is chosen, so that
// a missing barrier shows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef unsigned char uchar;
typedef unsigned int uint;
typedef unsigned short ushort;
struct uint4 {
  uint x, y, z, w;
};
struct bfloat16_t {
  ushort bits;
};
#define __global__
#define __restrict__
#define __launch_bounds__(...)
using std::max;
using std::min;

namespace emulator {

#ifndef EMULATED_CLUSTER
#define EMULATED_CLUSTER 1
#endif
constexpr int cluster = EMULATED_CLUSTER;  // blocks
constexpr int max_threads = 1024 * cluster;
constexpr int lanes = 32;
constexpr int stack_bytes = 65536;
constexpr int block_bytes = 256 * 1024;  // of shared memory
constexpr int shared_bytes = block_bytes * cluster;

enum class State { runnable, at_barrier, at_collective, done };
enum Order { ascending, descending, shuffled };

struct Fiber {
  void *stack_pointer;
  char *stack;
  State state;
};

// A warp's lanes exchange through one of two slots, so that a lane may reach the next collective before others have read.
struct Warp {
  int waiting, generation;
  unsigned long long values[2][lanes];
};

static Fiber fibers[max_threads];
static Warp warps[max_threads / lanes];
static void *scheduler;
static void (*kernel)();
static int current, block_threads, first_block;
static int rank() { return current / block_threads; }  // of the block in its cluster
static uchar *shared;
static long long *arguments;

extern "C" void switch_stack(void **save, void *load);
asm(R"(
.text
.globl switch_stack
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

static void leave(State state) {
  fibers[current].state = state;
  switch_stack(&fibers[current].stack_pointer, scheduler);
}

static void enter() {
  kernel();
  leave(State::done);
}

static unsigned long long *collective(unsigned long long value) {
  Warp &warp = warps[current / lanes];
  int slot = warp.generation & 1;
  warp.values[slot][current % lanes] = value;
  warp.waiting++;
  leave(State::at_collective);
  return warp.values[slot];
}

static void prepare(Fiber &fiber) {
  if (!fiber.stack) fiber.stack = (char *)malloc(stack_bytes);
  void **top = (void **)((uintptr_t)(fiber.stack + stack_bytes) & ~(uintptr_t)15);
  *--top = nullptr;
  *--top = (void *)enter;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.state = State::runnable;
}

static void release(std::vector<int> &threads, State state) {
  for (int thread : threads)
    if (fibers[thread].state == state) fibers[thread].state = State::runnable;
}

static void (*forget)() = nullptr;  // what the last block left of the hardware's state

// Returns false where no thread can go on: some wait at a barrier or collective that others never reach.
static bool run_block(int thread_count, Order order, uint &random) {
  std::vector<int> threads(thread_count);
  for (int i = 0; i < thread_count; i++) {
    prepare(fibers[i]);
    threads[i] = i;
  }
  for (Warp &warp : warps) warp.waiting = warp.generation = 0;
  if (forget) forget();
  if (order == descending) std::reverse(threads.begin(), threads.end());
  for (int live = thread_count; live;) {
    bool moved = false;
    int at_barrier = 0;
    for (int i = thread_count - 1; order == shuffled && i > 0; i--) {
      random = random * 1664525u + 1013904223u;
      std::swap(threads[i], threads[(random >> 8) % (i + 1)]);
    }
    for (int thread : threads) {
      if (fibers[thread].state != State::runnable) continue;
      moved = true;
      current = thread;
      switch_stack(&scheduler, fibers[thread].stack_pointer);
      live -= fibers[thread].state == State::done;
      Warp &warp = warps[thread / lanes];
      if (warp.waiting == lanes) {
        warp.waiting = 0;
        warp.generation++;
        for (int lane = 0; lane < lanes; lane++) fibers[thread / lanes * lanes + lane].state = State::runnable;
      }
    }
    for (int thread : threads) at_barrier += fibers[thread].state == State::at_barrier;
    if (live && at_barrier == live)
      release(threads, State::at_barrier);
    else if (!moved)
      return false;
  }
  return true;
}

struct Coordinates {
  int x, y, z;
};
struct CurrentThread {
  struct {
    operator int() const { return current % block_threads; }
  } x;
};
struct CurrentBlock {
  struct {
    operator int() const { return first_block + rank(); }
  } x;
  int y, z;
};

}  // namespace emulator

static emulator::CurrentBlock blockIdx;
static emulator::CurrentThread threadIdx;

static void __syncthreads() { emulator::leave(emulator::State::at_barrier); }
static void cudaTriggerProgrammaticLaunchCompletion() {}  // one kernel at a time: nothing overlaps
static void cudaGridDependencySynchronize() {}
static int __shfl_sync(uint, int value, int lane, int) { return (int)emulator::collective((uint)value)[lane & 31]; }
static int __shfl_up_sync(uint, int value, int distance, int) {
  unsigned long long *values = emulator::collective((uint)value);
  int lane = emulator::current % emulator::lanes;
  return (int)values[lane >= distance ? lane - distance : lane];
}
static int __popc(uint value) { return __builtin_popcount(value); }
static int atomicAdd(int *address, int value) {
  int before = *address;
  *address += value;
  return before;
}
template <class T, class V> static void AtomicAdd(T *address, V value, int = 0) { *address += (T)value; }

namespace tl {
static uint4 load_global_128(const void *address) {
  if ((uintptr_t)address % 16) {
    fprintf(stderr, "a 16-byte load from an address that 16 does not divide\n");
    abort();
  }
  return *(const uint4 *)address;
}
}  // namespace tl
