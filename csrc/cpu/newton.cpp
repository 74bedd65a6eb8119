// Newton's method on the candidates: threads and ordered sums, then the truncated Newton-CG itself.
#include "sela/newton.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/newton_loops.h"
#include "sela/parallel.h"

namespace sela {
namespace {

// Rows are summed in so many pieces at most, each into columns of its own which are then added in order: the bits are
// the same for any number of threads.  A piece must hold several entries per column to be worth its columns.
constexpr int64_t kPieces = 64;
constexpr int64_t kPieceEntries = 8192;
// Fewer entries than this are summed by the calling thread: starting others takes longer.
constexpr int64_t kSerialEntries = 1 << 16;

/// Rows with their scratch memory: what is evaluated again and again.
class Evaluator {
 public:
  Evaluator(const NewtonRows& rows, double ratio, int threads, Isa isa)
      : rows_(rows), ratio_(ratio), cols_(rows.cols()), pieces_(static_cast<int64_t>(rows.pieces().size()) - 1) {
    threads_ = rows.entries() < kSerialEntries ? 1 : (threads > 0 ? threads : available_threads());
    threads_ = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads_, pieces_)));
    pairs_.resize(static_cast<size_t>(2 * pieces_ * cols_));
    objective_.resize(static_cast<size_t>(pieces_));
    terms_.resize(static_cast<size_t>(threads_ * (kNewtonBatch + cols_ + 16)));
    sums_body_ = &generic::newton_rows_sums;
    product_body_ = &generic::newton_rows_product;
#if defined(__x86_64__)
    if (isa == Isa::avx512) {
      sums_body_ = &avx512::newton_rows_sums;
      product_body_ = &avx512::newton_rows_product;
    } else if (isa == Isa::avx2) {
      sums_body_ = &avx2::newton_rows_sums;
      product_body_ = &avx2::newton_rows_product;
    }
#endif
    (void)isa;
  }

  void sums(const double* d, NewtonSums& out, float* plan) {
    NewtonTask task = make_task(plan);
    task.d = d;
    parallel_blocks(pieces_, threads_, [&](int64_t piece, int worker) {
      double* pairs = &pairs_[static_cast<size_t>(2 * piece * cols_)];
      std::fill_n(pairs, 2 * cols_, 0.0);
      objective_[static_cast<size_t>(piece)] =
          sums_body_(task, rows_.pieces()[static_cast<size_t>(piece)], rows_.pieces()[static_cast<size_t>(piece) + 1],
                     &terms_[static_cast<size_t>(worker * (kNewtonBatch + cols_ + 16))], pairs);
    });
    out.columns = rows_.counts();
    out.diagonal.assign(static_cast<size_t>(cols_), 0.0);
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const double* pairs = &pairs_[static_cast<size_t>(2 * piece * cols_)];
      for (int64_t j = 0; j < cols_; ++j) {
        out.columns[static_cast<size_t>(j)] += pairs[2 * j];
        out.diagonal[static_cast<size_t>(j)] += pairs[2 * j + 1];
      }
    }
    out.objective = 0.0;
    for (const double part : objective_) out.objective += part;
    for (int64_t j = 0; j < cols_; ++j) out.objective += rows_.counts()[static_cast<size_t>(j)] * d[j];
  }

  void product(const float* plan, const double* x, double* out) {
    const NewtonTask task = make_task(const_cast<float*>(plan));
    parallel_blocks(pieces_, threads_, [&](int64_t piece, int) {
      double* columns = &pairs_[static_cast<size_t>(piece * cols_)];
      std::fill_n(columns, cols_, 0.0);
      product_body_(task, rows_.pieces()[static_cast<size_t>(piece)], rows_.pieces()[static_cast<size_t>(piece) + 1], x,
                    columns);
    });
    std::fill_n(out, cols_, 0.0);
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const double* part = &pairs_[static_cast<size_t>(piece * cols_)];
      for (int64_t j = 0; j < cols_; ++j) out[j] += part[j];
    }
  }

 private:
  NewtonTask make_task(float* plan) const {
    NewtonTask task;
    task.offsets = rows_.offsets();
    task.narrow = rows_.narrow();
    task.wide = rows_.wide();
    task.values = rows_.values();
    task.weights = rows_.weights();
    task.ratio = ratio_;
    task.plan = plan;
    return task;
  }

  const NewtonRows& rows_;
  double ratio_;
  int64_t cols_, pieces_;
  int threads_ = 1;
  std::vector<double> pairs_;  // [pieces, cols, 2] for sums; its first half, [pieces, cols], for products
  std::vector<double> objective_, terms_;
  double (*sums_body_)(const NewtonTask&, int64_t, int64_t, double*, double*);
  void (*product_body_)(const NewtonTask&, int64_t, int64_t, const double*, double*);
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
  return sum;
}

/// The function that is minimised, on the subspace sum_j gauge[j] d[j] = 0.
///
/// All rows' log-sum-exp grows by about that sum (over the weight) when gauge is the column sums at the start; held at
/// 0, an entry that was left out grows by exp(d[j]), as the defect says.
class Objective {
 public:
  Objective(Evaluator& evaluator, const NewtonRows& rows, const double* target, const double* defect)
      : evaluator_(evaluator), target_(target, target + rows.cols()), defect_(defect, defect + rows.cols()) {
    set_gauge(target_);
    weight_ = std::max(rows.weight(), 1e-300);
  }

  void set_gauge(const std::vector<double>& columns) {
    gauge_ = columns;
    gauge_sum_ = 0.0;
    for (size_t j = 0; j < gauge_.size(); ++j) {
      if (!(target_[j] > 0.0)) gauge_[j] = 0.0;
      gauge_sum_ += gauge_[j];
    }
    if (!(gauge_sum_ > 0.0)) set_gauge(target_);
  }

  /// Everything about one d.
  struct Point {
    std::vector<double> d, gradient;  // gradient: projected, see below
    std::vector<double> curvature;    // the Hessian's diagonal beyond that of the rows: the defect's
    NewtonSums sums;
    double value = 0.0, error = 0.0;
  };

  void evaluate(Point& at, float* plan) {
    evaluator_.sums(at.d.data(), at.sums, plan);
    finish(at);
  }

  /// The same at the first point, whose sums choose the gauge.  The shift into the subspace changes no share.
  void evaluate_first(Point& at, float* plan) {
    evaluator_.sums(at.d.data(), at.sums, plan);
    set_gauge(at.sums.columns);
    const double mean = dot(gauge_, at.d) / gauge_sum_;
    project_step(at.d);
    at.sums.objective -= mean * weight_;
    finish(at);
  }

  /// Value, gradient and error from the sums.
  void finish(Point& at) {
    const size_t cols = target_.size();
    at.gradient.assign(cols, 0.0);
    at.curvature.assign(cols, 0.0);
    at.value = at.sums.objective;
    for (size_t j = 0; j < cols; ++j) {
      if (!(target_[j] > 0.0)) continue;
      const double r = defect_[j];
      const double grown = r > 0.0 ? r * std::exp(std::min(at.d[j], 300.0)) : r;
      at.curvature[j] = r > 0.0 ? grown : 0.0;
      at.value += (r > 0.0 ? grown : r * at.d[j]) - target_[j] * at.d[j];
      at.gradient[j] = at.sums.columns[j] + grown - target_[j];
    }
    project_gradient(at.gradient);
    at.error = 0.0;
    for (const double g : at.gradient) at.error += std::fabs(g);
    at.error /= weight_;
  }

  /// Takes from a gradient what no step in the subspace can use: a multiple of the gauge.
  void project_gradient(std::vector<double>& g) const {
    double sum = 0.0;
    for (const double v : g) sum += v;
    sum /= gauge_sum_;
    for (size_t j = 0; j < g.size(); ++j) g[j] -= sum * gauge_[j];
  }

  /// Takes a step into the subspace.
  void project_step(std::vector<double>& x) const {
    const double mean = dot(gauge_, x) / gauge_sum_;
    for (size_t j = 0; j < x.size(); ++j)
      if (target_[j] > 0.0) x[j] -= mean;
  }

  /// Solves (H + diag(extra)) x = -gradient in the subspace by conjugate gradients, until the residual has fallen by
  /// `reduction` in the norm of the preconditioner.  Returns the number of products.
  int64_t step(const Point& at, const std::vector<double>& extra, const float* plan, double reduction, int64_t limit,
               std::vector<double>& x) {
    const size_t cols = target_.size();
    std::vector<double> inverse(cols, 0.0), residual(cols), z(cols), direction, product(cols);
    for (size_t j = 0; j < cols; ++j) {
      if (target_[j] > 0.0) inverse[j] = 1.0 / (at.sums.diagonal[j] + extra[j]);
      residual[j] = -at.gradient[j];
    }
    const auto precondition = [&] {
      for (size_t j = 0; j < cols; ++j) z[j] = inverse[j] * residual[j];
      project_step(z);
    };
    x.assign(cols, 0.0);
    precondition();
    direction = z;
    double rz = dot(residual, z);
    const double enough = rz * reduction * reduction;
    int64_t products = 0;
    while (products < limit && rz > enough && rz > 0.0) {
      evaluator_.product(plan, direction.data(), product.data());
      ++products;
      for (size_t j = 0; j < cols; ++j) product[j] = target_[j] > 0.0 ? product[j] + extra[j] * direction[j] : 0.0;
      project_gradient(product);
      const double curvature = dot(direction, product);
      if (!(curvature > 0.0)) break;
      const double length = rz / curvature;
      for (size_t j = 0; j < cols; ++j) {
        x[j] += length * direction[j];
        residual[j] -= length * product[j];
      }
      precondition();
      const double next = dot(residual, z);
      for (size_t j = 0; j < cols; ++j) direction[j] = z[j] + next / rz * direction[j];
      rz = next;
    }
    return products;
  }

 private:
  Evaluator& evaluator_;
  std::vector<double> target_, defect_, gauge_;
  double gauge_sum_ = 0.0, weight_ = 1.0;
};

void check(const NewtonRows& rows, const double* target, const double* defect, const double* d,
           const NewtonOptions& options) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("newton_solve: " + what); };
  double total = 0.0;
  for (int64_t j = 0; j < rows.cols(); ++j) {
    if (!(target[j] >= 0.0) || !std::isfinite(target[j]) || !std::isfinite(defect[j]) || !std::isfinite(d[j]))
      refuse("expected finite numbers and targets >= 0, found others in column " + std::to_string(j));
    total += target[j];
  }
  if (!(total > 0.0)) refuse("expected a target above 0, found none");
  if (!(options.clip > 0.0)) refuse("expected clip > 0, found " + std::to_string(options.clip));
}

void check_ratio(double ratio) {
  if (!(ratio >= 1.0) || !(ratio <= 65536.0))
    throw std::invalid_argument("newton: expected a ratio in 1 .. 65536, found " + std::to_string(ratio));
}

}  // namespace

NewtonRows::NewtonRows(Candidates&& candidates)
    : cols_(candidates.cols),
      offsets_{0},
      narrow_(std::move(candidates.narrow)),
      wide_(std::move(candidates.wide)),
      values_(std::move(candidates.values)),
      weights_(std::move(candidates.weights)),
      counts_(static_cast<size_t>(candidates.cols), 0.0) {
  for (size_t row = 0; row + 1 < candidates.offsets.size(); ++row)
    if (candidates.offsets[row] < candidates.offsets[row + 1])
      weight_ += weights_.empty() ? 1.0 : static_cast<double>(weights_[row]);
  if (candidates.overflow) throw std::invalid_argument("newton: expected candidates that did not overflow");
  compact(candidates.offsets, [](int64_t) { return true; });
  candidates.offsets.clear();
}

/// Keeps the entries for which keep(entry) holds, in their order; rows that have one left are counted from then on.
template <class Keep>
void NewtonRows::compact(const std::vector<int64_t>& offsets, const Keep& keep) {
  const bool wide = !wide_.empty();
  int64_t out = 0, row_out = 0;
  std::vector<int64_t> new_offsets{0};
  for (size_t row = 0; row + 1 < offsets.size(); ++row) {
    const double weight = weights_.empty() ? 1.0 : static_cast<double>(weights_[row]);
    const int64_t first = out;
    for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) {
      if (!keep(k)) continue;
      const size_t from = static_cast<size_t>(k), to = static_cast<size_t>(out++);
      if (wide)
        wide_[to] = wide_[from];
      else
        narrow_[to] = narrow_[from];
      values_[to] = values_[from];
    }
    if (out - first == 1)
      counts_[wide ? wide_[static_cast<size_t>(first)] : narrow_[static_cast<size_t>(first)]] += weight;
    if (out - first <= 1) {
      out = first;
      continue;
    }
    if (!weights_.empty()) weights_[static_cast<size_t>(row_out)] = weights_[row];
    ++row_out;
    new_offsets.push_back(out);
  }
  if (wide)
    wide_.resize(static_cast<size_t>(out));
  else
    narrow_.resize(static_cast<size_t>(out));
  values_.resize(static_cast<size_t>(out));
  if (!weights_.empty()) weights_.resize(static_cast<size_t>(row_out));
  is_wide_ = wide;
  offsets_ = std::move(new_offsets);

  const int64_t piece = std::max({kPieceEntries, 4 * cols_, (out + kPieces - 1) / kPieces});
  pieces_.assign(1, 0);
  for (int64_t row = 0; row < row_out; ++row)
    if (offsets_[static_cast<size_t>(row) + 1] - offsets_[static_cast<size_t>(pieces_.back())] >= piece)
      pieces_.push_back(row + 1);
  if (pieces_.back() != row_out || pieces_.size() == 1) pieces_.push_back(row_out);
}

void NewtonRows::prune(const float* plan, double level) {
  const float smallest = static_cast<float>(std::exp(-level));
  const std::vector<int64_t> offsets = std::move(offsets_);
  compact(offsets, [&](int64_t k) { return plan[k] > smallest; });
}

void newton_sums(const NewtonRows& rows, double ratio, const double* d, NewtonSums& sums, float* plan, int threads,
                 Isa isa) {
  check_ratio(ratio);
  Evaluator(rows, ratio, threads, isa).sums(d, sums, plan);
}

void newton_product(const NewtonRows& rows, const float* plan, const double* x, double* out, int threads, Isa isa) {
  Evaluator(rows, 1.0, threads, isa).product(plan, x, out);
}

NewtonResult newton_solve(NewtonRows& rows, const double* target, const double* defect, double* d,
                          const NewtonOptions& options, Isa isa) {
  check(rows, target, defect, d, options);
  check_ratio(options.ratio);
  const size_t cols = static_cast<size_t>(rows.cols());
  Evaluator evaluator(rows, options.ratio, options.threads, isa);
  Objective objective(evaluator, rows, target, defect);
  std::vector<float> plan(static_cast<size_t>(rows.entries()));
  std::vector<double> x, extra(cols);
  NewtonResult result;

  Objective::Point at, next;
  at.d.assign(d, d + cols);
  objective.evaluate_first(at, plan.data());
  bool plan_is_here = true;  // `plan` is that of `at`, not of a step that was refused
  result.sums = 1;
  double total = 0.0;
  for (size_t j = 0; j < cols; ++j) total += target[j];
  const std::vector<double> start = at.d;
  result.error = at.error;
  result.stalled = true;

  while (true) {
    if (at.error <= options.tolerance) {
      result.stalled = false;
      break;
    }
    if (result.steps >= options.steps) break;
    // The extra diagonal keeps every column, and every group of columns that few rows tie to the others, from moving
    // much further than `clip`; it vanishes with the gradient, and convergence is quadratic.
    for (size_t j = 0; j < cols; ++j)
      extra[j] = at.curvature[j] + std::fabs(at.gradient[j]) / options.clip + 1e-9 * target[j] + 1e-14 * total;
    const double reduction = std::min(0.05, at.error);
    result.products += objective.step(at, extra, plan.data(), reduction, options.products, x);
    ++result.steps;
    const double slope = dot(at.gradient, x);
    double largest = 0.0;
    for (const double v : x) largest = std::max(largest, std::fabs(v));
    double length = std::min(1.0, 2.0 * options.clip / std::max(largest, 1e-300));
    for (size_t j = 0; j < cols; ++j)  // stay where the candidates are those that count
      if (x[j] != 0.0)
        length = std::min(length, (options.reach - std::copysign(1.0, x[j]) * (at.d[j] - start[j])) / std::fabs(x[j]));
    if (!(length > 1e-6)) break;
    bool better = false;
    for (int trial = 0; trial < 12 && slope < 0.0; ++trial, length *= 0.5) {
      next.d = at.d;
      for (size_t j = 0; j < cols; ++j) next.d[j] += length * x[j];
      objective.evaluate(next, plan.data());
      plan_is_here = false;
      ++result.sums;
      better = next.value <= at.value + 1e-4 * length * slope || next.error < 0.9 * at.error;
      if (better) break;
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
