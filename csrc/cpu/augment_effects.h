#pragma once
// What may follow the colour operations, on planes of floats in [0, 1]: tone, blur, noise, gradients.
//
// A plane is [size, size], contiguous, with room for two vectors behind it. Operations that look at neighbours write a
// second plane, row by row: what passes the end of a row is overwritten by the next one.
#include "cpu/augment_colour.h"
#include "sela/effects.h"

namespace sela::SELA_ISA {
namespace {

using namespace pixels;

// ---------------------------------------------------------------- blur

/// Weights of distances 0 .. radius, as torchvision's: a Gaussian at whole pixels that sums to one over the kernel.
/// Returns the largest distance that matters: those below 1e-7 of the middle one are left out.
int32_t blur_weights(float sigma, int32_t radius, float* weight) {
  double total = 0.0;
  int32_t reach = 0;
  for (int32_t k = 0; k <= radius; ++k) {
    const double x = k / static_cast<double>(sigma), w = std::exp(-0.5 * x * x);
    if (k > 0 && w < 1e-7) break;
    weight[k] = static_cast<float>(w);
    total += k == 0 ? w : 2.0 * w;
    reach = k;
  }
  for (int32_t k = 0; k <= reach; ++k) weight[k] = static_cast<float>(weight[k] / total);
  return reach;
}

/// Separable convolution with reflected borders (the border itself is not repeated); radius < size.
/// line: [size + 2 radius] floats and two vectors.
void blur(const float* from, int32_t size, const float* weight, int32_t radius, float* line, float* to) {
  constexpr int kTogether = 2;  // vectors whose sums grow side by side
  float* const middle = line + radius;
  for (int32_t y = 0; y < size; ++y) {
    const float* row = from + int64_t{y} * size;
    int32_t x = 0;
    auto mix_rows = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      Floats total[kVectors];
      for (int j = 0; j < kVectors; ++j) total[j] = load(row + x + j * kLanes) * splat(weight[0]);
      for (int32_t k = 1; k <= radius; ++k) {
        const int32_t above = y - k < 0 ? k - y : y - k, below = y + k < size ? y + k : 2 * size - 2 - y - k;
        const float* up = from + int64_t{above} * size + x;
        const float* down = from + int64_t{below} * size + x;
        const Floats w = splat(weight[k]);
        for (int j = 0; j < kVectors; ++j) total[j] = fma(load(up + j * kLanes) + load(down + j * kLanes), w, total[j]);
      }
      for (int j = 0; j < kVectors; ++j) store(middle + x + j * kLanes, total[j]);
      x += kVectors * kLanes;
    };
    while (x + kTogether * kLanes <= size) mix_rows(std::integral_constant<int, kTogether>{});
    while (x < size) mix_rows(std::integral_constant<int, 1>{});
    for (int32_t k = 1; k <= radius; ++k) {
      middle[-k] = middle[k];
      middle[size - 1 + k] = middle[size - 1 - k];
    }
    float* out = to + int64_t{y} * size;
    x = 0;
    auto mix_columns = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      Floats total[kVectors];
      for (int j = 0; j < kVectors; ++j) total[j] = load(middle + x + j * kLanes) * splat(weight[0]);
      for (int32_t k = 1; k <= radius; ++k) {
        const Floats w = splat(weight[k]);
        for (int j = 0; j < kVectors; ++j)
          total[j] = fma(load(middle + x + j * kLanes - k) + load(middle + x + j * kLanes + k), w, total[j]);
      }
      for (int j = 0; j < kVectors; ++j) store(out + x + j * kLanes, total[j]);
      x += kVectors * kLanes;
    };
    while (x + kTogether * kLanes <= size) mix_columns(std::integral_constant<int, kTogether>{});
    while (x < size) mix_columns(std::integral_constant<int, 1>{});
  }
}

// ---------------------------------------------------------------- tone

/// Bytes as torchvision rounds them before it counts.
inline int32_t tone_bin(float v) {
  return static_cast<int32_t>(v * 255.999f);
}

/// Histogram equalisation over 256 levels, in place (Pillow's ImageOps.equalize).
void equalize(float* plane, int64_t pixels) {
  int32_t parts[4][256] = {};  // neighbours are often alike: four counters do not wait for each other
  for (int64_t i = 0; i < pixels; ++i) ++parts[i & 3][tone_bin(plane[i])];
  int64_t counts[256];
  int32_t highest = 0;
  for (int32_t v = 0; v < 256; ++v) {
    counts[v] = int64_t{parts[0][v]} + parts[1][v] + parts[2][v] + parts[3][v];
    if (counts[v] > 0) highest = v;
  }
  const int64_t step = (pixels - counts[highest]) / 255;
  float table[256];
  int64_t below = step / 2;
  for (int32_t v = 0; v < 256; ++v) {
    const int64_t level = step == 0 ? v : below / step;
    table[v] = static_cast<float>(level > 255 ? 255 : level) * (1.0f / 255.0f);
    below += counts[v];
  }
  for (int64_t i = 0; i < pixels; ++i) plane[i] = table[tone_bin(plane[i])];
}

/// Ranges below this are taken for one flat colour: what rounding leaves must not be stretched to the whole range.
constexpr float kFlat = 1e-4f;

/// Stretched so that the darkest pixel is 0 and the brightest 1, in place.
void autocontrast(float* plane, int64_t pixels) {
  Floats low = splat(plane[0]), high = low;
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) {
    low = min(low, load(plane + i));
    high = max(high, load(plane + i));
  }
  float lows[kLanes], highs[kLanes];
  store(lows, low);
  store(highs, high);
  float least = lows[0], most = highs[0];
  for (int k = 1; k < kLanes; ++k) {
    least = lows[k] < least ? lows[k] : least;
    most = highs[k] > most ? highs[k] : most;
  }
  for (; i < pixels; ++i) {
    least = plane[i] < least ? plane[i] : least;
    most = plane[i] > most ? plane[i] : most;
  }
  if (!(most - least > kFlat)) return;
  const Floats scale = splat(1.0f / (most - least)), shift = splat(least);
  for (i = 0; i < pixels; i += kLanes) store(plane + i, clamp((load(plane + i) - shift) * scale));
}

/// v + (1 - factor) * (mean - v), where the mean of 3 x 3 pixels counts the middle one five times; the border keeps its
/// pixels, and so do images of 2 x 2 pixels.
void sharpen(const float* from, int32_t size, float factor, float* to) {
  const int64_t n = size;
  auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from[i] < 0.0f ? 0.0f : from[i] > 1.0f ? 1.0f : from[i];
  };
  copy(0, n < 3 ? n * n : n);
  if (n < 3) return;
  const Floats share = splat(1.0f - factor), five = splat(5.0f), part = splat(1.0f / 13.0f);
  for (int64_t y = 1; y < n - 1; ++y) {
    for (int64_t x = 1; x < n - 1; x += kLanes) {
      const float* at = from + y * n + x;
      const Floats v = load(at);
      Floats total = load(at - n - 1) + load(at - n) + load(at - n + 1);
      total = total + load(at - 1) + load(at + 1);
      total = total + load(at + n - 1) + load(at + n) + load(at + n + 1);
      store(to + y * n + x, clamp(fma(fma(v, five, total) * part - v, share, v)));
    }
    copy(y * n, y * n + 1);
    copy(y * n + n - 1, y * n + n);
  }
  copy((n - 1) * n, n * n);
}

// ---------------------------------------------------------------- noise

/// Counters that are drawn side by side (see Note [Noise]).
constexpr int kNoiseLanes = 16;

/// v + sigma * z, clamped, in place.
void add_noise(float* plane, int64_t pixels, uint32_t channel, float sigma, const uint32_t key[2]) {
  for (int64_t begin = 0; begin < pixels; begin += 4 * kNoiseLanes) {
    const uint32_t first = static_cast<uint32_t>(begin / 4);
    float normal[4 * kNoiseLanes];
    for (int l = 0; l < kNoiseLanes; ++l) {
      const PhiloxWords words = philox_pixel(first + static_cast<uint32_t>(l), channel, key[0], key[1]);
      normal_pair(words.word[0], words.word[1], normal + l, normal + kNoiseLanes + l);
      normal_pair(words.word[2], words.word[3], normal + 2 * kNoiseLanes + l, normal + 3 * kNoiseLanes + l);
    }
    const int64_t count = pixels - begin < 4 * kNoiseLanes ? pixels - begin : 4 * kNoiseLanes;
    for (int64_t i = 0; i < count; ++i) {
      const float v = plane[begin + i] + sigma * normal[i];
      plane[begin + i] = v < 0.0f ? 0.0f : v > 1.0f ? 1.0f : v;
    }
  }
}

// ---------------------------------------------------------------- gradients

/// Sobel's two filters over gray with a border of zeros: along[y][x] falls from left to right, across from top to
/// bottom.  line: [3, stride] floats, stride >= size + 2 and two vectors.
void sobel(const float* gray, int32_t size, float* line, int64_t stride, float* along, float* across) {
  auto fill = [&](int32_t y) {  // row y with its margin; rows outside are zeros
    float* to = line + (y + 3) % 3 * stride;
    to[0] = to[size + 1] = 0.0f;
    if (y < 0 || y >= size) {
      std::memset(to + 1, 0, static_cast<size_t>(size) * sizeof(float));
    } else {
      std::memcpy(to + 1, gray + int64_t{y} * size, static_cast<size_t>(size) * sizeof(float));
    }
  };
  fill(-1);
  fill(0);
  const Floats two = splat(2.0f);
  for (int32_t y = 0; y < size; ++y) {
    fill(y + 1);
    const float* up = line + (y + 2) % 3 * stride;
    const float* here = line + y % 3 * stride;
    const float* down = line + (y + 1) % 3 * stride;
    for (int32_t x = 0; x < size; x += kLanes) {
      const Floats left = load(up + x) + fma(load(here + x), two, load(down + x));
      const Floats right = load(up + x + 2) + fma(load(here + x + 2), two, load(down + x + 2));
      const Floats above = load(up + x) + fma(load(up + x + 1), two, load(up + x + 2));
      const Floats under = load(down + x) + fma(load(down + x + 1), two, load(down + x + 2));
      store(along + int64_t{y} * size + x, left - right);
      store(across + int64_t{y} * size + x, above - under);
    }
  }
}

// ---------------------------------------------------------------- in order

/// Planes of one image: the first `distinct` (1 or all) hold it, the others are not filled yet.
struct Image {
  float* plane[3];
  float* spare;
  int32_t channels, distinct;
  int32_t size;
};

/// Tone, blur and noise, in that order.
void apply_effects(const AugmentJob& job, const Buffers& b, Image* image) {
  const AugmentEffects& e = job.effects;
  const int64_t pixels = int64_t{image->size} * image->size;
  auto through_spare = [&](int32_t c, auto operation) {
    operation(image->plane[c], image->spare);
    float* const old = image->plane[c];
    image->plane[c] = image->spare;
    image->spare = old;
  };
  for (int32_t c = 0; c < image->distinct; ++c) {
    if (e.tone == Tone::equalize) equalize(image->plane[c], pixels);
    if (e.tone == Tone::autocontrast) autocontrast(image->plane[c], pixels);
    if (e.tone == Tone::sharpness)
      through_spare(c, [&](const float* from, float* to) { sharpen(from, image->size, e.sharpness, to); });
    if (e.blur > 0.0f) {
      float* weight = b.line + b.line_stride;  // the second line: [padded size] floats are enough for a radius < size
      const int32_t radius = blur_weights(e.blur, job.effect_options->blur_radius, weight);
      if (radius > 0)
        through_spare(c, [&](const float* from, float* to) { blur(from, image->size, weight, radius, b.line, to); });
    }
  }
  if (e.noise > 0.0f) {
    for (; image->distinct < image->channels; ++image->distinct)
      std::memcpy(image->plane[image->distinct], image->plane[0], static_cast<size_t>(pixels) * sizeof(float));
    for (int32_t c = 0; c < image->channels; ++c)
      add_noise(image->plane[c], pixels, static_cast<uint32_t>(c), e.noise, e.noise_key);
  }
}

}  // namespace
}  // namespace sela::SELA_ISA
