#pragma once
#include <cstdint>

#include "sela/augment.h"
#include "sela/planes.h"

namespace sela {

/// Everything that the loops need for one image.  They allocate nothing: scratch and bytes are as large as lay_out
/// says, and all floats are finite.
struct AugmentJob {
  const AugmentOptions* options;
  const EffectOptions* effect_options;
  ImageView image;
  const PlanarImage* planes;  ///< the image as planes, of which image.height and width are the size; or null
  bool exact;                 ///< planes become RGB at full resolution
  int32_t channels;
  const AugmentParameters* parameters;
  AugmentEffects effects;
  void* out;  ///< [channels, size, size] (or [size, size, channels] with channels_last) of `type`
  PixelType type;
  bool channels_last;
  float* scratch;
  uint8_t* bytes;
};

#define SELA_DECLARE_LOOPS(ISA)              \
  namespace ISA {                            \
  void augment_image(const AugmentJob& job); \
  }
SELA_DECLARE_LOOPS(generic)
SELA_DECLARE_LOOPS(avx2)
SELA_DECLARE_LOOPS(avx512)
#undef SELA_DECLARE_LOOPS

}  // namespace sela
