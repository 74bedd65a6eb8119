// Anderson's acceleration of Sinkhorn iterations.  For problems so small that a pass takes tens of microseconds, an
// iteration has to cost no more than that, too.
#include "sela/anderson.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sela {
namespace {

constexpr double kRank = 1e-10;  // of the longest direction: shorter ones are rounding
constexpr int kMost = 64;        // differences

/// Four sums side by side: one alone would wait for each addition.
double dot(const double* a, const double* b, int64_t size) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = 0;
  for (; i + 4 <= size; i += 4)
    for (int64_t k = 0; k < 4; ++k) sums[k] += a[i + k] * b[i + k];
  for (; i < size; ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

double largest(const double* x, int64_t size) {
  double most = 0.0;
  for (int64_t i = 0; i < size; ++i) most = std::max(most, std::isnan(x[i]) ? INFINITY : std::fabs(x[i]));
  return most;
}

/// A gamma that minimises |f - C gamma|, from the QR decomposition of C's columns, the longest remaining one first; 0
/// for those that add nothing.  c: [count, size], destroyed.
void least_squares(std::vector<double>& c, int count, int64_t size, std::vector<double> f, double* gamma) {
  std::vector<double> r(static_cast<size_t>(count) * static_cast<size_t>(count), 0.0);  // r[i * count + j]
  std::vector<double> top(static_cast<size_t>(count), 0.0);                             // of the turned f
  int order[kMost];
  for (int j = 0; j < count; ++j) order[j] = j;
  const auto column = [&](int j) { return c.data() + static_cast<int64_t>(order[j]) * size; };
  int rank = 0;
  double first = 0.0;
  for (; rank < count && rank < size; ++rank) {
    int longest = rank;
    double length = -1.0;
    for (int j = rank; j < count; ++j) {
      const double square = dot(column(j) + rank, column(j) + rank, size - rank);
      if (square > length) {
        length = square;
        longest = j;
      }
    }
    length = std::sqrt(length);
    if (rank == 0) first = length;
    if (!(length > kRank * first)) break;
    std::swap(order[rank], order[longest]);
    for (int i = 0; i < rank; ++i)
      std::swap(r[static_cast<size_t>(i * count + rank)], r[static_cast<size_t>(i * count + longest)]);
    double* v = column(rank) + rank;  // becomes the reflection's vector
    const double head = v[0] > 0.0 ? -length : length;
    v[0] -= head;
    const double square = dot(v, v, size - rank);
    const auto reflect = [&](double* x) {
      const double part = 2.0 * dot(v, x, size - rank) / square;
      for (int64_t i = 0; i < size - rank; ++i) x[i] -= part * v[i];
    };
    r[static_cast<size_t>(rank * count + rank)] = head;
    for (int j = rank + 1; j < count; ++j) {
      reflect(column(j) + rank);
      r[static_cast<size_t>(rank * count + j)] = column(j)[rank];
    }
    reflect(f.data() + rank);
    top[static_cast<size_t>(rank)] = f[static_cast<size_t>(rank)];
  }
  std::fill_n(gamma, count, 0.0);
  for (int i = rank - 1; i >= 0; --i) {
    double value = top[static_cast<size_t>(i)];
    for (int j = i + 1; j < rank; ++j) value -= r[static_cast<size_t>(i * count + j)] * gamma[order[j]];
    gamma[order[i]] = value / r[static_cast<size_t>(i * count + i)];
  }
}

/// Adds a row behind the others, and drops the oldest one where there are too many.
void remember(std::vector<double>& rows, const std::vector<double>& after, const std::vector<double>& before,
              int memory) {
  const size_t size = after.size();
  if (rows.size() == static_cast<size_t>(memory) * size)
    rows.erase(rows.begin(), rows.begin() + static_cast<int64_t>(size));
  for (size_t i = 0; i < size; ++i) rows.push_back(after[i] - before[i]);
}

}  // namespace

void anderson_step(const double* residual, const double* steps, const double* changes, int count, int64_t size,
                   double* step) {
  if (count < 0 || count >= kMost || size < 1)
    throw std::invalid_argument("anderson_step: expected 0 .. 63 differences of one number or more, found " +
                                std::to_string(count) + " of " + std::to_string(size));
  std::copy_n(residual, size, step);
  if (count == 0) return;
  std::vector<double> scaled(changes, changes + count * size), scale(static_cast<size_t>(count));
  for (int j = 0; j < count; ++j) {
    double* column = scaled.data() + j * size;
    const double length = std::sqrt(dot(column, column, size));
    scale[static_cast<size_t>(j)] = length == 0.0 ? 1.0 : length;
    for (int64_t i = 0; i < size; ++i) column[i] /= scale[static_cast<size_t>(j)];
  }
  double gamma[kMost];
  least_squares(scaled, count, size, std::vector<double>(residual, residual + size), gamma);
  for (int j = 0; j < count; ++j) {
    const double part = gamma[j] / scale[static_cast<size_t>(j)];
    for (int64_t i = 0; i < size; ++i) step[i] -= (steps[j * size + i] + changes[j * size + i]) * part;
  }
}

void anderson_next(const double* residual, const double* steps, const double* changes, int count, int64_t size,
                   double cap, double* step) {
  anderson_step(residual, steps, changes, count, size, step);
  if (2.0 * largest(step, size) <= cap) return;  // nor does it without its mean
  cap = std::max(cap, 2.0 * largest(residual, size));
  double mean = 0.0, most = 0.0;
  for (int64_t i = 0; i < size; ++i) mean += step[i];
  mean /= static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i)
    most = std::max(most, std::isfinite(step[i]) ? std::fabs(step[i] - mean) : INFINITY);
  if (!std::isfinite(most))
    std::copy_n(residual, size, step);
  else if (most > cap)
    for (int64_t i = 0; i < size; ++i) step[i] *= cap / most;
}

ColumnState column_state(const double* columns, double weight, const double* target, const double* potential,
                         int64_t cols, double* shares, double* logs) {
  ColumnState state;
  for (int64_t j = 0; j < cols; ++j) {
    shares[j] = columns[j] / weight;
    logs[j] = std::log(shares[j]);
    state.error += std::fabs(shares[j] - target[j]);
  }
  state.pulled = dot(target, potential, cols);
  return state;
}

void centre(double* x, const double* target, int64_t size) {
  const double shift = dot(target, x, size);
  for (int64_t i = 0; i < size; ++i) x[i] -= shift;
}

void anderson_cpu(SinkhornPass pass, const AndersonOptions& options, AndersonState& state, SinkhornSums& sums,
                  void* reference, int64_t* words, int threads, Isa isa) {
  const size_t cols = static_cast<size_t>(pass.cols);
  if (state.potential.size() != cols || state.residual.size() != cols || state.steps.size() != state.changes.size() ||
      state.steps.size() % cols != 0 || state.steps.size() > static_cast<size_t>(options.memory) * cols)
    throw std::invalid_argument("anderson: expected vectors [cols] and differences [memory, cols] at most");
  const bool is_double = pass.type == LogitsType::float64;
  const size_t lse_bytes = static_cast<size_t>(pass.rows) * (is_double ? sizeof(double) : sizeof(float));
  const int64_t blocks = (pass.rows + kSinkhornRows - 1) / kSinkhornRows;
  const double unit = sinkhorn_resolution(pass);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<double> totals(static_cast<size_t>(2 * blocks)), potential(cols), residual(cols), columns(cols),
      shares(cols);
  state.best = state.potential;
  double best = state.error, lowest = state.error;
  int64_t since = 0;
  for (int64_t number = 0; number < options.passes; ++number) {
    anderson_next(state.residual.data(), state.steps.data(), state.changes.data(),
                  static_cast<int>(state.steps.size() / cols), pass.cols, options.cap, potential.data());
    for (size_t j = 0; j < cols; ++j) potential[j] += state.potential[j];
    centre(potential.data(), options.target, pass.cols);
    if (!is_double)
      for (double& value : potential) value = static_cast<double>(static_cast<float>(value));
    if (!std::isfinite(largest(potential.data(), pass.cols))) return;

    pass.potential = potential.data();
    pass.reference = reference;
    sinkhorn_pass_cpu(pass, sums, threads, isa, {}, nullptr, totals.data());
    if (reference != nullptr) std::memcpy(reference, sums.lse, lse_bytes);
    sinkhorn_exact_totals(totals.data(), blocks, pass.largest_weight, words);
    const double weight = sinkhorn_total(words + kSinkhornWords, pass.largest_weight);
    const double objective = sinkhorn_total(words, pass.largest_weight);

    for (size_t j = 0; j < cols; ++j) columns[j] = static_cast<double>(sums.column_sums[j]) * unit;
    const ColumnState found = column_state(columns.data(), weight, options.target, potential.data(), pass.cols,
                                           shares.data(), residual.data());
    const double error = found.error;
    bool is_odd = !(weight > 0.0);
    for (size_t j = 0; j < cols; ++j) {
      is_odd = is_odd || shares[j] < options.faint * options.target[j];
      residual[j] = options.log_target[j] - residual[j];
    }
    state.errors.push_back(error);
    state.objectives.push_back(found.pulled - objective / weight);
    state.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    if (is_odd) return;

    centre(residual.data(), options.target, pass.cols);
    remember(state.steps, potential, state.potential, options.memory);
    remember(state.changes, residual, state.residual, options.memory);
    state.potential.swap(potential);
    state.residual.swap(residual);
    state.error = error;
    if (error < best) {
      best = error;
      state.best = state.potential;
    }
    if (error <= options.tolerance) {
      state.converged = true;
      return;
    }
    since = error < 0.5 * lowest ? 0 : since + 1;
    if (since == 0) lowest = error;
    if (error > options.restart * best || since >= options.patience) return;
  }
}

}  // namespace sela
