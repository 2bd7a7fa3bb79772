// What a kernel in CUDA C++ of one block needs beside emulator.h; its inline assembly is left out (see emulator.py).
#pragma once
#include "emulator.h"

#define __device__
#define __forceinline__ inline
#define __noinline__
typedef bfloat16_t __nv_bfloat16;
static emulator::Coordinates gridDim;
struct uint2 {
  uint x, y;
};
struct int2 {
  int x, y;
};
struct float2 {
  float x, y;
};
static int2 make_int2(int x, int y) { return int2{x, y}; }
static uint2 make_uint2(uint x, uint y) { return uint2{x, y}; }
struct int4 {
  int x, y, z, w;
};
static int4 make_int4(int x, int y, int z, int w) { return int4{x, y, z, w}; }
struct ushort4 {
  unsigned short x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
static float2 make_float2(float x, float y) { return float2{x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
static uint4 make_uint4(uint x, uint y, uint z, uint w) { return uint4{x, y, z, w}; }
template <class To, class From> static To bits_as(From value) {
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}
// Of what a GPU has added up: its NaN has all bits set but the sign, whatever NaN went in.
static uint __float_as_uint(float value) { return value != value ? 0x7FFFFFFFu : bits_as<uint>(value); }
static float __uint_as_float(uint value) { return bits_as<float>(value); }
static size_t __cvta_generic_to_shared(const void *address) { return (size_t)address; }
template <class T> static T __ldcs(const T *address) { return *address; }
template <class T> static void __stcg(T *address, T value) { *address = value; }
static uint atomicAdd(uint *address, uint value) {
  uint before = *address;
  *address += value;
  return before;
}
static uint atomicMax(uint *address, uint value) {
  uint before = *address;
  *address = std::max(before, value);
  return before;
}
static uint atomicOr(uint *address, uint value) {
  uint before = *address;
  *address |= value;
  return before;
}
static uint __funnelshift_l(uint low, uint high, uint by) { return by %= 32, by ? high << by | low >> (32 - by) : high; }
static float __saturatef(float value) { return value > 0 ? std::min(value, 1.0f) : 0; }  // NaN is 0
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Towards zero: what is exact in a double, then the nearest unless that is further from zero.
static float __fmaf_rz(float a, float b, float c) {
  const double exact = (double)a * b + c;
  const float nearest = (float)exact;
  return fabs((double)nearest) > fabs(exact) ? nextafterf(nearest, 0.0f) : nearest;
}
static float __fmul_rz(float a, float b) { return __fmaf_rz(a, b, 0); }
static float __fdividef(float a, float b) { return a / b; }
static uint __umulhi(uint a, uint b) { return (uint)((unsigned long long)a * b >> 32); }
static int __clz(uint value) { return value ? __builtin_clz(value) : 32; }
static int __ffs(uint value) { return __builtin_ffs((int)value); }
static void __syncwarp() { emulator::collective(0); }
static uint __ballot_sync(uint, bool value) {
  unsigned long long *values = emulator::collective(value);
  uint found = 0;
  for (int lane = 0; lane < emulator::lanes; lane++) found |= (uint)values[lane] << lane;
  return found;
}
static uint __reduce_add_sync(uint, uint value) {
  unsigned long long *values = emulator::collective(value);
  uint sum = 0;
  for (int lane = 0; lane < emulator::lanes; lane++) sum += (uint)values[lane];
  return sum;
}
static uint __reduce_min_sync(uint, uint value) {
  unsigned long long *values = emulator::collective(value);
  return (uint)*std::min_element(values, values + emulator::lanes);
}
static uint __reduce_max_sync(uint, uint value) {
  unsigned long long *values = emulator::collective(value);
  return (uint)*std::max_element(values, values + emulator::lanes);
}
static int __reduce_min_sync(uint all, int value) { return (int)(__reduce_min_sync(all, (uint)value ^ 1u << 31) ^ 1u << 31); }
static int __reduce_max_sync(uint all, int value) { return (int)(__reduce_max_sync(all, (uint)value ^ 1u << 31) ^ 1u << 31); }
static uint __shfl_sync(uint mask, uint value, int lane) { return (uint)__shfl_sync(mask, (int)value, lane, 32); }
static uint __shfl_up_sync(uint mask, uint value, int distance) { return (uint)__shfl_up_sync(mask, (int)value, distance, 32); }
