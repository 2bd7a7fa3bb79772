// What the blocks of a cluster need beside emulator_cuda.h: stores into another block's shared memory that count at a barrier
// there. A store lands when somebody waits for its barrier, so that whoever does not wait finds the poison.
#pragma once
#include "emulator_cuda.h"

namespace emulator {

constexpr long most_idle_turns = 20000000;

struct Barrier {  // in shared memory, 8 bytes as on the GPU
  int bytes;      // that are awaited
  short arrived, phase;
};
struct Sent {
  Barrier *barrier;
  uint *to;
  uint value;
};
static std::vector<Sent> sent;
static int waiting_warps[cluster], warp_meetings[cluster];

static void pass_if_done(Barrier &barrier) {
  if (barrier.arrived && !barrier.bytes) barrier.arrived = 0, barrier.phase ^= 1;
}
template <class Condition> static void wait_until(Condition condition) {
  for (long turns = 0; !condition(); turns++) leave(turns > most_idle_turns ? State::at_collective : State::runnable);
}
template <class T> static T *in_block(const T *own, int of) { return (T *)((uchar *)own + (of - rank()) * block_bytes); }
static void meet(int threads) {  // of some warps of a block
  const int block = rank(), meeting = warp_meetings[block];
  if (++waiting_warps[block] == threads)
    waiting_warps[block] = 0, warp_meetings[block]++;
  else
    wait_until([&] { return warp_meetings[block] != meeting; });
}

}  // namespace emulator

static void init_barrier(const uint64_t *barrier) { *(emulator::Barrier *)barrier = {0, 0, 0}; }
static void expect(const uint64_t *barrier, uint bytes) {
  emulator::Barrier &at = *(emulator::Barrier *)barrier;
  if (at.arrived) abort();  // made for one arrival
  at.bytes += bytes, at.arrived = 1;
  emulator::pass_if_done(at);
}
static void receive(const uint64_t *barrier, uint parity) {
  emulator::Barrier &at = *(emulator::Barrier *)barrier;
  emulator::wait_until([&] {
    std::vector<emulator::Sent> others;
    for (const emulator::Sent &each : emulator::sent)
      if (each.barrier == &at)
        *each.to = each.value, at.bytes -= 4;
      else
        others.push_back(each);
    emulator::sent.swap(others);
    emulator::pass_if_done(at);
    return at.phase != (short)parity;
  });
}
static uint32_t cluster_rank() { return emulator::rank(); }
static uint32_t remote(const void *own, uint32_t rank) {
  return (uint32_t)((uchar *)emulator::in_block((const uchar *)own, rank) - emulator::shared);
}
static void send(const void *to, const uint64_t *barrier, uint32_t rank, uint32_t value) {
  auto at = (emulator::Barrier *)emulator::in_block(barrier, rank);
  emulator::sent.push_back({at, (uint *)emulator::in_block((const uchar *)to, rank), value});
}
static uint32_t load_remote(uint32_t address) { return *(uint32_t *)(emulator::shared + address); }
static uint4 load_remote4(uint32_t address) { return *(uint4 *)(emulator::shared + address); }
static void cluster_arrive() {}
static void cluster_wait() { __syncthreads(); }  // of all blocks
