// Launchers of Newton's method on candidates: how many lanes share a row, and grids of how many blocks.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/newton_kernels.cuh"
#include "sela/newton_device.h"

namespace sela {
namespace {

using namespace newton_cuda;

void check(const NewtonDeviceRows& rows) {
  if (rows.cols < 1 || rows.rows < 0 || rows.entries < 0)
    throw std::invalid_argument("newton: expected rows, entries >= 0 and columns >= 1, found " +
                                std::to_string(rows.rows) + ", " + std::to_string(rows.entries) + ", " +
                                std::to_string(rows.cols));
}

int64_t tiles_of(const NewtonDeviceRows& rows) {
  return (rows.rows + kNewtonTileRows - 1) / kNewtonTileRows;
}

/// As many blocks as are resident at once, never more than there is work for.
template <class Kernel, class Arguments>
void launch_over(const char* name, Kernel kernel, int64_t work, int threads, const Arguments& a, void* stream) {
  if (work <= 0) return;
  const int64_t at_once = int64_t{std::max(1, resident_blocks(name, kernel, threads, 0))} * multiprocessors();
  launch(name, kernel, dim3(static_cast<unsigned>(std::min(work, std::max<int64_t>(1, at_once)))), threads, 0, stream,
         a);
}

void launch_rows(const RowsArguments& a, void* stream) {
  const int64_t tiles = tiles_of(a.rows);
  // Lanes that have nothing to do cost as much as those that have: fewest for rows of few entries, on the average.
  if (a.rows.entries <= 4 * a.rows.rows)
    launch_over("newton_rows_kernel (2 lanes)", newton_rows_kernel<2>, tiles, kNewtonRowThreads, a, stream);
  else if (a.rows.entries <= 16 * a.rows.rows)
    launch_over("newton_rows_kernel (8 lanes)", newton_rows_kernel<8>, tiles, kNewtonRowThreads, a, stream);
  else
    launch_over("newton_rows_kernel (32 lanes)", newton_rows_kernel<32>, tiles, kNewtonRowThreads, a, stream);
}

float smallest_of(double level) {
  return static_cast<float>(std::exp(-level));
}

int64_t blocks_of(int64_t rows) {
  return (rows + kNewtonCountThreads - 1) / kNewtonCountThreads;
}

}  // namespace

void newton_count_cuda(const NewtonDeviceRows& rows, const float* plan, double level, int64_t* kept, int64_t* counts,
                       void* stream) {
  check(rows);
  const CountArguments a{rows, plan, smallest_of(level), kept, counts};
  launch_over("newton_count_kernel", newton_count_kernel, blocks_of(rows.rows), kNewtonCountThreads, a, stream);
}

void newton_compact_cuda(const NewtonDeviceRows& rows, const float* plan, double level, const int64_t* ends,
                         int64_t* offsets, int32_t* columns, float* values, float* weights, void* stream) {
  check(rows);
  const CompactArguments a{rows, plan, smallest_of(level), ends, offsets, columns, values, weights};
  launch_over("newton_compact_kernel", newton_compact_kernel, blocks_of(rows.rows), kNewtonCountThreads, a, stream);
}

void newton_sums_cuda(const NewtonDeviceRows& rows, double ratio, const double* d, const NewtonDeviceSums& sums,
                      void* stream) {
  check(rows);
  RowsArguments a{};
  a.rows = rows;
  a.sums = sums;
  a.ratio = ratio;
  a.phase = kNewtonFirst;
  a.x = d;
  launch_rows(a, stream);
}

void newton_product_cuda(const NewtonDeviceRows& rows, const double* x, double largest, const NewtonDeviceSums& sums,
                         void* stream) {
  check(rows);
  if (!(largest > kTiny && largest < kHuge))
    throw std::invalid_argument("newton_product: expected the largest |x| in 1e-200 .. 1e200, found " +
                                std::to_string(largest));
  RowsArguments a{};
  a.rows = rows;
  a.sums = sums;
  a.phase = kNewtonProduct;
  a.x = x;
  a.largest = largest;
  launch_rows(a, stream);
}

void newton_rounds_cuda(const NewtonDeviceRows& rows, const NewtonDeviceSolve& solve, const NewtonDeviceSums& sums,
                        int64_t rounds, void* stream) {
  check(rows);
  RowsArguments a{};
  a.rows = rows;
  a.sums = sums;
  a.ratio = solve.ratio;
  a.vectors = solve.vectors;
  a.state = solve.state;
  const ColumnsArguments c{solve, sums.columns, sums.totals, tiles_of(rows), rows.cols, rows.units};
  const int64_t warps = (rows.cols + kWarp - 1) / kWarp;
  const int threads = static_cast<int>(std::min<int64_t>(kNewtonColumnThreads, warps * kWarp));
  for (int64_t round = 0; round < rounds; ++round) {
    launch_rows(a, stream);
    launch("newton_columns_kernel", newton_columns_kernel, dim3(1), dim3(threads), 0, stream, c);
  }
}

}  // namespace sela
