#pragma once
#include <cstdint>

#include "sela/sinkhorn.h"

// Between the driver (sinkhorn.cpp) and its loop bodies (sinkhorn_loops.cpp, one copy per instruction set).

namespace sela {

/// Rows whose chunks a worker knows from their bounds at a time: those at work, and those to come.
constexpr int64_t kSinkhornAhead = 32;

/// What a worker needs for one block of rows.  Columns are padded to a multiple of kSinkhornChunk in all arrays.
struct SinkhornScratch {
  int64_t start = 0;           ///< row of the block where reading begins, see SinkhornSample
  int64_t* columns = nullptr;  ///< integer column sums of this worker
  void* terms = nullptr;       ///< 4 rows of `terms_stride` float, or one row of double
  int64_t terms_stride = 0;
  void* partial = nullptr;    ///< [padded] float or double: column sums of the block at work
  int32_t* live = nullptr;    ///< [padded / kSinkhornChunk] chunks that were not skipped
  uint64_t* marks = nullptr;  ///< [kSinkhornAhead, mark_words] one bit per chunk: its bound says that it may be live

  /// Where the candidates of each row go, in the order of the rows; null: they are not wanted.  Returns whether it
  /// wants those of the next row.  A plain function, so that no container's code is compiled into the loop bodies.
  bool (*keep)(void* sink, const float* values, const int32_t* columns, int64_t count) = nullptr;
  void* sink = nullptr;
  float* kept_values = nullptr;     ///< [padded + 16] candidates of one row
  int32_t* kept_columns = nullptr;  ///< [padded + 16]
};

/// Read-only data that all workers share.
struct SinkhornTask {
  SinkhornPass pass;
  SinkhornSums out;                  ///< lse and labels are written
  int64_t padded = 0;                ///< columns rounded up to kSinkhornChunk
  const float* potential = nullptr;  ///< [padded], -inf behind the last column
  const double* potential64 = nullptr;
  const float* chunk_potential = nullptr;  ///< [bounds_stride] largest potential of each chunk; -inf behind the last
  int64_t mark_words = 0;
  double units = 0.0;       ///< 1 / resolution
  double keep_above = 0.0;  ///< p of a candidate is larger
  bool labels = false;
  int64_t group_step = 0;  ///< rows from one group that is read to the next
};

struct SinkhornBlockTotals {
  double objective = 0.0;
  double weight = 0.0;
  int64_t masked = 0;
  int64_t live = 0;
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
