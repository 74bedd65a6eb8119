#pragma once
#include <cstdint>

#include "sela/sinkhorn.h"

namespace sela {

/// Features whose draws are numbered: philox_image has 65,536 per row, and eight features take three.
constexpr int64_t kMostFeatures = 8 * 21845;

/// Rows of a matrix of feature vectors, seen as they are or as noisy views.
///
///   d[c] = x[c] - mean[c], or 0 where feature c is left out
///   out[c] = mean[c] + (d[c] / (1 - dropout) + noise[c] * g)
///
/// Each feature is left out with probability `dropout`; g has mean 0 and deviation 1: the sum of four random bytes,
/// centred and scaled, which is close to Gaussian and exact in every arithmetic.  All is drawn by philox_image, keyed
/// by (seed, epoch, number of the row, view): bits depend on neither threads nor batch.  Products and sums are float32.
struct VectorRows {
  const void* rows = nullptr;             ///< [N, width], C order
  LogitsType type = LogitsType::float32;  ///< float32, float16, bfloat16 or float64
  int64_t width = 0;                      ///< features, at most kMostFeatures where there is a view
  const int64_t* index = nullptr;         ///< [count] rows to take
  const int64_t* number = nullptr;        ///< [count] what their draws are keyed by
  int64_t count = 0;
  const float* mean = nullptr;   ///< [width]; null: no view, rows as they are
  const float* noise = nullptr;  ///< [width] deviation of the noise; null: none
  uint32_t dropout = 0;          ///< probability in parts of 65,536
  uint64_t seed = 0;
  uint32_t epoch = 0;
  uint32_t view = 0;  ///< 0 .. 255
};

/// Writes out [count, width], and finite [count]: 1 where all numbers of the row are finite in float32.
void vector_rows_cpu(const VectorRows& task, float* out, uint8_t* finite, int threads);

}  // namespace sela
