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

template <class Index>
double rows_sums(const NewtonTask& task, const Index* index, int64_t first, int64_t last, double* terms,
                 double* columns, double* diagonal) {
  const int64_t* offsets = task.offsets;
  double objective = 0.0;
  for (int64_t row = first; row < last;) {
    const int64_t begin = offsets[row];
    int64_t end_row = row + 1;
    while (end_row < last && offsets[end_row + 1] - begin <= kNewtonBatch) ++end_row;
    const int64_t count = offsets[end_row] - begin;
    for (int64_t k = 0; k < count; ++k)
      terms[k] = task.ratio * static_cast<double>(task.values[begin + k]) + task.d[index[begin + k]];
    for (int64_t k = count; k < count + D; ++k) terms[k] = 0.0;  // the last vector may reach past the rows
    for (int64_t i = row; i < end_row; ++i) {
      double* t = terms + (offsets[i] - begin);
      const int64_t n = offsets[i + 1] - offsets[i];
      double top = t[0];
      for (int64_t k = 1; k < n; ++k) top = t[k] > top ? t[k] : top;
      for (int64_t k = 0; k < n; ++k) t[k] -= top;
      objective += (task.weights != nullptr ? static_cast<double>(task.weights[i]) : 1.0) * top;
    }
    for (int64_t k = 0; k < count; k += D) {
      const vdouble e = exp64(load64(terms + k));
      std::memcpy(terms + k, &e, sizeof(e));
    }
    for (int64_t i = row; i < end_row; ++i) {
      const double* e = terms + (offsets[i] - begin);
      const Index* j = index + offsets[i];
      const int64_t n = offsets[i + 1] - offsets[i];
      double sum = 0.0;
      for (int64_t k = 0; k < n; ++k) sum += e[k];
      const double weight = task.weights != nullptr ? static_cast<double>(task.weights[i]) : 1.0;
      const double inverse = 1.0 / sum;
      objective += weight * std::log(sum);
      for (int64_t k = 0; k < n; ++k) {
        const double q = e[k] * inverse;
        columns[j[k]] += weight * q;
        diagonal[j[k]] += weight * q * ((sum - e[k]) * inverse);
        if (task.plan != nullptr) task.plan[offsets[i] + k] = static_cast<float>(q);
      }
    }
    row = end_row;
  }
  return objective;
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

double newton_rows_sums(const NewtonTask& task, int64_t first, int64_t last, double* terms, double* columns,
                        double* diagonal) {
  const FlushToZero flush_to_zero;
  return task.narrow != nullptr ? rows_sums(task, task.narrow, first, last, terms, columns, diagonal)
                                : rows_sums(task, task.wide, first, last, terms, columns, diagonal);
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
