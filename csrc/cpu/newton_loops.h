#pragma once
#include <cstdint>

// Between the driver (newton.cpp) and its loop bodies (newton_loops.cpp, one copy per instruction set).

namespace sela {

/// Entries that are worked on together: their terms stay in the first-level cache.
constexpr int64_t kNewtonBatch = 2048;

/// Rows with several candidates, and the point.  See sela/newton.h.
struct NewtonTask {
  const int64_t* offsets = nullptr;
  const uint16_t* narrow = nullptr;  ///< one of narrow and wide is null
  const uint32_t* wide = nullptr;
  const float* values = nullptr;
  const float* weights = nullptr;  ///< null: all 1
  double ratio = 1.0;
  const double* d = nullptr;  ///< [cols]
  float* plan = nullptr;      ///< [entries]; written by sums where not null, read by product
};

/// Declares, for one instruction set:
///   newton_rows_sums: adds rows [first, last) to pairs [cols, 2], column sum and diagonal of each column; returns
///   their part of the objective. newton_rows_product: out += sum_i w q[i] (sum over j of q[i, j] (x[i] - x[j])), the
///   Hessian times x.
/// `terms` has room for kNewtonBatch + cols + 16 numbers.
#define SELA_DECLARE_NEWTON(isa)                                                                               \
  namespace isa {                                                                                              \
  double newton_rows_sums(const NewtonTask& task, int64_t first, int64_t last, double* terms, double* pairs);  \
  void newton_rows_product(const NewtonTask& task, int64_t first, int64_t last, const double* x, double* out); \
  }
SELA_DECLARE_NEWTON(generic)
#if defined(__x86_64__)
SELA_DECLARE_NEWTON(avx2)
SELA_DECLARE_NEWTON(avx512)
#endif
#undef SELA_DECLARE_NEWTON

}  // namespace sela
