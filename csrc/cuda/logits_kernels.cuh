// Kernel of the conversion of logits to 16 bits (see sela/logits.h for what is written).
//
// Bytes, operations and floor: N K (b + 2) bytes for logits of b bytes, and N * 4 of maxima; per entry 1 comparison and
// 1 maximum, then 1 subtraction, 1 multiplication, 2 comparisons and the rounding. Rows are swept twice, for the
// maximum and to write, but only the first sweep reads memory: the rows that a card works on at once, 8 of 256 threads
// or 64 of a warp on each multiprocessor, are 5 to 25 MB and lie in the second-level cache. H100 at 3.0 TB/s, N =
// 1,281,167, K = 3000: float32 23 GB = 7.7 ms, float16 15 GB = 5.1 ms.
//
// Who does what: a warp takes a row up to 1,024 columns, a block of 256 threads a longer one; a thread takes 8 adjacent
// columns, which are one store of 16 bytes. Every operation is exact or rounded once, as on the CPU: the same bits.
#pragma once
#include "cuda/sinkhorn_reductions.cuh"
#include "sela/logits.h"

namespace sela {
namespace logits_cuda {

using namespace rows_cuda;

constexpr int kStoreThreads = 256;
constexpr int kStoreColumns = 8;         // of a thread and sweep: 16 bytes of what is written
constexpr int kStoreWarpColumns = 1024;  // widest row of one warp
constexpr float kLargestFloat = 3.402823466e38f;
constexpr double kLargestDouble = 1.7976931348623157e308;

__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
  return fmax(a, b);
}
struct StoreArguments {
  const void* logits;
  int64_t rows, cols, stride, values_stride;
  double lambda;
  uint16_t* values;
  float* maxima;
  unsigned long long* saturated;
  int kind;          // a LogitsType
  bool one_warp;     // a row is one warp's
  bool wide_stores;  // rows of values begin at multiples of 16 bytes
};

__device__ __forceinline__ float largest_of(float) {
  return kLargestFloat;
}
__device__ __forceinline__ double largest_of(double) {
  return kLargestDouble;
}

/// Columns j .. j + 8 of a row; -inf behind the last one.
template <class T, bool kAligned, class A>
__device__ __forceinline__ void load_columns(const T* row, int64_t j, int64_t cols, A (&x)[kStoreColumns]) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  if (kAligned && j + kStoreColumns <= cols) {
    Bytes16 pieces[kStoreColumns / kPer];
#pragma unroll
    for (int p = 0; p < kStoreColumns / kPer; ++p) pieces[p] = reinterpret_cast<const Bytes16*>(row + j)[p];
#pragma unroll
    for (int v = 0; v < kStoreColumns; ++v) {
      T value;
      memcpy(&value, reinterpret_cast<const unsigned char*>(pieces) + v * sizeof(T), sizeof(T));
      x[v] = to_arithmetic(value);
    }
  } else {
#pragma unroll
    for (int v = 0; v < kStoreColumns; ++v) x[v] = j + v < cols ? to_arithmetic(row[j + v]) : -infinity<A>();
  }
}

/// A distance below the maximum, in the unit of the kind, as it is stored.
__device__ __forceinline__ uint16_t stored(float distance, int kind) {
  uint16_t bits;
  if (kind == static_cast<int>(LogitsType::fixed16)) {
    const float shifted = fminf(distance, 65535.0f) + 8388608.0f;  // 2^23: the sum is rounded to a whole number
    uint32_t word;
    memcpy(&word, &shifted, sizeof(word));
    return static_cast<uint16_t>(word & 0xffffu);
  }
  if (kind == static_cast<int>(LogitsType::float16)) {
    const __half value = __float2half_rn(0.0f - distance);
    memcpy(&bits, &value, sizeof(bits));
  } else {
    const __nv_bfloat16 value = __float2bfloat16_rn(0.0f - distance);
    memcpy(&bits, &value, sizeof(bits));
  }
  return bits;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kStoreThreads) store_kernel(const StoreArguments a) {
  using A = decltype(to_arithmetic(T()));
  constexpr int kWarps = kStoreThreads / kWarp;
  SELA_SHARED_ARRAY(A, tops, 2 * kWarps);
  const int threads = a.one_warp ? kWarp : kStoreThreads;  // of a row
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const int64_t at_once = static_cast<int64_t>(gridDim.x) * (kStoreThreads / threads);
  const bool fixed = a.kind == static_cast<int>(LogitsType::fixed16);
  const bool half_kind = a.kind == static_cast<int>(LogitsType::float16);
  const float limit = fixed ? kFixedLimit : half_kind ? kHalfLimit : kBfloatLimit;
  const uint16_t bad_value = fixed ? kFixedBad : half_kind ? kHalfBad : kBfloatBad;
  const A factor = fixed ? static_cast<A>(kFixedSteps * a.lambda) : A(1);
  int saturated = 0, half = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kStoreThreads / threads) + threadIdx.x / threads; row < a.rows;
       row += at_once) {
    const T* x_row = static_cast<const T*>(a.logits) + row * a.stride;
    A top = -infinity<A>();
    for (int64_t j = thread * kStoreColumns; j < a.cols; j += threads * kStoreColumns) {
      A x[kStoreColumns];
      load_columns<T, kAligned>(x_row, j, a.cols, x);
#pragma unroll
      for (int v = 0; v < kStoreColumns; ++v) top = x[v] <= largest_of(A()) ? larger(top, x[v]) : infinity<A>();
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) top = larger(top, __shfl_xor_sync(0xffffffffu, top, step));
    if (!a.one_warp) {  // two halves in turn, so that one barrier is enough
      if (threadIdx.x % kWarp == 0) tops[half * kWarps + threadIdx.x / kWarp] = top;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = larger(top, tops[half * kWarps + w]);
      half ^= 1;
    }
    const double most = static_cast<double>(kLargestFloat), scaled = static_cast<double>(top) * a.lambda;
    const bool fits =
        static_cast<double>(top) >= -most && static_cast<double>(top) <= most && scaled >= -most && scaled <= most;
    if (thread == 0) a.maxima[row] = fits ? static_cast<float>(top) : NAN;
    uint16_t* values = a.values + row * a.values_stride;
    for (int64_t j = thread * kStoreColumns; j < a.cols; j += threads * kStoreColumns) {
      A x[kStoreColumns];
      load_columns<T, kAligned>(x_row, j, a.cols, x);
      uint16_t out[kStoreColumns];
#pragma unroll
      for (int v = 0; v < kStoreColumns; ++v) {
        const float distance = static_cast<float>((top - x[v]) * factor);
        out[v] = fits ? stored(distance, a.kind) : bad_value;
        saturated += fits && distance > limit && x[v] > -infinity<A>() ? 1 : 0;
      }
      if (a.wide_stores && j + kStoreColumns <= a.cols) {
        Bytes16 piece;
        memcpy(&piece, out, sizeof(piece));
        *reinterpret_cast<Bytes16*>(values + j) = piece;
      } else {
#pragma unroll
        for (int v = 0; v < kStoreColumns; ++v) {
          if (j + v < a.cols) values[j + v] = out[v];
        }
      }
    }
  }
  saturated = sinkhorn_cuda::warp_count(saturated);
  if (threadIdx.x % kWarp == 0 && saturated != 0) atomicAdd(a.saturated, static_cast<unsigned long long>(saturated));
}

}  // namespace logits_cuda
}  // namespace sela
