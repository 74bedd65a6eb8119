#pragma once
#include <cstdint>
#include <vector>

#include "sela/rounding.h"

// Between the driver of the candidate search (rounding.cpp) and its loop bodies (rounding_loops.cpp, one copy per
// instruction set).

namespace sela {

/// Rows per block.
constexpr int64_t kCandidateRows = 128;

/// What a worker needs.  All arrays hold padded columns, up to a multiple of kCandidateGroups.
struct CandidateScratch {
  float* scores = nullptr;
  float* smallest = nullptr;  ///< [kColumnMargins, padded] for margins
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
  const float* bonus = nullptr;         ///< [padded], or null
};

/// Rows per group of packed lists.
constexpr int64_t kSmoothRows = 16;

/// Packed lists: groups of kSmoothRows rows, whose k-th entries are side by side; short lists are filled up with -inf.
struct SmoothPart {
  std::vector<int32_t> columns;  ///< [sum of lengths, kSmoothRows]
  std::vector<float> values;     ///< [sum of lengths, kSmoothRows]
  std::vector<int32_t> lengths;  ///< [groups] entries per row
  std::vector<float> weights;    ///< [groups, kSmoothRows] 1, or 0 for rows that fill up the last group
  std::vector<double> single;    ///< [clusters] rows with a single entry
};

#define SELA_DECLARE_CANDIDATES(isa)                                                                \
  namespace isa {                                                                                   \
  void candidates_block(const CandidateTask& task, int64_t block, const CandidateScratch& scratch); \
  /* Takes the losses of a block of rows into the smallest ones, scratch.smallest. */               \
  void margins_block(const CandidateTask& task, int64_t block, const CandidateScratch& scratch);    \
  /* sum[j] += sum_i softmax(sharpness * values[i, :] + sharp)[j]; sharp: [clusters]. */            \
  void smooth_part(const SmoothPart& part, float sharpness, const float* sharp, double* sum);       \
  }
SELA_DECLARE_CANDIDATES(generic)
#if defined(__x86_64__)
SELA_DECLARE_CANDIDATES(avx2)
SELA_DECLARE_CANDIDATES(avx512)
#endif
#undef SELA_DECLARE_CANDIDATES

}  // namespace sela
