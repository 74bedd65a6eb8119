#pragma once
#include <cstdint>

#include "sela/augment.h"
#include "sela/host_device.h"

namespace sela {

/// Colour operations besides contrast, which splits an order into before and after; 2 bits each.
enum ColourOp : uint32_t { kNone = 0, kBrightness = 1, kSaturation = 2, kHue = 3 };

/// The colour operations of one image, those that change nothing left out.
struct ColourPlan {
  uint32_t before, after;  ///< operations before and after the contrast, 2 bits each, the first one lowest
  bool contrast;           ///< without one everything comes "after" it
};

/// saturates, turns: whether saturation and hue can change this image.
SELA_SHARED_INLINE ColourPlan colour_plan(const AugmentParameters& p, bool saturates, bool turns) {
  ColourPlan plan = {0, 0, p.jitter && p.contrast != 1.0f};
  if (!p.jitter) return plan;
  bool passed = !plan.contrast;
  uint32_t shift_before = 0, shift_after = 0;
  for (int i = 0; i < 4; ++i) {
    const int32_t op = p.order[i];
    if (op == 1) {
      passed = true;
      continue;
    }
    const uint32_t code = op == 0 ? kBrightness : op == 2 ? kSaturation : kHue;
    const bool idle = op == 0   ? p.brightness == 1.0f
                      : op == 2 ? p.saturation == 1.0f || !saturates
                                : p.hue == 0.0f || !turns;
    if (idle) continue;
    if (passed) {
      plan.after |= code << shift_after;
      shift_after += 2;
    } else {
      plan.before |= code << shift_before;
      shift_before += 2;
    }
  }
  return plan;
}

}  // namespace sela
