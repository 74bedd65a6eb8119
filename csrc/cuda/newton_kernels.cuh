// Kernels of Newton's method on candidates (see sela/newton_device.h for what they compute). No torch, no cooperative
// groups, no grid barrier: the SIMT runner executes this header.
//
// Bytes, operations and floor. E entries in R rows with several candidates, K columns:
//   newton_rows_kernel, a product: 12 bytes per entry (column, q; column again from the first-level cache), 8 (or 12)
//     per row, and in the second-level cache 8 bytes of x and one 64-bit addition per entry. Sums: the same with the
//     value, 4 bytes of plan written, a second addition, and two exp() in double per entry, of some 30 instructions.
//     H100: 8 million entries (1,281,167 rows of ImageNet with 6 each) are 64 MB = 21 us of memory for a product, and
//     128 MB = 43 us for sums. Additions in the second-level cache come to about 1 per clock in each of 96 slices:
//     50 and 100 us. So a product is bound by those, and a pass over the logits (2.6 ms) takes as long as 50 of them.
//   newton_columns_kernel: 5 to 20 vectors of 8 K bytes from the second-level cache: of K = 3000 0.1 to 0.5 MB. One
//     block, bound by latency: a few reductions of some 1 us each. That is what a product of small problems costs.
//   newton_count_kernel, newton_compact_kernel: 12 bytes per entry read (8 without a plan, which is counted by the
//     offsets and the column of single rows alone) and 8 written, once per pass and once per solve.
//
// Who does what.
//   newton_rows_kernel<G>: G lanes of a warp share a row, entries k = lane, lane + G, ...; their sums are reduced by
//     shuffles in a fixed order. G = 2, 8 or 32 by the entries per row. A block of 128 threads takes tiles of 128 rows,
//     128 / G at a time. Columns are added to by integer atomics, which know no order; logarithms are summed in double,
//     thread by thread over the rows of a tile, then over the threads in a fixed order, into the tile's own number.
//   newton_columns_kernel: one block; thread t has columns t, t + threads, ..., of all vectors, so no vector is read by
//     another thread than wrote it. Every thread knows every sum over columns: they all take the same way.
//   newton_count_kernel, newton_compact_kernel: a thread per row: rows have a few entries, which lie side by side.
#pragma once
#include <math.h>
#include <stdint.h>

#include "cuda/gpu.cuh"
#include "sela/newton_device.h"

namespace sela {
namespace newton_cuda {

constexpr int kWarp = 32;
constexpr int kNewtonRowThreads = 128;     // of newton_rows_kernel
constexpr int kNewtonColumnThreads = 512;  // of newton_columns_kernel, at most
constexpr int kNewtonCountThreads = 256;   // of newton_count_kernel and newton_compact_kernel
constexpr int kTile = static_cast<int>(kNewtonTileRows);
constexpr int kMost = 4;                         // sums over columns that are reduced together
constexpr int kTrials = 12;                      // of a line search
constexpr double kTiny = 1e-200, kHuge = 1e200;  // a direction beyond these is none

struct RowsArguments {
  NewtonDeviceRows rows;
  NewtonDeviceSums sums;
  double ratio;
  int64_t phase;             // what to do, where there is no solve: kNewtonFirst (sums) or kNewtonProduct
  const double* x;           // then: d, or what to multiply
  double largest;            // then: max |x|
  const double* vectors;     // of a solve
  const NewtonState* state;  // of a solve, or null
};

struct ColumnsArguments {
  NewtonDeviceSolve solve;
  int64_t* columns;  // [2, cols]
  const double* totals;
  int64_t tiles;
  int64_t cols;
  double units;
};

struct CountArguments {
  NewtonDeviceRows rows;
  const float* plan;
  float smallest;
  int64_t* kept;
  int64_t* counts;
};

struct CompactArguments {
  NewtonDeviceRows rows;
  const float* plan;
  float smallest;
  const int64_t* ends;
  int64_t* offsets;
  int32_t* columns;
  float* values;
  float* weights;
};

__device__ __forceinline__ void add_units(int64_t* column, double value, double units) {
  const long long count = static_cast<long long>(rint(value * units));
  if (count != 0) atomicAdd(reinterpret_cast<unsigned long long*>(column), static_cast<unsigned long long>(count));
}

/// Which vector of a solve its rows are to be summed at.
__device__ __forceinline__ int vector_of(const NewtonState& s) {
  if (s.phase == kNewtonProduct) return kNewtonDirection;
  const int64_t point = s.phase == kNewtonTrial ? 1 - s.at : s.at;
  return kNewtonPoint + static_cast<int>(point) * kNewtonPerPoint;
}

// ---- Rows.

template <int G>
__device__ __forceinline__ double lanes_sum(double x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <int G>
__device__ __forceinline__ double lanes_max(double x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, x, step);
    x = other > x ? other : x;
  }
  return x;
}

/// Adds the row's q to the columns; returns weight times log-sum-exp. All lanes of the warp are here, with `count` 0
/// where there is no row.
template <int G>
__device__ __forceinline__ double sum_row(const RowsArguments& a, const double* d, int64_t begin, int64_t count,
                                          double weight, int lane) {
  const int32_t* columns = a.rows.columns + begin;
  const float* values = a.rows.values + begin;
  double top = -INFINITY;
  for (int64_t k = lane; k < count; k += G) {
    const double t = a.ratio * static_cast<double>(values[k]) + d[columns[k]];
    top = t > top ? t : top;
  }
  top = lanes_max<G>(top);
  double sum = 0.0;
  for (int64_t k = lane; k < count; k += G) sum += exp(a.ratio * static_cast<double>(values[k]) + d[columns[k]] - top);
  sum = lanes_sum<G>(sum);
  const double inverse = 1.0 / sum;
  for (int64_t k = lane; k < count; k += G) {
    const int32_t j = columns[k];
    const double e = exp(a.ratio * static_cast<double>(values[k]) + d[j] - top);
    const double q = e * inverse, share = weight * q;
    add_units(a.sums.columns + j, share, a.rows.units);
    add_units(a.sums.columns + a.rows.cols + j, share * ((sum - e) * inverse), a.rows.units);
    if (a.sums.plan != nullptr) a.sums.plan[begin + k] = static_cast<float>(q);
  }
  return count > 0 ? weight * (top + log(sum)) : 0.0;
}

/// Adds weight q (x - q . x) to the columns. q_j (x_j - q . x) keeps its digits where q_j x_j - q_j (q . x) would lose
/// them; that q sums to 1 in float only is why the mean is divided by that sum.
template <int G>
__device__ __forceinline__ void multiply_row(const RowsArguments& a, const double* x, double units, int64_t begin,
                                             int64_t count, double weight, int lane) {
  const int32_t* columns = a.rows.columns + begin;
  const float* plan = a.sums.plan + begin;
  double mean = 0.0, total = 0.0;
  for (int64_t k = lane; k < count; k += G) {
    const double q = static_cast<double>(plan[k]);
    mean += q * x[columns[k]];
    total += q;
  }
  mean = lanes_sum<G>(mean) / lanes_sum<G>(total);
  for (int64_t k = lane; k < count; k += G)
    add_units(a.sums.columns + columns[k], weight * static_cast<double>(plan[k]) * (x[columns[k]] - mean), units);
}

/// One sum or product over all rows; within a solve, the one that it waits for.
template <int G>
__global__ void __launch_bounds__(kNewtonRowThreads) newton_rows_kernel(const RowsArguments a) {
  SELA_SHARED_ARRAY(double, parts, kNewtonRowThreads / kWarp);
  const int64_t phase = a.state != nullptr ? a.state->phase : a.phase;
  if (phase == kNewtonDone) return;
  const double* x = a.state != nullptr ? a.vectors + vector_of(*a.state) * a.rows.cols : a.x;
  const bool product = phase == kNewtonProduct;
  const double units =
      product ? newton_product_units(a.rows.units, a.state != nullptr ? a.state->largest : a.largest) : 0.0;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % G;
  const int64_t tiles = (a.rows.rows + kTile - 1) / kTile;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    double objective = 0.0;
    for (int turn = 0; turn < kTile; turn += kNewtonRowThreads / G) {
      const int64_t row = tile * kTile + turn + thread / G;
      const bool there = row < a.rows.rows;
      const int64_t begin = there ? a.rows.offsets[row] : 0;
      const int64_t count = there ? a.rows.offsets[row + 1] - begin : 0;
      const double weight = there && a.rows.weights != nullptr ? static_cast<double>(a.rows.weights[row]) : 1.0;
      if (product) {
        multiply_row<G>(a, x, units, begin, count, weight, lane);
      } else {
        const double part = sum_row<G>(a, x, begin, count, weight, lane);
        if (lane == 0) objective += part;
      }
    }
    if (product) continue;  // all threads of the grid
    objective = lanes_sum<kWarp>(objective);
    if (thread % kWarp == 0) parts[thread / kWarp] = objective;
    __syncthreads();
    if (thread == 0) {
      double total = 0.0;
      for (double part : parts) total += part;
      a.sums.totals[tile] = total;
    }
    __syncthreads();  // parts are written again
  }
}

// ---- Columns.

/// The algebra of one round. Every thread has all numbers of the state, and its own columns of every vector.
struct Solver {
  const ColumnsArguments& a;
  NewtonState s;
  double* shared;  // [kMost][kNewtonColumnThreads / kWarp]

  __device__ __forceinline__ double* vector(int which) const { return a.solve.vectors + which * a.cols; }
  /// Vector 0 (d), 1 (gradient), 2 (curvature) or 3 (diagonal) of a point.
  __device__ __forceinline__ double* point(int64_t of, int which) const {
    return vector(kNewtonPoint + static_cast<int>(of) * kNewtonPerPoint + which);
  }
  __device__ __forceinline__ bool wanted(int64_t j) const { return a.solve.columns.target[j] > 0.0; }

  /// Sums (or maxima) over the block in a fixed order, the same for all threads.
  template <bool kMax, int N>
  __device__ __forceinline__ void reduce(double (&values)[N]) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = kMax ? lanes_max<kWarp>(values[n]) : lanes_sum<kWarp>(values[n]);
      if (threadIdx.x % kWarp == 0) shared[n * (kNewtonColumnThreads / kWarp) + warp] = values[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = shared[n * (kNewtonColumnThreads / kWarp)];
      for (int w = 1; w < warps; ++w) {
        const double other = shared[n * (kNewtonColumnThreads / kWarp) + w];
        values[n] = kMax ? (other > values[n] ? other : values[n]) : values[n] + other;
      }
    }
    __syncthreads();  // shared memory is written again
  }

  template <class Body>
  __device__ __forceinline__ void columns(const Body& body) const {
    for (int64_t j = threadIdx.x; j < a.cols; j += blockDim.x) body(j);
  }

  __device__ __forceinline__ double column_sum(int64_t j) const {
    return static_cast<double>(a.solve.counts[j] + a.columns[j]) / a.units;
  }

  /// What the rows add to F at a point, those with a single candidate too.
  __device__ __forceinline__ double rows_value(int64_t of) const {
    double sum[1] = {0.0};
    const double* d = point(of, 0);
    columns([&](int64_t j) { sum[0] += static_cast<double>(a.solve.counts[j]) / a.units * d[j]; });
    for (int64_t tile = threadIdx.x; tile < a.tiles; tile += blockDim.x) sum[0] += a.totals[tile];
    reduce<false>(sum);
    return sum[0];
  }

  /// The column sums at the start choose the gauge, or the targets where they are 0.
  __device__ __forceinline__ void choose_gauge() {
    double* gauge = vector(kNewtonGauge);
    double sums[2] = {0.0, 0.0};
    columns([&](int64_t j) {
      gauge[j] = wanted(j) ? column_sum(j) : 0.0;
      sums[0] += gauge[j];
      sums[1] += a.solve.columns.target[j];
    });
    reduce<false>(sums);
    s.gauge_sum = sums[0];
    if (sums[0] > 0.0) return;
    s.gauge_sum = sums[1];
    columns([&](int64_t j) { gauge[j] = a.solve.columns.target[j]; });
  }

  __device__ __forceinline__ double gauge_mean(const double* x) const {
    const double* gauge = vector(kNewtonGauge);
    double sum[1] = {0.0};
    columns([&](int64_t j) { sum[0] += gauge[j] * x[j]; });
    reduce<false>(sum);
    return sum[0] / s.gauge_sum;
  }

  /// Gradient, curvature and diagonal of a point from the sums of its rows, of which `value` is already known. Returns
  /// F and the error. The sums are zero afterwards.
  __device__ __forceinline__ void finish(int64_t of, double value, double* f, double* error) const {
    const NewtonColumns& wish = a.solve.columns;
    const bool exact = wish.exact();
    const double *d = point(of, 0), *gauge = vector(kNewtonGauge);
    double *gradient = point(of, 1), *curvature = point(of, 2), *diagonal = point(of, 3);
    const double mean = exact ? 0.0 : gauge_mean(d);
    double sums[3] = {0.0, 0.0, 0.0};  // F; growth of the defects; gradient
    columns([&](int64_t j) {
      const double sum = column_sum(j);
      diagonal[j] = static_cast<double>(a.columns[a.cols + j]) / a.units;
      a.columns[j] = a.columns[a.cols + j] = 0;
      gradient[j] = curvature[j] = 0.0;
      if (!wanted(j)) return;
      const NewtonTerm grown = newton_defect(wish.defect[j], d[j] - mean);
      sums[0] += grown.value;
      sums[1] += grown.gradient;
      curvature[j] = grown.curvature;
      gradient[j] = sum + grown.gradient;
    });
    if (!exact) reduce<false>(sums);
    const double share = exact ? 0.0 : sums[1] / s.gauge_sum;  // of the mean in the defects
    if (!exact) sums[0] = threadIdx.x == 0 ? sums[0] : 0.0;    // it is summed again below
    columns([&](int64_t j) {
      if (!wanted(j)) return;
      const NewtonTerm term = newton_wanted(wish, j, d[j], gradient[j] - share * gauge[j]);
      sums[0] += term.value;
      gradient[j] = term.gradient;
      curvature[j] += term.curvature;
      sums[2] += term.gradient;
    });
    reduce<false>(sums);
    const double part = exact ? sums[2] / s.gauge_sum : 0.0;  // of the gauge in the gradient, which no step can use
    double size[1] = {0.0};
    columns([&](int64_t j) {
      gradient[j] -= part * gauge[j];
      size[0] += fabs(gradient[j]);
    });
    reduce<false>(size);
    *f = value + sums[0];
    *error = size[0] / a.solve.weight;
  }

  /// Sums at the first point. A shift of exact columns changes no share: d is moved to where gauge . d = 0.
  __device__ __forceinline__ void start() {
    double value = rows_value(s.at);
    choose_gauge();
    double *d = point(s.at, 0), *start = vector(kNewtonStart);
    const double mean = a.solve.columns.exact() ? gauge_mean(d) : 0.0;
    value -= mean * a.solve.weight;
    columns([&](int64_t j) {
      if (wanted(j)) d[j] -= mean;
      start[j] = d[j];
    });
    finish(s.at, value, &s.value, &s.error);
    s.sums = 1;
    s.plan_is_here = 1;
    s.stalled = 1;
    next_step();
  }

  /// Ends, or begins conjugate gradients.
  __device__ __forceinline__ void next_step() {
    if (s.error <= a.solve.tolerance) {
      s.stalled = 0;
      return end();
    }
    if (s.steps >= a.solve.steps) return end();
    const NewtonColumns& wish = a.solve.columns;
    const double *d = point(s.at, 0), *gradient = point(s.at, 1), *curvature = point(s.at, 2);
    const double* diagonal = point(s.at, 3);
    double *extra = vector(kNewtonExtra), *inverse = vector(kNewtonInverse), *residual = vector(kNewtonResidual);
    double* step = vector(kNewtonStep);
    columns([&](int64_t j) {
      extra[j] = newton_extra(curvature[j], gradient[j], a.solve.clip, wish.target[j], a.solve.total);
      inverse[j] = newton_moves(wish, j, d[j], gradient[j]) ? 1.0 / (diagonal[j] + extra[j]) : 0.0;
      residual[j] = -gradient[j];
      step[j] = 0.0;
    });
    double mean;
    s.rz = preconditioned(&mean);
    const double reduction = s.error < 0.05 ? s.error : 0.05;
    s.enough = s.rz * reduction * reduction;
    s.step_products = 0;
    turn(mean, 0.0);
  }

  /// z = inverse * residual, less its mean where the columns are exact; returns residual . z.
  __device__ __forceinline__ double preconditioned(double* mean) const {
    const double *gauge = vector(kNewtonGauge), *inverse = vector(kNewtonInverse), *residual = vector(kNewtonResidual);
    double sums[3] = {0.0, 0.0, 0.0};
    columns([&](int64_t j) {
      const double z = inverse[j] * residual[j];
      sums[0] += residual[j] * z;
      sums[1] += gauge[j] * z;
      sums[2] += wanted(j) ? residual[j] : 0.0;
    });
    reduce<false>(sums);
    *mean = a.solve.columns.exact() ? sums[1] / s.gauge_sum : 0.0;
    return sums[0] - *mean * sums[2];
  }

  /// The next direction, z + part of the one before; or the end of conjugate gradients.
  __device__ __forceinline__ void turn(double mean, double part) {
    const double *inverse = vector(kNewtonInverse), *residual = vector(kNewtonResidual);
    double* direction = vector(kNewtonDirection);
    double largest[1] = {0.0};
    columns([&](int64_t j) {
      const double z = inverse[j] * residual[j] - (wanted(j) ? mean : 0.0);
      direction[j] = part == 0.0 ? z : z + part * direction[j];
      largest[0] = fabs(direction[j]) > largest[0] ? fabs(direction[j]) : largest[0];
    });
    reduce<true>(largest);
    s.largest = largest[0];
    s.phase = kNewtonProduct;
    const bool more = s.step_products < a.solve.products && s.rz > s.enough && s.rz > 0.0;
    if (!more || !(s.largest > kTiny && s.largest < kHuge)) search();
  }

  /// One product with the direction has arrived.
  __device__ __forceinline__ void multiplied() {
    const double *extra = vector(kNewtonExtra), *inverse = vector(kNewtonInverse), *gauge = vector(kNewtonGauge);
    const double* direction = vector(kNewtonDirection);
    double *product = vector(kNewtonProductVector), *step = vector(kNewtonStep), *residual = vector(kNewtonResidual);
    const double units = newton_product_units(a.units, s.largest);
    double sums[3] = {0.0, 0.0, 0.0};
    columns([&](int64_t j) {
      const double p = static_cast<double>(a.columns[j]) / units + extra[j] * direction[j];
      a.columns[j] = 0;
      product[j] = inverse[j] > 0.0 ? p : 0.0;
      sums[0] += product[j];
      sums[1] += direction[j] * product[j];
      sums[2] += direction[j] * gauge[j];
    });
    reduce<false>(sums);
    s.products += 1;
    s.step_products += 1;
    const double part = a.solve.columns.exact() ? sums[0] / s.gauge_sum : 0.0;
    const double curvature = sums[1] - part * sums[2];
    if (!(curvature > 0.0)) return search();
    const double length = s.rz / curvature;
    columns([&](int64_t j) {
      step[j] += length * direction[j];
      residual[j] -= length * (product[j] - part * gauge[j]);
    });
    double mean;
    const double before = s.rz;
    s.rz = preconditioned(&mean);
    turn(mean, s.rz / before);
  }

  /// The step is known: how much of it may be taken. No column goes further than twice the clip, or out of reach of its
  /// start, where other candidates would count.
  __device__ __forceinline__ void search() {
    s.steps += 1;
    const double *step = vector(kNewtonStep), *start = vector(kNewtonStart), *d = point(s.at, 0);
    double most[2] = {0.0, -1.0};  // max |step|; the least part that is in reach, negative
    columns([&](int64_t j) {
      const double size = fabs(step[j]);
      if (!(size > 0.0)) return;
      most[0] = size > most[0] ? size : most[0];
      const double moved = step[j] > 0.0 ? d[j] - start[j] : start[j] - d[j];
      const double room = (moved - a.solve.reach) / size;
      most[1] = room > most[1] ? room : most[1];
    });
    reduce<true>(most);
    s.length = 2.0 * a.solve.clip / (most[0] > 1e-300 ? most[0] : 1e-300);
    s.length = s.length < -most[1] ? s.length : -most[1];
    s.trial = 0;
    if (!(s.length > 1e-6)) return end();
    try_length();
  }

  /// Moves the other point to where the step leads.
  __device__ __forceinline__ void try_length() {
    const double *step = vector(kNewtonStep), *d = point(s.at, 0), *gradient = point(s.at, 1);
    double* to = point(1 - s.at, 0);
    double change[1] = {0.0};
    columns([&](int64_t j) {
      to[j] = newton_moved(a.solve.columns, j, d[j], s.length * step[j], gradient[j]);
      change[0] += gradient[j] * (to[j] - d[j]);
    });
    reduce<false>(change);
    s.change = change[0];
    s.phase = kNewtonTrial;
    if (!(s.change < 0.0)) end();
  }

  /// The sums at the point that was tried have arrived.
  __device__ __forceinline__ void judge() {
    const int64_t other = 1 - s.at;
    double value, error;
    finish(other, rows_value(other), &value, &error);
    s.sums += 1;
    s.plan_is_here = 0;
    if (value <= s.value + 1e-4 * s.change || error < 0.9 * s.error) {
      s.at = other;
      s.value = value;
      s.error = error;
      s.plan_is_here = 1;
      return next_step();
    }
    s.trial += 1;
    s.length *= 0.5;
    if (s.trial == kTrials) return end();
    try_length();
  }

  __device__ __forceinline__ void end() {
    s.phase = a.solve.want_plan && s.plan_is_here == 0 ? kNewtonLast : kNewtonDone;
  }

  __device__ __forceinline__ void last() {
    columns([&](int64_t j) { a.columns[j] = a.columns[a.cols + j] = 0; });
    s.plan_is_here = 1;
    s.phase = kNewtonDone;
  }
};

/// What a solve makes of the sums over its rows: the next thing that they are to be summed for.
__global__ void __launch_bounds__(kNewtonColumnThreads, 1) newton_columns_kernel(const ColumnsArguments a) {
  SELA_SHARED_ARRAY(double, shared, kMost*(kNewtonColumnThreads / kWarp));
  Solver solver{a, *a.solve.state, shared};
  __syncthreads();  // the state is written again
  if (solver.s.phase == kNewtonDone) return;
  if (solver.s.phase == kNewtonFirst)
    solver.start();
  else if (solver.s.phase == kNewtonProduct)
    solver.multiplied();
  else if (solver.s.phase == kNewtonTrial)
    solver.judge();
  else
    solver.last();
  if (threadIdx.x == 0) *a.solve.state = solver.s;
}

// ---- Which rows and entries there are.

__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t row_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

__global__ void __launch_bounds__(kNewtonCountThreads) newton_count_kernel(const CountArguments a) {
  for (int64_t row = first_row(); row < a.rows.rows; row += row_step()) {
    int64_t count = 0;
    int32_t column = 0;
    for (int64_t k = a.rows.offsets[row]; k < a.rows.offsets[row + 1]; ++k) {
      if (a.plan != nullptr && !(a.plan[k] > a.smallest)) continue;
      column = a.rows.columns[k];
      ++count;
    }
    a.kept[row] = count > 1 ? count : 0;
    a.kept[a.rows.rows + row] = count > 1;
    if (count == 1)
      add_units(a.counts + column, a.rows.weights != nullptr ? static_cast<double>(a.rows.weights[row]) : 1.0,
                a.rows.units);
  }
}

__global__ void __launch_bounds__(kNewtonCountThreads) newton_compact_kernel(const CompactArguments a) {
  for (int64_t row = first_row(); row < a.rows.rows; row += row_step()) {
    const int64_t end = a.ends[row], number = a.ends[a.rows.rows + row];
    int64_t to = row > 0 ? a.ends[row - 1] : 0;
    if (to == end) continue;
    a.offsets[number] = end;
    if (a.weights != nullptr) a.weights[number - 1] = a.rows.weights[row];
    for (int64_t k = a.rows.offsets[row]; k < a.rows.offsets[row + 1]; ++k) {
      if (a.plan != nullptr && !(a.plan[k] > a.smallest)) continue;
      a.columns[to] = a.rows.columns[k];
      a.values[to] = a.rows.values[k];
      ++to;
    }
  }
}

}  // namespace newton_cuda
}  // namespace sela
