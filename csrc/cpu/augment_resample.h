#pragma once
// Resampling an image in two passes: rows are mixed and rows are resampled horizontally.
//
// Enlarging: every input row horizontally, then rows are mixed; reducing: rows are mixed first, so that the horizontal
// pass runs once per output row.  Where rows come from is a source's business: it mixes `count` of its rows, from
// number `first` on, into one row of floats per channel.
#include "cpu/augment_axis.h"
#include "sela/planes.h"

namespace sela::SELA_ISA {
namespace {

using namespace pixels;

/// planes[c][x] = sum over k of weight[k] * rows[k][first + x][c] for kLanes pixels at a time, x < width.
/// Loads may pass the row's end, up to `end`, the end of the image; what they find there meets weights of zero.
template <int Channels>
void mix_input_rows(const uint8_t* source, int64_t stride, const uint8_t* end, int32_t width, const float* weight,
                    int64_t weight_stride, int32_t count, float* row, int64_t row_stride) {
  constexpr int kBytes = Channels * kLanes;
  for (int32_t x = 0; x < width; x += kLanes) {
    Floats total[Channels];
    for (int c = 0; c < Channels; ++c) total[c] = splat(0.0f);
    for (int32_t k = 0; k < count; ++k) {
      const uint8_t* from = source + k * stride + static_cast<int64_t>(x) * Channels;
      uint8_t tail[kBytes];
      if (end - from < kBytes) {
        std::memset(tail, 0, kBytes);
        std::memcpy(tail, from, static_cast<size_t>(end - from));
        from = tail;
      }
      const Floats w = splat(weight[k * weight_stride]);
      if constexpr (Channels == 3) {
        Floats red, green, blue;
        load_rgb(from, &red, &green, &blue);
        total[0] = fma(red, w, total[0]);
        total[1] = fma(green, w, total[1]);
        total[2] = fma(blue, w, total[2]);
      } else {
        total[0] = fma(load_gray(from), w, total[0]);
      }
    }
    for (int c = 0; c < Channels; ++c) store(row + c * row_stride + x, total[c]);
  }
}

inline Floats load_any(const uint8_t* p) {
  return load_gray(p);
}
inline Floats load_any(const float* p) {
  return load(p);
}

/// row[x] = sum over k of weight[k] * source[k * stride + x], kLanes numbers at a time; plus what is in row, if asked
/// for.  Nothing from `end` on is read.
template <bool kAdd, class T>
void mix_plane(const T* source, int64_t stride, const T* end, int32_t width, const float* weight, int64_t weight_stride,
               int32_t count, float* row) {
  constexpr int kTogether = 4;  // vectors whose sums grow side by side
  int32_t x = 0;
  if (count > 0) {
    const T* last = source + (count - 1) * stride;
    for (; x + kTogether * kLanes <= width && end - last >= x + kTogether * kLanes; x += kTogether * kLanes) {
      Floats total[kTogether];
      for (int j = 0; j < kTogether; ++j) total[j] = kAdd ? load(row + x + j * kLanes) : splat(0.0f);
      const T* from = source + x;
      for (int32_t k = 0; k < count; ++k, from += stride) {
        const Floats w = splat(weight[k * weight_stride]);
        for (int j = 0; j < kTogether; ++j) total[j] = fma(load_any(from + j * kLanes), w, total[j]);
      }
      for (int j = 0; j < kTogether; ++j) store(row + x + j * kLanes, total[j]);
    }
  }
  for (; x < width; x += kLanes) {
    Floats total = kAdd ? load(row + x) : splat(0.0f);
    for (int32_t k = 0; k < count; ++k) {
      const T* from = source + k * stride + x;
      T tail[kLanes];
      if (end - from < kLanes) {
        std::memset(tail, 0, sizeof(tail));
        std::memcpy(tail, from, static_cast<size_t>(end - from) * sizeof(T));
        from = tail;
      }
      total = fma(load_any(from), splat(weight[k * weight_stride]), total);
    }
    store(row + x, total);
  }
}

/// Rows of an image with interleaved channels.
template <int kChannels>
struct InterleavedRows {
  const uint8_t* corner;  ///< row 0, first column in use
  int64_t stride;
  const uint8_t* end;  ///< of the image's memory
  int32_t width;
  void mix(int32_t first, const float* weight, int64_t weight_stride, int32_t count, float* row, int64_t row_stride) {
    mix_input_rows<kChannels>(corner + first * stride, stride, end, width, weight, weight_stride, count, row,
                              row_stride);
  }
};

/// Rows of one plane.
struct PlaneRows {
  const uint8_t* corner;
  int64_t stride;
  const uint8_t* end;
  int32_t width;
  void mix(int32_t first, const float* weight, int64_t weight_stride, int32_t count, float* row, int64_t) {
    mix_plane<false>(corner + first * stride, stride, end, width, weight, weight_stride, count, row);
  }
};

/// to[j] = sum over k < kCount of weight[k * weight_stride] * from[k * stride + j], j < size, and up to a vector more.
template <int kCount>
void mix_lines(const float* from, int64_t stride, const float* weight, int64_t weight_stride, int32_t size, float* to) {
  Floats w[kCount];
  for (int k = 0; k < kCount; ++k) w[k] = splat(weight[k * weight_stride]);
  for (int32_t j = 0; j < size; j += kLanes) {
    Floats total = load(from + j) * w[0];
    for (int k = 1; k < kCount; ++k) total = fma(load(from + k * stride + j), w[k], total);
    store(to + j, total);
  }
}

void mix_lines(const float* from, int64_t stride, const float* weight, int64_t weight_stride, int32_t count,
               int32_t size, float* to) {
  switch (count) {  // all that enlarging needs, folded weights included
    case 1:
      return mix_lines<1>(from, stride, weight, weight_stride, size, to);
    case 2:
      return mix_lines<2>(from, stride, weight, weight_stride, size, to);
    case 3:
      return mix_lines<3>(from, stride, weight, weight_stride, size, to);
    default:
      break;
  }
  for (int32_t j = 0; j < size; j += kLanes) {
    Floats total = load(from + j) * splat(weight[0]);
    for (int32_t k = 1; k < count; ++k)
      total = fma(load(from + k * stride + j), splat(weight[k * weight_stride]), total);
    store(to + j, total);
  }
}

/// Resamples an image, a few rows of the output at a time.
template <int kChannels, class Rows>
struct Resampler {
  Rows rows;
  const Axis& x;
  const Axis& y;
  int32_t size;
  float* row;  ///< [kBlockRows, kChannels, row_stride] to work with, shared with others
  int64_t row_stride;
  float* middle;  ///< [size + 2, kChannels, middle_stride], its own
  int64_t middle_stride;

  bool enlarges() const { return y.last - y.first <= size + 2; }

  /// Before the first call of make.
  void prepare() {
    if (!enlarges()) return;
    const float one = 1.0f;
    const int32_t height = y.last - y.first;
    for (int32_t begin = 0; begin < height; begin += kBlockRows) {
      const int32_t count = height - begin < kBlockRows ? height - begin : kBlockRows;
      for (int32_t k = 0; k < count; ++k)
        rows.mix(y.first + begin + k, &one, 0, 1, row + k * kChannels * row_stride, row_stride);
      resample_lines(x, size, count * kChannels, row, row_stride, middle + begin * kChannels * middle_stride,
                     middle_stride);
    }
  }

  /// plane[c * plane_stride + i * size + j] for output rows i in [begin, begin + count), count <= kBlockRows; what lies
  /// within a vector behind them may change. To be called from top to bottom.
  void make(int32_t begin, int32_t count, float* plane, int64_t plane_stride) {
    if (!enlarges()) {
      for (int32_t k = 0; k < count; ++k) {
        const int32_t i = begin + k;
        rows.mix(y.start[i], y.weight + i, y.stride, y.count[i], row + k * kChannels * row_stride, row_stride);
      }
      for (int c = 0; c < kChannels; ++c)
        resample_lines(x, size, count, row + c * row_stride, kChannels * row_stride,
                       plane + c * plane_stride + int64_t{begin} * size, size);
      return;
    }
    const int64_t middle_row = kChannels * middle_stride;
    for (int32_t i = begin; i < begin + count; ++i) {
      const float* from = middle + (y.start[i] - y.first) * middle_row;
      const float* weight = y.weight + i;
      for (int c = 0; c < kChannels; ++c, from += middle_stride)
        mix_lines(from, middle_row, weight, y.stride, y.count[i], size, plane + c * plane_stride + int64_t{i} * size);
    }
  }
};

/// The whole output of one source, into b.plane.
template <int kChannels, class Rows>
void resample_rows(const Rows& rows, int32_t size, const Buffers& b) {
  Resampler<kChannels, Rows> resampler = {rows, b.x, b.y, size, b.row, b.row_stride, b.middle, b.middle_stride};
  resampler.prepare();
  for (int32_t begin = 0; begin < size; begin += kBlockRows)
    resampler.make(begin, size - begin < kBlockRows ? size - begin : kBlockRows, b.plane, b.plane_stride);
}

/// The image with interleaved channels.
template <int kChannels>
void resample_image(const AugmentJob& job, const Buffers& b, int32_t top, int32_t left) {
  const ImageView& image = job.image;
  const int64_t stride = image.row_stride;
  const InterleavedRows<kChannels> rows = {image.data + top * stride + int64_t{kChannels} * (left + b.x.first), stride,
                                           image.data + (image.height - 1) * stride + int64_t{kChannels} * image.width,
                                           b.x.last - b.x.first};
  resample_rows<kChannels>(rows, job.options->size, b);
}

}  // namespace
}  // namespace sela::SELA_ISA
