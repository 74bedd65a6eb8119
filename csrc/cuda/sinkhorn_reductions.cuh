// What the kernels of the Sinkhorn pass share (sinkhorn_kernels.cuh: rows of a block, sinkhorn_wide_kernels.cuh: wider
// ones): arguments, arithmetic, the columns of a thread, reductions over a group of threads, what becomes of a row, and
// the marks of its candidates. No torch, no cooperative groups, no grid barrier: the SIMT runner executes this header.
//
// Column sums are float inside a tile, and leave it as 64-bit integers, whose sum does not depend on any order: the
// bits are the same for any grid. In a tile rows are added in ascending order, first those that need no care, then the
// others. Row sums are reduced in a fixed order too.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/row_pieces.cuh"
#include "sela/sinkhorn.h"

namespace sela {
namespace sinkhorn_cuda {

using namespace rows_cuda;

constexpr int kTileRows =
    static_cast<int>(kSinkhornCudaRows);  // few atomics (1 per 64 entries), and enough tiles for every multiprocessor
constexpr int kSampleRows = static_cast<int>(kSinkhornGroup);
constexpr int kTileGroups = kTileRows / kSampleRows;
constexpr float kLow = 1e-20f;  // safe range of a row's sum relative to its reference
constexpr float kHigh = 1e30f;

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
/// The same number, of which the compiler knows nothing: what is computed from it stays where it is written, instead of
/// being kept in registers (two for each address) over a whole loop.
__device__ __forceinline__ int opaque(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
/// The same pointer, which is computed once. For copy_async16() alone: other loads by it would not know that its memory
/// is global.
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

__device__ __forceinline__ void add_units(unsigned long long* column, long long value) {
  if (value != 0) atomicAdd(column, static_cast<unsigned long long>(value));
}
template <class A>
__device__ __forceinline__ long long in_units(A value, double units) {
  return static_cast<long long>(static_cast<double>(value) * units + 0.5);
}

// ---- The columns of a thread.

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
      put_value(piece, v, *share.at(row, c));
    }
  }
  return piece;
}

/// What a thread has read of one row, as it lies in memory.
template <class T, int C>
struct Raw {
  Bytes16 piece[C * sizeof(T) / 16];

  __device__ __forceinline__ decltype(to_arithmetic(T())) operator[](int c) const {
    constexpr int kPer = 16 / static_cast<int>(sizeof(T));
    return to_arithmetic(value_in<T>(piece[c / kPer], c % kPer));
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

}  // namespace sinkhorn_cuda
}  // namespace sela
