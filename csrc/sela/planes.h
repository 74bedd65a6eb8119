#pragma once
#include <cstdint>

#include "sela/augment.h"
#include "sela/host_device.h"
#include "sela/resample.h"

namespace sela {

/// Whether components may have so many pixels per sample.
SELA_HOST_DEVICE inline bool is_step(int32_t step) {
  return step >= 1 && step <= 32 && (step & (step - 1)) == 0;
}

/// One component of an image as a JPEG file stores it, or that part of it which was decoded.  Sample (y, x) of the
/// whole component is data[(y - top) * stride + x - left].
struct PlaneView {
  const uint8_t* data;
  int64_t stride;           ///< bytes from row to row
  int32_t top, left;        ///< first sample that is there
  int32_t height, width;    ///< samples that are there, from it on
  int32_t full_height;      ///< samples of the whole component
  int32_t full_width;       ///<
  int32_t step_y, step_x;   ///< pixels of the image per sample: is_step; more than 4 where a reduced transform was used
  bool smooth_y, smooth_x;  ///< upsampled by interpolation (libjpeg's "fancy", step 2 only) or by repetition
};

/// An image as planes: Y, Cb, Cr (or R, G, B), or Y alone.
struct PlanarImage {
  PlaneView plane[3];
  int32_t count;          ///< planes: 1 or 3
  bool rgb;               ///< three planes are R, G, B
  int32_t height, width;  ///< pixels of the whole image
};

/// How a component is stored: pixels per sample, and whether it is interpolated.
struct Subsampling {
  int32_t step_y, step_x;
  bool smooth_y, smooth_x;
};

/// Where libjpeg interpolates ("fancy upsampling"): two pixels per sample, but not in components of one or two columns.
SELA_HOST_DEVICE inline Subsampling libjpeg_subsampling(int32_t step_y, int32_t step_x, int32_t width) {
  const bool wide = (width + step_x - 1) / step_x > 2;
  if (step_y == 2 && step_x == 1) return {2, 1, true, false};
  return {step_y, step_x, step_y == 2 && step_x == 2 && wide, step_y <= 2 && step_x == 2 && wide};
}

/// The sampling of an image of count planes; no samples yet.
SELA_HOST_DEVICE inline PlanarImage planar_geometry(int32_t count, const Subsampling& luma, const Subsampling& chroma,
                                                    int32_t height, int32_t width) {
  PlanarImage image = {};
  image.count = count;
  image.height = height;
  image.width = width;
  for (int32_t c = 0; c < count; ++c) {
    PlaneView& plane = image.plane[c];
    const Subsampling& sampling = c == 0 ? luma : chroma;
    plane.step_y = sampling.step_y;
    plane.step_x = sampling.step_x;
    plane.smooth_y = sampling.smooth_y;
    plane.smooth_x = sampling.smooth_x;
    plane.full_height = (height + plane.step_y - 1) / plane.step_y;
    plane.full_width = (width + plane.step_x - 1) / plane.step_x;
  }
  return image;
}

/// Pixels [top, bottom) x [left, right).
struct PixelBox {
  int32_t top, left, bottom, right;
};

/// Inputs [first, last) that outputs offset .. offset + size of `resampled` ones are made of.
SELA_HOST_DEVICE inline void used_range(int32_t length, int32_t resampled, int32_t offset, int32_t size, int32_t* first,
                                        int32_t* last) {
  const int64_t taps = most_taps(length, resampled);
  const AxisScale scale = axis_scale(length, resampled, static_cast<int32_t>(taps));
  *first = axis_span(scale, axis_middle(scale, offset)).start;
  const AxisSpan end = axis_span(scale, axis_middle(scale, offset + size - 1));
  *last = end.start + end.count;
}

/// Pixels that an output is made of.  height, width: of the image.  Parameters: passed by check_parameters.
SELA_HOST_DEVICE inline PixelBox shown_box(const AugmentOptions& options, const AugmentParameters& p, int32_t height,
                                           int32_t width) {
  if (options.crop != Crop::center) return {p.top, p.left, p.top + p.height, p.left + p.width};
  PixelBox box;
  used_range(height, p.height, p.top, options.size, &box.top, &box.bottom);
  used_range(width, p.width, p.left, options.size, &box.left, &box.right);
  return box;
}

/// Samples [first, last) of a component that pixels [begin, end) are upsampled from, one on either side included when
/// it is interpolated.
SELA_HOST_DEVICE inline void sample_range(int32_t begin, int32_t end, int32_t step, bool smooth, int32_t full,
                                          int32_t* first, int32_t* last) {
  const int32_t low = begin / step - (smooth ? 1 : 0), high = (end - 1) / step + (smooth ? 2 : 1);
  *first = low < 0 ? 0 : low;
  *last = high > full ? full : high;
}

/// Pixels whose samples, of all components, a decoder has to deliver so that an output can be made; within the image.
/// plane: the steps, smoothness and full sizes are read.
PixelBox needed_box(const AugmentOptions& options, const AugmentParameters& parameters, const PlanarImage& image);

/// Why an output cannot be made of these planes; nullptr when it can.  parameters: passed by check_parameters.
const char* check_planes(const AugmentOptions& options, const AugmentParameters& parameters, const PlanarImage& image);

/// How planes become RGB.
struct PlanarOptions {
  bool exact = false;  ///< at full resolution, rounded and clamped as libjpeg does; else at the size of the output
};

/// augment_images for planes.  exact: the same output as from the pixels that libjpeg would have decoded; else chroma
/// is resampled from its own resolution and colours are converted in float at the size of the output, which differs
/// where libjpeg would have rounded or clamped before the resampling. channels: 1 (images of one plane only) or 3.
void augment_planes(const AugmentOptions& options, const EffectOptions& effect_options, const PlanarOptions& planar,
                    const PlanarImage* images, int32_t channels, const AugmentParameters* parameters,
                    const AugmentEffects* effects, int64_t count, const AugmentOutput& out, int threads);

}  // namespace sela
