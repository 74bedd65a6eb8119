// Sums and Hessian products over the candidates: threads, and the order in which parts are added.
#include "sela/newton.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/newton_evaluator.h"
#include "sela/parallel.h"

namespace sela {
namespace {

// Fewer entries than this are summed by the calling thread: starting others takes longer.
constexpr int64_t kSerialEntries = 1 << 16;

}  // namespace

NewtonEvaluator::NewtonEvaluator(const NewtonRows& rows, double ratio, int threads, Isa isa)
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

void NewtonEvaluator::sums(const double* d, NewtonSums& out, float* plan) {
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

void NewtonEvaluator::product(const float* plan, const double* x, double* out) {
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

NewtonTask NewtonEvaluator::make_task(float* plan) const {
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

void check_newton_ratio(double ratio) {
  if (!(ratio >= 1.0) || !(ratio <= 65536.0))
    throw std::invalid_argument("newton: expected a ratio in 1 .. 65536, found " + std::to_string(ratio));
}

void newton_sums(const NewtonRows& rows, double ratio, const double* d, NewtonSums& sums, float* plan, int threads,
                 Isa isa) {
  check_newton_ratio(ratio);
  NewtonEvaluator(rows, ratio, threads, isa).sums(d, sums, plan);
}

void newton_product(const NewtonRows& rows, const float* plan, const double* x, double* out, int threads, Isa isa) {
  NewtonEvaluator(rows, 1.0, threads, isa).product(plan, x, out);
}

}  // namespace sela
