#pragma once
#include <cmath>
#include <cstdint>

#include "sela/augment.h"
#include "sela/host_device.h"

namespace sela {

/// Length of the resampled side, of which the output shows `size` pixels.
SELA_SHARED_INLINE int32_t resampled_length(const AugmentOptions& options, int32_t length) {
  return options.crop == Crop::center ? length : options.size;
}

/// Upper bound of the input pixels that one output pixel is the weighted mean of: a triangle that is twice the scale
/// wide covers at most ceil(2 * scale) pixel centres.
SELA_SHARED_INLINE int64_t most_taps(int64_t input, int64_t output) {
  const int64_t taps = input > output ? (2 * input + output - 1) / output : 2;
  return taps < input ? taps : input;
}

/// How `length` inputs are resampled along one axis, antialiased bilinear: output i is the mean of the inputs under a
/// triangle around its middle.  Same arithmetic as torch's upsample_bilinear2d_aa in float.
struct AxisScale {
  int32_t length;
  int32_t taps;   ///< at least the inputs of any output
  float scale;    ///< inputs per output
  float support;  ///< half the width of the triangle, in inputs
  float inverse;  ///< 1 / support
};

/// length inputs become `resampled` outputs.  taps: most_taps of the two.
SELA_SHARED_INLINE AxisScale axis_scale(int32_t length, int32_t resampled, int32_t taps) {
  const float scale = static_cast<float>(length) / static_cast<float>(resampled);
  return {length, taps, scale, scale >= 1.0f ? scale : 1.0f, scale >= 1.0f ? 1.0f / scale : 1.0f};
}

/// Where the middle of an output lies among the inputs.
SELA_SHARED_INLINE float axis_middle(const AxisScale& axis, int32_t output) {
  return axis.scale * (static_cast<float>(output) + 0.5f);
}

/// First input under the triangle, and how many there are, >= 1.
struct AxisSpan {
  int32_t start, count;
};
SELA_SHARED_INLINE AxisSpan axis_span(const AxisScale& axis, float middle) {
  int32_t begin = static_cast<int32_t>(middle - axis.support + 0.5f);
  int32_t end = static_cast<int32_t>(middle + axis.support + 0.5f);
  begin = begin < 0 ? 0 : begin;
  begin = begin > axis.length - 1 ? axis.length - 1 : begin;
  end = end > axis.length ? axis.length : end;
  end = end < begin + 1 ? begin + 1 : end;
  end = end > begin + axis.taps ? begin + axis.taps : end;  // one more, of weight zero, after an unlucky rounding
  return {begin, end - begin};
}

/// Height of the triangle over input start + k; 0 from count on.
SELA_SHARED_INLINE float axis_weight(const AxisScale& axis, float middle, AxisSpan span, int32_t k) {
  const float near = 1.0f - fabsf((static_cast<float>(span.start + k) - middle + 0.5f) * axis.inverse);
  return ((k < span.count) & (near > 0.0f)) ? near : 0.0f;
}

}  // namespace sela
