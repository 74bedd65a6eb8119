// Kernels of the Sinkhorn pass over rows of more than 8,192 columns, and of float64 (see sela/sinkhorn.h for what they
// compute, sinkhorn_kernels.cuh for rows that fit in a block).
//
// Bytes, operations and floor, per pass over [N, K] in b-byte logits: wide_rows_kernel, then wide_columns_kernel read
// the logits, with an ex2 for each entry each time, and N * 24 bytes of scratch: 2 N K b bytes, twice the floor of the
// fused kernel, 1.4 ns per 1000 entries of float16 on an H100 at 3.0 TB/s.
//
// Who does what. In wide_rows_kernel a block takes a tile of kTileRows rows, R at a time, in sweeps of kWideColumns
// columns per thread; in wide_columns_kernel a thread keeps its columns, and the sums of a tile, in registers.
//
//   kernel         block    columns, R     blocks resident   under way on a multiprocessor, 16 bits
//   wide rows      8 warps  8, 4 (f64 1)   2                 32 KB
//   wide columns   4 warps  8, 4 (f64 1)   5..7              48 KB and more
#pragma once
#include "cuda/sinkhorn_reductions.cuh"

namespace sela {
namespace sinkhorn_cuda {

constexpr int kWideColumns = 8;          // columns per thread and sweep
constexpr int kWideThreads = 256;        // threads of the row kernel
constexpr int kWideColumnThreads = 128;  // threads of the column kernel
template <class A, bool kAligned>
constexpr int kWideRows = sizeof(A) == 8 ? 1 : (kAligned ? 4 : 2);  // rows in flight

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
