// Kernels of the fused Sinkhorn pass (see sela/sinkhorn.h for what they compute, cpu/sinkhorn_loops.cpp, Note [Fused
// pass], for the arithmetic). No torch, no cooperative groups, no grid barrier: the SIMT runner executes this header.
//
// Bytes, operations and floor, per pass over [N, K] in b-byte logits:
//   fused_kernel (K <= 8192): N K b bytes read once; N * (4 to 16) bytes of reference, weights, log-sum-exp, labels;
//     one 64-bit addition in L2 per 64 entries. Per entry 1 fma + 1 add + 1 mul + 1 ex2 + 1 add + 1 fma.
//     H100 at 3.0 TB/s and 3.7e12 ex2/s, N = 1,281,167, K = 3000, float16: 7.7 GB = 2.6 ms of memory, 1.0 ms of ex2:
//     bound by memory, 2.0 ns per row; float32: 4.0 ns per row.
//   wide_rows_kernel, then wide_columns_kernel (K > 8192, and float64): the logits are read twice, with an ex2 for each
//     entry each time, and N * 24 bytes of scratch: twice that floor, 1.4 ns per 1000 entries of float16.
//   Without a reference, in the first pass of a solve, rows are done one by one, by two reductions, and nothing is on
//     its way meanwhile: that pass misses the floor.
//
// Who does what. A thread owns fixed columns, in pieces of 16 bytes, p * threads + t being piece p of thread t; their
// potentials and column sums stay in its registers. A group of threads takes tiles of kTileRows rows, R rows at a time:
// R rows are reduced together, by one barrier. While they are worked on, the next ones are copied to shared memory in
// one or two stages (cp.async; on sm_75 and for unaligned rows by the registers), where each thread finds what it
// copied itself. That, not the number of threads, keeps the memory busy: a multiprocessor of an H100 has to have
// 25 bytes/ns * 0.7 to 1 us = 18 to 25 KB under way at any time, and 32 KB to be safe.
//
//   mapping     K          group        columns, R     blocks resident   under way on a multiprocessor, 16 bits
//   OneWarp     to 256     a warp       8, 4 (f32 2)   4 of 4 warps      K = 256: 64 KB, 128: 32 KB, 10: 3 KB
//   OneBlock    to 1024    2..4 warps   8, 4 (f32 2)   8..4              K = 1000: 62 KB, 257: 33 KB
//   WideBlock   to 8192    3..16 warps  16, 2 (f32 1)  5..1              K = 3000: 48 KB, 8192: 32 KB
//   wide rows   beyond     8 warps      8, 4 (f64 1)   2                 32 KB
//   wide columns           4 warps      8, 4 (f64 1)   5..7              48 KB and more
//
// All fused mappings have 64 bytes per thread and stage (unaligned rows half of it) and fit in 128 registers, so that
// 512 threads are resident (on sm_75 fewer, for its 64 KB of shared memory, and it needs fewer). There are two stages
// up to K = 5632, one beyond: blocks that want more than 48 KB of shared memory have to ask, and sm_75 has nothing to
// give. Narrow rows leave lanes of the warp idle, in proportion; they also make small matrices.
//
// Why blocks of few warps up to K = 1024, and not several rows in a bigger block: registers end at 512 threads, that is
// at 8 blocks of 2 warps, long before the 16 (sm_75, sm_86) to 32 blocks that a multiprocessor can hold. Groups in one
// block would add no row to those under way, and would wait at each other's barriers.
// Why 16 columns per thread beyond: K = 3000 with 8 would be a block of 12 warps, alone on its multiprocessor, with
// nobody at work while it is at its barrier; 16 columns make two blocks of 6 warps.
//
// Column sums are float inside a tile, and leave it as 64-bit integers, whose sum does not depend on any order: the
// bits are the same for any grid. In a tile rows are added in ascending order, first those that need no care, then the
// others. Row sums are reduced in a fixed order too.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/gpu.cuh"
#include "sela/logits.h"
#include "sela/sinkhorn.h"

namespace sela {
namespace sinkhorn_cuda {

constexpr int kTileRows =
    static_cast<int>(kSinkhornCudaRows);  // few atomics (1 per 64 entries), and enough tiles for every multiprocessor
constexpr int kSampleRows = static_cast<int>(kSinkhornGroup);
constexpr int kTileGroups = kTileRows / kSampleRows;
constexpr int kWarp = 32;             // threads per warp
constexpr int kNoLabel = 0x7fffffff;  // more than any column
constexpr float kLow = 1e-20f;        // safe range of a row's sum relative to its reference
constexpr float kHigh = 1e30f;

// Mappings of the fused kernel; the comment above has their reasons. kThreads: most threads of a block; kBlocks: blocks
// that must fit on a multiprocessor, which is what holds the registers down.
template <class T, bool kAligned>
struct OneWarp {
  static constexpr bool kOneWarp = true;
  static constexpr int kColumns = 8, kRows = (kAligned ? 8 : 4) / static_cast<int>(sizeof(T)), kThreads = 128,
                       kBlocks = 4;
  static constexpr int kWidest = kWarp * kColumns;  // 256
};
template <class T, bool kAligned>
struct OneBlock {
  static constexpr bool kOneWarp = false;
  static constexpr int kColumns = 8, kRows = (kAligned ? 8 : 4) / static_cast<int>(sizeof(T)), kThreads = 128,
                       kBlocks = 4;
  static constexpr int kWidest = kThreads * kColumns;  // 1024
};
template <class T, bool kAligned>
struct WideBlock {
  static constexpr bool kOneWarp = false;
  static constexpr int kColumns = 16, kRows = kAligned && sizeof(T) == 2 ? 2 : 1, kThreads = 512, kBlocks = 1;
  static constexpr int kWidest = kThreads * kColumns;  // 8192
};
constexpr int kFusedColumns = WideBlock<float, true>::kWidest;  // widest row of the fused kernel
constexpr size_t kSlotBytes = 45 << 10;  // of shared memory for rows on their way; 48 KB a block need no permission

// The wide kernels.
constexpr int kWideColumns = 8;          // columns per thread and sweep
constexpr int kWideThreads = 256;        // threads of the row kernel
constexpr int kWideColumnThreads = 128;  // threads of the column kernel
template <class A, bool kAligned>
constexpr int kWideRows = sizeof(A) == 8 ? 1 : (kAligned ? 4 : 2);  // rows in flight

/// Which rows are read: all, or every so many groups of kSampleRows rows. Tiles are those of the whole matrix, so that
/// its sums come out with the same bits from any number of parts.
struct Sample {
  int every;       // 1: all rows
  int phase;       // groups of the matrix before this part, modulo `every`
  int start;       // group of this part that is read first
  int64_t visits;  // tiles in which something is read, with every > kTileGroups; else all tiles
};

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
  int stages;                  // of the fused kernel's rows on their way
  // What only kFull and the wide kernels know of.
  const float* maxima;  // [rows] taken off the rows before they were stored, or null
  double maxima_scale;
  Sample sample;
  unsigned* marks;  // [rows read][mark_words]: runs of columns that hold a candidate; null: no candidates
  int mark_words;
  int* counts;         // [rows read] candidates, zero before
  double keep_above;   // a candidate's least share of its row's sum; infinity: no candidates
  float keep_above32;  // the same
  int want_labels;     // labels is not null
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
__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
  return fmax(a, b);
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

/// The same number, of which the compiler knows nothing: what is computed from it stays where it is written, instead of
/// being kept in registers (two for each address) over a whole loop.
__device__ __forceinline__ int opaque(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
/// The same pointer, which is computed once. For copies alone: loads by it would not know that its memory is global.
template <class T>
__device__ __forceinline__ const T* opaque(const T* x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

/// Number of the lowest bit of a number that has one.
__device__ __forceinline__ int lowest_bit(unsigned x) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(x)) - 1;
#else
  return __builtin_ctz(x);
#endif
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

// ---- The columns of a thread.

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

/// The columns of one thread: C of them, in ascending order. Aligned rows (every row starts at a multiple of 16 bytes)
/// are dealt out in pieces of 16 bytes, others one by one, to thread 0, 1, 2, ..., 0, 1, ...: neighbours in a warp
/// read neighbours in memory.
template <class T, int C, bool kAligned>
struct Share {
  static constexpr int kPer = 16 / static_cast<int>(sizeof(T));  // columns in 16 bytes
  static constexpr int kPieces = C / kPer;
  static constexpr int kRun = kAligned ? kPer : 1;  // adjacent columns
  int first;                                        // column 0
  int step;                                         // from one run to the next
  int count;                                        // columns that there are

  __device__ __forceinline__ Share(int thread, int threads, int columns)
      : first(thread * kRun), step(threads * kRun), count(columns) {}
  __device__ __forceinline__ Share again() const {
    Share same = *this;
    same.first = opaque(first);
    return same;
  }
  __device__ __forceinline__ int column(int c) const { return first + c / kRun * step + c % kRun; }
  /// Column c of a row, by a 32-bit offset.
  __device__ __forceinline__ const T* at(const T* row, int c) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(row) +
                                      static_cast<unsigned>(column(c)) * static_cast<unsigned>(sizeof(T)));
  }
  __device__ __forceinline__ bool has(int c) const { return column(c) < count; }
  __device__ __forceinline__ bool has_piece(int p) const { return kAligned && column(p * kPer) + kPer <= count; }
  /// The row ends within piece p.
  __device__ __forceinline__ bool ends_in_piece(int p) const { return has(p * kPer) && !has_piece(p); }
};

/// Piece p of the thread's columns of a row, one by one; 0 for those that there are not.
template <class T, int C, bool kAligned>
__device__ __forceinline__ Bytes16 gather(const T* row, const Share<T, C, kAligned>& share, int p) {
  constexpr int kPer = Share<T, C, kAligned>::kPer;
  Bytes16 piece{{0, 0, 0, 0}};
#pragma unroll
  for (int v = 0; v < kPer; ++v) {
    const int c = p * kPer + v;
    if (share.has(c)) {
      const T value = *share.at(row, c);
      memcpy(reinterpret_cast<unsigned char*>(&piece) + v * sizeof(T), &value, sizeof(T));
    }
  }
  return piece;
}

/// What a thread has read of one row, as it lies in memory.
template <class T, int C>
struct Raw {
  Bytes16 piece[C * sizeof(T) / 16];

  __device__ __forceinline__ decltype(to_arithmetic(T())) operator[](int c) const {
    T value;
    memcpy(&value, reinterpret_cast<const unsigned char*>(piece) + c * sizeof(T), sizeof(T));
    return to_arithmetic(value);
  }
};

template <class T, int C, bool kAligned>
__device__ __forceinline__ void fetch(const T* row, const Share<T, C, kAligned>& share, Raw<T, C>& raw) {
#pragma unroll
  for (int p = 0; p < Share<T, C, kAligned>::kPieces; ++p) {
    if (share.has_piece(p))
      raw.piece[p] = *reinterpret_cast<const Bytes16*>(row + share.column(p * Share<T, C, kAligned>::kPer));
    else
      raw.piece[p] = gather(row, share.again(), p);
  }
}

/// Potentials of the thread's columns; -inf where there is none, which makes every term there 0.
template <class A, class T, int C, bool kAligned>
__device__ __forceinline__ void load_potential(const double* potential, const Share<T, C, kAligned>& share, A (&g)[C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) g[c] = share.has(c) ? static_cast<A>(potential[share.column(c)]) : -infinity<A>();
}

/// Column sums of a tile, added to those of all tiles as integers.
template <class A, class T, int C, bool kAligned>
__device__ __forceinline__ void flush(const A (&partial)[C], const Share<T, C, kAligned>& share, double units,
                                      unsigned long long* columns) {
#pragma unroll
  for (int c = 0; c < C; ++c)
    if (share.has(c)) add_units(columns + share.column(c), in_units(partial[c], units));
}

// ---- Reductions over a group, in a fixed order; all threads of the group get the result.

constexpr int32_t kNone = -1;  // no score above -inf
constexpr int32_t kBad = -2;   // a score was NaN or +inf; the value is then +inf, which beats all others

/// Best score and its column; of equal scores the lowest column.
template <class A>
struct Best {
  A value;
  int32_t column;
};

template <class A>
__device__ __forceinline__ Best<A> none() {
  return {-infinity<A>(), kNone};
}

/// A thread counts its own columns, c = 0, 1, ..., and offers them in that order; place() makes c a column of the row.
template <class A>
__device__ __forceinline__ void offer(Best<A>& b, A t, int32_t c) {
  if (t > b.value) b = {t, c};
}

/// The same, and takes note of scores that no row may have.
template <class A>
__device__ __forceinline__ void offer_checked(Best<A>& b, A t, int32_t c) {
  offer(b, t, c);
  if (!(t < infinity<A>())) b = {infinity<A>(), kBad};
}

template <class A, class Columns>
__device__ __forceinline__ void place(Best<A>& b, const Columns& share) {
  if (b.column >= 0) b.column = share.column(b.column);
}

template <class A>
__device__ __forceinline__ Best<A> better(Best<A> a, Best<A> b) {
  return b.value > a.value || (b.value == a.value && b.column < a.column) ? b : a;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/// Largest of numbers >= 0, whose bits are in the order of the numbers.
__device__ __forceinline__ float warp_top(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
#else
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
#endif
}

__device__ __forceinline__ int warp_count(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, x);
#else
  return warp_sum(x);
#endif
}

template <class A>
__device__ __forceinline__ Best<A> warp_best(Best<A> x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Best<A> other;
    other.value = __shfl_xor_sync(0xffffffffu, x.value, step);
    other.column = __shfl_xor_sync(0xffffffffu, x.column, step);
    x = better(x, other);
  }
  return x;
}

/// Sums and largest terms of the rows of a warp.
template <class A, int R>
struct alignas(sizeof(A) * (R > 1 ? 4 : 2)) SumAndTop {
  struct {
    A sum, top;
  } row[R];
};

/// Shared memory of a block-wide group: two halves used in turn. Whoever writes a half again has passed a barrier that
/// all others reached after reading it, so one barrier per reduction is enough.
template <class A, int R, int kThreads>
struct Shared {
  A sums[2][kThreads / kWarp][R];
  union {
    Best<A> best[2][kThreads / kWarp][R];
    SumAndTop<A, R> both[2][kThreads / kWarp];  // instead of the two: one load brings those of two rows
  };
};

/// Sums and best scores of N rows over the group, as asked for, with one barrier.
template <bool kOneWarp, bool kSums, bool kBests, int N, class A, class SharedMemory>
__device__ __forceinline__ void group_reduce(A (&s)[N], Best<A> (&b)[N], SharedMemory& shared, int& half) {
#pragma unroll
  for (int q = 0; q < N; ++q) {
    if (kSums) s[q] = warp_sum(s[q]);
    if (kBests) b[q] = warp_best(b[q]);
  }
  if (kOneWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int q = 0; q < N; ++q) {
      if (kSums) shared.sums[half][warp][q] = s[q];
      if (kBests) shared.best[half][warp][q] = b[q];
    }
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < N; ++q) {
    if (kSums) s[q] = shared.sums[half][0][q];
    if (kBests) b[q] = shared.best[half][0][q];
  }
  for (int w = 1; w < warps; ++w) {
#pragma unroll
    for (int q = 0; q < N; ++q) {
      if (kSums) s[q] += shared.sums[half][w][q];
      if (kBests) b[q] = better(b[q], shared.best[half][w][q]);
    }
  }
  half ^= 1;
}

/// Sums and largest terms of N rows over the group, with one barrier; own: the largest of the warp.
template <bool kOneWarp, int N, class SharedMemory>
__device__ __forceinline__ void group_sums_and_tops(float (&s)[N], float (&top)[N], float (&own)[N],
                                                    SharedMemory& shared, int& half) {
#pragma unroll
  for (int q = 0; q < N; ++q) {
    s[q] = warp_sum(s[q]);
    top[q] = own[q] = warp_top(top[q]);
  }
  if (kOneWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int q = 0; q < N; ++q) {
      shared.both[half][warp].row[q] = {s[q], top[q]};
    }
  }
  __syncthreads();
  const SumAndTop<float, N> first = shared.both[half][0];
#pragma unroll
  for (int q = 0; q < N; ++q) {
    s[q] = first.row[q].sum;
    top[q] = first.row[q].top;
  }
  for (int w = 1; w < warps; ++w) {
    const SumAndTop<float, N> next = shared.both[half][w];
#pragma unroll
    for (int q = 0; q < N; ++q) {
      s[q] += next.row[q].sum;
      top[q] = fmaxf(top[q], next.row[q].top);
    }
  }
  half ^= 1;
}

template <class A>
__device__ __forceinline__ bool in_range(A sum) {
  return sum > static_cast<A>(kLow) && sum < static_cast<A>(kHigh);
}

// ---- What becomes of a row.

struct Tally {
  double objective = 0.0, weight = 0.0;
  int masked = 0;
};

/// lse = log(sum) more than what the sum is relative to, and than what was taken off the row before it was stored.
template <class A>
__device__ __forceinline__ void finish_row(const Arguments& a, int64_t row, A x0, A base, A sum, float weight,
                                           bool masked, Tally& tally) {
  double lse = static_cast<double>(x0) * static_cast<double>(static_cast<A>(a.scale)) + static_cast<double>(base) +
               static_cast<double>(log_of(sum));
  if (a.maxima != nullptr) lse = a.maxima_scale * static_cast<double>(a.maxima[row]) + lse;
  if (a.lse != nullptr) static_cast<A*>(a.lse)[row] = masked ? static_cast<A>(NAN) : static_cast<A>(lse);
  if (masked) {
    tally.masked += 1;
  } else if (weight > 0.0f) {
    tally.objective += static_cast<double>(weight) * lse;
    tally.weight += static_cast<double>(weight);
  }
}

/// Totals of a tile from those of the first R threads of a group, in a fixed order; all threads of their warp take
/// part.
template <int R>
__device__ __forceinline__ void finish_tile(const Arguments& a, int64_t tile, int64_t tiles, int thread, Tally tally) {
#pragma unroll
  for (int step = R / 2; step > 0; step /= 2) {
    tally.objective += __shfl_xor_sync(0xffffffffu, tally.objective, step);
    tally.weight += __shfl_xor_sync(0xffffffffu, tally.weight, step);
    tally.masked += __shfl_xor_sync(0xffffffffu, tally.masked, step);
  }
  if (thread != 0) return;
  a.totals[tile] = tally.objective;
  a.totals[tiles + tile] = tally.weight;
  if (tally.masked != 0) atomicAdd(a.masked, static_cast<unsigned long long>(tally.masked));
}

// ---- Which rows, and which of their entries.

/// The rows of one tile that are read: `rows` of them, position i being row(i).
struct Tile {
  int number;     // in this part of the matrix
  int before;     // rows of this part that are read before it
  int64_t first;  // row of position 0
  int step;       // rows from one group to the next
  int rows;

  __device__ __forceinline__ int64_t row(int i) const {
    return first + static_cast<int64_t>(i / kSampleRows) * step + i % kSampleRows;
  }
};

/// Tile `visit` of those in which something is read.
__device__ __forceinline__ Tile tile_at(const Arguments& a, int64_t visit) {
  const int every = a.sample.every;
  int64_t number = visit;
  if (every > kTileGroups) number = (a.sample.start + visit * every) / kTileGroups;
  const int64_t left = a.rows - number * kTileRows;
  const int rows = left < kTileRows ? static_cast<int>(left) : kTileRows;
  const int tile = static_cast<int>(number);
  if (every == 1) return {tile, tile * kTileRows, number * kTileRows, kSampleRows, rows};
  const int groups = (rows + kSampleRows - 1) / kSampleRows;
  const int start =
      static_cast<int>((every - (a.sample.phase + number * kTileGroups) % every) % every);  // group of the tile
  if (start >= groups) return {tile, 0, a.rows, kSampleRows, 0};
  const int last = (groups - 1 - start) / every, rest = rows - (start + last * every) * kSampleRows;
  const int64_t before = (number * kTileGroups + start - a.sample.start) / every * kSampleRows;
  return {tile, static_cast<int>(before), number * kTileRows + start * kSampleRows, every * kSampleRows,
          last * kSampleRows + (rest < kSampleRows ? rest : kSampleRows)};
}

/// The bits of 1.0f where x > y, else 0. That is one instruction, and half of one adds it to others as an integer;
/// candidates_in() tells how many there were.
__device__ __forceinline__ unsigned one_if_above(float x, float y) {
#if defined(__CUDA_ARCH__)
  float one;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(x), "f"(y));
  return __float_as_uint(one);
#else
  return x > y ? 0x3f800000u : 0u;
#endif
}
__device__ __forceinline__ unsigned one_if_above(double x, double y) {
  return x > y ? 0x3f800000u : 0u;
}

/// n of n * 0x3f800000 = (n << 30) - (n << 23), n < 128.
__device__ __forceinline__ int candidates_in(unsigned ones) {
  return static_cast<int>((0u - ones) >> 23 & 0x7fu);
}

/// Leaves the rows of a tile without marks, before any is set.
__device__ __forceinline__ void clear_marks(const Arguments& a, const Tile& tile, int thread, int threads) {
  unsigned* words = a.marks + static_cast<int64_t>(tile.before) * a.mark_words;
  const int count = tile.rows * a.mark_words;
  for (int k = thread; k < count; k += threads) words[k] = 0;
}

/// Notes which runs of adjacent columns of a row hold a candidate, term > level, and how many the row has: what a
/// kernel behind this pass needs to find them without reading the row again (sinkhorn_candidates_kernels.cuh).
/// terms: of this thread; kRuns: their runs; thread: number of its first run, whose bit is in word thread / 32; words:
/// from one of its runs to the next. Words without a mark stay as clear_marks() left them; behind a row's last word
/// there are no columns, hence no marks.
template <int kRuns, class A, int C>
__device__ __forceinline__ void mark(const Arguments& a, int read, const A (&terms)[C], A level, int thread,
                                     int words) {
  constexpr int kRun = C / kRuns;
  static_assert(C < 128 && kRuns <= kWarp, "counts of a thread in 7 bits, a lane for every word");
  const unsigned lane = static_cast<unsigned>(thread) % kWarp, row = static_cast<unsigned>(read);
  unsigned all_ones = 0, own_word = 0;
#pragma unroll
  for (int p = 0; p < kRuns; ++p) {
    unsigned ones_of_run = 0;
#pragma unroll
    for (int c = p * kRun; c < (p + 1) * kRun; ++c) ones_of_run += one_if_above(terms[c], level);
    const unsigned bits = __ballot_sync(0xffffffffu, ones_of_run != 0);
    if (p == 0 || lane == static_cast<unsigned>(p)) own_word = bits;
    all_ones += ones_of_run;
  }
  const int found = warp_count(candidates_in(all_ones));
  const int64_t at = static_cast<int64_t>(row) * static_cast<unsigned>(a.mark_words) +
                     (static_cast<unsigned>(thread) / kWarp + lane * static_cast<unsigned>(words));
  if (lane < static_cast<unsigned>(kRuns) && own_word != 0) a.marks[at] = own_word;
  if (lane == 0 && found != 0) atomicAdd(a.counts + row, found);
}

/// What the search for the candidates of a row goes by: its terms are exp((x - x0) scale - base + g).
template <class A>
__device__ __forceinline__ void write_record(const Arguments& a, int64_t row, A x0, A base, A factor, A sum) {
  A* record = static_cast<A*>(a.scratch) + 4 * row;
  record[0] = x0;
  record[1] = base;
  record[2] = factor;
  record[3] = sum;
}

__device__ __forceinline__ float keep_above(const Arguments& a, float) {
  return a.keep_above32;
}
__device__ __forceinline__ double keep_above(const Arguments& a, double) {
  return a.keep_above;
}

/// Above what a term is a candidate; nothing is where the row's factor is 0: it is masked, or of weight 0.
template <class A>
__device__ __forceinline__ A keep_level(const Arguments& a, A factor, A sum) {
  return factor > A(0) ? keep_above(a, sum) * sum : infinity<A>();
}

// ---- K <= 8192: everything in one read.

/// What is known of the rows of a tile by its first thread, until its first warp finishes them all together: a
/// logarithm for each row in the middle of the loop would cost narrow rows a third of their time.
struct Rows {
  float x0[kTileRows], base[kTileRows];  // the terms of a row are exp((x - x0) scale - base + g)
  float sum[kTileRows];                  // 0: masked
  float weight[kTileRows];
  int label[kTileRows];  // kFull only
};

/// The rows on their way while others are worked on. Their logits are copied past the registers into shared memory,
/// where each thread reads nothing but what it has copied itself: no barrier is needed.
template <class T, class M, bool kAligned>
struct Ahead {
  using Columns = Share<T, M::kColumns, kAligned>;
  Bytes16* slots;  // [stage][row][piece][thread of the block]
  int stages;      // 1 or 2: R rows each

  __device__ __forceinline__ Bytes16* slot(int stage, int q, int p) const {
    return slots + ((stage * M::kRows + q) * Columns::kPieces + p) * static_cast<int>(blockDim.x) +
           static_cast<int>(threadIdx.x);
  }

  /// Zeros for the columns that there are not, once: their pieces are never copied.
  __device__ __forceinline__ void clear(const Columns& share) const {
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) {
      if (share.has(p * Columns::kPer)) continue;
      for (int stage = 0; stage < stages; ++stage) {
        for (int q = 0; q < M::kRows; ++q) *slot(stage, q, p) = Bytes16{{0, 0, 0, 0}};
      }
    }
  }

  /// Starts to copy R rows from `first`; behind the last row of all that one is repeated. Every call is one group of
  /// copies, also when there is no row left.
  __device__ __forceinline__ void start(const Arguments& a, int stage, unsigned first, const Columns& share) const {
    const unsigned rows = static_cast<unsigned>(a.rows);  // below 2^31
    const auto row_at = [&](unsigned row) {
      return static_cast<const T*>(a.logits) + (row < rows ? row : rows - 1) * a.stride;
    };
    if (first < rows) {
#pragma unroll
      for (int q = 0; q < M::kRows; ++q) {
        const T* row = row_at(first + static_cast<unsigned>(q));
        const T* x_row = kAligned ? opaque(row) : row;
#pragma unroll
        for (int p = 0; p < Columns::kPieces; ++p) {
          if (!kAligned)
            *slot(stage, q, p) = gather(row, share.again(), p);
          else if (share.has_piece(p))
            copy_async16(slot(stage, q, p), x_row + share.column(p * Columns::kPer));
        }
      }
      if (kAligned && share.count % Columns::kPer != 0) {  // one thread has the end of the rows
#pragma unroll 1
        for (int p = 0; p < Columns::kPieces; ++p) {
          if (!share.ends_in_piece(p)) continue;
#pragma unroll 1
          for (int q = 0; q < M::kRows; ++q)
            *slot(stage, q, p) = gather(row_at(first + static_cast<unsigned>(q)), share.again(), p);
        }
      }
    }
    copy_async_commit();
  }

  /// Waits for the oldest rows on their way.
  __device__ __forceinline__ void wait() const {
    if (stages == 2)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
  }

  __device__ __forceinline__ void take(int stage, int q, Raw<T, M::kColumns>& raw) const {
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) raw.piece[p] = *slot(stage, q, p);
  }
};

/// Mapping: one of OneWarp, OneBlock, WideBlock. kFull: with labels, candidates, rows that are not read, and stored
/// logits, as the arguments ask for; else none of them.
template <class T, template <class, bool> class Mapping, bool kAligned, bool kFull>
__global__ void __launch_bounds__(Mapping<T, kAligned>::kThreads, Mapping<T, kAligned>::kBlocks)
    fused_kernel(const Arguments a) {
  using M = Mapping<T, kAligned>;
  constexpr int C = M::kColumns, R = M::kRows, kRuns = C / Share<T, C, kAligned>::kRun;
  static_assert(kSampleRows % R == 0, "rows that are read together are adjacent");
  using SharedMemory = Shared<float, R, M::kThreads>;
  constexpr int kGroups = M::kOneWarp ? M::kThreads / kWarp : 1;
  SELA_SHARED(SharedMemory, shared);
  SELA_SHARED_ARRAY(Rows, rows_of_groups, kGroups);
  const int threads = M::kOneWarp ? kWarp : static_cast<int>(blockDim.x);  // of a group
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const int groups_here = static_cast<int>(blockDim.x) / threads;
  const int group = static_cast<int>(blockIdx.x) * groups_here + static_cast<int>(threadIdx.x) / threads;
  const int groups = static_cast<int>(gridDim.x) * groups_here;
  Rows& tile_rows = rows_of_groups[M::kOneWarp ? static_cast<int>(threadIdx.x) / kWarp : 0];
  const int tiles = static_cast<int>((a.rows + kTileRows - 1) / kTileRows);
  const int visits = kFull ? static_cast<int>(a.sample.visits) : tiles;
  const Share<T, C, kAligned> share(thread, threads, static_cast<int>(a.cols));
  const float scale = static_cast<float>(a.scale);
  float g[C];
  load_potential(a.potential, share, g);
  int half = 0, stage = 0;
  SELA_DYNAMIC_SHARED(Bytes16, slots);
  const Ahead<T, M, kAligned> ahead{slots, kAligned ? a.stages : 1};
  if constexpr (kAligned) ahead.clear(share);
  const float* reference = static_cast<const float*>(a.reference);
  const unsigned all_rows = static_cast<unsigned>(a.rows);  // below 2^31
  float ref_ahead[R] = {};
  // References of R rows from `from`; behind the last row that row's.
  const auto look_ahead = [&](unsigned from) {
#pragma unroll
    for (int q = 0; q < R; ++q) ref_ahead[q] = reference[from + q < all_rows ? from + q : all_rows - 1];
  };
  const auto tile_of = [&](int visit) -> Tile {
    if (kFull) return tile_at(a, visit);
    const int64_t first = static_cast<int64_t>(visit) * kTileRows;
    return {visit, visit * kTileRows, first, kSampleRows,
            a.rows - first < kTileRows ? static_cast<int>(a.rows - first) : kTileRows};
  };
  // The row `rows_ahead` positions on, also in the next tile; where only some rows are read every tile begins anew.
  const auto later = [&](const Tile& tile, int visit, int i, int rows_ahead) -> unsigned {
    const int to = i + rows_ahead;
    if (kFull && a.sample.every > 1) return to < tile.rows ? static_cast<unsigned>(tile.row(to)) : all_rows;
    return static_cast<unsigned>(to < kTileRows ? visit : visit + groups - 1) * kTileRows + static_cast<unsigned>(to);
  };

  for (int visit = group; visit < visits; visit += groups) {
    const Tile tile = tile_of(visit);
    const int rows = tile.rows;
    if (kFull && rows == 0) break;  // the matrix ends within the last tile
    if (reference != nullptr && (visit == group || (kFull && a.sample.every > 1))) {
      stage = 0;
      look_ahead(static_cast<unsigned>(tile.first));
      for (int k = 0; k < ahead.stages; ++k) ahead.start(a, k, later(tile, visit, 0, k * R), share);
    }
    const auto row_at = [&](int i) { return kFull ? tile.row(i) : tile.first + i; };
    float partial[C];
#pragma unroll
    for (int c = 0; c < C; ++c) partial[c] = 0.0f;
    if (thread < kWarp) {
      for (int i = thread; i < rows; i += kWarp) {
        tile_rows.x0[i] = 0.0f;
        tile_rows.base[i] = reference != nullptr ? reference[row_at(i)] : 0.0f;
        tile_rows.weight[i] = a.weights != nullptr ? a.weights[row_at(i)] : 1.0f;
        if (kFull) tile_rows.label[i] = kNoLabel;
      }
    }
    if (kFull && a.marks != nullptr) clear_marks(a, tile, thread, threads);
    __syncwarp();  // blocks have a barrier before other warps read a weight, offer a label or set a mark

    // Rows that are done below: all without a reference, else those whose sum leaves its range.
    uint64_t careful = reference != nullptr ? 0 : ~uint64_t{0} >> (64 - rows);
    for (int i = 0; reference != nullptr && i < rows; i += R) {
      float e[R][C], s[R], ref[R], own_top[R], warp_tops[R], top[R];
      ahead.wait();
#pragma unroll
      for (int q = 0; q < R; ++q) {
        Raw<T, C> x;
        ahead.take(stage, q, x);
        ref[q] = ref_ahead[q];
        s[q] = 0.0f;
#pragma unroll
        for (int c = 0; c < C; ++c) e[q][c] = multiply_add(x[c], scale, -ref[q]) + g[c];
      }
      // What comes next is on its way while these rows are worked on, also from one tile to the next.
      ahead.start(a, stage, later(tile, visit, i, ahead.stages * R), share);
      look_ahead(later(tile, visit, i, R));
      stage = ahead.stages == 2 ? stage ^ 1 : 0;
#pragma unroll
      for (int q = 0; q < R; ++q) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          e[q][c] = exp_of(e[q][c]);
          s[q] += e[q][c];
        }
      }
      if (kFull) {
#pragma unroll
        for (int q = 0; q < R; ++q) {
          own_top[q] = e[q][0];
#pragma unroll
          for (int c = 1; c < C; ++c) own_top[q] = fmaxf(own_top[q], e[q][c]);
          top[q] = own_top[q];
        }
        group_sums_and_tops<M::kOneWarp>(s, top, warp_tops, shared, half);
      } else {
        Best<float> unused[R];
        group_reduce<M::kOneWarp, true, false>(s, unused, shared, half);
      }

#pragma unroll
      for (int q = 0; q < R; ++q) {
        if (q > 0 && i + q >= rows) continue;
        if (!in_range(s[q])) {  // the same for the whole group
          careful |= uint64_t{1} << (i + q);
          continue;
        }
        const float factor = tile_rows.weight[i + q] / s[q];
#pragma unroll
        for (int c = 0; c < C; ++c) partial[c] = multiply_add(e[q][c], factor, partial[c]);
        if (thread == 0) tile_rows.sum[i + q] = s[q];
        if (!kFull) continue;
        if (a.want_labels && own_top[q] == top[q]) {  // few threads, mostly one
          int best = C - 1;
#pragma unroll
          for (int c = C - 2; c >= 0; --c) {
            if (e[q][c] == top[q]) best = c;
          }
          atomicMin(tile_rows.label + i + q, share.column(best));
        }
        // Few warps of a trained plan's row hold a candidate; none does where there are none to be kept.
        const float level = keep_above(a, s[q]) * s[q];
        if (warp_tops[q] > level && factor > 0.0f)
          mark<kRuns>(a, tile.before + i + q, e[q], level, opaque(thread), threads / kWarp);
      }
    }

    // With care: relative to the best column's own logit and potential.
#pragma unroll 1
    for (int i = 0; careful != 0; ++i, careful >>= 1) {
      if ((careful & 1u) == 0) continue;
      const int64_t row = row_at(i);
      const T* x_row = static_cast<const T*>(a.logits) + row * a.stride;
      Raw<T, C> x;
      float sum[1] = {0.0f};
      Best<float> top[1] = {none<float>()};
      fetch(x_row, share, x);
#pragma unroll
      for (int c = 0; c < C; ++c) offer_checked(top[0], multiply_add(x[c], scale, g[c]), c);
      place(top[0], share);
      group_reduce<M::kOneWarp, false, true>(sum, top, shared, half);
      const bool bad = top[0].column < 0;
      const int64_t at = bad ? 0 : top[0].column;
      const float x0 = to_arithmetic(x_row[at]), base = static_cast<float>(a.potential[at]);
      float term[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        term[c] = bad ? 0.0f : exp_of(multiply_add(x[c] - x0, scale, -base) + g[c]);
        sum[0] += term[c];
      }
      group_reduce<M::kOneWarp, true, false>(sum, top, shared, half);
      const float factor = bad ? 0.0f : tile_rows.weight[i] / sum[0];
#pragma unroll
      for (int c = 0; c < C; ++c) partial[c] = multiply_add(term[c], factor, partial[c]);
      if (thread == 0) {
        tile_rows.x0[i] = x0;
        tile_rows.base[i] = base;
        tile_rows.sum[i] = sum[0];
        if (kFull) tile_rows.label[i] = top[0].column;
      }
      if (kFull && a.marks != nullptr)
        mark<kRuns>(a, tile.before + i, term, keep_level(a, factor, sum[0]), opaque(thread), threads / kWarp);
    }

    flush(partial, share.again(), a.units, a.columns);
    if (kFull && !M::kOneWarp) __syncthreads();  // all labels have been offered
    __syncwarp();
    if (thread < kWarp) {
      Tally tally;
      for (int i = thread; i < rows; i += kWarp) {
        const int64_t row = row_at(i);
        const float w = tile_rows.weight[i], sum = tile_rows.sum[i];
        const float x0 = tile_rows.x0[i], base = tile_rows.base[i];
        const bool bad = !(sum > 0.0f);
        finish_row(a, row, x0, base, sum, w, bad, tally);
        if (!kFull) continue;
        if (a.labels != nullptr) a.labels[row] = bad ? -1 : tile_rows.label[i];
        if (a.marks != nullptr) write_record(a, row, x0, base, bad ? 0.0f : w / sum, sum);
      }
      finish_tile<kWarp>(a, tile_of(opaque(visit)).number, tiles, thread, tally);
    }
    __syncwarp();  // before the first thread writes the next rows
  }
}

// ---- K > 8192, and float64: rows first, then columns; two reads.

/// One block per row tile: log-sum-exp, labels and objective; x0, ref and factor of every row to scratch.
template <class T, class A, bool kAligned>
__global__ void __launch_bounds__(kWideThreads, sizeof(A) == 4 ? 2 : 1) wide_rows_kernel(const Arguments a) {
  constexpr int C = kWideColumns, R = kWideRows<A, kAligned>;
  using SharedMemory = Shared<A, R, kWideThreads>;
  SELA_SHARED(SharedMemory, shared);
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t step = static_cast<int64_t>(threads) * C;
  const A scale = static_cast<A>(a.scale);
  const T* logits = static_cast<const T*>(a.logits);
  const A* reference = static_cast<const A*>(a.reference);
  int half = 0;
  const auto of_sweep = [&](int64_t from) {
    return Share<T, C, kAligned>(thread, threads, static_cast<int>(a.cols - from < step ? a.cols - from : step));
  };
  const Share<T, C, kAligned> placing = of_sweep(0);  // its column(c) goes on from sweep to sweep

  for (int64_t visit = blockIdx.x; visit < a.sample.visits; visit += gridDim.x) {
    const Tile tile = tile_at(a, visit);
    Tally tally;
    if (a.marks != nullptr) clear_marks(a, tile, thread, threads);  // for wide_columns_kernel
    for (int begin = 0; begin < tile.rows; begin += R) {
      const int64_t i = tile.row(begin), last = i + (tile.rows - begin < R ? tile.rows - begin : R);
      A s[R], ref[R];
      Best<A> best[R];
#pragma unroll
      for (int q = 0; q < R; ++q) {
        ref[q] = reference != nullptr ? reference[i + q < last ? i + q : last - 1] : static_cast<A>(NAN);
        s[q] = A(0);
        best[q] = none<A>();
      }
      if (reference != nullptr) {
        for (int64_t from = 0; from < a.cols; from += step) {
          const Share<T, C, kAligned> share = of_sweep(from);
          const int before = static_cast<int>(from / threads);  // of this thread, in earlier sweeps
          Raw<T, C> x[R];
          A g[C];
#pragma unroll
          for (int q = 0; q < R; ++q) fetch(logits + (i + q < last ? i + q : last - 1) * a.stride + from, share, x[q]);
          load_potential(a.potential + from, share, g);
#pragma unroll
          for (int q = 0; q < R; ++q) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
              const A t = multiply_add(x[q][c], scale, -ref[q]) + g[c];
              if (a.labels != nullptr) offer(best[q], t, before + c);
              s[q] += exp_of(t);
            }
          }
        }
#pragma unroll
        for (int q = 0; q < R; ++q) place(best[q], placing);
        group_reduce<false, true, true>(s, best, shared, half);
      }

      unsigned again = 0;  // the same for the whole block
#pragma unroll
      for (int q = 0; q < R; ++q) {
        if (i + q >= last) continue;
        if (reference == nullptr || !in_range(s[q])) {
          again |= 1u << q;
        } else if (thread == q) {
          const float w = a.weights != nullptr ? a.weights[i + q] : 1.0f;
          write_record(a, i + q, A(0), ref[q], static_cast<A>(w) / s[q], s[q]);
          finish_row(a, i + q, A(0), ref[q], s[q], w, false, tally);
          if (a.labels != nullptr) a.labels[i + q] = best[q].column;
        }
      }

#pragma unroll 1
      for (int q = 0; again != 0; ++q, again >>= 1) {
        if ((again & 1u) == 0) continue;
        const int64_t row = i + q;
        const T* x_row = logits + row * a.stride;
        A sum[1] = {A(0)};
        Best<A> top[1] = {none<A>()};
        for (int64_t from = 0; from < a.cols; from += step) {
          const Share<T, C, kAligned> share = of_sweep(from);
          const int before = static_cast<int>(from / threads);
          Raw<T, C> x;
          A g[C];
          fetch(x_row + from, share, x);
          load_potential(a.potential + from, share, g);
#pragma unroll
          for (int c = 0; c < C; ++c) offer_checked(top[0], multiply_add(x[c], scale, g[c]), before + c);
        }
        place(top[0], placing);
        group_reduce<false, false, true>(sum, top, shared, half);
        const bool bad = top[0].column < 0;
        const int64_t at = bad ? 0 : top[0].column;
        const A x0 = to_arithmetic(x_row[at]), base = static_cast<A>(a.potential[at]);
        for (int64_t from = 0; from < a.cols; from += step) {
          const Share<T, C, kAligned> share = of_sweep(from);
          Raw<T, C> x;
          A g[C];
          fetch(x_row + from, share, x);
          load_potential(a.potential + from, share, g);
#pragma unroll
          for (int c = 0; c < C; ++c) sum[0] += exp_of(multiply_add(x[c] - x0, scale, -base) + g[c]);
        }
        group_reduce<false, true, false>(sum, top, shared, half);
        if (thread == q) {
          const float w = a.weights != nullptr ? a.weights[row] : 1.0f;
          write_record(a, row, x0, base, bad ? A(0) : static_cast<A>(w) / sum[0], sum[0]);
          finish_row(a, row, x0, base, sum[0], w, bad, tally);
          if (a.labels != nullptr) a.labels[row] = bad ? -1 : top[0].column;
        }
      }
    }
    finish_tile<R>(a, tile.number, tiles, thread, tally);
  }
}

/// blockIdx.y: columns; blockIdx.x: row tiles, grid-stride. No barrier, no shared memory.
template <class T, class A, bool kAligned>
__global__ void __launch_bounds__(kWideColumnThreads, 4) wide_columns_kernel(const Arguments a) {
  constexpr int C = kWideColumns, R = kWideRows<A, kAligned>, kRun = Share<T, C, kAligned>::kRun;
  static_assert(kWideColumnThreads % kWarp == 0, "the first run of a block's columns is the first of a word");
  const int threads = static_cast<int>(blockDim.x), most = threads * C;
  const int warps = threads / kWarp,
            thread = static_cast<int>(blockIdx.y) * (most / kRun) + static_cast<int>(threadIdx.x);
  const int64_t from = static_cast<int64_t>(blockIdx.y) * most;
  const Share<T, C, kAligned> share(static_cast<int>(threadIdx.x), threads,
                                    static_cast<int>(a.cols - from < most ? a.cols - from : most));
  const A scale = static_cast<A>(a.scale);
  const T* logits = static_cast<const T*>(a.logits) + from;
  const A* scratch = static_cast<const A*>(a.scratch);
  A g[C];
  load_potential(a.potential + from, share, g);
  for (int64_t visit = blockIdx.x; visit < a.sample.visits; visit += gridDim.x) {
    const Tile tile = tile_at(a, visit);
    A partial[C];
#pragma unroll
    for (int c = 0; c < C; ++c) partial[c] = A(0);
    for (int begin = 0; begin < tile.rows; begin += R) {
      const int64_t i = tile.row(begin), last = i + (tile.rows - begin < R ? tile.rows - begin : R);
      Raw<T, C> x[R];
#pragma unroll
      for (int q = 0; q < R; ++q) fetch(logits + (i + q < last ? i + q : last - 1) * a.stride, share, x[q]);
#pragma unroll
      for (int q = 0; q < R; ++q) {
        if (i + q >= last) continue;
        const A x0 = scratch[4 * (i + q)], base = scratch[4 * (i + q) + 1], factor = scratch[4 * (i + q) + 2];
        if (!(factor > A(0))) continue;  // masked, or of weight 0: its terms may be NaN
        A e[C];
#pragma unroll
        for (int c = 0; c < C; ++c) {
          e[c] = exp_of(multiply_add(x[q][c] - x0, scale, -base) + g[c]);
          partial[c] = multiply_add(e[c], factor, partial[c]);
        }
        if (a.marks == nullptr) continue;
        mark<C / kRun>(a, tile.before + begin + q, e, keep_level(a, factor, scratch[4 * (i + q) + 3]), thread, warps);
      }
    }
    flush(partial, share.again(), a.units, a.columns + from);
  }
}

}  // namespace sinkhorn_cuda
}  // namespace sela
