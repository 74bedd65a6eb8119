// Sums over the candidates: log-sum-exp, column sums and Hessian products of rows with a few entries each.
//
// Rows are short (2 to 100 entries), so exponentials are taken of many rows at once.  Everything is in double but the
// stored values and plan: Newton's line search compares objectives that differ in the tenth digit, and float64 logits
// are solved to 1e-9.
#include "cpu/newton_loops.h"

#include <cmath>

#include "cpu/simd.h"
#include "cpu/simd_double.h"

namespace sela {
namespace SELA_ISA {
namespace {

/// Two numbers of a column that lie side by side, and are added to in one go.
typedef double pair64 __attribute__((vector_size(2 * sizeof(double))));

/// Exponents in +-kSafe need no shift by the largest of their row.
constexpr double kSafe = 500.0;

/// terms[k] = exp(ratio * value + d) for `count` entries from `begin` on.  Returns false where that may leave the
/// range.
template <class Index>
bool plain_terms(const NewtonTask& task, const Index* index, int64_t begin, int64_t count, double* terms) {
  for (int64_t k = 0; k < count; ++k)
    terms[k] = task.ratio * static_cast<double>(task.values[begin + k]) + task.d[index[begin + k]];
  for (int64_t k = count; k < count + D; ++k) terms[k] = 0.0;  // the last vector may reach past the rows
  const vdouble zero = {};
  vdouble low = zero, high = zero;
  for (int64_t k = 0; k < count; k += D) {
    const vdouble t = load64(terms + k);
    low = t < low ? t : low;
    high = t > high ? t : high;
    const vdouble e = exp64(t);
    std::memcpy(terms + k, &e, sizeof(e));
  }
  double lowest = 0.0, highest = 0.0;
  for (int64_t v = 0; v < D; ++v) {
    lowest = low[v] < lowest ? low[v] : lowest;
    highest = high[v] > highest ? high[v] : highest;
  }
  return lowest > -kSafe && highest < kSafe;
}

/// The same relative to the largest term of each row, whose logarithms go to the objective, which is returned.
template <class Index>
double shifted_terms(const NewtonTask& task, const Index* index, int64_t row, int64_t end_row, double* terms) {
  const int64_t begin = task.offsets[row], count = task.offsets[end_row] - begin;
  for (int64_t k = 0; k < count; ++k)
    terms[k] = task.ratio * static_cast<double>(task.values[begin + k]) + task.d[index[begin + k]];
  double objective = 0.0;
  for (int64_t i = row; i < end_row; ++i) {
    double* t = terms + (task.offsets[i] - begin);
    const int64_t n = task.offsets[i + 1] - task.offsets[i];
    double top = t[0];
    for (int64_t k = 1; k < n; ++k) top = t[k] > top ? t[k] : top;
    for (int64_t k = 0; k < n; ++k) t[k] -= top;
    objective += (task.weights != nullptr ? static_cast<double>(task.weights[i]) : 1.0) * top;
  }
  for (int64_t k = 0; k < count; k += D) {
    const vdouble e = exp64(load64(terms + k));
    std::memcpy(terms + k, &e, sizeof(e));
  }
  return objective;
}

/// The sum of logarithms, with one logarithm for many numbers.
struct LogSum {
  double total = 0.0, product = 1.0;
  inline void add(double x) {
    product *= x;
    if (product > 1e-40 && product < 1e40) return;
    total += std::log(product);
    product = 1.0;
  }
  double sum() const { return total + std::log(product); }
};

template <class Index>
double rows_sums(const NewtonTask& task, const Index* index, int64_t first, int64_t last, double* terms,
                 double* pairs) {
  const int64_t* offsets = task.offsets;
  double objective = 0.0;
  LogSum logs;
  for (int64_t row = first; row < last;) {
    const int64_t begin = offsets[row];
    int64_t end_row = row + 1;
    while (end_row < last && offsets[end_row + 1] - begin <= kNewtonBatch) ++end_row;
    if (!plain_terms(task, index, begin, offsets[end_row] - begin, terms))
      objective += shifted_terms(task, index, row, end_row, terms);
    for (int64_t i = row; i < end_row; ++i) {
      const double* e = terms + (offsets[i] - begin);
      const Index* j = index + offsets[i];
      const int64_t n = offsets[i + 1] - offsets[i];
      double even = 0.0, odd = 0.0;
      for (int64_t k = 0; k + 1 < n; k += 2) {
        even += e[k];
        odd += e[k + 1];
      }
      const double sum = n % 2 != 0 ? even + odd + e[n - 1] : even + odd;
      double weight = 1.0;
      if (task.weights == nullptr) {
        logs.add(sum);
      } else {
        weight = static_cast<double>(task.weights[i]);
        objective += weight * std::log(sum);
      }
      const double inverse = 1.0 / sum;
      for (int64_t k = 0; k < n; ++k) {
        const double q = e[k] * inverse, share = weight * q;
        double* to = pairs + 2 * static_cast<int64_t>(j[k]);
        pair64 both;
        std::memcpy(&both, to, sizeof(both));
        both += pair64{share, share * ((sum - e[k]) * inverse)};
        std::memcpy(to, &both, sizeof(both));
        if (task.plan != nullptr) task.plan[offsets[i] + k] = static_cast<float>(q);
      }
    }
    row = end_row;
  }
  return objective + logs.sum();
}

template <class Index>
void rows_product(const NewtonTask& task, const Index* index, int64_t first, int64_t last, const double* x,
                  double* out) {
  for (int64_t i = first; i < last; ++i) {
    const Index* j = index + task.offsets[i];
    const float* q = task.plan + task.offsets[i];
    const int64_t n = task.offsets[i + 1] - task.offsets[i];
    // q_j (x_j - q . x) keeps its digits where q_j x_j - q_j (q . x) would lose them; that q sums to 1 in float32 only
    // makes sum_j of it differ from 0, hence the division.
    double mean = 0.0, total = 0.0;
    for (int64_t k = 0; k < n; ++k) {
      mean += static_cast<double>(q[k]) * x[j[k]];
      total += static_cast<double>(q[k]);
    }
    mean /= total;
    const double weight = task.weights != nullptr ? static_cast<double>(task.weights[i]) : 1.0;
    for (int64_t k = 0; k < n; ++k) out[j[k]] += weight * static_cast<double>(q[k]) * (x[j[k]] - mean);
  }
}

}  // namespace

double newton_rows_sums(const NewtonTask& task, int64_t first, int64_t last, double* terms, double* pairs) {
  const FlushToZero flush_to_zero;
  return task.narrow != nullptr ? rows_sums(task, task.narrow, first, last, terms, pairs)
                                : rows_sums(task, task.wide, first, last, terms, pairs);
}

void newton_rows_product(const NewtonTask& task, int64_t first, int64_t last, const double* x, double* out) {
  const FlushToZero flush_to_zero;
  if (task.narrow != nullptr)
    rows_product(task, task.narrow, first, last, x, out);
  else
    rows_product(task, task.wide, first, last, x, out);
}

}  // namespace SELA_ISA
}  // namespace sela
