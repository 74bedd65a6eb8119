// Kernels of the fused augmentation of images of any size (see sela/augment_device.h for what they compute,
// cpu/augment_loops.cpp for the same on a CPU): resampling by tiles of the output, then the colours that need the mean
// of all tiles. What may follow is in augment_effects_kernels.cuh.
//
// Bytes, operations and floor, per image of 224 x 224 RGB from a box of 300 x 300, float16 out:
//   bytes       270 kB in + 301 kB out: 0.19 us on an H100 at 3.0 TB/s. With a contrast, 602 kB of floats are
//               written and read again between two launches; rounds are so small that they stay in the cache.
//   operations  read off the disassembly for sm_90, the paper's set with every operation on, 280 instructions per
//               output pixel: rows 84 (55 per row and 12 bytes), columns 38 (40 per input and four rows), weights 31,
//               gray, brightness, contrast, saturation 17, hue 40, luma and stage 17, barriers and branches 25,
//               loads, normalisation, output 28. In all 440,000 of a warp: 0.49 us at 132 x 4 x 1.7e9 per second
//   floor       0.49 us: issue of instructions binds, by 2.6 over memory; of images that are only cropped and mirrored
//               (275,000 of a warp) 0.31 us, by 1.6
//   shared      25 kB of mixed rows, and the weights of 16 rows: 5 kB (14 kB of planes)
//
// Who does what. A block takes one tile of one image: 16 rows of the output by as many columns (224; fewer of sources
// so wide that the inputs under them would not fit), one thread per column.
//
//   weights    one thread per row of the tile (and component); columns' weights are made as they are used
//   then, for four rows of the output at a time:
//   vertical   a thread mixes 12 bytes of the rows under one output row: loads of 4 bytes, whatever they mean. What
//              comes of it, separated into channels, lies in shared memory: mixed[channel][row][column].
//                  thread: 4 rows of a group of 12 bytes side by side, groups along the block
//   horizontal a thread owns a column: its weight is made once for four rows of all channels
//   colours    gray, the operations before the contrast, the luma's sum, then into the stage; or, of an image without
//              contrast and effects, everything up to the output
//   A second launch (colour_kernel) adds up the tiles' sums in their order, and does contrast, the operations after it,
//   gray, normalisation, output: 8 pixels per thread, 16-byte loads and stores.
//
// The mean without atomic functions on floats: two launches, not a cluster of blocks. A cluster of 8 blocks would hold
// an image in its shared memory (602 kB), save the way through the cache and need a Hopper; that way costs 13 of 280
// instructions per pixel, and 1.2 MB of the cache's bandwidth per image, 0.2 us.
//
// Sources whose tiles do not fit (reduced more than 32 times, say) go pixel by pixel: correct, and slow.
#pragma once
#include <stdint.h>

#include "cuda/augment_large.cuh"
#include "cuda/augment_pixels.cuh"
#include "cuda/gpu.cuh"

namespace sela {
namespace augment_cuda {

constexpr int kTileRows = 16;        // output rows of a tile: what is made once per tile costs little
constexpr int kPitch = 520;          // columns of a mixed row; 8 modulo 32: four rows lie in different banks
constexpr int kSpan = 504;           // inputs under the columns of a tile, at most: kPitch less what a group may pass
constexpr int kTaps = 64;            // inputs under an output row, at most
constexpr int kWeights = kTaps + 4;  // samples of a component, which may be more than its pixels
constexpr int kGroup = 12;           // bytes that a thread mixes: four pixels, or twelve samples
constexpr int kColourPixels = 8;     // pixels of a thread of colour_kernel

/// Where pixels come from: RGB, one channel, planes resampled from their own resolution, or at full resolution.
enum Source { kRgb = 0, kOne = 1, kPlanes = 2, kExact = 3 };

template <int kSource>
constexpr int kChannelsOf = kSource == kOne ? 1 : 3;
/// Components with rows and weights of their own.
template <int kSource>
constexpr int kComponents = kSource == kPlanes ? 3 : 1;

/// Blocks that a multiprocessor shall run at a time: what registers without a spill allow.
template <int kSource>
constexpr int kTileBlocks = kSource == kPlanes ? 2
                            : kSource == kRgb  ? 4
                                               : 3;

/// Inputs under one output row, numbered from the top of the image or component.
struct RowTap {
  int32_t start, count;
};

/// Rows of bytes: those of an image, or of a component.
struct Bytes {
  const uint8_t* data;  ///< row 0, byte 0; perhaps outside of what is there
  int64_t stride;
  const uint8_t* begin;  ///< the first byte that may be read
  const uint8_t* end;    ///< behind the last one
};

/// sum[j] = sum over k < count of weight[k] * at[k * stride + j], j < kGroup; a byte that may not be read counts as 0.
__device__ __forceinline__ void mix_group(const Bytes& bytes, const uint8_t* at, int32_t count, const float* weight,
                                          float (&sum)[kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) sum[j] = 0.0f;
  const uint8_t* last = at + (count - 1) * bytes.stride;
  if (at - bytes.begin >= 3 && bytes.end - last >= kGroup + 4) {
#pragma unroll 1
    for (int32_t k = 0; k < count; ++k, at += bytes.stride) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(at);
      const uint32_t* words = reinterpret_cast<const uint32_t*>(at - (address & 3u));
      const uint32_t shift = static_cast<uint32_t>(address & 3u) * 8u;
      const float w = weight[k];
      uint32_t low = words[0];
#pragma unroll
      for (int q = 0; q < kGroup / 4; ++q) {
        const uint32_t high = words[q + 1];
        const uint32_t four = static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> shift);
        low = high;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[4 * q + j] = fmaf(static_cast<float>((four >> (8 * j)) & 255u), w, sum[4 * q + j]);
      }
    }
    return;
  }
#pragma unroll 1
  for (int32_t k = 0; k < count; ++k, at += bytes.stride) {
    const float w = weight[k];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const bool there = at - bytes.begin >= -j && bytes.end - at > j;
      sum[j] = fmaf(there ? static_cast<float>(at[j]) : 0.0f, w, sum[j]);
    }
  }
}

// ---- Components of another resolution.

/// 0 .. 5 for steps of 1 .. 32.
__device__ __forceinline__ int32_t shift_of(int32_t step) {
  return step < 4 ? step >> 1 : step < 8 ? 2 : step < 16 ? 3 : step < 32 ? 4 : 5;
}

/// The sample beside `near` that an interpolated pixel takes a quarter of.
__device__ __forceinline__ int32_t beside(int32_t pixel, int32_t near, int32_t full) {
  const int32_t far = (pixel & 1) == 0 ? near - 1 : near + 1;
  return far < 0 ? 0 : far > full - 1 ? full - 1 : far;
}

/// A sample of a component, by its place in the whole of it.
__device__ __forceinline__ int32_t sample(const PlaneView& plane, int32_t y, int32_t x) {
  return plane.data[(y - plane.top) * plane.stride + (x - plane.left)];
}

/// Pixel (y, x) of a component, its samples upsampled and rounded as libjpeg does.
__device__ __forceinline__ int32_t exact_sample(const PlaneView& plane, int32_t y, int32_t x) {
  const int32_t row = y / plane.step_y, column = x / plane.step_x;
  if (!plane.smooth_y && !plane.smooth_x) return sample(plane, row, column);
  const int32_t other = plane.smooth_y ? beside(y, row, plane.full_height) : row;
  auto tall = [&](int32_t j) {
    return plane.smooth_y ? 3 * sample(plane, row, j) + sample(plane, other, j) : sample(plane, row, j);
  };
  if (!plane.smooth_x) return (tall(column) + ((y & 1) == 0 ? 1 : 2)) >> 2;
  const bool even = (x & 1) == 0;
  const int32_t sum = 3 * tall(column) + tall(beside(x, column, plane.full_width));
  return plane.smooth_y ? (sum + (even ? 8 : 7)) >> 4 : (sum + (even ? 1 : 2)) >> 2;
}

// libjpeg's factors in 16-bit fixed point.
constexpr int32_t kRedOfCr = static_cast<int32_t>(1.40200 * 65536 + 0.5);
constexpr int32_t kGreenOfCr = static_cast<int32_t>(0.71414 * 65536 + 0.5);
constexpr int32_t kGreenOfCb = static_cast<int32_t>(0.34414 * 65536 + 0.5);
constexpr int32_t kBlueOfCb = static_cast<int32_t>(1.77200 * 65536 + 0.5);

__device__ __forceinline__ float byte_range(int32_t v) {
  return static_cast<float>(v < 0 ? 0 : v > 255 ? 255 : v);
}

/// Pixel (y, x) as libjpeg makes it, whole numbers in 0..255.
__device__ __forceinline__ void exact_pixel(const PlanarImage& image, int32_t y, int32_t x, float (&value)[3]) {
  const int32_t first = exact_sample(image.plane[0], y, x);
  value[0] = value[1] = value[2] = static_cast<float>(first);
  if (image.count == 1) return;
  const int32_t second = exact_sample(image.plane[1], y, x), third = exact_sample(image.plane[2], y, x);
  if (image.rgb) {
    value[1] = static_cast<float>(second);
    value[2] = static_cast<float>(third);
    return;
  }
  const int32_t b = second - 128, r = third - 128, half = 32768;
  value[0] = byte_range(first + ((r * kRedOfCr + half) >> 16));
  value[1] = byte_range(first + ((half - b * kGreenOfCb - r * kGreenOfCr) >> 16));
  value[2] = byte_range(first + ((b * kBlueOfCb + half) >> 16));
}

/// Y, Cb, Cr of [0, 1] to RGB.
template <int kCount>
__device__ __forceinline__ void convert_colours(float (&v)[3][kCount]) {
  constexpr float kMiddle = 128.0f / 255.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float y = v[0][j], b = v[1][j] - kMiddle, r = v[2][j] - kMiddle;
    v[0][j] = __saturatef(fmaf(r, 1.402f, y));
    v[1][j] = __saturatef(fmaf(r, -0.71414f, fmaf(b, -0.34414f, y)));
    v[2][j] = __saturatef(fmaf(b, 1.772f, y));
  }
}

// ---- Weights.

/// One output of an axis: its inputs, and what its weights are multiplied by.
struct Output {
  float middle, gain;
  AxisSpan span;
};

/// The weights of output `i` add up to `sum`.
__device__ __forceinline__ Output make_output(const AxisScale& axis, int32_t i, float sum) {
  Output o;
  o.middle = axis_middle(axis, i);
  o.span = axis_span(axis, o.middle);
  float total = 0.0f;
#pragma unroll 1
  for (int32_t k = 0; k < o.span.count; ++k) total += axis_weight(axis, o.middle, o.span, k);
  o.gain = total > 0.0f ? sum / total : 0.0f;
  return o;
}

__device__ __forceinline__ AxisScale make_scale(int32_t length, int32_t resampled) {
  return axis_scale(length, resampled, static_cast<int32_t>(most_taps(length, resampled)));
}

/// Weights of an output row for the rows of pixels, which are numbered from the image's top, where the box is at `top`.
__device__ __forceinline__ RowTap row_weights(const AxisScale& axis, int32_t output, int32_t top, float* weight) {
  const Output o = make_output(axis, output, 1.0f);
#pragma unroll 1
  for (int32_t k = 0; k < o.span.count; ++k) weight[k] = axis_weight(axis, o.middle, o.span, k) * o.gain;
  return {top + o.span.start, o.span.count};
}

/// The same for the rows of a component: its upsampling is part of the weights.
__device__ __forceinline__ RowTap folded_weights(const AxisScale& axis, int32_t output, int32_t top,
                                                 const PlaneView& plane, float* weight) {
  const Output o = make_output(axis, output, 1.0f);
  const int32_t begin = top + o.span.start, shift = shift_of(plane.step_y), full = plane.full_height;
  int32_t low = begin >> shift;
  if (plane.smooth_y && (begin & 1) == 0 && low > 0) --low;
  int32_t high = low - 1;  // weights up to here are there
#pragma unroll 1
  for (int32_t k = 0; k < o.span.count; ++k) {
    const int32_t pixel = begin + k, near = pixel >> shift, far = plane.smooth_y ? beside(pixel, near, full) : near;
    const float w = axis_weight(axis, o.middle, o.span, k) * o.gain;
    const int32_t most = near > far ? near : far;
    while (high < most) weight[++high - low] = 0.0f;
    weight[near - low] += plane.smooth_y ? 0.75f * w : w;
    if (plane.smooth_y) weight[far - low] += 0.25f * w;
  }
  return {low, high - low + 1};
}

// ---- A tile.

/// Columns [first, last) of a component that pixels [begin, end) are made of.
__device__ __forceinline__ void component_columns(const PlaneView& plane, int32_t begin, int32_t end, int32_t* first,
                                                  int32_t* last) {
  sample_range(begin, end, plane.step_x, plane.smooth_x, plane.full_width, first, last);
}

__device__ __forceinline__ Bytes bytes_of(const PlaneView& plane) {
  return {plane.data, plane.stride, plane.data, plane.data + (plane.height - 1) * plane.stride + plane.width};
}

/// Rows y .. y + kRows of the output before their horizontal pass, into mixed[channel][row][kPitch].
/// low, high: pixels of the image in use, columns.
template <int kSource>
__device__ __forceinline__ void mix_rows(const LargePlan& image, const PlanarImage* planar, const RowTap* taps,
                                         const float* weights, int32_t line, int32_t rows, int32_t low, int32_t high,
                                         float* mixed) {
  const int t = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  if constexpr (kSource == kExact) {
    const int32_t tasks = kRows * (high - low);
    for (int32_t task = t; task < tasks; task += step) {
      const int32_t r = task % kRows, x = task / kRows;
      if (r >= rows) continue;
      const RowTap tap = taps[line + r];
      const float* weight = weights + (line + r) * kWeights;
      float sum[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll 1
      for (int32_t k = 0; k < tap.count; ++k) {
        float value[3];
        exact_pixel(*planar, tap.start + k, low + x, value);
#pragma unroll
        for (int c = 0; c < 3; ++c) sum[c] = fmaf(value[c], weight[k], sum[c]);
      }
#pragma unroll
      for (int c = 0; c < 3; ++c) mixed[(c * kRows + r) * kPitch + x] = sum[c];
    }
    return;
  }
  const int32_t components = kSource == kPlanes ? planar->count : 1;
#pragma unroll 1
  for (int32_t c = 0; c < components; ++c) {
    Bytes bytes;
    int32_t first = low, last = high, top = 0, left = 0;
    if constexpr (kSource == kPlanes) {
      const PlaneView& plane = planar->plane[c];
      bytes = bytes_of(plane);
      component_columns(plane, low, high, &first, &last);
      top = plane.top;
      left = plane.left;
    } else {
      const ImageView& view = image.view;
      const int64_t length = (view.height - 1) * view.row_stride + int64_t{kChannelsOf<kSource>} * view.width;
      bytes = {view.data, view.row_stride, view.data, view.data + length};
    }
    constexpr int kPixelBytes = kSource == kRgb ? 3 : 1, kWide = kGroup / kPixelBytes;
    const int32_t tasks = kRows * ((last - first + kWide - 1) / kWide);
#pragma unroll 1
    for (int32_t task = t; task < tasks; task += step) {
      const int32_t r = task % kRows, group = task / kRows;
      if (r >= rows) continue;
      const RowTap tap = taps[c * kTileRows + line + r];
      const uint8_t* at = bytes.data + (tap.start - top) * bytes.stride + (first - left) * kPixelBytes + group * kGroup;
      float sum[kGroup];
      mix_group(bytes, at, tap.count, weights + (c * kTileRows + line + r) * kWeights, sum);
      if constexpr (kSource == kRgb) {
#pragma unroll
        for (int v = 0; v < 3; ++v)
          *reinterpret_cast<float4*>(mixed + (v * kRows + r) * kPitch + 4 * group) =
              make_float4(sum[v], sum[v + 3], sum[v + 6], sum[v + 9]);
      } else {
#pragma unroll
        for (int v = 0; v < 3; ++v)
          *reinterpret_cast<float4*>(mixed + (c * kRows + r) * kPitch + kGroup * group + 4 * v) =
              make_float4(sum[4 * v], sum[4 * v + 1], sum[4 * v + 2], sum[4 * v + 3]);
      }
    }
  }
}

/// The horizontal pass: this thread's column of kRows rows, within [0, 1]. start: pixel of the output's first input.
template <int kSource>
__device__ __forceinline__ void mix_column(const PlanarImage* planar, const AxisScale& axis, const Output& o,
                                           int32_t start, int32_t low, int32_t high, const float* mixed,
                                           float (&v)[kChannelsOf<kSource>][kRows]) {
#pragma unroll
  for (int c = 0; c < kChannelsOf<kSource>; ++c)
#pragma unroll
    for (int j = 0; j < kRows; ++j) v[c][j] = 0.0f;
  if constexpr (kSource != kPlanes) {
    const float* from = mixed + (start - low);
#pragma unroll 1
    for (int32_t k = 0; k < o.span.count; ++k) {
      const float w = axis_weight(axis, o.middle, o.span, k) * o.gain;
#pragma unroll
      for (int c = 0; c < kChannelsOf<kSource>; ++c)
#pragma unroll
        for (int j = 0; j < kRows; ++j) v[c][j] = fmaf(from[(c * kRows + j) * kPitch + k], w, v[c][j]);
    }
  } else {
    int32_t first[3], shift[3];
    bool smooth[3];
    int32_t full[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const PlaneView& plane = planar->plane[c < planar->count ? c : 0];
      int32_t last;
      component_columns(plane, low, high, &first[c], &last);
      shift[c] = shift_of(plane.step_x);
      smooth[c] = plane.smooth_x;
      full[c] = plane.full_width;
    }
#pragma unroll 1
    for (int32_t k = 0; k < o.span.count; ++k) {
      const float w = axis_weight(axis, o.middle, o.span, k) * o.gain;
      const int32_t pixel = start + k;
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        if (c >= planar->count) continue;
        const int32_t near = pixel >> shift[c];
        const float* row = mixed + c * kRows * kPitch;
        if (smooth[c]) {
          const float most = 0.75f * w, rest = 0.25f * w;
          const int32_t far = beside(pixel, near, full[c]);
#pragma unroll
          for (int j = 0; j < kRows; ++j)
            v[c][j] =
                fmaf(row[j * kPitch + far - first[c]], rest, fmaf(row[j * kPitch + near - first[c]], most, v[c][j]));
        } else {
#pragma unroll
          for (int j = 0; j < kRows; ++j) v[c][j] = fmaf(row[j * kPitch + near - first[c]], w, v[c][j]);
        }
      }
    }
  }
}

/// What a pixel of the image is, of planes interpolated without rounding: for tiles that do not fit.
template <int kSource>
__device__ __forceinline__ void read_pixel(const LargePlan& image, const PlanarImage* planar, int32_t y, int32_t x,
                                           float (&value)[kChannelsOf<kSource>]) {
  if constexpr (kSource == kExact) {
    exact_pixel(*planar, y, x, value);
  } else if constexpr (kSource == kPlanes) {
#pragma unroll 1
    for (int32_t c = 0; c < planar->count; ++c) {
      const PlaneView& plane = planar->plane[c];
      const int32_t row = y / plane.step_y, column = x / plane.step_x;
      const int32_t other_row = plane.smooth_y ? beside(y, row, plane.full_height) : row;
      const int32_t other_column = plane.smooth_x ? beside(x, column, plane.full_width) : column;
      const int32_t near = 3 * sample(plane, row, column) + sample(plane, other_row, column);
      const int32_t far = 3 * sample(plane, row, other_column) + sample(plane, other_row, other_column);
      const float mean = static_cast<float>(3 * near + far) * (1.0f / 16.0f);
      if (c == 0) value[0] = mean;
      if (c == 1) value[1] = mean;
      if (c == 2) value[2] = mean;
    }
  } else {
    const uint8_t* pixel = image.view.data + y * image.view.row_stride + x * kChannelsOf<kSource>;
#pragma unroll
    for (int c = 0; c < kChannelsOf<kSource>; ++c) value[c] = static_cast<float>(pixel[c]);
  }
}

/// One output of a tile that does not fit, from all the inputs under it.
template <int kSource>
__device__ __forceinline__ void mix_box(const LargePlan& image, const PlanarImage* planar, const AxisScale& tall,
                                        const Output& rows, const AxisScale& wide, const Output& columns,
                                        float (&v)[kChannelsOf<kSource>]) {
  constexpr int kCount = kChannelsOf<kSource>;
#pragma unroll
  for (int c = 0; c < kCount; ++c) v[c] = 0.0f;
#pragma unroll 1
  for (int32_t y = 0; y < rows.span.count; ++y) {
    float part[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) part[c] = 0.0f;
#pragma unroll 1
    for (int32_t x = 0; x < columns.span.count; ++x) {
      float value[kCount] = {};
      read_pixel<kSource>(image, planar, image.plan.top + rows.span.start + y, image.plan.left + columns.span.start + x,
                          value);
      const float w = axis_weight(wide, columns.middle, columns.span, x) * columns.gain;
#pragma unroll
      for (int c = 0; c < kCount; ++c) part[c] = fmaf(value[c], w, part[c]);
    }
    const float w = axis_weight(tall, rows.middle, rows.span, y) * rows.gain;
#pragma unroll
    for (int c = 0; c < kCount; ++c) v[c] = fmaf(part[c], w, v[c]);
  }
}

/// Clamped where the contrast would be, the operations after it, gray: of an image without contrast.
template <int kChannels, int kCount>
__device__ __forceinline__ void finish_colours(const Plan& p, float offset, float (&v)[kChannels][kCount]) {
  if ((p.flags & kColour) != 0u) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[c][j] = __saturatef(fmaf(v[c][j], p.contrast, offset));
  }
  apply(p.operations >> 6, p, v);
  if ((p.flags & kGrayLast) != 0u) make_gray(v);
}

/// One tile of one image: block number = (image * row_tiles + row tile) * column_tiles + column tile.
template <int kSource>
__global__ void __launch_bounds__(kLargeThreads, kTileBlocks<kSource>) tile_kernel(const LargeArguments a) {
  constexpr int kChannels = kChannelsOf<kSource>, kParts = kComponents<kSource>;
  SELA_SHARED_ARRAY(float4, mixed_rows, kChannels * kRows * kPitch / 4);
  SELA_SHARED_ARRAY(float, weights, kParts * kTileRows * kWeights);
  SELA_SHARED_ARRAY(RowTap, taps, kParts * kTileRows);
  SELA_SHARED_ARRAY(float, sums, kLargeThreads / 32);
  float* mixed = reinterpret_cast<float*>(mixed_rows);

  const int t = static_cast<int>(threadIdx.x);
  const int32_t size = a.options.size, tiles = a.row_tiles * a.column_tiles;
  const int64_t number = blockIdx.x / static_cast<uint32_t>(tiles);
  const int32_t tile = static_cast<int32_t>(blockIdx.x % static_cast<uint32_t>(tiles));
  const int32_t top = tile / a.column_tiles * kTileRows, left = tile % a.column_tiles * a.columns;
  const int32_t bottom = top + kTileRows < size ? top + kTileRows : size;
  const int32_t columns = left + a.columns < size ? a.columns : size - left;
  const LargePlan& image = a.plans[number];
  const PlanarImage* planar = a.planes != nullptr ? a.planes + number : nullptr;
  const Plan p = image.plan;

  if (tile == 0 && (p.flags & kEffects) != 0u && a.tone != nullptr) {
    ToneFacts& facts = a.tone[number];
    for (int k = t; k < 3 * kCounts; k += static_cast<int>(blockDim.x)) (&facts.counts[0][0])[k] = 0u;
    if (t < 3) {
      facts.least[t] = 0x7F800000u;  // infinity
      facts.most[t] = 0u;
    }
  }

  // This thread's column, and the pixels under all columns of the tile.
  const bool there = p.image >= 0, mirrored = (p.flags & kFlip) != 0u;
  const AxisScale wide = make_scale(p.width, p.wide), tall = make_scale(p.height, p.tall);
  const int32_t own = t < columns ? t : columns - 1;
  auto output_column = [&](int32_t x) { return p.first_col + (mirrored ? size - 1 - left - x : left + x); };
  Output column = make_output(wide, output_column(own), 1.0f / 255.0f);
  if (!there) column.span.count = 0;
  const AxisSpan one = axis_span(wide, axis_middle(wide, output_column(mirrored ? columns - 1 : 0)));
  const AxisSpan other = axis_span(wide, axis_middle(wide, output_column(mirrored ? 0 : columns - 1)));
  const int32_t low = p.left + one.start, high = p.left + other.start + other.count;
  const bool fits = high - low <= kSpan && tall.taps <= kTaps;

  if (fits) {
    for (int k = t; k < kParts * kTileRows; k += static_cast<int>(blockDim.x)) {
      const int32_t row = top + k % kTileRows, part = k / kTileRows;
      if (row >= bottom) continue;
      if constexpr (kSource == kPlanes) {
        if (part < planar->count)
          taps[k] = folded_weights(tall, p.first_row + row, p.top, planar->plane[part], weights + k * kWeights);
      } else {
        taps[k] = row_weights(tall, p.first_row + row, p.top, weights + k * kWeights);
      }
    }
    __syncthreads();
  }

  float sum = 0.0f;
#pragma unroll 1
  for (int32_t y = top; y < bottom; y += kRows) {
    const int32_t rows = bottom - y < kRows ? bottom - y : kRows;
    float v[kChannels][kRows];
    if (fits) {
      if (there) mix_rows<kSource>(image, planar, taps, weights, y - top, rows, low, high, mixed);
      __syncthreads();
      mix_column<kSource>(planar, wide, column, p.left + column.span.start, low, high, mixed, v);
      __syncthreads();
    } else {
#pragma unroll 1
      for (int j = 0; j < rows; ++j) {
        const Output row = make_output(tall, p.first_row + y + j, 1.0f);
        float value[kChannels] = {};
        if (there && t < columns) mix_box<kSource>(image, planar, tall, row, wide, column, value);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) mixed[(c * kRows + j) * kPitch + t] = value[c];
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int j = 0; j < kRows; ++j) v[c][j] = j < rows ? mixed[(c * kRows + j) * kPitch + t] : 0.0f;
    }
    if constexpr (kSource == kPlanes) {
      if (planar->count == 1) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) v[1][j] = v[2][j] = v[0][j];
      } else if (!planar->rgb) {
        convert_colours(v);
      }
    }
    if ((p.flags & kGrayFirst) != 0u) make_gray(v);
    apply(p.operations & 63u, p, v);
    if ((p.flags & kStaged) == 0u) finish_colours(p, 0.0f, v);
    if (t >= columns) continue;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (j >= rows) continue;
      const int32_t at = (y + j) * size + left + t;
      if ((p.flags & kStaged) != 0u) {
        sum += brightness_of(v, j);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) a.stage[(number * kChannels + c) * a.plane + at] = v[c][j];
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          store_pixel(a, number, kChannels, c, at, fmaf(v[c][j], a.scale[c], a.shift[c] + absent(p)));
      }
    }
  }

  if ((p.flags & kContrast) != 0u) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kEveryLane, sum, lanes);
    if (t % 32 == 0) sums[t / 32] = sum;
    __syncthreads();
    if (t == 0) {
      float total = 0.0f;
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += sums[w];
      a.partial[number * tiles + tile] = total;
    }
  }
}

/// Counts for equalize and extremes for autocontrast, of the 8 pixels of this thread, `live` of which are there.
template <int kChannels>
__device__ __forceinline__ void tone_facts(const LargeArguments& a, Tone tone, int64_t number, int32_t live,
                                           uint32_t* counts, const float (&v)[kChannels][kColourPixels]) {
  ToneFacts& facts = a.tone[number];
  const int t = static_cast<int>(threadIdx.x);
  if (tone == Tone::equalize) {
    for (int k = t; k < kChannels * kCounts; k += kLargeThreads) counts[k] = 0u;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int j = 0; j < kColourPixels; ++j)
        if (j < live) atomicAdd(&counts[c * kCounts + static_cast<int>(v[c][j] * 255.999f)], 1u);
    __syncthreads();
    for (int k = t; k < kChannels * kCounts; k += kLargeThreads)
      if (counts[k] != 0u) atomicAdd(&facts.counts[k / kCounts][k % kCounts], counts[k]);
  } else if (tone == Tone::autocontrast) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float least = INFINITY, most = 0.0f;
#pragma unroll
      for (int j = 0; j < kColourPixels; ++j) {
        least = j < live ? fminf(least, v[c][j]) : least;
        most = j < live ? fmaxf(most, v[c][j]) : most;
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        least = fminf(least, __shfl_xor_sync(kEveryLane, least, lanes));
        most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, lanes));
      }
      if (t % 32 == 0) {
        atomicMin(&facts.least[c], word_of(least));
        atomicMax(&facts.most[c], word_of(most));
      }
    }
  }
}

/// Contrast and what comes after it, of kColourPixels pixels per thread: block number = image * blocks + part. Leaves
/// the image in the stage where effects follow.
template <int kChannels>
__global__ void __launch_bounds__(kLargeThreads, 3) colour_kernel(const LargeArguments a) {
  SELA_SHARED(float, mean);
  SELA_SHARED_ARRAY(uint32_t, counts, kChannels* kCounts);
  const int32_t size = a.options.size, pixels = size * size, tiles = a.row_tiles * a.column_tiles;
  const int32_t per_block = kLargeThreads * kColourPixels;
  const uint32_t blocks = static_cast<uint32_t>((pixels + per_block - 1) / per_block);
  const int64_t number = blockIdx.x / blocks;
  const LargePlan& image = a.plans[number];
  const Plan p = image.plan;
  if ((p.flags & kStaged) == 0u) return;
  const int t = static_cast<int>(threadIdx.x);
  if ((p.flags & kContrast) != 0u) {
    if (t < 32) {
      float total = 0.0f;
      for (int32_t k = t; k < tiles; k += 32) total += a.partial[number * tiles + k];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kEveryLane, total, lanes);
      if (t == 0) mean = total * a.inverse_pixels;
    }
    __syncthreads();
  }
  const float offset = (p.flags & kContrast) != 0u ? (1.0f - p.contrast) * mean : 0.0f;
  const int32_t at = static_cast<int32_t>(blockIdx.x % blocks) * per_block + t * kColourPixels;
  const int32_t live = pixels - at < kColourPixels ? pixels - at : kColourPixels;  // < 1: none
  float* stage = a.stage + number * kChannels * a.plane + at;
  float v[kChannels][kColourPixels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
#pragma unroll
    for (int k = 0; k < kColourPixels; k += 4) {
      const float4 four =
          live > 0 ? *reinterpret_cast<const float4*>(stage + c * a.plane + k) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      v[c][k] = four.x;
      v[c][k + 1] = four.y;
      v[c][k + 2] = four.z;
      v[c][k + 3] = four.w;
    }
  finish_colours(p, offset, v);
  if ((p.flags & kEffects) != 0u) {
    if (a.tone != nullptr) tone_facts<kChannels>(a, image.effects.tone, number, live, counts, v);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int k = 0; k < kColourPixels; k += 4)
        if (live > 0)
          *reinterpret_cast<float4*>(stage + c * a.plane + k) =
              make_float4(v[c][k], v[c][k + 1], v[c][k + 2], v[c][k + 3]);
    return;
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
#pragma unroll
    for (int j = 0; j < kColourPixels; ++j) v[c][j] = fmaf(v[c][j], a.scale[c], a.shift[c] + absent(p));
  const int64_t first = number * kChannels * pixels;
  if (a.aligned && live == kColourPixels) {
    if (a.last && kChannels == 3) {
      store_values<kChannels * kColourPixels>(a, first + int64_t{at} * kChannels,
                                              [&v](int e) { return v[e % kChannels][e / kChannels]; });
    } else {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        store_values<kColourPixels>(a, first + int64_t{c} * pixels + at, [&v, c](int e) { return v[c][e]; });
    }
  } else {
#pragma unroll
    for (int j = 0; j < kColourPixels; ++j)
      if (j < live) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) store_pixel(a, number, kChannels, c, at + j, v[c][j]);
      }
  }
}

}  // namespace augment_cuda
}  // namespace sela
