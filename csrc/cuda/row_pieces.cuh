// How kernels read rows of logits: in pieces of 16 bytes, as they lie in memory, and what a logit is in arithmetic.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/gpu.cuh"
#include "sela/logits.h"

namespace sela {
namespace rows_cuda {

constexpr int kWarp = 32;  // threads per warp

template <class A>
__device__ __forceinline__ A infinity() {
  return static_cast<A>(INFINITY);
}

__device__ __forceinline__ float to_arithmetic(float x) {
  return x;
}
__device__ __forceinline__ float to_arithmetic(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_arithmetic(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ double to_arithmetic(double x) {
  return x;
}

/// A logit of fixed16: so many steps below its row's maximum, kFixedImpossible for -inf.
struct Fixed16 {
  uint16_t steps;
};

/// By the bits of 2^23 + steps: cards convert integers at a quarter of the rate of everything else here.
__device__ __forceinline__ float to_arithmetic(Fixed16 x) {
  const uint32_t bits = 0x4b000000u | x.steps;
  float shifted;
  memcpy(&shifted, &bits, sizeof(shifted));
  return x.steps == kFixedImpossible ? -INFINITY : 8388608.0f - shifted;
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

/// Value v of a piece, as it lies there.
template <class T>
__device__ __forceinline__ T value_in(const Bytes16& piece, int v) {
  T value;
  memcpy(&value, reinterpret_cast<const unsigned char*>(&piece) + v * sizeof(T), sizeof(T));
  return value;
}

template <class T>
__device__ __forceinline__ void put_value(Bytes16& piece, int v, T value) {
  memcpy(reinterpret_cast<unsigned char*>(&piece) + v * sizeof(T), &value, sizeof(T));
}

/// The first V values at `x`, of which there are `left`, in a piece; 0 behind them. By one load where all of a piece is
/// there and x is a multiple of 16 bytes (kAligned), else value by value.
template <bool kAligned, int V, class T>
__device__ __forceinline__ Bytes16 piece_at(const T* x, int64_t left) {
  if (kAligned && V * sizeof(T) == 16 && left >= V) return *reinterpret_cast<const Bytes16*>(x);
  Bytes16 piece{{0, 0, 0, 0}};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < left) put_value(piece, v, x[v]);
  }
  return piece;
}

}  // namespace rows_cuda
}  // namespace sela
