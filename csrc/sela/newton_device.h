#pragma once
#include <math.h>

#include <cstdint>

#include "sela/host_device.h"
#include "sela/newton_columns.h"

namespace sela {

// Newton's method on the candidates of a pass on a CUDA device: what sela/newton.h does on the CPU, see Note [Sparse
// semi-dual] there.  All pointers are device memory, unless said otherwise; nothing waits for the device.
//
// Note [Units]
// Sums over rows go into 64-bit integers, which atomics add in any order with the same bits.  A unit of column sums is
// 1 / units, where units is a power of two, at most 2^61 / weight of all rows: of 1,281,167 rows 5e-13.  A term of a
// product with x is at most 2 max|x| times its row's weight, so its units are smaller by 4 max|x|, rounded up to a
// power of two: the sum of a column is then below 2^62 of them.

/// Rows of these kernels whose log-sum-exp is one number of `totals`.
constexpr int64_t kNewtonTileRows = 128;

/// Rows with two candidates or more, row by row (CSR).
struct NewtonDeviceRows {
  const int64_t* offsets = nullptr;  ///< [rows + 1]
  const int32_t* columns = nullptr;  ///< [entries]
  const float* values = nullptr;     ///< [entries] log p at the pass
  const float* weights = nullptr;    ///< [rows] or null: all 1
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t entries = 0;
  double units = 1.0;  ///< see Note [Units]
};

/// What a sum over the rows is written to.
struct NewtonDeviceSums {
  int64_t* columns = nullptr;  ///< [2, cols], zero before: column sums, then the diagonal, in units; products: [cols]
  double* totals = nullptr;    ///< [tiles]: sum of weight times log-sum-exp of each tile of kNewtonTileRows rows
  float* plan = nullptr;       ///< [entries] q, or null
};

/// What a solve on the device waits for.
enum NewtonPhase : int64_t {
  kNewtonDone = 0,
  kNewtonFirst = 1,    ///< sums at the start
  kNewtonProduct = 2,  ///< a Hessian product with the direction
  kNewtonTrial = 3,    ///< sums at the point that was moved to
  kNewtonLast = 4,     ///< sums at the solution, for its plan
};

/// Where a solve is.  Its first round is told by phase = kNewtonFirst, zeros elsewhere.
struct NewtonState {
  int64_t phase;
  int64_t steps, products, sums;  ///< as in NewtonResult
  int64_t stalled;
  int64_t step_products;  ///< in this step
  int64_t trial;          ///< of its line search
  int64_t at;             ///< 0 or 1: which of the two points is the current one; the other is tried
  int64_t plan_is_here;   ///< the plan is that of the current point
  double error;           ///< of the current point
  double value;           ///< F there
  double gauge_sum;
  double largest;         ///< max |direction|
  double rz, enough;      ///< conjugate gradients: residual in the norm of the preconditioner, and where to end
  double length, change;  ///< part of the step that is tried, and what the gradient promises of it
};
static_assert(sizeof(NewtonState) == 17 * 8, "read back as 64-bit numbers");

/// Vectors [cols] of a solve, one behind the other.
enum NewtonVector : int {
  kNewtonGauge,
  kNewtonStart,
  kNewtonExtra,
  kNewtonInverse,
  kNewtonResidual,
  kNewtonDirection,
  kNewtonProductVector,
  kNewtonStep,
  kNewtonPoint,  ///< two points of kNewtonPerPoint vectors each; d is the first of them
  kNewtonPerPoint = 4,
  kNewtonVectors = kNewtonPoint + 2 * kNewtonPerPoint,
};

/// What a solve is asked for; see NewtonOptions.
struct NewtonDeviceSolve {
  NewtonColumns columns;            ///< of device vectors
  const int64_t* counts = nullptr;  ///< [cols] weight of single rows in units
  double weight = 0.0;              ///< of all rows with candidates
  double total = 0.0;               ///< sum of the targets
  double ratio = 1.0;
  double tolerance = 1e-6;
  int64_t steps = 40;
  int64_t products = 400;
  double clip = 4.0;
  double reach = 1e300;
  bool want_plan = false;     ///< ends with the plan of the solution
  double* vectors = nullptr;  ///< [kNewtonVectors, cols]; d to start from in vector kNewtonPoint
  NewtonState* state = nullptr;
};

/// Units of a product with x, of max |x| = largest in 1e-200 .. 1e200.
SELA_HOST_DEVICE inline double newton_product_units(double units, double largest) {
  int exponent = 0;
  frexp(largest, &exponent);
  return ldexp(units, -(exponent + 2));
}

/// kept[0, i]: entries that remain of row i, 0 where fewer than two do; kept[1, i]: 1 where any do.  [2, rows].
/// With a plan those above exp(-level) remain, otherwise all.  A row with a single one is added to `counts`.
void newton_count_cuda(const NewtonDeviceRows& rows, const float* plan, double level, int64_t* kept, int64_t* counts,
                       void* stream);

/// Rows of the entries that remain.  ends: [2, rows], running sums of `kept`.  offsets[0] must be 0 before.
void newton_compact_cuda(const NewtonDeviceRows& rows, const float* plan, double level, const int64_t* ends,
                         int64_t* offsets, int32_t* columns, float* values, float* weights, void* stream);

/// Sums over the rows at d.
void newton_sums_cuda(const NewtonDeviceRows& rows, double ratio, const double* d, const NewtonDeviceSums& sums,
                      void* stream);

/// The Hessian at sums.plan times x, into sums.columns, in units of newton_product_units.
void newton_product_cuda(const NewtonDeviceRows& rows, const double* x, double largest, const NewtonDeviceSums& sums,
                         void* stream);

/// So many rounds of a solve: each reads the rows once and then does the algebra of the columns.  A round after the end
/// does nothing.  sums.columns must be zero before the first one.
void newton_rounds_cuda(const NewtonDeviceRows& rows, const NewtonDeviceSolve& solve, const NewtonDeviceSums& sums,
                        int64_t rounds, void* stream);

}  // namespace sela
