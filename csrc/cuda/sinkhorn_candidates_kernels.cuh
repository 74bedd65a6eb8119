// Kernels beside the fused Sinkhorn pass (cuda/sinkhorn_kernels.cuh): what it goes by before, what is kept of it after.
//
// Candidates. A pass cannot write them itself: where one belongs is known when all rows before it are counted. It
// leaves, for each row read, how many there are, one bit for every run of adjacent columns that holds one (16 bytes;
// one column where rows are unaligned), and its x0, base and sum. With the counts summed up, candidates_kernel goes to
// the marked runs alone, computes their terms by the same operations, hence the same bits, and writes what is above the
// level.
//
// Bytes, operations and floor: per row read 16 of its record, 8 of its offset, K / 64 bytes of marks (16-bit types; K /
// 32 for float), which is 1% of the logits; per candidate up to 32 bytes (one sector) of them and 8 written; an ex2 per
// entry of a marked run. A trained plan has 1 or 2 candidates a row: N = 1,281,167, K = 3000: 0.2 GB, 0.1 ms on an H100
// at 3.0 TB/s, 3% of the pass. When each run holds one (a smooth plan, in which Newton's method is not used) it is
// another pass.
//
// Who does what: a warp takes a row, 32 words of marks at a time, a lane one run of each marked word. Lanes write their
// candidates behind those of the lanes before, by a scan of their numbers: the order is that of the columns.
#pragma once
#include "cuda/sinkhorn_reductions.cuh"

namespace sela {
namespace sinkhorn_cuda {

constexpr int kCandidateThreads = 256;  // rows per block: its warps
constexpr int kReferenceThreads = 256;

struct CandidateArguments {
  Arguments pass;
  int64_t rows_read;
  const int64_t* offsets;  // [rows_read + 1]
  int32_t* columns;        // [offsets[rows_read]]
  float* values;           // the same
};

template <class T, class A, bool kAligned>
__global__ void __launch_bounds__(kCandidateThreads) candidates_kernel(const CandidateArguments arguments) {
  constexpr int kRun = Share<T, 16 / static_cast<int>(sizeof(T)), kAligned>::kRun;
  const Arguments& a = arguments.pass;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  const A scale = static_cast<A>(a.scale);
  int64_t read = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  for (; read < arguments.rows_read; read += warps) {
    int64_t to = arguments.offsets[read];
    if (to == arguments.offsets[read + 1]) continue;
    const int64_t row = (a.sample.start + read / kSampleRows * a.sample.every) * kSampleRows + read % kSampleRows;
    const T* x_row = static_cast<const T*>(a.logits) + row * a.stride;
    const A* record = static_cast<const A*>(a.scratch) + 4 * row;
    const A x0 = record[0], base = record[1], sum = record[3], level = static_cast<A>(a.keep_above) * sum;
    for (int first = 0; first < a.mark_words; first += kWarp) {
      const unsigned own = first + lane < a.mark_words ? a.marks[read * a.mark_words + first + lane] : 0;
      unsigned marked = __ballot_sync(0xffffffffu, own != 0);
      for (; marked != 0; marked &= marked - 1) {
        const int word = lowest_bit(marked);
        const unsigned runs = __shfl_sync(0xffffffffu, own, word);
        const int64_t column = (static_cast<int64_t>(first + word) * kWarp + lane) * kRun;
        A e[kRun];
        int found = 0;
#pragma unroll
        for (int v = 0; v < kRun; ++v) e[v] = A(0);
        if ((runs >> lane & 1u) != 0) {
          const Bytes16 piece = piece_at<kAligned, kRun>(x_row + column, a.cols - column);
#pragma unroll
          for (int v = 0; v < kRun; ++v) {
            const T x = value_in<T>(piece, v);
            const A g = column + v < a.cols ? static_cast<A>(a.potential[column + v]) : -infinity<A>();
            e[v] = exp_of(multiply_add(to_arithmetic(x) - x0, scale, -base) + g);
            found += e[v] > level ? 1 : 0;
          }
        }
        int behind = found;  // candidates of this lane and those before
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, behind, step);
          if (lane >= step) behind += other;
        }
        int64_t at = to + behind - found;
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
          if (!(e[v] > level)) continue;
          arguments.columns[at] = static_cast<int32_t>(column + v);
          arguments.values[at] = static_cast<float>(log_of(e[v] / sum));
          ++at;
        }
        to += __shfl_sync(0xffffffffu, behind, kWarp - 1);
      }
    }
  }
}

/// The reference of rows that were stored relative to their maxima, from that of the rows before. It need not be exact:
/// what is taken off here is what finish_row() adds to.
__global__ void __launch_bounds__(kReferenceThreads)
    reference_kernel(const float* reference, const float* maxima, float scale, int64_t rows, float* shifted) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += step)
    shifted[row] = multiply_add(-scale, maxima[row], reference[row]);
}

}  // namespace sinkhorn_cuda
}  // namespace sela
