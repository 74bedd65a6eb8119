#pragma once
#include <cstdint>
#include <memory>

#include "cpu/augment_layout.h"
#include "cpu/augment_loops.h"
#include "sela/dispatch.h"

// The fused pass of one image on the calling thread: for callers with threads of their own.

namespace sela {

/// What one thread works in, from image to image.
class AugmentScratch {
 public:
  /// Makes room for an image; what was there is lost.
  void grow(const ScratchSize& needed);
  float* floats() { return floats_.get(); }
  uint8_t* bytes() { return bytes_.get(); }
  /// Memory in use, bytes.
  int64_t held() const { return size_.floats * static_cast<int64_t>(sizeof(float)) + size_.bytes; }

 private:
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<uint8_t[]> bytes_;
  ScratchSize size_ = {0, 0};
};

/// job.scratch and job.bytes are not looked at.  Parameters, effects and planes: passed by check_parameters,
/// check_effects and check_planes.
void augment_one(Isa isa, AugmentJob job, AugmentScratch& scratch);

/// Bytes of one number.
inline int64_t bytes_of(PixelType type) {
  return type == PixelType::float32 ? 4 : type == PixelType::uint8 ? 1 : 2;
}

constexpr AugmentEffects kNoEffects = {0.0f, Tone::none, 1.0f, 0.0f, {0, 0}};

}  // namespace sela
