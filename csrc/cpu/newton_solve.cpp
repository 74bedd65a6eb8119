// Truncated Newton-CG on the candidates.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/newton_evaluator.h"
#include "sela/newton.h"

namespace sela {
namespace {

using Vector = std::vector<double>;

double dot(const Vector& a, const Vector& b) {
  double sum = 0.0;
  for (size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
  return sum;
}

/// Everything about one d.
struct Point {
  Vector d, gradient;  // projected, see Objective; 0 for a column that stays where it is
  Vector curvature;    // the Hessian's diagonal beyond that of the rows
  NewtonSums sums;
  double value = 0.0, error = 0.0;
};

/// The function that is minimised; for exact columns on the subspace sum_j gauge[j] d[j] = 0.
///
/// All rows' log-sum-exp grows by about that sum (over the weight) when gauge is the column sums at the start; held at
/// 0, an entry that was left out grows by exp(d[j]), as the defect says.  The constant of pulled and bounded columns is
/// not free: there the defect is that of d minus this mean.
class Objective {
 public:
  Objective(NewtonEvaluator& evaluator, const NewtonRows& rows, const NewtonColumns& columns)
      : evaluator_(evaluator),
        columns_(columns),
        cols_(static_cast<size_t>(rows.cols())),
        exact_(columns.exact()),
        weight_(std::max(rows.weight(), 1e-300)) {
    set_gauge(Vector(columns.target, columns.target + cols_));
  }

  void evaluate(Point& at, float* plan) {
    evaluator_.sums(at.d.data(), at.sums, plan);
    finish(at);
  }

  /// The same at the first point, whose sums choose the gauge.  A shift of exact columns changes no share.
  void evaluate_first(Point& at, float* plan) {
    evaluator_.sums(at.d.data(), at.sums, plan);
    set_gauge(at.sums.columns);
    if (exact_) {
      at.sums.objective -= dot(gauge_, at.d) / gauge_sum_ * weight_;
      project_step(at.d);
    }
    finish(at);
  }

  /// Solves (H + diag(extra)) x = -gradient in the subspace by conjugate gradients, until the residual has fallen by
  /// `reduction` in the norm of the preconditioner.  Returns the number of products.
  int64_t step(const Point& at, const Vector& extra, const float* plan, double reduction, int64_t limit, Vector& x);

  /// The point `length` times a step away.
  void move(const Point& from, const Vector& x, double length, Point& to) const {
    to.d = from.d;
    for (size_t j = 0; j < cols_; ++j) {
      const int64_t column = static_cast<int64_t>(j);
      to.d[j] = newton_moved(columns_, column, from.d[j], length * x[j], from.gradient[j]);
    }
  }

 private:
  bool moves(size_t j) const { return columns_.target[j] > 0.0; }

  /// Whether a column takes part in a step from here: not when it rests at its kink.
  bool moves(const Point& at, size_t j) const {
    return newton_moves(columns_, static_cast<int64_t>(j), at.d[j], at.gradient[j]);
  }

  void set_gauge(const Vector& columns) {
    gauge_ = columns;
    gauge_sum_ = 0.0;
    for (size_t j = 0; j < cols_; ++j) {
      if (!moves(j)) gauge_[j] = 0.0;
      gauge_sum_ += gauge_[j];
    }
    if (!(gauge_sum_ > 0.0)) set_gauge(Vector(columns_.target, columns_.target + cols_));
  }

  /// Value, gradient and error from the sums.
  void finish(Point& at) const {
    at.gradient.assign(cols_, 0.0);
    at.curvature.assign(cols_, 0.0);
    at.value = at.sums.objective;
    const double mean = exact_ ? 0.0 : dot(gauge_, at.d) / gauge_sum_;
    double all_grown = 0.0;
    for (size_t j = 0; j < cols_; ++j) {
      if (!moves(j)) continue;
      const NewtonTerm grown = newton_defect(columns_.defect[j], at.d[j] - mean);
      at.value += grown.value;
      at.curvature[j] = grown.curvature;
      at.gradient[j] = grown.gradient;
      all_grown += grown.gradient;
    }
    const double share = exact_ ? 0.0 : all_grown / gauge_sum_;  // of the mean in the defect
    for (size_t j = 0; j < cols_; ++j)
      if (moves(j)) add_law(at, j, at.sums.columns[j] + at.gradient[j] - share * gauge_[j]);
    if (exact_) project_gradient(at.gradient);
    at.error = 0.0;
    for (const double g : at.gradient) at.error += std::fabs(g);
    at.error /= weight_;
  }

  /// What is wanted of a column whose sum is `sum`.
  void add_law(Point& at, size_t j, double sum) const {
    const NewtonTerm wanted = newton_wanted(columns_, static_cast<int64_t>(j), at.d[j], sum);
    at.value += wanted.value;
    at.gradient[j] = wanted.gradient;
    at.curvature[j] += wanted.curvature;
  }

  /// Takes from a gradient what no step in the subspace can use: a multiple of the gauge.
  void project_gradient(Vector& g) const {
    double sum = 0.0;
    for (const double v : g) sum += v;
    sum /= gauge_sum_;
    for (size_t j = 0; j < cols_; ++j) g[j] -= sum * gauge_[j];
  }

  /// Takes a step into the subspace.
  void project_step(Vector& x) const {
    const double mean = dot(gauge_, x) / gauge_sum_;
    for (size_t j = 0; j < cols_; ++j)
      if (moves(j)) x[j] -= mean;
  }

  NewtonEvaluator& evaluator_;
  NewtonColumns columns_;
  size_t cols_;
  bool exact_;
  Vector gauge_;
  double gauge_sum_ = 0.0, weight_;
};

int64_t Objective::step(const Point& at, const Vector& extra, const float* plan, double reduction, int64_t limit,
                        Vector& x) {
  Vector inverse(cols_, 0.0), residual(cols_), z(cols_), direction, product(cols_);
  for (size_t j = 0; j < cols_; ++j) {
    if (moves(at, j)) inverse[j] = 1.0 / (at.sums.diagonal[j] + extra[j]);
    residual[j] = -at.gradient[j];
  }
  const auto precondition = [&] {
    for (size_t j = 0; j < cols_; ++j) z[j] = inverse[j] * residual[j];
    if (exact_) project_step(z);
  };
  x.assign(cols_, 0.0);
  precondition();
  direction = z;
  double rz = dot(residual, z);
  const double enough = rz * reduction * reduction;
  int64_t products = 0;
  while (products < limit && rz > enough && rz > 0.0) {
    evaluator_.product(plan, direction.data(), product.data());
    ++products;
    for (size_t j = 0; j < cols_; ++j) product[j] = inverse[j] > 0.0 ? product[j] + extra[j] * direction[j] : 0.0;
    if (exact_) project_gradient(product);
    const double curvature = dot(direction, product);
    if (!(curvature > 0.0)) break;
    const double length = rz / curvature;
    for (size_t j = 0; j < cols_; ++j) {
      x[j] += length * direction[j];
      residual[j] -= length * product[j];
    }
    precondition();
    const double next = dot(residual, z);
    for (size_t j = 0; j < cols_; ++j) direction[j] = z[j] + next / rz * direction[j];
    rz = next;
  }
  return products;
}

/// How much of a step may be taken: no column goes further than twice the clip, or out of reach of its start, where
/// other candidates would count.
double longest(const Vector& x, const Point& at, const Vector& start, const NewtonOptions& options) {
  double largest = 0.0;
  for (const double v : x) largest = std::max(largest, std::fabs(v));
  double length = std::min(1.0, 2.0 * options.clip / std::max(largest, 1e-300));
  for (size_t j = 0; j < x.size(); ++j)
    if (x[j] != 0.0)
      length = std::min(length, (options.reach - std::copysign(1.0, x[j]) * (at.d[j] - start[j])) / std::fabs(x[j]));
  return length;
}

/// Of the gradient along the way from one point to another: the change of the value that it promises.
double promised(const Point& from, const Point& to) {
  double sum = 0.0;
  for (size_t j = 0; j < from.d.size(); ++j) sum += from.gradient[j] * (to.d[j] - from.d[j]);
  return sum;
}

void check(const NewtonRows& rows, const NewtonColumns& columns, const double* d, const NewtonOptions& options) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("newton_solve: " + what); };
  const bool bounded = columns.low != nullptr && columns.high != nullptr;
  if ((columns.low != nullptr) != (columns.high != nullptr) || (bounded && columns.strength > 0.0))
    refuse("expected a strength, or two bounds, or none of them");
  if ((bounded || columns.strength > 0.0) && columns.offset == nullptr) refuse("expected an offset of the columns");
  double total = 0.0;
  for (int64_t j = 0; j < rows.cols(); ++j) {
    const double* target = columns.target;
    if (!(target[j] >= 0.0) || !std::isfinite(target[j]) || !std::isfinite(columns.defect[j]) || !std::isfinite(d[j]))
      refuse("expected finite numbers and targets >= 0, found others in column " + std::to_string(j));
    if (bounded && !(columns.low[j] >= 0.0 && columns.low[j] <= columns.high[j]))
      refuse("expected bounds 0 <= low <= high, found others in column " + std::to_string(j));
    total += target[j];
  }
  if (!(total > 0.0)) refuse("expected a target above 0, found none");
  if (!(options.clip > 0.0)) refuse("expected clip > 0, found " + std::to_string(options.clip));
  check_newton_ratio(options.ratio);
}

}  // namespace

NewtonResult newton_solve(NewtonRows& rows, const NewtonColumns& columns, double* d, const NewtonOptions& options,
                          Isa isa) {
  check(rows, columns, d, options);
  const size_t cols = static_cast<size_t>(rows.cols());
  NewtonEvaluator evaluator(rows, options.ratio, options.threads, isa);
  Objective objective(evaluator, rows, columns);
  std::vector<float> plan(static_cast<size_t>(rows.entries()));
  Vector x, extra(cols);
  NewtonResult result;

  Point at, next;
  at.d.assign(d, d + cols);
  objective.evaluate_first(at, plan.data());
  bool plan_is_here = true;  // `plan` is that of `at`, not of a step that was refused
  result.sums = 1;
  double total = 0.0;
  for (size_t j = 0; j < cols; ++j) total += columns.target[j];
  const Vector start = at.d;
  result.error = at.error;
  result.stalled = true;

  while (true) {
    if (at.error <= options.tolerance) {
      result.stalled = false;
      break;
    }
    if (result.steps >= options.steps) break;
    for (size_t j = 0; j < cols; ++j)
      extra[j] = newton_extra(at.curvature[j], at.gradient[j], options.clip, columns.target[j], total);
    const double reduction = std::min(0.05, at.error);
    result.products += objective.step(at, extra, plan.data(), reduction, options.products, x);
    ++result.steps;
    double length = longest(x, at, start, options);
    if (!(length > 1e-6)) break;
    bool better = false;
    for (int trial = 0; trial < 12 && !better; ++trial, length *= 0.5) {
      objective.move(at, x, length, next);
      const double change = promised(at, next);
      if (!(change < 0.0)) break;
      objective.evaluate(next, plan.data());
      plan_is_here = false;
      ++result.sums;
      better = next.value <= at.value + 1e-4 * change || next.error < 0.9 * at.error;
    }
    if (!better) break;
    std::swap(at, next);
    plan_is_here = true;
    result.error = at.error;
  }
  std::copy(at.d.begin(), at.d.end(), d);
  if (options.prune > 0.0) {
    if (!plan_is_here) objective.evaluate(at, plan.data());
    rows.prune(plan.data(), options.prune);
  }
  return result;
}

}  // namespace sela
