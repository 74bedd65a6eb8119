#pragma once
#include <vector>

#include "cpu/newton_loops.h"
#include "sela/newton.h"

// Between the sums over candidates (newton.cpp) and the solver (newton_solve.cpp).

namespace sela {

/// Rows with their scratch memory: what is evaluated again and again at one ratio of lambdas.
class NewtonEvaluator {
 public:
  NewtonEvaluator(const NewtonRows& rows, double ratio, int threads, Isa isa);

  void sums(const double* d, NewtonSums& out, float* plan);       ///< see newton_sums
  void product(const float* plan, const double* x, double* out);  ///< see newton_product

 private:
  NewtonTask make_task(float* plan) const;

  const NewtonRows& rows_;
  double ratio_;
  int64_t cols_, pieces_;
  int threads_ = 1;
  std::vector<double> pairs_;  // [pieces, cols, 2] for sums; its first half, [pieces, cols], for products
  std::vector<double> objective_, terms_;
  double (*sums_body_)(const NewtonTask&, int64_t, int64_t, double*, double*);
  void (*product_body_)(const NewtonTask&, int64_t, int64_t, const double*, double*);
};

/// Throws std::invalid_argument unless 1 <= ratio <= 65536.
void check_newton_ratio(double ratio);

}  // namespace sela
