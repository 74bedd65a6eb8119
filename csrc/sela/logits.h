#pragma once
#include <cstdint>

#include "sela/dispatch.h"
#include "sela/sinkhorn.h"

namespace sela {

/// Steps of fixed16 per nat of lambda * logit.
constexpr double kFixedSteps = 64.0;

/// What fixed16 holds for -inf, and for entries from 1,024 nats below the row's maximum on: their p is exactly 0.
constexpr uint16_t kFixedImpossible = 65535;

/// Distances below the row's maximum, in the unit of the kind, above which an entry is stored as -inf: what lies
/// between them and the largest number of the kind is rounded to that.
constexpr float kFixedLimit = 65534.5f, kHalfLimit = 65519.996f, kBfloatLimit = 3.3961774e38f;

/// What the values of a masked row are: impossible, or NaN.
constexpr uint16_t kFixedBad = kFixedImpossible, kHalfBad = 0x7e00, kBfloatBad = 0x7fc0;

/// Logits to be stored in 16 bits, each row relative to its maximum m[i], in one of three kinds:
///   fixed16             round(kFixedSteps * lambda * (m[i] - logits[i, j])), ties to even
///   float16, bfloat16   logits[i, j] - m[i]
/// A row that holds NaN or +inf, or only -inf, or whose lambda * m[i] is beyond float's range, gets a NaN for its
/// maximum and values by which a pass masks it.
struct StoreLogits {
  const void* logits = nullptr;           ///< [rows, cols] row-major, elements of `type`
  LogitsType type = LogitsType::float32;  ///< not fixed16
  LogitsType kind = LogitsType::fixed16;  ///< what is written: fixed16, float16 or bfloat16
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;          ///< elements from one row to the next, >= cols
  double lambda = 1.0;         ///< > 0, finite
  uint16_t* values = nullptr;  ///< [rows, cols], written
  int64_t values_stride = 0;   ///< from one row of values to the next, >= cols; 0: cols
  float* maxima = nullptr;     ///< [rows], written
};

/// Stores logits; the bits depend on neither threads nor instruction set.  Returns how many finite entries were too far
/// below their row's maximum and are stored as -inf.
/// Throws std::invalid_argument for sizes, kinds or lambda out of range.
int64_t store_logits_cpu(const StoreLogits& store, int threads, Isa isa);

/// The same on the current CUDA device, in the order of `stream` (a cudaStream_t), with the same bits; all pointers are
/// device memory.  How many entries are stored as -inf is added to *saturated.  Nothing waits for the device.
/// Throws std::invalid_argument too, std::runtime_error without CUDA, and when the launch fails.
void store_logits_cuda(const StoreLogits& store, int64_t* saturated, void* stream);

/// Throws std::invalid_argument unless sizes, kinds and lambda are in range.
void check_store(const StoreLogits& store);

}  // namespace sela
