#pragma once
// How the scratch of one image is laid out: the driver counts it, the loops use it.
#include <cstdint>

#include "cpu/augment_loops.h"
#include "sela/resample.h"

namespace sela {

/// The longest vector of any instruction set: scratch is laid out for it, whichever runs.
constexpr int64_t kScratchLanes = 16;

/// Rows that are unpacked before they are resampled horizontally: loads that straddle two stores must not come right
/// behind them.
constexpr int32_t kBlockRows = 4;

SELA_SHARED_INLINE int64_t round_up(int64_t n) {
  return (n + kScratchLanes - 1) / kScratchLanes * kScratchLanes;
}

/// Output i is sum over k < count[i] of weight[k * stride + i] * input[start[i] + k].
struct Axis {
  int32_t* start;
  int32_t* count;
  float* weight;
  float* total;  ///< [stride] floats to work with
  int64_t stride;
  int32_t taps;         ///< at least every count; weights from count[i] to taps are zero
  int32_t first, last;  ///< inputs in use: [first, last)
};

/// Scratch of one image.
struct Buffers {
  Axis x, y;                      ///< of the pixels
  Axis sample_x[3], sample_y[3];  ///< of the samples of components at another resolution
  float* row;                     ///< [kBlockRows, channels, row_stride]: rows of the input, or of the mixed input
  int64_t row_stride;
  float* middle;  ///< [rows, channels, middle_stride]: horizontally resampled rows
  int64_t middle_stride;
  float* plane;  ///< [channels, plane_stride]: the resampled image
  int64_t plane_stride;
  float* spare;  ///< [plane_stride]: one more
  float* line;   ///< [3, line_stride]: rows with a margin
  int64_t line_stride;
  float* ring;  ///< [ring_rows, 3, ring_stride]: rows as RGB in 0..255
  int64_t ring_stride;
  int32_t ring_rows;
  uint8_t* sample;  ///< [3, sample_stride]: a row of every component, upsampled
  int64_t sample_stride;
  uint16_t* sum;  ///< [sample_stride]: a row of a component on the way there
};

/// Whether something follows the colour operations besides normalisation to a floating-point type.
SELA_SHARED_INLINE bool has_effects(const AugmentJob& job) {
  const AugmentEffects& e = job.effects;
  return e.blur > 0.0f || e.tone != Tone::none || e.noise > 0.0f || job.effect_options->sobel ||
         job.type == PixelType::uint8;
}

/// Channels of the output.
SELA_SHARED_INLINE int32_t output_channels(const AugmentJob& job) {
  return job.effect_options->sobel ? 2 : job.channels;
}

/// Room that lay_out asks for.
struct ScratchSize {
  int64_t floats, bytes;
};

/// Lays the buffers out in job.scratch and job.bytes (null while they are only counted) and says how large these are.
SELA_SHARED_INLINE ScratchSize lay_out(const AugmentJob& job, Buffers* b) {
  const AugmentOptions& options = *job.options;
  const AugmentParameters& p = *job.parameters;
  const bool center = options.crop == Crop::center;
  const int64_t height = center ? job.image.height : p.height, width = center ? job.image.width : p.width;
  const int64_t size = options.size, padded = round_up(size);
  const int64_t taps_x = most_taps(width, resampled_length(options, p.width));
  const int64_t taps_y = most_taps(height, resampled_length(options, p.height));
  const bool colour = job.planes != nullptr && job.planes->count == 3;
  const bool exact = colour && job.exact;
  const bool effects = has_effects(job);

  int64_t floats = 0;
  auto take = [&](int64_t n) __attribute__((always_inline)) {
    float* const begin = job.scratch == nullptr ? nullptr : job.scratch + floats;
    floats += round_up(n);
    return begin;
  };
  b->plane_stride = round_up(size * size) + 2 * kScratchLanes;
  b->plane = take((effects ? 3 : job.channels) * b->plane_stride);  // gradients take three, whatever the image has
  b->spare = take(effects ? b->plane_stride : 0);
  b->line_stride = effects ? 3 * padded + 2 * kScratchLanes : 0;
  b->line = take(3 * b->line_stride);
  b->middle_stride = padded;
  b->middle = take((size + 2) * job.channels * b->middle_stride);
  b->row_stride = round_up(width + taps_x + 8) + 2 * kScratchLanes;
  b->row = take(kBlockRows * job.channels * b->row_stride);
  auto take_axis = [&](Axis* axis, int64_t taps) __attribute__((always_inline)) {
    axis->stride = padded;
    axis->start = reinterpret_cast<int32_t*>(take(padded));
    axis->count = reinterpret_cast<int32_t*>(take(padded));
    axis->total = take(padded);
    axis->weight = take(taps * padded);
  };
  take_axis(&b->x, taps_x);
  take_axis(&b->y, taps_y);
  const int32_t components = job.planes == nullptr || exact ? 0 : job.planes->count;
  for (int32_t c = 0; c < components; ++c) {
    if (job.planes->plane[c].step_x == 1 && job.planes->plane[c].step_y == 1) continue;
    take_axis(&b->sample_x[c], taps_x + 3);
    take_axis(&b->sample_y[c], taps_y + 3);
  }

  b->ring_rows = exact ? static_cast<int32_t>(taps_y) : 0;
  b->ring_stride = exact ? round_up(width) + kScratchLanes : 0;
  b->ring = take(3 * b->ring_rows * b->ring_stride);

  int64_t bytes = 0;
  auto take_bytes = [&](int64_t n) __attribute__((always_inline)) {
    uint8_t* const begin = job.bytes == nullptr ? nullptr : job.bytes + bytes;
    bytes += round_up(n);
    return begin;
  };
  b->sample_stride = exact ? round_up(width + 8) + 8 * kScratchLanes : 0;  // two blocks more: augment_planes.h
  b->sample = take_bytes(3 * b->sample_stride);
  b->sum = reinterpret_cast<uint16_t*>(take_bytes(2 * b->sample_stride));
  return {floats + 10 * kScratchLanes, bytes};
}

}  // namespace sela
