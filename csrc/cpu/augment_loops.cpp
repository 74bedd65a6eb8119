// One image: crop, antialiased bilinear resampling, flip, colour operations, effects, normalisation.
//
// Fused so that the image is read once and the output written once; what lies between stays in one worker's scratch:
//   augment_axis.h      weights per output column and row; the horizontal pass
//   augment_resample.h  both passes over the rows of an image with interleaved channels ...
//   augment_planes.h    ... or of the planes of a JPEG file
//   augment_colour.h    gray and jitter; without anything behind them they normalise and store as well
//   augment_effects.h   tone, blur, noise, gradients
#include "cpu/augment_loops.h"

#include <type_traits>

#include "cpu/augment_colour.h"
#include "cpu/augment_effects.h"
#include "cpu/augment_planes.h"
#include "cpu/augment_resample.h"

namespace sela::SELA_ISA {
namespace {

using namespace pixels;

/// plane[0 .. pixels) to 16-bit numbers.  plane has room for kLanes more.
void convert(const float* plane, int64_t pixels, PixelType type, uint16_t* out) {
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const Floats v = load(plane + i);
    uint16_t tail[kLanes];
    uint16_t* to = pixels - i >= kLanes ? out + i : tail;
    if (type == PixelType::float16) {
      store_half(to, v);
    } else {
      store_bfloat16(to, v);
    }
    if (to == tail) std::memcpy(out + i, tail, static_cast<size_t>(pixels - i) * sizeof(uint16_t));
  }
}

/// plane[0 .. pixels), within [0, 1], to bytes, rounded to nearest.
void convert(const float* plane, int64_t pixels, uint8_t* out) {
  for (int64_t i = 0; i < pixels; ++i) {
    const float v = plane[i] < 0.0f ? 0.0f : plane[i] > 1.0f ? 1.0f : plane[i];
    const float rounded = v * 255.0f + 8388608.0f;  // 2^23: the number now stands in the lowest bits
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    out[i] = static_cast<uint8_t>(bits);
  }
}

template <typename T>
void interleave(const T* const* planes, int32_t count, int64_t pixels, T* out) {
  if (count == 3) {
    for (int64_t i = 0; i < pixels; ++i) {
      out[3 * i] = planes[0][i];
      out[3 * i + 1] = planes[1][i];
      out[3 * i + 2] = planes[2][i];
    }
    return;
  }
  for (int64_t i = 0; i < pixels; ++i)
    for (int32_t c = 0; c < count; ++c) out[count * i + c] = planes[c][i];
}

/// Pixels converted or interleaved at a time, from a small buffer.
constexpr int64_t kChunk = 512;

/// Planes to numbers of another type: change(plane, pixels, out).
template <typename T, class Change>
void write_changed(const float* const* planes, int32_t count, bool interleaved, int64_t pixels, T* out, Change change) {
  if (!interleaved) {
    for (int32_t c = 0; c < count; ++c) change(planes[c], pixels, out + c * pixels);
    return;
  }
  T chunk[3][kChunk];
  const T* const parts[3] = {chunk[0], chunk[1], chunk[2]};
  for (int64_t i = 0; i < pixels; i += kChunk) {
    const int64_t n = pixels - i < kChunk ? pixels - i : kChunk;
    for (int32_t c = 0; c < count; ++c) change(planes[c] + i, n, chunk[c]);
    interleave(parts, count, n, out + count * i);
  }
}

/// Finished planes to the output's type and memory order.
void write_output(const AugmentJob& job, const float* const* planes, int32_t count, int64_t pixels) {
  const bool interleaved = job.channels_last && count > 1;
  if (job.type == PixelType::float32) {
    if (interleaved) {
      interleave(planes, count, pixels, static_cast<float*>(job.out));
    } else {
      for (int32_t c = 0; c < count; ++c)
        std::memcpy(static_cast<float*>(job.out) + c * pixels, planes[c], static_cast<size_t>(pixels) * sizeof(float));
    }
  } else if (job.type == PixelType::uint8) {
    write_changed(planes, count, interleaved, pixels, static_cast<uint8_t*>(job.out),
                  [](const float* plane, int64_t n, uint8_t* out) { convert(plane, n, out); });
  } else {
    write_changed(planes, count, interleaved, pixels, static_cast<uint16_t*>(job.out),
                  [&job](const float* plane, int64_t n, uint16_t* out) { convert(plane, n, job.type, out); });
  }
}

/// What the normalisation of channel c is: v * scale[c] + shift[c].
struct Normalisation {
  float scale[3], shift[3];
};

/// The gray version of the normalised image, weights 1/3 each as DeepCluster's first filter has them, into to.
void normalised_gray(const Image& image, const Normalisation& n, float* to) {
  const int64_t pixels = int64_t{image.size} * image.size;
  const float third = 1.0f / static_cast<float>(image.channels);
  Floats scale[3];
  float shift = 0.0f;
  for (int32_t c = 0; c < image.channels; ++c) {
    scale[c] = splat(n.scale[c] * third);
    shift += n.shift[c] * third;
  }
  for (int64_t i = 0; i < pixels; i += kLanes) {
    Floats total = splat(shift);
    for (int32_t c = 0; c < image.channels; ++c)
      total = fma(load(image.plane[c < image.distinct ? c : 0] + i), scale[c], total);
    store(to + i, total);
  }
}

/// Outputs of at least so many bytes are written past the caches: the next image would push them out before anybody
/// reads them, and a store through the cache reads what it is going to overwrite.
constexpr int64_t kStreamBytes = int64_t{1} << 18;

/// Whether planes of `pixels` numbers from out on are written past the caches.
bool streams(const float* out, int32_t count, int64_t pixels) {
  const int64_t bytes = pixels * static_cast<int64_t>(sizeof(float));
  return reinterpret_cast<uintptr_t>(out) % kStreamAlignment == 0 &&
         static_cast<uintptr_t>(bytes) % kStreamAlignment == 0 && count * bytes >= kStreamBytes;
}

/// Everything behind the colour operations, which have left the image in [0, 1].
void finish(const AugmentJob& job, const Buffers& b, const Normalisation& n, Image* image) {
  const int64_t pixels = int64_t{image->size} * image->size;
  apply_effects(job, b, image);
  float** const plane = image->plane;
  if (job.effect_options->sobel) {
    normalised_gray(*image, n, image->spare);
    sobel(image->spare, image->size, b.line, b.line_stride, plane[0], plane[1]);
    return write_output(job, plane, 2, pixels);
  }
  if (job.type == PixelType::uint8) {
    const float* const shown[3] = {plane[0], plane[image->distinct > 1 ? 1 : 0], plane[image->distinct > 1 ? 2 : 0]};
    return write_output(job, shown, job.channels, pixels);
  }
  if (job.type == PixelType::float32 && !(job.channels_last && job.channels == 3)) {
    float* const out = static_cast<float*>(job.out);
    const bool streamed = streams(out, job.channels, pixels);
    for (int32_t c = 0; c < job.channels; ++c)
      normalise(plane[c < image->distinct ? c : 0], pixels, n.scale[c], n.shift[c], out + c * pixels, streamed);
    if (streamed) finish_streams();
    return;
  }
  for (int32_t c = job.channels - 1; c >= 0; --c)
    normalise(plane[c < image->distinct ? c : 0], pixels, n.scale[c], n.shift[c], plane[c], false);
  write_output(job, plane, job.channels, pixels);
}

}  // namespace

void augment_image(const AugmentJob& job) {
  const AugmentOptions& options = *job.options;
  const AugmentParameters& p = *job.parameters;
  const bool center = options.crop == Crop::center;
  const int32_t height = center ? job.image.height : p.height, width = center ? job.image.width : p.width;
  const int32_t rows = resampled_length(options, p.height), columns = resampled_length(options, p.width);
  const int32_t top = center ? 0 : p.top, left = center ? 0 : p.left;
  Buffers b;
  lay_out(job, &b);
  make_axis(&b.x, width, columns, center ? p.left : 0, options.size, p.flip != 0, 1.0f / 255.0f,
            static_cast<int32_t>(most_taps(width, columns)));
  make_axis(&b.y, height, rows, center ? p.top : 0, options.size, false, 1.0f,
            static_cast<int32_t>(most_taps(height, rows)));
  if (job.planes != nullptr) {
    resample_planes(job, b, top, left);
  } else if (job.channels == 3) {
    resample_image<3>(job, b, top, left);
  } else {
    resample_image<1>(job, b, top, left);
  }

  const int64_t pixels = int64_t{options.size} * options.size;
  float* const plane[3] = {b.plane, b.plane + b.plane_stride, b.plane + 2 * b.plane_stride};
  Normalisation n;
  for (int c = 0; c < 3; ++c) {
    n.scale[c] = 1.0f / options.std[c];
    n.shift[c] = -options.mean[c] / options.std[c];
  }
  const bool effects = has_effects(job);
  const bool direct = job.type == PixelType::float32 && !(job.channels_last && job.channels == 3);
  float* out[3];
  for (int c = 0; c < job.channels; ++c)
    out[c] = direct && !effects ? static_cast<float*>(job.out) + c * pixels : plane[c];

  const bool streamed = direct && !effects && streams(out[0], job.channels, pixels);

  // A gray plane of a file, shown as three channels: they are equal from the start.
  const bool expanded = job.channels == 3 && job.planes != nullptr && job.planes->count == 1;
  const bool gray_now = job.channels == 3 && p.gray && options.gray_first;
  if (gray_now || (expanded && p.gray && !p.jitter)) {
    const float* const from[3] = {plane[0], plane[expanded ? 0 : 1], plane[expanded ? 0 : 2]};
    for (int64_t i = 0; i < pixels; i += kLanes)
      store(plane[0] + i, luma(load(from[0] + i), load(from[1] + i), load(from[2] + i)));
  }
  const bool single = job.channels == 1 || gray_now || expanded;
  if (single) {
    if (p.jitter) {
      colour_gray(p, job.channels == 3 ? kLumaSum : 1.0f, job.channels == 3, plane[0], pixels);
      if (expanded && p.gray && !gray_now)
        for (int64_t i = 0; i < pixels; i += kLanes) store(plane[0] + i, load(plane[0] + i) * splat(kLumaSum));
    }
  } else if (p.jitter || p.gray) {
    Factors f = {};
    f.stream = streamed;
    for (int c = 0; c < 3; ++c) {
      f.scale[c] = effects ? 1.0f : n.scale[c];
      f.shift[c] = effects ? 0.0f : n.shift[c];
    }
    colour_rgb(p, p.gray != 0, &f, {plane[0], plane[1], plane[2], pixels}, out);
  }
  if (effects) {
    Image image = {{plane[0], plane[1], plane[2]}, b.spare, job.channels, single || p.gray ? 1 : 3, options.size};
    return finish(job, b, n, &image);
  }
  if (single || !(p.jitter || p.gray)) {
    for (int c = job.channels - 1; c >= 0; --c)
      normalise(plane[single ? 0 : c], pixels, n.scale[c], n.shift[c], out[c], streamed);
  }
  if (streamed) finish_streams();
  if (!direct) write_output(job, out, job.channels, pixels);
}

}  // namespace sela::SELA_ISA
