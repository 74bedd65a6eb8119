#pragma once
// Weights of the resampling along one axis, and the horizontal pass.
//
// Weights are what torch's antialiased interpolation computes, in float; the flip is a reversed table and the division
// by 255 a factor of the horizontal weights.
#include "cpu/augment_layout.h"
#include "cpu/simd_image.h"
#include "sela/resample.h"

namespace sela::SELA_ISA {
namespace {

using namespace pixels;

/// length inputs resampled to `resampled`, of which outputs offset .. offset + size are wanted, times gain.
/// taps: most_taps(length, resampled).
void make_axis(Axis* axis, int32_t length, int32_t resampled, int32_t offset, int32_t size, bool flip, float gain,
               int32_t taps) {
  const AxisScale scale = axis_scale(length, resampled, taps);
  const int32_t from = flip ? offset + size - 1 : offset, step = flip ? -1 : 1;
  const int32_t lanes = static_cast<int32_t>(axis->stride);  // those behind the last column repeat it
  for (int32_t i = 0; i < lanes; ++i) {
    const AxisSpan span = axis_span(scale, axis_middle(scale, from + step * (i < size ? i : size - 1)));
    axis->start[i] = span.start;
    axis->count[i] = span.count;
  }
  const int32_t low = flip ? size - 1 : 0, high = flip ? 0 : size - 1;
  axis->first = axis->start[low];
  axis->last = axis->start[high] + axis->count[high];
  axis->taps = taps;

  float* total = axis->total;
  for (int32_t i = 0; i < lanes; ++i) total[i] = 0.0f;
  for (int32_t k = 0; k < taps; ++k) {
    float* weight = axis->weight + k * axis->stride;
    for (int32_t i = 0; i < lanes; ++i) {
      const float middle = axis_middle(scale, from + step * (i < size ? i : size - 1));
      const float w = axis_weight(scale, middle, {axis->start[i], axis->count[i]}, k);
      weight[i] = w;
      total[i] += w;
    }
  }
  for (int32_t i = 0; i < lanes; ++i) total[i] = total[i] > 0.0f ? gain / total[i] : 0.0f;
  for (int32_t k = 0; k < taps; ++k) {
    float* weight = axis->weight + k * axis->stride;
    for (int32_t i = 0; i < lanes; ++i) weight[i] *= total[i];
  }
}

/// The same outputs from the samples of a component of another resolution, of which libjpeg would have made the pixels:
/// its upsampling is part of the weights.  Interpolation gives a pixel 3/4 of the sample that covers it and 1/4 of the
/// next one on the pixel's side, which is itself at the border; repetition gives it the sample that covers it.
/// pixels: inputs count from pixel `origin` of the image; samples: inputs count from the first of the component.
void fold_axis(const Axis& pixels, int32_t origin, int32_t step, bool smooth, int32_t full, Axis* samples) {
  const int32_t lanes = static_cast<int32_t>(samples->stride);
  const int64_t stride = samples->stride, rows = pixels.taps + 3;
  for (int64_t i = 0; i < rows * stride; ++i) samples->weight[i] = 0.0f;
  samples->taps = 1;
  samples->first = full;
  samples->last = 0;
  for (int32_t i = 0; i < lanes; ++i) {
    const int32_t begin = origin + pixels.start[i], count = pixels.count[i];
    int32_t low = begin / step;
    if (smooth && begin % 2 == 0 && low > 0) --low;
    int32_t high = low;
    for (int32_t k = 0; k < count; ++k) {
      const int32_t pixel = begin + k, near = pixel / step;
      const float w = pixels.weight[k * pixels.stride + i];
      if (smooth) {
        int32_t far = pixel % 2 == 0 ? near - 1 : near + 1;
        far = far < 0 ? 0 : far > full - 1 ? full - 1 : far;
        samples->weight[(near - low) * stride + i] += 0.75f * w;
        samples->weight[(far - low) * stride + i] += 0.25f * w;
        high = far > high ? far : high;
      } else {
        samples->weight[(near - low) * stride + i] += w;
      }
      high = near > high ? near : high;
    }
    samples->start[i] = low;
    samples->count[i] = high - low + 1;
    samples->taps = samples->count[i] > samples->taps ? samples->count[i] : samples->taps;
    samples->first = low < samples->first ? low : samples->first;
    samples->last = high + 1 > samples->last ? high + 1 : samples->last;
  }
}

/// out[line][i] = sum over k of weight[k, i] * in[line][start[i] - x.first + k] for `lines` lines and all columns.
/// What depends on the columns alone is found once per vector of columns, not once per line.
template <int kTaps>
void resample_lines(const Axis& x, int32_t size, int lines, const float* in, int64_t in_stride, float* out,
                    int64_t out_stride) {
  const int32_t taps = kTaps > 0 ? kTaps : x.taps;
  for (int32_t i = 0; i < size; i += kLanes) {
    const int32_t* start = x.start + i;
    const float* weight = x.weight + i;
    const int32_t ends[2] = {start[0], start[kLanes - 1]};  // starts rise, or fall in a flipped table
    const int32_t low = ends[0] < ends[1] ? ends[0] : ends[1], high = ends[0] < ends[1] ? ends[1] : ends[0];
    const float* base = in + (low - x.first);
    const Ints index = add(load_ints(start), -low);
    auto each_line = [&](auto resampled) {
      for (int line = 0; line < lines; ++line) {
        const Floats total = resampled(base + line * in_stride);
        float* to = out + line * out_stride + i;
        if (i + kLanes <= size) {
          store(to, total);
        } else {
          float tail[kLanes];
          store(tail, total);
          std::memcpy(to, tail, static_cast<size_t>(size - i) * sizeof(float));
        }
      }
    };
#if !defined(SELA_ISA_generic)
    const int32_t span = high - low + taps;
    if (span <= kLanes) {
      each_line([&](const float* from) {
        const Floats inputs = load(from);
        Floats total = look_up(inputs, index) * load(weight);
        for (int32_t k = 1; k < taps; ++k)
          total = fma(look_up(inputs, add(index, k)), load(weight + k * x.stride), total);
        return total;
      });
      continue;
    }
    if (span <= 2 * kLanes) {
      each_line([&](const float* from) {
        const Floats inputs = load(from), more = load(from + kLanes);
        Floats total = look_up(inputs, more, index) * load(weight);
        for (int32_t k = 1; k < taps; ++k)
          total = fma(look_up(inputs, more, add(index, k)), load(weight + k * x.stride), total);
        return total;
      });
      continue;
    }
#else
    (void)high;
#endif
    each_line([&](const float* from) {
      Floats total = gather(from, index) * load(weight);
      for (int32_t k = 1; k < taps; ++k) total = fma(gather(from + k, index), load(weight + k * x.stride), total);
      return total;
    });
  }
}

void resample_lines(const Axis& x, int32_t size, int lines, const float* in, int64_t in_stride, float* out,
                    int64_t out_stride) {
  switch (x.taps) {  // unrolled up to halving
    case 2:
      return resample_lines<2>(x, size, lines, in, in_stride, out, out_stride);
    case 3:
      return resample_lines<3>(x, size, lines, in, in_stride, out, out_stride);
    case 4:
      return resample_lines<4>(x, size, lines, in, in_stride, out, out_stride);
    case 5:
      return resample_lines<5>(x, size, lines, in, in_stride, out, out_stride);
    default:
      return resample_lines<0>(x, size, lines, in, in_stride, out, out_stride);
  }
}

}  // namespace
}  // namespace sela::SELA_ISA
