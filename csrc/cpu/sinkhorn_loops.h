#pragma once
#include <cstdint>

#include "sela/sinkhorn.h"

// Between the driver (sinkhorn.cpp) and its loop bodies (sinkhorn_loops.cpp, one copy per instruction set).

namespace sela {

/// Columns are padded to a multiple of this in all scratch arrays; also the unit of skipping.
constexpr int64_t kSinkhornChunk = 32;

/// What a worker needs for one block of rows.  All arrays hold padded columns.
struct SinkhornScratch {
  int64_t* columns = nullptr;  ///< integer column sums of this worker
  void* terms = nullptr;       ///< 4 rows of `terms_stride` float, or one row of double
  int64_t terms_stride = 0;
  void* partial = nullptr;  ///< [padded] float or double: column sums of the block at work
  int32_t* live = nullptr;  ///< [padded / kSinkhornChunk] chunks that were not skipped
};

/// Read-only data that all workers share.
struct SinkhornTask {
  SinkhornPass pass;
  SinkhornSums out;                  ///< lse and labels are written
  int64_t padded = 0;                ///< columns rounded up to kSinkhornChunk
  const float* potential = nullptr;  ///< [padded], -inf behind the last column
  const double* potential64 = nullptr;
  double units = 0.0;  ///< 1 / resolution
  bool labels = false;
};

struct SinkhornBlockTotals {
  double objective = 0.0;
  double weight = 0.0;
  int64_t masked = 0;
};

#define SELA_DECLARE_SINKHORN(isa)                                                                             \
  namespace isa {                                                                                              \
  SinkhornBlockTotals sinkhorn_block(const SinkhornTask& task, int64_t block, const SinkhornScratch& scratch); \
  }
SELA_DECLARE_SINKHORN(generic)
#if defined(__x86_64__)
SELA_DECLARE_SINKHORN(avx2)
SELA_DECLARE_SINKHORN(avx512)
#endif
#undef SELA_DECLARE_SINKHORN

}  // namespace sela
