// Kernels of the fused Sinkhorn pass (see sela/sinkhorn.h for what they compute, cpu/sinkhorn_loops.cpp, Note [Fused
// pass], for the arithmetic). No torch, no cooperative groups, no grid barrier: the SIMT runner executes this header.
//
// Bytes, operations and floor, per pass over [N, K] in b-byte logits:
//   fused_kernel (K <= 8192): N K b bytes read once; N * (4 to 16) bytes of reference, weights, log-sum-exp, labels;
//     one 64-bit addition in L2 per 64 entries. Per entry 1 fma + 1 add + 1 mul + 1 ex2 + 1 add + 1 fma.
//     H100 at 3.0 TB/s and 3.7e12 ex2/s, N = 1,281,167, K = 3000, float16: 7.7 GB = 2.6 ms of memory, 1.0 ms of ex2:
//     bound by memory, 2.0 ns per row; float32: 4.0 ns per row.
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
#pragma once
#include "cuda/sinkhorn_reductions.cuh"

namespace sela {
namespace sinkhorn_cuda {

constexpr int kNoLabel = 0x7fffffff;  // more than any column

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

/// What is known of the rows of a tile, until the first warp finishes them all together: a logarithm for each row in
/// the middle of the loop would cost narrow rows a third of their time. References and weights are there from the
/// beginning.
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
      float e[R][C], s[R], ref[R], warp_tops[R], top[R];
      ahead.wait();
#pragma unroll
      for (int q = 0; q < R; ++q) {
        Raw<T, C> x;
        ahead.take(stage, q, x);
        ref[q] = ref_ahead[q];
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
          s[q] = c == 0 ? e[q][c] : s[q] + e[q][c];
        }
      }
      if (kFull) {
#pragma unroll
        for (int q = 0; q < R; ++q) {
          top[q] = e[q][0];
#pragma unroll
          for (int c = 1; c < C; ++c) top[q] = fmaxf(top[q], e[q][c]);
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
        if (a.want_labels && warp_tops[q] == top[q]) {  // few warps, mostly one
          int best = kNone;
#pragma unroll
          for (int c = C - 1; c >= 0; --c) {
            if (e[q][c] == top[q]) best = c;
          }
          if (best >= 0) atomicMin(tile_rows.label + i + q, share.column(best));
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
    if (!M::kOneWarp) __syncthreads();  // all labels have been offered, all weights read
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

}  // namespace sinkhorn_cuda
}  // namespace sela
