#pragma once
#include <cstdint>
#include <vector>

#include "sela/dispatch.h"
#include "sela/sinkhorn.h"

namespace sela {

/// The Anderson step (type II) from a residual f of `size` numbers:
///   step = f - (S + C) gamma,   gamma minimises |f - C gamma|.
/// S, C: [count, size], differences of successive points and of the residuals at them, one below the other; count < 64.
/// By Householder reflections, the differences scaled to length 1 first; of those that are left in turn the longest one
/// is taken, and those that add less than 1e-10 of the first have no part in the step.
void anderson_step(const double* residual, const double* steps, const double* changes, int count, int64_t size,
                   double* step);

/// The same, shortened where it goes more than `cap` nats, and twice as far as the plain one; the residual itself where
/// it is no number.
void anderson_next(const double* residual, const double* steps, const double* changes, int count, int64_t size,
                   double cap, double* step);

/// What column sums come to.  Solvers that go pass by pass and anderson_cpu call this one function, for equal bits.
struct ColumnState {
  double error = 0.0;   ///< sum_j |share_j - target_j|
  double pulled = 0.0;  ///< target . potential
};

/// shares[j] = columns[j] / weight, logs[j] = log shares[j] (-inf for 0).  All arrays: [cols].
ColumnState column_state(const double* columns, double weight, const double* target, const double* potential,
                         int64_t cols, double* shares, double* logs);

/// Shifts x so that target . x = 0: potentials and residuals are defined up to a constant.
void centre(double* x, const double* target, int64_t size);

/// Sinkhorn iterations with Anderson acceleration, many passes in one call.
struct AndersonOptions {
  const double* target = nullptr;      ///< [cols] wanted shares of the columns, > 0, of sum 1
  const double* log_target = nullptr;  ///< [cols] their logarithms
  double tolerance = 1e-4;             ///< ends at sum_j |share_j - target_j| <= tolerance
  int64_t passes = 1;                  ///< at most so many
  int memory = 10;                     ///< differences that are kept
  double cap = 10.0;                   ///< nats that a step may go, or twice as far as the plain one
  double restart = 3.0;                ///< an error this many times the best one ends it
  int64_t patience = 40;               ///< and so many passes that have not halved the error
  double faint = 1e-9;                 ///< and a share of less than so many times its target
};

/// Where the iteration is.  At the start: the potential of a pass and what that gave.
struct AndersonState {
  std::vector<double> potential;       ///< [cols]; float numbers unless the logits are float64
  std::vector<double> residual;        ///< [cols] log target - log share, shifted so that target . residual = 0
  double error = 0.0;                  ///< sum_j |share_j - target_j|
  std::vector<double> steps, changes;  ///< [known, cols] differences of potentials and residuals, oldest first
  std::vector<double> best;            ///< [cols] the potential of the smallest error
  std::vector<double> errors, objectives, seconds;  ///< of each pass; objective = target . g - sum_i a_i lse_i
  bool converged = false;
};

/// Iterates from `state` until it converges, the passes are used up or something is odd (see AndersonOptions).  The
/// results of the last pass are in `sums` (whose arrays are all there) and `totals`; `pass.potential` is not looked at,
/// and `pass.reference`, where not null, is that of the pass before and is overwritten.
/// words: [2 * kSinkhornWords], the exact totals of the last pass.
void anderson_cpu(SinkhornPass pass, const AndersonOptions& options, AndersonState& state, SinkhornSums& sums,
                  void* reference, int64_t* words, int threads, Isa isa);

}  // namespace sela
