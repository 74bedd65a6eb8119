#pragma once
#include <cstdint>

#include "sela/augment.h"

namespace sela {

/// Everything that the loops need for one image.  They allocate nothing: scratch has scratch_floats(...) floats, all
/// of them finite.
struct AugmentJob {
  const AugmentOptions* options;
  ImageView image;
  int32_t channels;
  const AugmentParameters* parameters;
  void* out;  ///< [channels, size, size] (or [size, size, channels] with channels_last) of `type`
  PixelType type;
  bool channels_last;
  float* scratch;
};

/// The longest vector of any instruction set: scratch is laid out for it, whichever runs.
constexpr int64_t kScratchLanes = 16;

/// Rows that are unpacked before they are resampled horizontally: loads that straddle two stores must not come right
/// behind them.
constexpr int32_t kBlockRows = 4;

#define SELA_DECLARE_LOOPS(ISA)              \
  namespace ISA {                            \
  void augment_image(const AugmentJob& job); \
  }
SELA_DECLARE_LOOPS(generic)
SELA_DECLARE_LOOPS(avx2)
SELA_DECLARE_LOOPS(avx512)
#undef SELA_DECLARE_LOOPS

}  // namespace sela
