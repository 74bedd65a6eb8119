#pragma once
// Resampling an image that is given as the planes of a JPEG file.
//
// Default: every component from its own resolution straight to the output's, with the upsampling of chroma in the
// weights (fold_axis); colours are converted at the size of the output.  Exact: rows become RGB as libjpeg makes them,
// one by one as the vertical pass reaches them, and only those between its first and its last tap are kept.
#include "cpu/augment_resample.h"

namespace sela::SELA_ISA {
namespace {

// ---------------------------------------------------------------- exact

/// libjpeg's colour conversion: factors and a rounded sum in 16-bit fixed point.  All sums stay below 2^24, so float
/// holds them exactly.
constexpr float fixed(double x) {
  return static_cast<float>(static_cast<int32_t>(x * 65536 + 0.5));
}

/// `width` pixels to RGB in 0..255, whole numbers, and up to a vector more.  y: nothing from y_end on is read; cb, cr:
/// padded.
void colour_row(const uint8_t* y, const uint8_t* y_end, const uint8_t* cb, const uint8_t* cr, int32_t width, float* red,
                float* green, float* blue) {
  const Floats half = splat(32768.0f), part = splat(1.0f / 65536.0f), middle = splat(128.0f);
  const Floats low = splat(0.0f), high = splat(255.0f);
  for (int32_t x = 0; x < width; x += kLanes) {
    const uint8_t* from = y + x;
    uint8_t tail[kLanes];
    if (y_end - from < kLanes) {
      std::memset(tail, 0, kLanes);
      std::memcpy(tail, from, static_cast<size_t>(y_end - from));
      from = tail;
    }
    const Floats luma = load_gray(from), b = load_gray(cb + x) - middle, r = load_gray(cr + x) - middle;
    const Floats more_red = floor(fma(r, splat(fixed(1.40200)), half) * part);
    const Floats more_green = floor(fma(r, splat(-fixed(0.71414)), fma(b, splat(-fixed(0.34414)), half)) * part);
    const Floats more_blue = floor(fma(b, splat(fixed(1.77200)), half) * part);
    store(red + x, min(max(luma + more_red, low), high));
    store(green + x, min(max(luma + more_green, low), high));
    store(blue + x, min(max(luma + more_blue, low), high));
  }
}

/// Numbers that a loop takes at a time where it may pass the end into padding: the compiler makes vectors of them.
constexpr int32_t kBlock = 32;

/// Two pixels per sample: out[2 j] = (3 sum[j] + sum[j - 1] + even) >> kShift, out[2 j + 1] the same of sum[j + 1]; j <
/// count, and up to kBlock more.
template <int kShift>
void smooth_row(const uint16_t* __restrict sum, int32_t count, uint16_t even, uint16_t odd, uint8_t* __restrict out) {
  for (int32_t begin = 0; begin < count; begin += kBlock) {
    for (int32_t j = begin; j < begin + kBlock; ++j) {
      const uint16_t middle = static_cast<uint16_t>(3 * sum[j]);
      out[2 * j] = static_cast<uint8_t>(static_cast<uint16_t>(middle + sum[j - 1] + even) >> kShift);
      out[2 * j + 1] = static_cast<uint8_t>(static_cast<uint16_t>(middle + sum[j + 1] + odd) >> kShift);
    }
  }
}

/// to[j] = near[j] * kNear + far[j], j < count.
template <int kNear>
void sum_rows(const uint8_t* __restrict near, const uint8_t* __restrict far, int32_t count, uint16_t* __restrict to) {
  auto block = [&](int32_t begin) {
    for (int32_t j = begin; j < begin + kBlock; ++j)
      to[j] = static_cast<uint16_t>(kNear * near[j] + (kNear > 1 ? far[j] : 0));
  };
  if (count < kBlock) {
    for (int32_t j = 0; j < count; ++j) to[j] = static_cast<uint16_t>(kNear * near[j] + (kNear > 1 ? far[j] : 0));
    return;
  }
  for (int32_t j = 0; j + kBlock <= count; j += kBlock) block(j);
  block(count - kBlock);  // overlaps
}

/// Pixels [left, left + width) of row y of a component at full resolution, as libjpeg upsamples it: where they are, in
/// the component itself or in out.  sum: width / 2 + 4 numbers, out: width + 4 bytes, and two blocks each; to work
/// with.
const uint8_t* upsample_row(const PlaneView& plane, int32_t y, int32_t left, int32_t width, uint16_t* sum,
                            uint8_t* out) {
  auto row = [&plane](int32_t sample) { return plane.data + (sample - plane.top) * plane.stride - plane.left; };
  const int32_t near = y / plane.step_y;
  const uint8_t* from = row(near);
  if (plane.step_x == 1 && !plane.smooth_y) return from + left;
  int32_t far = y % 2 == 0 ? near - 1 : near + 1;
  far = far < 0 ? 0 : far > plane.full_height - 1 ? plane.full_height - 1 : far;
  const uint8_t* beside = plane.smooth_y ? row(far) : from;

  if (!plane.smooth_x) {
    const int32_t step = plane.step_x;
    const int32_t bias = y % 2 == 0 ? 1 : 2;
    for (int32_t x = 0; x < width; ++x) {
      const int32_t j = (left + x) / step;
      out[x] = plane.smooth_y ? static_cast<uint8_t>((3 * from[j] + beside[j] + bias) >> 2) : from[j];
    }
    return out;
  }
  // Samples begin - 1 .. end, the outermost repeated at the border.
  const int32_t begin = left / 2, end = (left + width - 1) / 2 + 1;
  const int32_t low = begin > 0 ? begin - 1 : 0, high = end < plane.full_width ? end + 1 : plane.full_width;
  uint16_t* const first = sum + 1;  // of sample `begin`
  if (plane.smooth_y) {
    sum_rows<3>(from + low, beside + low, high - low, first + (low - begin));
  } else {
    sum_rows<1>(from + low, from + low, high - low, first + (low - begin));
  }
  if (begin == 0) first[-1] = first[0];
  if (high == end) first[end - begin] = first[end - begin - 1];
  if (plane.smooth_y) {
    smooth_row<4>(first, end - begin, 8, 7, out);
  } else {
    smooth_row<2>(first, end - begin, 1, 2, out);
  }
  return out + (left - 2 * begin);
}

/// Rows as RGB, made when they are first asked for.  Requests move downwards, and each is for at most ring_rows rows.
struct ConvertedRows {
  const PlanarImage* image;
  const Buffers* b;
  int32_t top, left;  ///< pixel of row 0 and of the first column in use
  int32_t width;
  int32_t next;  ///< the first row that has not been made

  float* ring_row(int32_t row, int channel) const {
    return b->ring + (row % b->ring_rows * 3 + channel) * b->ring_stride;
  }
  void make(int32_t row) {
    const uint8_t* from[3];
    for (int c = 0; c < 3; ++c) {
      uint8_t* const room = b->sample + c * b->sample_stride;
      from[c] = upsample_row(image->plane[c], top + row, left, width, b->sum, room);
      if (from[c] >= room && from[c] < room + b->sample_stride) continue;
      if (c == 0 && !image->rgb) continue;  // not padded, but its end is known
      std::memcpy(room, from[c], static_cast<size_t>(width));
      from[c] = room;
    }
    if (image->rgb) {
      const float one = 1.0f;
      for (int c = 0; c < 3; ++c)
        mix_plane<false>(from[c], 0, from[c] + round_up(width), width, &one, 0, 1, ring_row(row, c));
      return;
    }
    const PlaneView& luma = image->plane[0];
    const bool direct = luma.step_x == 1 && !luma.smooth_y;
    const uint8_t* end = direct ? luma.data + (luma.height - 1) * luma.stride + luma.width : from[0] + round_up(width);
    colour_row(from[0], end, from[1], from[2], width, ring_row(row, 0), ring_row(row, 1), ring_row(row, 2));
  }
  void mix(int32_t first, const float* weight, int64_t weight_stride, int32_t count, float* row, int64_t row_stride) {
    next = next < first ? first : next;
    for (; next < first + count; ++next) make(next);
    const int32_t before = b->ring_rows - first % b->ring_rows;  // rows until the ring begins anew
    const int32_t front = count < before ? count : before;
    const float* end = b->ring + int64_t{3} * b->ring_rows * b->ring_stride;
    for (int c = 0; c < 3; ++c) {
      mix_plane<false, float>(ring_row(first, c), 3 * b->ring_stride, end, width, weight, weight_stride, front,
                              row + c * row_stride);
      if (front < count)
        mix_plane<true, float>(ring_row(0, c), 3 * b->ring_stride, end, width, weight + front * weight_stride,
                               weight_stride, count - front, row + c * row_stride);
    }
  }
};

// ---------------------------------------------------------------- planar

bool same_sampling(const PlaneView& a, const PlaneView& b) {
  return a.step_x == b.step_x && a.step_y == b.step_y && a.smooth_x == b.smooth_x && a.smooth_y == b.smooth_y &&
         a.full_height == b.full_height && a.full_width == b.full_width;
}

/// Y, Cb, Cr to RGB in [0, 1], in place; what lies within a vector behind `pixels` may change.
void convert_colours(float* y, float* cb, float* cr, int64_t pixels) {
  const Floats zero = splat(0.0f), one = splat(1.0f), middle = splat(128.0f / 255.0f);
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const Floats luma = load(y + i), b = load(cb + i) - middle, r = load(cr + i) - middle;
    store(y + i, min(max(fma(r, splat(1.402f), luma), zero), one));
    store(cb + i, min(max(fma(r, splat(-0.71414f), fma(b, splat(-0.34414f), luma)), zero), one));
    store(cr + i, min(max(fma(b, splat(1.772f), luma), zero), one));
  }
}

/// One component.  (top, left): the sample that the axes count from; channel: whose part of b.middle it has.
Resampler<1, PlaneRows> component_resampler(const PlaneView& plane, const Axis& x, const Axis& y, int32_t top,
                                            int32_t left, int32_t size, const Buffers& b, int32_t channel) {
  const PlaneRows rows = {plane.data + (top - plane.top) * plane.stride + (left + x.first - plane.left), plane.stride,
                          plane.data + (plane.height - 1) * plane.stride + plane.width, x.last - x.first};
  return {rows, x, y, size, b.row, b.row_stride, b.middle + channel * (size + 2) * b.middle_stride, b.middle_stride};
}

/// (top, left): the pixel that the axes count from.
void resample_planes(const AugmentJob& job, Buffers& b, int32_t top, int32_t left) {
  const PlanarImage& image = *job.planes;
  const int32_t size = job.options->size;
  if (image.count == 3 && job.exact) {
    resample_rows<3>(ConvertedRows{&image, &b, top, left + b.x.first, b.x.last - b.x.first, 0}, size, b);
    return;
  }
  bool folded[3];
  for (int32_t c = 0; c < image.count; ++c) {
    const PlaneView& plane = image.plane[c];
    folded[c] = plane.step_x > 1 || plane.step_y > 1;
    if (!folded[c]) continue;
    if (c > 0 && folded[c - 1] && same_sampling(plane, image.plane[c - 1])) {
      b.sample_x[c] = b.sample_x[c - 1];
      b.sample_y[c] = b.sample_y[c - 1];
    } else {
      fold_axis(b.x, left, plane.step_x, plane.smooth_x, plane.full_width, &b.sample_x[c]);
      fold_axis(b.y, top, plane.step_y, plane.smooth_y, plane.full_height, &b.sample_y[c]);
    }
  }
  auto resampler = [&](int32_t c) {
    return folded[c] ? component_resampler(image.plane[c], b.sample_x[c], b.sample_y[c], 0, 0, size, b, c)
                     : component_resampler(image.plane[c], b.x, b.y, top, left, size, b, c);
  };
  if (image.count == 1) {
    Resampler<1, PlaneRows> only = resampler(0);
    only.prepare();
    for (int32_t begin = 0; begin < size; begin += kBlockRows)
      only.make(begin, size - begin < kBlockRows ? size - begin : kBlockRows, b.plane, b.plane_stride);
    return;
  }
  Resampler<1, PlaneRows> components[3] = {resampler(0), resampler(1), resampler(2)};
  for (auto& component : components) component.prepare();
  float* const plane[3] = {b.plane, b.plane + b.plane_stride, b.plane + 2 * b.plane_stride};
  for (int32_t begin = 0; begin < size; begin += kBlockRows) {
    const int32_t count = size - begin < kBlockRows ? size - begin : kBlockRows;
    const int64_t first = int64_t{begin} * size;
    for (int32_t c = 0; c < 3; ++c) components[c].make(begin, count, plane[c], 0);
    if (!image.rgb) convert_colours(plane[0] + first, plane[1] + first, plane[2] + first, int64_t{count} * size);
  }
}

}  // namespace
}  // namespace sela::SELA_ISA
