#pragma once
#include <cstdint>

#include "sela/rounding.h"

// Between the driver of the candidate search (rounding.cpp) and its loop bodies (rounding_loops.cpp, one copy per
// instruction set).

namespace sela {

/// Rows per block.
constexpr int64_t kCandidateRows = 128;
/// Columns are padded to a multiple of this in scratch arrays; also the number of groups whose maxima bound the lists.
constexpr int64_t kCandidateGroups = 64;

/// What a worker needs.  All arrays hold padded columns.
struct CandidateScratch {
  float* scores = nullptr;
  float* hits = nullptr;
  float* order = nullptr;
  int32_t* columns = nullptr;
};

/// Read-only data that all workers share.
struct CandidateTask {
  CandidateSearch search;
  CandidateLists out;
  int64_t padded = 0;                   ///< columns rounded up to kCandidateGroups
  const float* prices = nullptr;        ///< [padded], -inf behind the last column
  const float* label_prices = nullptr;  ///< [cols]
};

#define SELA_DECLARE_CANDIDATES(isa)                                                                \
  namespace isa {                                                                                   \
  void candidates_block(const CandidateTask& task, int64_t block, const CandidateScratch& scratch); \
  }
SELA_DECLARE_CANDIDATES(generic)
#if defined(__x86_64__)
SELA_DECLARE_CANDIDATES(avx2)
SELA_DECLARE_CANDIDATES(avx512)
#endif
#undef SELA_DECLARE_CANDIDATES

}  // namespace sela
