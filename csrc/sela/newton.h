#pragma once
#include <cstdint>
#include <vector>

#include "sela/candidates.h"
#include "sela/dispatch.h"
#include "sela/newton_columns.h"

namespace sela {

// The assignment problem on the candidates of one pass: sums over a few entries per row instead of K.
//
// Note [Sparse semi-dual]
// A pass at lambda and potential g gave values u[i, j] = log p[i, j] of the candidates.  At lambda' = ratio * lambda
// and the potential g' the plan is, among the candidates,
//   q[i, :] = softmax_j(ratio * u[i, j] + d[j]),   d = g' - ratio * g,
// for what is constant in a row cancels.  All unknowns are then small numbers, wherever g is.  Minimised over d is
//   F(d) = sum_i w[i] logsumexp_j(ratio * u[i, j] + d[j]) + sum_j defect(d[j]) - sum_j target[j] d[j].
// `defect` stands for what the candidates leave out: with r = (column sums of the pass) - (column sums over the
// candidates), r d where r < 0, and r exp(d) where r > 0: entries that were left out grow like exp(d[j]).  Its
// derivative at d = 0 is r, so the gradient there is that of the whole matrix, and an error in the model is of second
// order.  A column without candidates is moved by log(target / r), which is a Sinkhorn step.
//   Rows with one candidate are constant: they are counted per column and left out of everything else.

/// The rows of Candidates in the form that Newton's method works on.
class NewtonRows {
 public:
  /// Takes the arrays over.  Expects candidates that did not overflow.
  explicit NewtonRows(Candidates&& candidates);

  /// Drops the entries whose q at a plan ([entries], of newton_sums) is at most exp(-level); fewer remain at larger
  /// lambda.  Values stay relative to the pass.
  void prune(const float* plan, double level);

  int64_t cols() const { return cols_; }
  int64_t rows() const { return static_cast<int64_t>(offsets_.size()) - 1; }  ///< with two candidates or more
  int64_t entries() const { return static_cast<int64_t>(values_.size()); }    ///< of those rows
  double weight() const { return weight_; }                                   ///< of all rows with candidates
  const std::vector<double>& counts() const { return counts_; }               ///< [cols] weight of single rows
  const std::vector<int64_t>& pieces() const { return pieces_; }              ///< rows [pieces[c], pieces[c + 1])
  const int64_t* offsets() const { return offsets_.data(); }                  ///< [rows + 1]
  const uint16_t* narrow() const { return is_wide_ ? nullptr : narrow_.data(); }
  const uint32_t* wide() const { return is_wide_ ? wide_.data() : nullptr; }
  const float* values() const { return values_.data(); }                                 ///< [entries]
  const float* weights() const { return weights_.empty() ? nullptr : weights_.data(); }  ///< [rows] or null: all 1

 private:
  template <class Keep>
  void compact(const std::vector<int64_t>& offsets, const Keep& keep);

  int64_t cols_ = 0;
  bool is_wide_ = false;
  double weight_ = 0.0;
  std::vector<int64_t> offsets_, pieces_;
  std::vector<uint16_t> narrow_;
  std::vector<uint32_t> wide_;
  std::vector<float> values_, weights_;
  std::vector<double> counts_;
};

/// Sums at one d.
struct NewtonSums {
  std::vector<double> columns;   ///< [cols] sum_i w q[i, j], single rows included
  std::vector<double> diagonal;  ///< [cols] sum_i w q (1 - q), the Hessian's diagonal
  double objective = 0.0;        ///< sum_i w logsumexp
};

/// Sums at d, and q of the entries when `plan` ([entries]) is not null.  Bits do not depend on threads.
void newton_sums(const NewtonRows& rows, double ratio, const double* d, NewtonSums& sums, float* plan, int threads,
                 Isa isa);

/// out = diag(column sums of the rows with several candidates) x - sum_i w q[i] (q[i] . x): the Hessian at `plan`.
/// x, out: [cols].  Bits do not depend on threads.
void newton_product(const NewtonRows& rows, const float* plan, const double* x, double* out, int threads, Isa isa);

struct NewtonOptions {
  double ratio = 1.0;       ///< lambda' / lambda, >= 1
  double tolerance = 1e-6;  ///< ends at sum_j |gradient_j| <= tolerance * weight
  int steps = 40;           ///< at most so many Newton steps
  int products = 400;       ///< Hessian products per step, at most
  double clip = 4.0;        ///< nats that one step may move a column
  double reach = 1e300;     ///< nats that d[j] may move; entries left out begin to count when it is the level
  double prune = 0.0;       ///< nats; > 0: afterwards rows.prune() at the solution
  int threads = 0;
};

struct NewtonResult {
  double error = 0.0;    ///< sum_j |gradient_j| / weight at the end: an estimate, for the candidates are not all
  int steps = 0;         ///< Newton steps
  int64_t products = 0;  ///< Hessian products
  int64_t sums = 0;      ///< evaluations of sums
  bool stalled = false;  ///< no step made it better, or the steps were used up
};

/// Minimises F from d in place by truncated Newton-CG.
/// Exact columns: along the vector of ones, where F without its defects is constant, d is held so that the log-sum-exp
/// of the rows stays the same on the average.
/// Bounded columns: no step leads across w = 0, where F has a kink; a column there moves on when its sum is outside.
NewtonResult newton_solve(NewtonRows& rows, const NewtonColumns& columns, double* d, const NewtonOptions& options,
                          Isa isa);

}  // namespace sela
