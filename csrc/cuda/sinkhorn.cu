// Launchers of the fused Sinkhorn pass: which kernel for which shape, on a grid of how many blocks.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/sinkhorn_kernels.cuh"
#include "sela/sinkhorn.h"

namespace sela {
namespace {

using sinkhorn_cuda::Arguments;

/// Launches over `work` pieces, `pieces` per block and turn: as many blocks as are resident at once, never more than
/// work.
template <class Kernel>
void launch_over(const char* name, Kernel kernel, int64_t work, int pieces, int threads, size_t shared,
                 int64_t columns_of_blocks, const Arguments& arguments, void* stream) {
  const int64_t wanted = (work + pieces - 1) / pieces;
  const int64_t at_once =
      static_cast<int64_t>(std::max(1, resident_blocks(name, kernel, threads, shared))) * multiprocessors();
  const int64_t per_column = std::max<int64_t>(1, at_once / columns_of_blocks);
  const dim3 grid(static_cast<unsigned>(std::min(wanted, per_column)), static_cast<unsigned>(columns_of_blocks));
  launch(name, kernel, grid, threads, shared, stream, arguments);
}

template <class T, template <class, bool> class Mapping, bool kAligned, bool kLabels>
void launch_mapping(const char* name, const Arguments& a, int64_t tiles, void* stream) {
  using namespace sinkhorn_cuda;
  using M = Mapping<T, kAligned>;
  const int owners = static_cast<int>((a.cols + M::kColumns - 1) / M::kColumns);
  const int threads = M::kOneWarp ? M::kThreads : (owners + kWarp - 1) / kWarp * kWarp;
  const size_t stage = static_cast<size_t>(threads) * M::kRows * M::kColumns * sizeof(T);
  Arguments staged = a;
  staged.stages = kAligned && 2 * stage <= kSlotBytes ? 2 : 1;
  launch_over(name, fused_kernel<T, Mapping, kAligned, kLabels>, tiles, M::kOneWarp ? M::kThreads / kWarp : 1, threads,
              stage * staged.stages, 1, staged, stream);
}

template <class T, bool kAligned, bool kLabels>
void launch_fused(const Arguments& a, int64_t tiles, void* stream) {
  using namespace sinkhorn_cuda;
  if (a.cols <= OneWarp<T, kAligned>::kWidest)
    launch_mapping<T, OneWarp, kAligned, kLabels>("fused_kernel (one warp)", a, tiles, stream);
  else if (a.cols <= OneBlock<T, kAligned>::kWidest)
    launch_mapping<T, OneBlock, kAligned, kLabels>("fused_kernel (one block)", a, tiles, stream);
  else
    launch_mapping<T, WideBlock, kAligned, kLabels>("fused_kernel (wide block)", a, tiles, stream);
}

template <class T, class A, bool kAligned>
void launch_wide(const Arguments& a, int64_t tiles, void* stream) {
  using namespace sinkhorn_cuda;
  launch_over("wide_rows_kernel", wide_rows_kernel<T, A, kAligned>, tiles, 1, kWideThreads, 0, 1, a, stream);
  const int64_t per_block = static_cast<int64_t>(kWideColumnThreads) * kWideColumns;
  launch_over("wide_columns_kernel", wide_columns_kernel<T, A, kAligned>, tiles, 1, kWideColumnThreads, 0,
              (a.cols + per_block - 1) / per_block, a, stream);
}

template <class T, bool kAligned>
void launch_float(const Arguments& a, int64_t tiles, void* stream) {
  if (a.cols > sinkhorn_cuda::kFusedColumns)
    launch_wide<T, float, kAligned>(a, tiles, stream);
  else if (a.labels != nullptr)
    launch_fused<T, kAligned, true>(a, tiles, stream);
  else
    launch_fused<T, kAligned, false>(a, tiles, stream);
}

template <class T>
bool is_aligned(const Arguments& a) {
  const bool base = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0;
  return base && (a.rows == 1 || a.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
}

template <class T>
void launch_typed(const Arguments& a, int64_t tiles, void* stream) {
  if (is_aligned<T>(a))
    launch_float<T, true>(a, tiles, stream);
  else
    launch_float<T, false>(a, tiles, stream);
}

}  // namespace

SinkhornWorkspace sinkhorn_workspace_cuda(int64_t rows, int64_t cols, LogitsType type) {
  SinkhornWorkspace need;
  need.totals = 2 * std::max<int64_t>(1, (rows + kSinkhornCudaRows - 1) / kSinkhornCudaRows);
  if (type == LogitsType::float64)
    need.scratch = rows * 4 * static_cast<int64_t>(sizeof(double));
  else if (cols > sinkhorn_cuda::kFusedColumns)
    need.scratch = rows * 4 * static_cast<int64_t>(sizeof(float));
  return need;
}

void sinkhorn_pass_cuda(const SinkhornPass& pass, const SinkhornSums& sums, double* totals, int64_t* masked,
                        void* scratch, void* stream) {
  if (pass.rows <= 0) return;
  if (pass.cols < 1 || pass.stride < pass.cols)
    throw std::invalid_argument("sinkhorn_pass: expected 1 <= cols <= stride, found cols " + std::to_string(pass.cols) +
                                ", stride " + std::to_string(pass.stride));
  Arguments a{};
  a.logits = pass.logits;
  a.rows = pass.rows;
  a.cols = pass.cols;
  a.stride = pass.stride;
  a.scale = pass.scale;
  a.potential = pass.potential;
  a.weights = pass.row_weights;
  a.reference = sinkhorn_reference(pass);
  a.columns = reinterpret_cast<unsigned long long*>(sums.column_sums);
  a.lse = sums.lse;
  a.labels = sums.labels;
  a.totals = totals;
  a.masked = reinterpret_cast<unsigned long long*>(masked);
  a.scratch = scratch;
  a.units = 1.0 / sinkhorn_resolution(pass);

  const int64_t tiles = (pass.rows + kSinkhornCudaRows - 1) / kSinkhornCudaRows;
  switch (pass.type) {
    case LogitsType::float64:
      if (is_aligned<double>(a))
        launch_wide<double, double, true>(a, tiles, stream);
      else
        launch_wide<double, double, false>(a, tiles, stream);
      break;
    case LogitsType::float16:
      launch_typed<__half>(a, tiles, stream);
      break;
    case LogitsType::bfloat16:
      launch_typed<__nv_bfloat16>(a, tiles, stream);
      break;
    default:
      launch_typed<float>(a, tiles, stream);
  }
}

}  // namespace sela
