// The parts of templates/cuda (barriers, copies, products of a group of warps) for the CPU: what the inline assembly of a kernel
// does on a Hopper GPU. A copy lands when its thread signals it, so that whoever does not wait finds the poison.
#pragma once
#include "emulator_cuda.h"
#include <deque>

#define DEVICE static inline
#define __cvta_generic_to_shared(address) (emulator::rank() * emulator::block_bytes)
using u32 = uint32_t;
using u64 = uint64_t;
using bf16 = unsigned short;

namespace emulator {

constexpr int named_barriers = 16;
constexpr long most_idle_turns = 20000000;

struct Barrier {  // in shared memory, 8 bytes as on the GPU
  short count, pending;
  unsigned phase : 1;
  int bytes : 31;  // bytes: that are awaited
};
struct Meeting {
  int waiting, generation;
  bool any, result;
};
struct Copy {
  u32 to;
  const bf16 *from;
  bool valid;
};
static Meeting meetings[named_barriers * cluster];
static const bool forgets = (forget = [] { std::fill(std::begin(meetings), std::end(meetings), Meeting()); }, true);
static std::vector<Copy> copies[max_threads];
struct Staged {  // no bytes: the end of a group
  u32 to;
  const unsigned char *from;  // none: zeros
  u32 bytes;
};
static std::deque<Staged> staged[max_threads];
static long idle_turns;

static Barrier &barrier_at(u32 address) { return *(Barrier *)(shared + address); }
static void pass_if_done(Barrier &barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.count, barrier.phase = !barrier.phase;
}
static void arrive(Barrier &barrier) {
  barrier.pending--;
  pass_if_done(barrier);
}
struct Piece {
  u32 to;
  const unsigned char *from;
  u32 bytes, bar;
};
static std::vector<Piece> pieces;
struct Described {  // a matrix of which tiles are brought, as emulator.py lays it out; of the dimensions the innermost comes first
  const unsigned char *address;
  int rank, shape[5], box[5], element, swizzle;  // bytes of an element, of a swizzled row
  long long strides[5];                          // bytes
};
static_assert(sizeof(Described) <= 128, "a descriptor");
struct Tile {
  u32 to, bar;
  Described of;
  int first[5];
};
static std::vector<Tile> tiles;
static void bring(const Tile &tile) {
  int at[5] = {}, rows = 0;
  const Described &of = tile.of;
  for (bool more = true; more; rows++) {
    for (at[0] = 0; at[0] < of.box[0]; at[0]++) {
      bool inside = true;
      const unsigned char *from = of.address;
      for (int i = 0; i < of.rank; i++) {
        const int place = tile.first[i] + at[i];
        inside = inside && place >= 0 && place < of.shape[i];
        from += place * of.strides[i];
      }
      u32 to = tile.to + (rows * of.box[0] + at[0]) * of.element;
      if (of.swizzle) to ^= (to >> 7 & (of.swizzle / 16 - 1)) << 4;
      if (inside) memcpy(shared + to, from, of.element);
      else memset(shared + to, 0, of.element);
    }
    more = false;
    for (int i = 1; i < of.rank && !more; i++) {
      more = ++at[i] < of.box[i];
      if (!more) at[i] = 0;
    }
  }
  barrier_at(tile.bar).bytes -= rows * of.box[0] * of.element;
  pass_if_done(barrier_at(tile.bar));
}
static void land(u32 bar) {
  std::vector<Tile> later;
  for (const Tile &tile : std::vector<Tile>(tiles))
    if (tile.bar == bar) bring(tile);
    else later.push_back(tile);
  tiles.swap(later);
  std::vector<Piece> others;
  for (const Piece &piece : pieces) {
    if (piece.bar != bar) {
      others.push_back(piece);
      continue;
    }
    memcpy(shared + piece.to, piece.from, piece.bytes);
    barrier_at(bar).bytes -= piece.bytes;
    pass_if_done(barrier_at(bar));
  }
  pieces.swap(others);
}
template <class Condition> static void wait_until(Condition condition) {
  while (!condition()) leave(++idle_turns > most_idle_turns ? State::at_collective : State::runnable);  // there: for ever
  idle_turns = 0;
}
static bool meet(int number, int threads, bool value) {
  Meeting &at = meetings[rank() * named_barriers + number];
  const int generation = at.generation;
  at.any |= value;
  if (++at.waiting == threads) {
    at.result = at.any, at.any = false, at.waiting = 0, at.generation++;
  } else {
    wait_until([&] { return at.generation != generation; });
  }
  return at.result;
}
static void come(int number, int threads) {  // to a meeting, without waiting for it
  Meeting &at = meetings[rank() * named_barriers + number];
  if (++at.waiting == threads) at.result = at.any, at.any = false, at.waiting = 0, at.generation++;
}
static float widened(u32 address) { return bits_as<float>((u32) * (bf16 *)(shared + address) << 16); }
static u32 narrowed(float value) {
  const u32 bits = bits_as<u32>(value);
  return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
// An element of an operand in shared memory whose atoms of 8 rows of 128 bytes are swizzled, or of 64 as the descriptor says; rows
// are k's where transposed, of 128 bytes.
static float element(u64 descriptor, bool transposed, int row, int k) {
  const u32 start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const bool narrow = descriptor >> 62 == 2;
  const u32 across = k / 8 * stride + k % 8 * 128 + row / 64 * leading + row % 64 * 2;
  const u32 along = row / 8 * stride + row % 8 * (narrow ? 64 : 128) + k * 2;
  const u32 address = start + (transposed ? across : along);
  return widened(rank() * block_bytes + (address ^ (address >> 7 & (narrow ? 3 : 7)) << 4));
}
template <int n, int a_transposed, int b_transposed> static void product(float *d, u64 a, u64 b, bool add) {
  const int lane = current % lanes;
  for (int i = 0; i < n / 2; i++) {
    const int row = current / lanes % 4 * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; k++) sum += element(a, a_transposed, row, k) * element(b, b_transposed, column, k);
    d[i] = sum;
  }
}
// A in the registers of a warp: a lane has of the rows l / 4 and 8 more the columns 2 (l % 4) and the next, and 8 more.
template <int n, int b_transposed> static void product(float *d, const u32 (&a)[4], u64 b, bool add) {
  const int lane = current % lanes;
  float rows[2][16];
  for (int i = 0; i < 4; i++) {
    unsigned long long *pairs = collective(a[i]);
    for (int k = 0; k < 8; k++)
      rows[i % 2][i / 2 * 8 + k] = bits_as<float>((u32)(pairs[lane / 4 * 4 + k / 2] >> k % 2 * 16 << 16));
  }
  for (int i = 0; i < n / 2; i++) {
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; k++) sum += rows[i % 4 / 2][k] * element(b, b_transposed, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
    d[i] = sum;
  }
}
static float of_e4m3(u32 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7F) == 0x7F) return NAN;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return bits & 0x80 ? -size : size;
}
static u32 as_e4m3(float value) {  // to the nearest, of two the even one; what is larger than the largest becomes it
  const u32 sign = bits_as<u32>(value) >> 31 << 7;
  if (value != value) return 0x7F;
  const float size = fminf(fabsf(value), 448);
  int exponent;
  frexpf(size, &exponent);
  const int least = size ? std::max(exponent - 4, -9) : -9;
  const u32 units = (u32)nearbyintf(ldexpf(size, -least));  // 8 ... 16 of them, or fewer where there is no smaller exponent
  return sign | (least == -9 ? units : ((least + 10) << 3) + units - 8);
}
// The same of bytes: rows along k in atoms of 8 rows of 128 bytes, or of 64, as the descriptor says.
static float byte_element(u64 descriptor, int row, int k) {
  const u32 start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const bool narrow = descriptor >> 62 == 2;
  const u32 address = start + row / 8 * stride + row % 8 * (narrow ? 64 : 128) + k;
  return of_e4m3(*(uchar *)(shared + (address ^ (address >> 7 & (narrow ? 3 : 7)) << 4)));
}
template <int n> static void product8(float *d, u64 a, u64 b, bool add) {
  const int lane = current % lanes;
  for (int i = 0; i < n / 2; i++) {
    const int row = current / lanes % 4 * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 32; k++) sum += byte_element(a, row, k) * byte_element(b, column, k);
    d[i] = sum;
  }
}
// A lane has of the rows l / 4 and 8 more the columns 4 (l % 4) and the next three, and 16 more.
template <int n> static void product8(float *d, const u32 (&a)[4], u64 b, bool add) {
  const int lane = current % lanes;
  float rows[2][32];
  for (int i = 0; i < 4; i++) {
    unsigned long long *words = collective(a[i]);
    for (int k = 0; k < 16; k++) rows[i % 2][i / 2 * 16 + k] = of_e4m3((u32)words[lane / 4 * 4 + k / 4] >> k % 4 * 8 & 0xFF);
  }
  for (int i = 0; i < n / 2; i++) {
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 32; k++) sum += rows[i % 4 / 2][k] * byte_element(b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
    d[i] = sum;
  }
}
static void store_transposed(u32 address, const u32 *pairs, int count) {
  u32 to[lanes];
  unsigned long long *addresses = collective(address);
  for (int i = 0; i < lanes; i++) to[i] = addresses[i];
  const int lane = current % lanes;
  for (int m = 0; m < count; m++)
    for (int i = 0; i < 2; i++)
      *(bf16 *)(shared + to[8 * m + lane % 4 * 2 + i] + lane / 4 * 2) = pairs[m] >> (16 * i);
}

}  // namespace emulator

DEVICE void barrier_init(u32 bar, u32 count) { emulator::barrier_at(bar) = {(short)count, (short)count, 0}; }
DEVICE void barriers_are_made() {}
DEVICE void barrier_arrive(u32 bar) { emulator::arrive(emulator::barrier_at(bar)); }
DEVICE void barrier_expect(u32 bar, u32 bytes) {
  emulator::barrier_at(bar).bytes += bytes;
  barrier_arrive(bar);
}
// Bytes copied in one piece land when their barrier is waited for, until which its reader finds the poison.
DEVICE void copy_bytes(u32 to, const unsigned char *from, u32 bytes, u32 bar) { emulator::pieces.push_back({to, from, bytes, bar}); }
template <bool cluster = false> DEVICE void barrier_wait(u32 bar, u32 parity) {
  emulator::wait_until([&] {
    emulator::land(bar);
    return emulator::barrier_at(bar).phase != parity;
  });
}
DEVICE void copy16(u32 to, const bf16 *from, bool valid, u64) { emulator::copies[emulator::current].push_back({to, from, valid}); }
DEVICE void copy16_of_line(u32 to, const bf16 *from, bool valid, u64 policy) { copy16(to, from, valid, policy); }
DEVICE void copies_land() {
  for (auto &copy : emulator::copies[emulator::current])
    if (copy.valid)
      memcpy(emulator::shared + copy.to, copy.from, 16);
    else
      memset(emulator::shared + copy.to, 0, 16);
  emulator::copies[emulator::current].clear();
}
DEVICE void copies_arrive(u32 bar) {
  copies_land();
  barrier_arrive(bar);
}
DEVICE void count_up(u32 *counter) { ++*counter; }
DEVICE u32 count_of(const u32 *counter) { return *counter; }
DEVICE u64 keep_in_l2() { return 0; }
DEVICE u64 pass_through_l2() { return 0; }
DEVICE void store4(u32 address, u32 value) { *(u32 *)(emulator::shared + address) = value; }
DEVICE u32 load4(u32 address) { return *(u32 *)(emulator::shared + address); }
DEVICE uint4 load16(u32 address) { return *(uint4 *)(emulator::shared + address); }
DEVICE void store16(bf16 *to, uint4 value, u64) { memcpy(to, &value, 16); }
DEVICE float load_float(u32 address) { return *(float *)(emulator::shared + address); }
DEVICE void store_float(u32 address, float value) { *(float *)(emulator::shared + address) = value; }
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float max_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
DEVICE u32 pack(float low, float high) { return emulator::narrowed(low) | emulator::narrowed(high) << 16; }
DEVICE u32 scale_pair(u32 pair, float factor) {
  const float by = bits_as<float>(emulator::narrowed(factor) << 16);
  return pack(bits_as<float>(pair << 16) * by, bits_as<float>(pair & 0xFFFF0000) * by);
}
DEVICE void store_transposed(u32 address, u32 a, u32 b) {
  const u32 pairs[] = {a, b};
  emulator::store_transposed(address, pairs, 2);
}
DEVICE void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  const u32 pairs[] = {a, b, c, d};
  emulator::store_transposed(address, pairs, 4);
}
DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  const u32 pairs[] = {a, b, c, d}, lane = emulator::current % emulator::lanes;
  u32 to[emulator::lanes];
  unsigned long long *addresses = emulator::collective(address);
  for (int i = 0; i < emulator::lanes; i++) to[i] = addresses[i];
  for (int m = 0; m < 4; m++) store4(to[8 * m + lane / 4] + lane % 4 * 4, pairs[m]);
}
DEVICE u32 transposed(u32 pair) {
  const u32 lane = emulator::current % emulator::lanes;
  u32 pairs[emulator::lanes];
  unsigned long long *all = emulator::collective(pair);
  for (int i = 0; i < emulator::lanes; i++) pairs[i] = all[i];
  u32 its = 0;
  for (int i = 0; i < 2; i++) its |= (pairs[(lane % 4 * 2 + i) * 4 + lane / 8] >> lane / 4 % 2 * 16 & 0xFFFF) << 16 * i;
  return its;
}
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
  return emulator::as_e4m3(a) | emulator::as_e4m3(b) << 8 | emulator::as_e4m3(c) << 16 | emulator::as_e4m3(d) << 24;
}
DEVICE void load_transposed(u32 (&rows)[4], u32 address) {
  const u32 lane = emulator::current % emulator::lanes;
  u32 from[emulator::lanes];
  unsigned long long *addresses = emulator::collective(address);
  for (int i = 0; i < emulator::lanes; i++) from[i] = addresses[i];
  for (int m = 0; m < 4; m++) {
    rows[m] = 0;
    for (int i = 0; i < 2; i++) rows[m] |= *(bf16 *)(emulator::shared + from[8 * m + lane % 4 * 2 + i] + lane / 4 * 2) << 16 * i;
  }
}
static u32 __byte_perm(u32 a, u32 b, u32 order) {
  const u64 bytes = (u64)b << 32 | a;
  u32 chosen = 0;
  for (int i = 0; i < 4; i++) chosen |= (u32)(bytes >> (order >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return chosen;
}
DEVICE void store8(bf16 *to, u32 a, u32 b, u64) {
  const u32 pairs[] = {a, b};
  memcpy(to, pairs, 8);
}
DEVICE void prefetch(const bf16 *) {}
DEVICE void stores_before_products() {}
DEVICE u32 load_byte(u32 address) { return emulator::shared[address]; }
DEVICE void store1(u32 address, u32 value) { emulator::shared[address] = value; }
DEVICE void store16(u32 address, u32 a, u32 b, u32 c, u32 d) {
  const u32 words[] = {a, b, c, d};
  memcpy(emulator::shared + address, words, 16);
}
// Bytes that are staged land when they are waited for: whoever reads before, or what another thread staged, finds the poison.
DEVICE void stage(u32 to, const unsigned char *from, bool valid, u32 bytes) {
  emulator::staged[emulator::current].push_back({to, valid ? from : nullptr, bytes});
}
DEVICE void stage16(u32 to, const unsigned char *from, bool valid) { stage(to, from, valid, 16); }
DEVICE void stage8(u32 to, const unsigned char *from, bool valid) { stage(to, from, valid, 8); }
DEVICE void stage4(u32 to, const unsigned char *from, bool valid) { stage(to, from, valid, 4); }
DEVICE void stage_commit() { stage(0, nullptr, false, 0); }
template <int left> DEVICE void stage_wait() {
  if (left == 0) copies_land();
  auto &copies = emulator::staged[emulator::current];
  int groups = 0;
  for (auto &copy : copies) groups += copy.bytes == 0;
  for (; groups > left; copies.pop_front()) {
    const auto &copy = copies.front();
    if (copy.from) memcpy(emulator::shared + copy.to, copy.from, copy.bytes);
    else memset(emulator::shared + copy.to, 0, copy.bytes);
    groups -= copy.bytes == 0;
  }
}
DEVICE float4 numbers_of(u32 word) {
  using emulator::of_e4m3;
  return float4{of_e4m3(word & 255), of_e4m3(word >> 8 & 255), of_e4m3(word >> 16 & 255), of_e4m3(word >> 24)};
}
DEVICE float relu(float x) { return x > 0 || x != x ? x : 0; }
DEVICE void sums_are_done(float (&)[2]) {}
template <class Map> DEVICE void prefetch_map(const Map &) {}
template <class Map> DEVICE void bring_tile(u32 to, const Map &map, int x, int y, u32 bar) {
  emulator::tiles.push_back({to, bar, *(const emulator::Described *)&map, {x, y}});
}
template <class Map> DEVICE void bring_tile(u32 to, const Map &map, int x, int y, int z, u32 bar) {
  emulator::tiles.push_back({to, bar, *(const emulator::Described *)&map, {x, y, z}});
}
template <class Map> DEVICE void bring_tile(u32 to, const Map &map, int x, int y, int z, int w, u32 bar) {
  emulator::tiles.push_back({to, bar, *(const emulator::Described *)&map, {x, y, z, w}});
}
DEVICE uint2 load8(u32 address) { return *(uint2 *)(emulator::shared + address); }
static float e4m3(u32 byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = (byte & 127) == 127 ? NAN : exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return byte & 128 ? -magnitude : magnitude;
}
DEVICE uint2 widened(u32 word, float scale) {
  u32 pairs[2];
  for (int i = 0; i < 2; i++) pairs[i] = pack(e4m3(word >> 16 * i & 255) * scale, e4m3(word >> (16 * i + 8) & 255) * scale);
  return uint2{pairs[0], pairs[1]};
}
#if EMULATED_CLUSTER > 1
namespace emulator {
static int arrived, passed[max_threads];  // at the barrier of all threads of the cluster
}
DEVICE u32 rank_in_cluster() { return emulator::rank(); }
DEVICE u32 way_to(u32, u32 rank) { return (rank - emulator::rank()) * emulator::block_bytes; }
DEVICE void send16(u32 address, u32 a, u32 b, u32 c, u32 d, u32 bar) {
  store16(address, a, b, c, d);
  auto &barrier = emulator::barrier_at(bar);
  barrier.bytes -= 16;
  emulator::pass_if_done(barrier);
}
DEVICE void send16_if(bool condition, u32 address, u32 a, u32 b, u32 c, u32 d, u32 bar) {
  if (condition) send16(address, a, b, c, d, bar);
}
DEVICE void send8_if(bool condition, u32 address, u32 a, u32 b, u32 bar) {
  if (!condition) return;
  store4(address, a);
  store4(address + 4, b);
  auto &barrier = emulator::barrier_at(bar);
  barrier.bytes -= 8;
  emulator::pass_if_done(barrier);
}
DEVICE void send4_if(bool condition, u32 address, u32 a, u32 bar) {
  if (!condition) return;
  store4(address, a);
  auto &barrier = emulator::barrier_at(bar);
  barrier.bytes -= 4;
  emulator::pass_if_done(barrier);
}
DEVICE void cluster_arrive() { emulator::arrived++; }
DEVICE void cluster_wait() {
  const int all = emulator::block_threads * emulator::cluster, phase = ++emulator::passed[emulator::current];
  emulator::wait_until([&] { return emulator::arrived >= phase * all; });
}
DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
#endif
DEVICE uint4 fetch16(const unsigned char *from, bool valid) { return valid ? *(const uint4 *)from : uint4{0, 0, 0, 0}; }
DEVICE u32 fetch4(const unsigned char *from, bool valid) { return valid ? *(const u32 *)from : 0; }
DEVICE int listed_at(const int *from, bool some) { return some ? *from : -1; }
DEVICE uint2 fetch8(const unsigned char *from, bool valid) { return valid ? *(const uint2 *)from : uint2{0, 0}; }
DEVICE u32 pack_halves(float low, float high) { return bits_as<bf16>((_Float16)low) | (u32)bits_as<bf16>((_Float16)high) << 16; }
DEVICE float2 halves(u32 pair) { return float2{(float)bits_as<_Float16>((bf16)pair), (float)bits_as<_Float16>((bf16)(pair >> 16))}; }
template <int warps> DEVICE void workers_sync() { emulator::meet(3, 32 * warps, false); }
DEVICE void barrier_arrive_by(u32 bar, u32 count) {
  while (count--) barrier_arrive(bar);
}
DEVICE void store_logit(float *to, float value, u64) { *to = value; }
DEVICE void store_logit(bf16 *to, float value, u64) { *to = emulator::narrowed(value); }
template <class Logit> DEVICE void store_logits(Logit *to, const float (&values)[4], u64 policy) {
  for (int i = 0; i < 4; i++) store_logit(to + i, values[i], policy);
}
DEVICE void consumers_sync() { emulator::meet(1, 256, false); }
DEVICE void block_sync() { emulator::meet(2, emulator::block_threads, false); }
DEVICE void arrived(u32 &, u32) {}
DEVICE void prefetch_line(const unsigned char *) {}
DEVICE void expect_bytes(const unsigned char *, u32) {}
DEVICE void wait_for_last() {}
DEVICE void let_next_start() {}
DEVICE void group_sync(u32 group) { emulator::meet(1 + group, 128, false); }
DEVICE bool group_any(u32 group, bool condition) { return emulator::meet(1 + group, 128, condition); }
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int left> DEVICE void wgmma_wait() { emulator::collective(0); }  // for all lanes of a warp at once
template <int n> DEVICE void settle(float (&)[n]) {}

#define __shared__ static
#define __grid_constant__
template <class T> static T __ldg(const T *address) { return *address; }
static int __shfl_sync(uint mask, int value, int lane) { return __shfl_sync(mask, value, lane, 32); }
static float __shfl_sync(uint mask, float value, int lane) { return bits_as<float>(__shfl_sync(mask, bits_as<int>(value), lane, 32)); }
static u64 __shfl_sync(uint, u64 value, int lane) { return emulator::collective(value)[lane & 31]; }
static float __shfl_xor_sync(uint, float value, int apart) {
  unsigned long long *values = emulator::collective(bits_as<uint>(value));
  return bits_as<float>((uint)values[emulator::current % emulator::lanes ^ apart]);
}
static u32 __shfl_xor_sync(uint, u32 value, int apart) {
  return emulator::collective(value)[emulator::current % emulator::lanes ^ apart];
}
static bool __any_sync(uint mask, bool value) { return __ballot_sync(mask, value); }
static float __frcp_rn(float value) { return 1 / value; }
