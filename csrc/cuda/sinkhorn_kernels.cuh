// Kernels of the fused Sinkhorn pass (see sela/sinkhorn.h for what they compute, cpu/sinkhorn_loops.cpp, Note [Fused
// pass], for the arithmetic). No torch, no cooperative groups, no grid barrier: a test can run this header on the CPU.
//
// Bytes, operations and floor, per pass over [N, K] in b-byte logits:
//   fused kernels (K <= 6144): N K b bytes read once, N * (4 to 16) bytes of reference, weights, log-sum-exp, labels;
//     per entry 1 fma + 1 add + 1 mul + 1 ex2 + 1 add + 1 fma.
//     H100 at 3.0 TB/s and 3.7e12 ex2/s, N = 1,281,167, K = 3000, float16: 7.7 GB = 2.6 ms of memory, 1.0 ms of ex2:
//     bound by memory, 2.0 ns per row; float32: 4.0 ns per row.
//   wide kernels (K > 6144, and float64): the logits are read twice: 4.0 ns per row of 3000 float16.
//
// Who does what. A thread owns 8 consecutive columns, t * 8 .. t * 8 + 7: one 16-byte load of 16-bit logits, two of
// float32; its potentials and its column sums stay in registers.
//
//   K <= 256    a group is one warp:   lane 0 | lane 1 | ... | lane 31          several groups per block, no barrier
//   K <= 6144   a group is one block:  warp 0          | warp 1 | ...           one barrier per R rows
//   beyond      one block per row tile finds the row sums; then blocks of columns add them up, without a barrier
//
// A group takes tiles of kTileRows rows, aligned to multiples of it, R rows at a time. Column sums are float inside a
// tile, in the order of the rows, and leave it as 64-bit integers, whose sum does not depend on any order: the bits are
// the same for any grid. Row sums are reduced in a fixed order too.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/gpu.cuh"
#include "sela/sinkhorn.h"

namespace sela {
namespace sinkhorn_cuda {

constexpr int kTileRows =
    kSinkhornCudaRows;                // few atomics (1 per 64 entries), and enough tiles for every multiprocessor
constexpr int kColumns = 8;           // columns per thread
constexpr int kWarp = 32;             // threads per warp
constexpr int kWarpColumns = 256;     // widest row of one warp
constexpr int kWarpThreads = 128;     // block of the kernel with one warp per group
constexpr int kMaxThreads = 768;      // widest block: leaves 80 registers per thread, so that nothing spills
constexpr int kFourRowThreads = 384;  // widest block that takes four rows at a time: 168 registers per thread
constexpr int kFusedColumns = kMaxThreads * kColumns;  // widest row of one block
constexpr int kWideThreads = 256;                      // threads of the wide row kernel
constexpr int kWideColumnThreads = 128;                // threads of the wide column kernel
constexpr float kLow = 1e-20f;                         // safe range of a row's sum relative to its reference
constexpr float kHigh = 1e30f;

/// What every kernel is given. Pointers are device memory; null: absent.
struct Arguments {
  const void* logits;
  int64_t rows, cols, stride;
  double scale;
  const double* potential;
  const float* weights;
  const void* reference;
  unsigned long long* columns;  // [cols], two's complement
  void* lse;
  int32_t* labels;
  double* totals;              // [2 * tiles]: objective, then weight, of each tile
  unsigned long long* masked;  // [1]
  void* scratch;               // [rows][4] of the arithmetic type: x0, ref, factor of the wide kernels
  double units;                // integer units of 1.0
};

// ---- Wrappers of what a host cannot do or does differently.

__device__ __forceinline__ float exp_of(float t) {
  const float y = t * 1.44269504f;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
#else
  return exp2f(y);
#endif
}
__device__ __forceinline__ double exp_of(double t) {
  return exp(t);
}
__device__ __forceinline__ float log_of(float x) {
  return logf(x);
}
__device__ __forceinline__ double log_of(double x) {
  return log(x);
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
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

template <class A>
__device__ __forceinline__ A infinity() {
  return static_cast<A>(INFINITY);
}

__device__ __forceinline__ void add_units(unsigned long long* column, long long value) {
  if (value != 0) atomicAdd(column, static_cast<unsigned long long>(value));
}
template <class A>
__device__ __forceinline__ long long in_units(A value, double units) {
  return static_cast<long long>(static_cast<double>(value) * units + 0.5);
}

// ---- Eight columns of a row.

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

/// x[0 .. 8) of a row from column j, of which `own` exist; columns that do not exist are 0. kAligned: every row starts
/// at a multiple of 16 bytes.
template <bool kAligned, class T, class A>
__device__ __forceinline__ void load_columns(const T* row, int64_t j, int own, A (&x)[kColumns]) {
  if (kAligned && own == kColumns) {
    constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));
    constexpr int kLoads = kColumns / kPerLoad;
    union {
      Bytes16 bytes[kLoads];
      unsigned char raw[kColumns * sizeof(T)];
    } in;
    const Bytes16* from = reinterpret_cast<const Bytes16*>(row + j);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) in.bytes[i] = from[i];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      T value;
      memcpy(&value, in.raw + c * sizeof(T), sizeof(T));
      x[c] = to_arithmetic(value);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = c < own ? to_arithmetic(row[j + c]) : A(0);
  }
}

/// Potentials of eight columns; -inf where there is none, which makes every term there 0.
template <class A>
__device__ __forceinline__ void load_potential(const double* potential, int64_t j, int own, A (&g)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) g[c] = c < own ? static_cast<A>(potential[j + c]) : -infinity<A>();
}

__device__ __forceinline__ int owned(int64_t cols, int64_t j) {
  const int64_t left = cols - j;
  return left >= kColumns ? kColumns : (left > 0 ? static_cast<int>(left) : 0);
}

// ---- Reductions over a group, in a fixed order; all threads of the group get the result.

/// Best score and its column; of equal scores the lowest column.
template <class A>
struct Best {
  A value;
  int32_t column;  // -1: none above -inf yet
  int32_t bad;     // a score was NaN or +inf
};

template <class A>
__device__ __forceinline__ Best<A> better(Best<A> a, Best<A> b) {
  const bool take = b.column >= 0 && (a.column < 0 || b.value > a.value || (b.value == a.value && b.column < a.column));
  Best<A> r = take ? b : a;
  r.bad = a.bad | b.bad;
  return r;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class A>
__device__ __forceinline__ Best<A> warp_best(Best<A> x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Best<A> other;
    other.value = __shfl_xor_sync(0xffffffffu, x.value, step);
    other.column = __shfl_xor_sync(0xffffffffu, x.column, step);
    other.bad = __shfl_xor_sync(0xffffffffu, x.bad, step);
    x = better(x, other);
  }
  return x;
}

/// Shared memory of a block-wide group. sums has two halves used in turn: whoever writes a half for the second time has
/// passed a barrier that all others reached after reading it.
template <class A, int R>
struct Shared {
  A sums[2][kMaxThreads / kWarp][R];
  Best<A> best[kMaxThreads / kWarp];
};

template <bool kOneWarp, class A, int R>
__device__ __forceinline__ void group_sums(A (&s)[R], Shared<A, R>& shared, int& half) {
#pragma unroll
  for (int q = 0; q < R; ++q) s[q] = warp_sum(s[q]);
  if (kOneWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int q = 0; q < R; ++q) shared.sums[half][warp][q] = s[q];
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < R; ++q) s[q] = A(0);
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int q = 0; q < R; ++q) s[q] += shared.sums[half][w][q];
  }
  half ^= 1;
}

template <bool kOneWarp, class A, int R>
__device__ __forceinline__ Best<A> group_best(Best<A> b, Shared<A, R>& shared) {
  b = warp_best(b);
  if (kOneWarp) return b;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  __syncthreads();  // everybody has read the previous result
  if (threadIdx.x % kWarp == 0) shared.best[warp] = b;
  __syncthreads();
  b = shared.best[0];
  for (int w = 1; w < warps; ++w) b = better(b, shared.best[w]);
  return b;
}

template <class A>
__device__ __forceinline__ void offer(Best<A>& b, A t, int64_t column) {
  if (!(t < infinity<A>())) b.bad = 1;
  if (t > b.value) {
    b.value = t;
    b.column = static_cast<int32_t>(column);
  }
}

// ---- K <= 6144: everything in one read.

/// kOneWarp: a group is a warp, K <= 256; otherwise the block. R rows are in flight together.
template <class T, int R, bool kOneWarp, bool kAligned, bool kLabels>
__global__ void __launch_bounds__(kOneWarp ? kWarpThreads : (R >= 4 ? kFourRowThreads : kMaxThreads), kOneWarp ? 3 : 1)
    fused_kernel(const Arguments a) {
  using SharedMemory = Shared<float, R>;
  SELA_SHARED(SharedMemory, shared);
  const int thread = kOneWarp ? static_cast<int>(threadIdx.x) % kWarp : static_cast<int>(threadIdx.x);
  const int groups_here = kOneWarp ? static_cast<int>(blockDim.x) / kWarp : 1;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * groups_here + (kOneWarp ? threadIdx.x / kWarp : 0);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * groups_here;
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  const int64_t j = static_cast<int64_t>(thread) * kColumns;
  const int own = owned(a.cols, j);
  const float scale = static_cast<float>(a.scale);
  const T* logits = static_cast<const T*>(a.logits);
  const float* reference = static_cast<const float*>(a.reference);
  float* lse_out = static_cast<float*>(a.lse);
  float g[kColumns];
  load_potential(a.potential, j, own, g);
  int half = 0;

  for (int64_t tile = group; tile < tiles; tile += groups) {
    const int64_t first = tile * kTileRows;
    const int64_t last = first + kTileRows < a.rows ? first + kTileRows : a.rows;
    float partial[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) partial[c] = 0.0f;
    double objective = 0.0, weight_sum = 0.0;
    int masked = 0;

    for (int64_t i = first; i < last; i += R) {
      float e[R][kColumns], ref[R], s[R];
      Best<float> best[R];
#pragma unroll
      for (int q = 0; q < R; ++q) {  // rows behind the last repeat it and count for nothing
        const int64_t row = i + q < last ? i + q : last - 1;
        load_columns<kAligned>(logits + row * a.stride, j, own, e[q]);
        ref[q] = reference != nullptr ? reference[row] : NAN;  // NaN: the row is done from its maximum, below
      }
#pragma unroll
      for (int q = 0; q < R; ++q) {
        s[q] = 0.0f;
        best[q] = {-infinity<float>(), -1, 0};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float t = multiply_add(e[q][c], scale, -ref[q]) + g[c];
          if (kLabels) offer(best[q], t, j + c);
          e[q][c] = exp_of(t);
          s[q] += e[q][c];
        }
      }
      group_sums<kOneWarp>(s, shared, half);

#pragma unroll
      for (int q = 0; q < R; ++q) {
        const int64_t row = i + q < last ? i + q : last - 1;
        const bool counts = i + q < last;
        bool bad = false;
        float base = ref[q];
        double exact = static_cast<double>(ref[q]);
        int32_t label = -1;
        if (kLabels) label = group_best<kOneWarp>(best[q], shared).column;
        if (!(s[q] > kLow && s[q] < kHigh)) {  // the same for the whole group
          // The careful form: relative to the best column's own logit and potential.
          float x[kColumns], sum[R];
          Best<float> top = {-infinity<float>(), -1, 0};
          load_columns<kAligned>(logits + row * a.stride, j, own, x);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) offer(top, multiply_add(x[c], scale, g[c]), j + c);
          top = group_best<kOneWarp>(top, shared);
          label = top.column;
          bad = top.bad != 0 || top.column < 0;
          const int64_t at = bad ? 0 : top.column;
          const float x0 = to_arithmetic(logits[row * a.stride + at]);
          base = static_cast<float>(a.potential[at]);
          exact = static_cast<double>(x0) * static_cast<double>(scale) + static_cast<double>(base);
#pragma unroll
          for (int r = 0; r < R; ++r) sum[r] = 0.0f;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            e[q][c] = bad ? 0.0f : exp_of(multiply_add(x[c] - x0, scale, -base) + g[c]);
            sum[0] += e[q][c];
          }
          group_sums<kOneWarp>(sum, shared, half);
          s[q] = bad ? 1.0f : sum[0];
        }
        const float w = a.weights != nullptr ? a.weights[row] : 1.0f;
        const float factor = counts && !bad ? w / s[q] : 0.0f;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) partial[c] = multiply_add(e[q][c], factor, partial[c]);
        if (thread == 0 && counts) {
          const double lse = exact + static_cast<double>(log_of(s[q]));
          if (lse_out != nullptr) lse_out[row] = bad ? NAN : static_cast<float>(lse);
          if (kLabels) a.labels[row] = bad ? -1 : label;
          masked += bad;
          if (!bad && w > 0.0f) {
            objective += static_cast<double>(w) * lse;
            weight_sum += static_cast<double>(w);
          }
        }
      }
    }

#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c < own) add_units(a.columns + j + c, in_units(partial[c], a.units));
    if (thread == 0) {
      a.totals[tile] = objective;
      a.totals[tiles + tile] = weight_sum;
      if (masked != 0) atomicAdd(a.masked, static_cast<unsigned long long>(masked));
    }
  }
}

// ---- K > 6144, and float64: rows first, then columns; two reads.

/// One block per row tile: log-sum-exp, labels and objective; x0, ref and factor of every row to scratch.
template <class T, class A, bool kAligned>
__global__ void __launch_bounds__(kWideThreads, sizeof(A) == 4 ? 3 : 2) wide_rows_kernel(const Arguments a) {
  using SharedMemory = Shared<A, 1>;
  SELA_SHARED(SharedMemory, shared);
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  const A scale = static_cast<A>(a.scale);
  const T* logits = static_cast<const T*>(a.logits);
  const A* reference = static_cast<const A*>(a.reference);
  A* lse_out = static_cast<A*>(a.lse);
  A* scratch = static_cast<A*>(a.scratch);
  const int64_t step = static_cast<int64_t>(blockDim.x) * kColumns;
  int half = 0;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kTileRows;
    const int64_t last = first + kTileRows < a.rows ? first + kTileRows : a.rows;
    double objective = 0.0, weight_sum = 0.0;
    int masked = 0;
    for (int64_t row = first; row < last; ++row) {
      const T* x_row = logits + row * a.stride;
      A x0 = A(0), base = reference != nullptr ? reference[row] : static_cast<A>(NAN);
      double exact = static_cast<double>(base);
      Best<A> best = {-infinity<A>(), -1, 0};
      A s[1];
      bool bad = false;
      int32_t label = -1;
      for (int attempt = reference != nullptr ? 0 : 1; attempt < 2; ++attempt) {
        if (attempt == 1 || a.labels != nullptr) {  // best column, and whether the row is bad
          best = {-infinity<A>(), -1, 0};
          for (int64_t j = static_cast<int64_t>(threadIdx.x) * kColumns; j < a.cols; j += step) {
            A x[kColumns], g[kColumns];
            const int own = owned(a.cols, j);
            load_columns<kAligned>(x_row, j, own, x);
            load_potential(a.potential, j, own, g);
            const A shift = attempt == 1 ? A(0) : base;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) offer(best, multiply_add(x[c], scale, -shift) + g[c], j + c);
          }
          best = group_best<false>(best, shared);
          label = best.column;
        }
        if (attempt == 1) {
          bad = best.bad != 0 || best.column < 0;
          const int64_t at = bad ? 0 : best.column;
          x0 = to_arithmetic(x_row[at]);
          base = static_cast<A>(a.potential[at]);
          exact = static_cast<double>(x0) * static_cast<double>(scale) + static_cast<double>(base);
        }
        s[0] = A(0);
        for (int64_t j = static_cast<int64_t>(threadIdx.x) * kColumns; j < a.cols; j += step) {
          A x[kColumns], g[kColumns];
          const int own = owned(a.cols, j);
          load_columns<kAligned>(x_row, j, own, x);
          load_potential(a.potential, j, own, g);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) s[0] += exp_of(multiply_add(x[c] - x0, scale, -base) + g[c]);
        }
        group_sums<false>(s, shared, half);
        if (s[0] > static_cast<A>(kLow) && s[0] < static_cast<A>(kHigh)) break;  // the same for the whole block
      }
      const float w = a.weights != nullptr ? a.weights[row] : 1.0f;
      if (threadIdx.x == 0) {
        const double lse = exact + static_cast<double>(log_of(s[0]));
        scratch[4 * row] = x0;
        scratch[4 * row + 1] = base;
        scratch[4 * row + 2] = bad ? A(0) : static_cast<A>(w) / s[0];
        if (lse_out != nullptr) lse_out[row] = bad ? static_cast<A>(NAN) : static_cast<A>(lse);
        if (a.labels != nullptr) a.labels[row] = bad ? -1 : label;
        masked += bad;
        if (!bad && w > 0.0f) {
          objective += static_cast<double>(w) * lse;
          weight_sum += static_cast<double>(w);
        }
      }
    }
    if (threadIdx.x == 0) {
      a.totals[tile] = objective;
      a.totals[tiles + tile] = weight_sum;
      if (masked != 0) atomicAdd(a.masked, static_cast<unsigned long long>(masked));
    }
  }
}

/// blockIdx.y: columns; blockIdx.x: row tiles, grid-stride. No barrier, no shared memory.
template <class T, class A, bool kAligned>
__global__ void __launch_bounds__(kWideColumnThreads, sizeof(A) == 4 ? 8 : 4) wide_columns_kernel(const Arguments a) {
  const int64_t j = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns;
  const int own = owned(a.cols, j);
  if (own == 0) return;
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  const A scale = static_cast<A>(a.scale);
  const T* logits = static_cast<const T*>(a.logits);
  const A* scratch = static_cast<const A*>(a.scratch);
  A g[kColumns];
  load_potential(a.potential, j, own, g);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kTileRows;
    const int64_t last = first + kTileRows < a.rows ? first + kTileRows : a.rows;
    A partial[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) partial[c] = A(0);
    for (int64_t row = first; row < last; ++row) {
      const A x0 = scratch[4 * row], base = scratch[4 * row + 1], factor = scratch[4 * row + 2];
      if (!(factor > A(0))) continue;  // masked, or of weight 0: its terms may be NaN
      A x[kColumns];
      load_columns<kAligned>(logits + row * a.stride, j, own, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        partial[c] = multiply_add(exp_of(multiply_add(x[c] - x0, scale, -base) + g[c]), factor, partial[c]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c < own) add_units(a.columns + j + c, in_units(partial[c], a.units));
  }
}

}  // namespace sinkhorn_cuda
}  // namespace sela
