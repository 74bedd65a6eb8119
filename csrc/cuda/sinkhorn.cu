// Launchers of the fused Sinkhorn pass: which kernel for which shape, on a grid of how many blocks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/sinkhorn_candidates_kernels.cuh"
#include "cuda/sinkhorn_kernels.cuh"
#include "cuda/sinkhorn_wide_kernels.cuh"
#include "sela/sinkhorn.h"

namespace sela {
namespace {

using rows_cuda::Fixed16;
using sinkhorn_cuda::Arguments;
using sinkhorn_cuda::CandidateArguments;

/// Launches over `work` pieces, `pieces` per block and turn: as many blocks as are resident at once, never more than
/// work.
template <class Kernel, class... Args>
void launch_over(const char* name, Kernel kernel, int64_t work, int pieces, int threads, size_t shared,
                 int64_t columns_of_blocks, void* stream, const Args&... arguments) {
  const int64_t wanted = (work + pieces - 1) / pieces;
  const int64_t at_once =
      static_cast<int64_t>(std::max(1, resident_blocks(name, kernel, threads, shared))) * multiprocessors();
  const int64_t per_column = std::max<int64_t>(1, at_once / columns_of_blocks);
  const dim3 grid(static_cast<unsigned>(std::min(wanted, per_column)), static_cast<unsigned>(columns_of_blocks));
  launch(name, kernel, grid, threads, shared, stream, arguments...);
}

template <class T, template <class, bool> class Mapping, bool kAligned, bool kFull>
void launch_mapping(const char* name, const Arguments& a, void* stream) {
  using namespace sinkhorn_cuda;
  using M = Mapping<T, kAligned>;
  const int owners = static_cast<int>((a.cols + M::kColumns - 1) / M::kColumns);
  const int threads = M::kOneWarp ? M::kThreads : (owners + kWarp - 1) / kWarp * kWarp;
  const size_t stage = static_cast<size_t>(threads) * M::kRows * M::kColumns * sizeof(T);
  Arguments staged = a;
  staged.stages = kAligned && 2 * stage <= kSlotBytes ? 2 : 1;
  launch_over(name, fused_kernel<T, Mapping, kAligned, kFull>, a.sample.visits, M::kOneWarp ? M::kThreads / kWarp : 1,
              threads, stage * staged.stages, 1, stream, staged);
}

template <class T, bool kAligned, bool kFull>
void launch_fused(const Arguments& a, void* stream) {
  using namespace sinkhorn_cuda;
  if (a.cols <= OneWarp<T, kAligned>::kWidest)
    launch_mapping<T, OneWarp, kAligned, kFull>("fused_kernel (one warp)", a, stream);
  else if (a.cols <= OneBlock<T, kAligned>::kWidest)
    launch_mapping<T, OneBlock, kAligned, kFull>("fused_kernel (one block)", a, stream);
  else
    launch_mapping<T, WideBlock, kAligned, kFull>("fused_kernel (wide block)", a, stream);
}

template <class T, class A, bool kAligned>
void launch_wide(const Arguments& a, void* stream) {
  using namespace sinkhorn_cuda;
  launch_over("wide_rows_kernel", wide_rows_kernel<T, A, kAligned>, a.sample.visits, 1, kWideThreads, 0, 1, stream, a);
  const int64_t per_block = static_cast<int64_t>(kWideColumnThreads) * kWideColumns;
  launch_over("wide_columns_kernel", wide_columns_kernel<T, A, kAligned>, a.sample.visits, 1, kWideColumnThreads, 0,
              (a.cols + per_block - 1) / per_block, stream, a);
}

/// What runs a pass over logits of a type: its kernels, for aligned rows or not.
struct RunPass {
  const Arguments& a;
  void* stream;

  template <class T, class A, bool kAligned>
  void run() const {
    if constexpr (sizeof(A) == 8) {
      launch_wide<T, A, kAligned>(a, stream);
    } else {
      const bool full = a.labels != nullptr || a.marks != nullptr || a.maxima != nullptr || a.sample.every > 1;
      if (a.cols > sinkhorn_cuda::kFusedColumns)
        launch_wide<T, A, kAligned>(a, stream);
      else if (full)
        launch_fused<T, kAligned, true>(a, stream);
      else
        launch_fused<T, kAligned, false>(a, stream);
    }
  }
};

/// The same for the search for candidates.
struct RunSearch {
  const CandidateArguments& a;
  void* stream;

  template <class T, class A, bool kAligned>
  void run() const {
    using namespace sinkhorn_cuda;
    launch_over("candidates_kernel", candidates_kernel<T, A, kAligned>, a.rows_read, kCandidateThreads / kWarp,
                kCandidateThreads, 0, 1, stream, a);
  }
};

/// Whether every row begins at a multiple of 16 bytes.
bool is_aligned(const SinkhornPass& pass) {
  const int64_t size = pass.type == LogitsType::float64 ? 8 : pass.type == LogitsType::float32 ? 4 : 2;
  const bool base = reinterpret_cast<uintptr_t>(pass.logits) % 16 == 0;
  return base && (pass.rows == 1 || pass.stride * size % 16 == 0);
}

template <class Task>
void run_typed(const SinkhornPass& pass, const Task& task) {
  const bool aligned = is_aligned(pass);
  switch (pass.type) {
    case LogitsType::float64:
      return aligned ? task.template run<double, double, true>() : task.template run<double, double, false>();
    case LogitsType::float16:
      return aligned ? task.template run<__half, float, true>() : task.template run<__half, float, false>();
    case LogitsType::bfloat16:
      return aligned ? task.template run<__nv_bfloat16, float, true>()
                     : task.template run<__nv_bfloat16, float, false>();
    case LogitsType::fixed16:
      if (!aligned) throw std::invalid_argument("sinkhorn_pass: expected rows of fixed16 at multiples of 16 bytes");
      return task.template run<Fixed16, float, true>();
    default:
      return aligned ? task.template run<float, float, true>() : task.template run<float, float, false>();
  }
}

/// Words of marks per row: a bit for every run of 16 bytes, or for every column of unaligned rows.
int64_t mark_words(const SinkhornPass& pass) {
  const int64_t size = pass.type == LogitsType::float64 ? 8 : pass.type == LogitsType::float32 ? 4 : 2;
  const int64_t run = is_aligned(pass) ? 16 / size : 1;
  return ((pass.cols + run - 1) / run + sinkhorn_cuda::kWarp - 1) / sinkhorn_cuda::kWarp;
}

/// Bytes of the records of rows, with which scratch begins; shifted references and marks are behind them.
int64_t record_bytes(const SinkhornPass& pass, bool candidates) {
  if (pass.type == LogitsType::float64) return pass.rows * 4 * static_cast<int64_t>(sizeof(double));
  const bool wide = pass.cols > sinkhorn_cuda::kFusedColumns;
  return wide || candidates ? pass.rows * 4 * static_cast<int64_t>(sizeof(float)) : 0;
}

int64_t reference_bytes(const SinkhornPass& pass) {
  return pass.maxima != nullptr ? pass.rows * static_cast<int64_t>(sizeof(float)) : 0;
}

sinkhorn_cuda::Sample sample_of(const SinkhornPass& pass, SinkhornSample sample) {
  const int64_t tiles = (pass.rows + kSinkhornCudaRows - 1) / kSinkhornCudaRows;
  sinkhorn_cuda::Sample found{1, 0, 0, tiles};
  if (sample.every == 1) return found;
  found.every = static_cast<int>(std::min<int64_t>(sample.every, 1 << 30));
  found.start = static_cast<int>(sample.start(0) / kSinkhornGroup);
  found.phase = static_cast<int>((found.every - found.start) % found.every);
  const int64_t groups = (sample.count(pass.rows) + kSinkhornGroup - 1) / kSinkhornGroup;
  if (found.every > sinkhorn_cuda::kTileGroups) found.visits = groups;
  return found;
}

Arguments arguments_of(const SinkhornPass& pass, SinkhornSample sample, double level, void* scratch) {
  if (pass.cols < 1 || pass.stride < pass.cols)
    throw std::invalid_argument("sinkhorn_pass: expected 1 <= cols <= stride, found cols " + std::to_string(pass.cols) +
                                ", stride " + std::to_string(pass.stride));
  if (pass.rows > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("sinkhorn_pass: expected less than 2^31 rows, found " + std::to_string(pass.rows));
  if (sample.every < 1 || sample.every > int64_t{1} << 30 || sample.first_block < 0)
    throw std::invalid_argument("sinkhorn_pass: expected every in 1 .. 2^30 and a first block >= 0, found " +
                                std::to_string(sample.every) + " and " + std::to_string(sample.first_block));
  const double largest = pass.type == LogitsType::float64 ? kLargestLevel64 : kLargestLevel;
  if (!(level >= 0.0 && level <= largest))
    throw std::invalid_argument("sinkhorn_pass: expected a level of candidates in 0 .. " + std::to_string(largest) +
                                " nats, found " + std::to_string(level));
  Arguments a{};
  a.logits = pass.logits;
  a.rows = pass.rows;
  a.cols = pass.cols;
  a.stride = pass.stride;
  a.scale = pass.scale;
  a.potential = pass.potential;
  a.weights = pass.row_weights;
  a.maxima = pass.maxima;
  a.maxima_scale = pass.maxima_scale;
  a.scratch = scratch;
  a.units = 1.0 / sinkhorn_resolution(pass);
  a.sample = sample_of(pass, sample);
  a.keep_above = std::numeric_limits<double>::infinity();
  if (level > 0.0) {
    unsigned char* marks = static_cast<unsigned char*>(scratch) + record_bytes(pass, true) + reference_bytes(pass);
    a.marks = reinterpret_cast<unsigned*>(marks);
    a.mark_words = static_cast<int>(mark_words(pass));
    a.keep_above = std::exp(-level);
  }
  a.keep_above32 = static_cast<float>(a.keep_above);
  return a;
}

}  // namespace

SinkhornWorkspace sinkhorn_workspace_cuda(const SinkhornPass& pass, SinkhornSample sample, bool candidates) {
  SinkhornWorkspace need;
  need.totals = 2 * std::max<int64_t>(1, (pass.rows + kSinkhornCudaRows - 1) / kSinkhornCudaRows);
  need.scratch = record_bytes(pass, candidates) + reference_bytes(pass);
  if (candidates) need.scratch += sample.count(pass.rows) * mark_words(pass) * static_cast<int64_t>(sizeof(unsigned));
  return need;
}

void sinkhorn_pass_cuda(const SinkhornPass& pass, const SinkhornSums& sums, double* totals, int64_t* masked,
                        void* scratch, void* stream, SinkhornSample sample, SinkhornMarks marks) {
  if (pass.rows <= 0) return;
  Arguments a = arguments_of(pass, sample, marks.level, scratch);
  if (a.sample.visits == 0) return;
  a.reference = sinkhorn_reference(pass);
  a.columns = reinterpret_cast<unsigned long long*>(sums.column_sums);
  a.lse = sums.lse;
  a.labels = sums.labels;
  a.want_labels = sums.labels != nullptr;
  a.totals = totals;
  a.masked = reinterpret_cast<unsigned long long*>(masked);
  a.counts = marks.counts;
  if (a.reference != nullptr && a.maxima != nullptr) {
    using namespace sinkhorn_cuda;
    unsigned char* memory = static_cast<unsigned char*>(scratch) + record_bytes(pass, a.marks != nullptr);
    float* shifted = reinterpret_cast<float*>(memory);
    launch_over("reference_kernel", reference_kernel, pass.rows, kReferenceThreads, kReferenceThreads, 0, 1, stream,
                static_cast<const float*>(a.reference), a.maxima, static_cast<float>(a.maxima_scale), pass.rows,
                shifted);
    a.reference = shifted;
  }
  run_typed(pass, RunPass{a, stream});
}

void sinkhorn_candidates_cuda(const SinkhornPass& pass, SinkhornSample sample, double level, const void* scratch,
                              const int64_t* offsets, int32_t* columns, float* values, void* stream) {
  if (pass.rows <= 0) return;
  CandidateArguments a{};
  a.pass = arguments_of(pass, sample, level, const_cast<void*>(scratch));
  a.rows_read = sample.count(pass.rows);
  a.offsets = offsets;
  a.columns = columns;
  a.values = values;
  if (a.rows_read == 0 || level <= 0.0) return;
  run_typed(pass, RunSearch{a, stream});
}

}  // namespace sela
