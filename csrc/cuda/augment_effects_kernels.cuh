// Kernels of what may follow the colour operations of images of any size: tone, blur, noise, gradients, as
// cpu/augment_effects.h has them, on the floats in [0, 1] that colour_kernel has left in the stage.
//
// Each is a launch of its own, of which blocks of images without the effect end at once. An image has two buffers, the
// stage and the spare; a step reads one of them and writes the other:
//
//   tone_kernel   equalize and autocontrast by what colour_kernel counted; sharpness from 3 x 3 pixels
//   blur_kernel   the vertical pass of the blur
//   last_kernel   the horizontal pass, noise, then normalisation and output; or the gray version for the gradients
//   sobel_kernel  two gradients of that
//
// Bytes per image of 224 x 224 RGB: 1.2 MB per step through the second-level cache, 301 kB out. Operations per pixel
// and channel: 8 for each distance of either pass of the blur, up to 11 of them, and 60 for noise; the blur binds. Who
// does what: threads own pixels, along the rows; of last_kernel the four pixels of one counter of the noise.
#pragma once
#include <stdint.h>

#include "cuda/augment_large.cuh"
#include "cuda/gpu.cuh"
#include "sela/effects.h"

namespace sela {
namespace augment_cuda {

constexpr int kStepPixels = 2048;    // of a block
constexpr float kFlatRange = 1e-4f;  // ranges below it are one flat colour (cpu/augment_effects.h)

__device__ __forceinline__ uint32_t blocks_per_image(const LargeArguments& a) {
  return static_cast<uint32_t>((a.options.size * a.options.size + kStepPixels - 1) / kStepPixels);
}

/// Where the image is before the blur, and after it.
__device__ __forceinline__ bool in_spare_before_blur(const AugmentEffects& e) {
  return e.tone != Tone::none;
}
__device__ __forceinline__ bool in_spare_after_blur(const AugmentEffects& e) {
  return (e.tone != Tone::none) != (e.blur > 0.0f);
}
__device__ __forceinline__ float* buffer_of(const LargeArguments& a, bool spare, int64_t number) {
  return (spare ? a.spare : a.stage) + number * a.channels * a.plane;
}

/// i, or its mirror image at the border, which is not repeated; -size < i < 2 size - 1.
__device__ __forceinline__ int32_t reflected(int32_t i, int32_t size) {
  return i < 0 ? -i : i < size ? i : 2 * size - 2 - i;
}

__device__ __forceinline__ float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

__global__ void __launch_bounds__(kLargeThreads) tone_kernel(const LargeArguments a) {
  SELA_SHARED_ARRAY(float, table, kCounts);
  SELA_SHARED_ARRAY(uint32_t, below, kCounts);
  SELA_SHARED(uint32_t, highest);
  const uint32_t blocks = blocks_per_image(a);
  const int64_t number = blockIdx.x / blocks;
  const AugmentEffects e = a.plans[number].effects;
  if (e.tone == Tone::none) return;
  const int t = static_cast<int>(threadIdx.x);
  const int32_t size = a.options.size, pixels = size * size;
  const int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * kStepPixels;
  const int32_t end = first + kStepPixels < pixels ? first + kStepPixels : pixels;
#pragma unroll 1
  for (int32_t c = 0; c < a.channels; ++c) {
    const float* from = buffer_of(a, false, number) + c * a.plane;
    float* to = buffer_of(a, true, number) + c * a.plane;
    if (e.tone == Tone::equalize) {
      const uint32_t own = a.tone[number].counts[c][t];
      below[t] = own;
      __syncthreads();
#pragma unroll 1
      for (int distance = 1; distance < kCounts; distance *= 2) {
        const uint32_t more = t >= distance ? below[t - distance] : 0u;
        __syncthreads();
        below[t] += more;
        __syncthreads();
      }
      // The highest level in use is not counted: it is the one whose share brings the sum to all pixels.
      const uint32_t all = static_cast<uint32_t>(pixels);
      if (below[t] == all && own != 0u) highest = own;
      __syncthreads();
      const uint32_t step = (all - highest) / 255u;
      const uint32_t level = step == 0u ? static_cast<uint32_t>(t) : (step / 2u + below[t] - own) / step;
      table[t] = static_cast<float>(level > 255u ? 255u : level) * (1.0f / 255.0f);
      __syncthreads();
      for (int32_t at = first + t; at < end; at += kLargeThreads) to[at] = table[static_cast<int>(from[at] * 255.999f)];
    } else if (e.tone == Tone::autocontrast) {
      const float least = float_of(a.tone[number].least[c]), most = float_of(a.tone[number].most[c]);
      const bool flat = !(most - least > kFlatRange);
      const float scale = flat ? 1.0f : 1.0f / (most - least), shift = flat ? 0.0f : least;
      for (int32_t at = first + t; at < end; at += kLargeThreads) {
        const float v = (from[at] - shift) * scale;
        to[at] = flat ? v : __saturatef(v);
      }
    } else {
      for (int32_t at = first + t; at < end; at += kLargeThreads) {
        const int32_t y = at / size, x = at % size;
        const float v = from[at];
        if (y == 0 || x == 0 || y == size - 1 || x == size - 1) {
          to[at] = __saturatef(v);
          continue;
        }
        const float* up = from + at - size;
        const float* down = from + at + size;
        float total = up[-1] + up[0] + up[1];
        total = total + from[at - 1] + from[at + 1];
        total = total + down[-1] + down[0] + down[1];
        to[at] = __saturatef(fmaf(fmaf(v, 5.0f, total) * (1.0f / 13.0f) - v, 1.0f - e.sharpness, v));
      }
    }
  }
}

/// Weights of distances 0 .. reach into shared memory, a Gaussian that sums to one; weights below 1e-7 of the middle
/// one are left out. Returns the longest distance that is not. All threads of the block, between barriers.
__device__ __forceinline__ int32_t blur_weights(const LargeArguments& a, float sigma, float* weight) {
  SELA_SHARED_ARRAY(float, scale, 1);
  const int t = static_cast<int>(threadIdx.x);
  const float inverse = 1.0f / sigma;
  // exp(-x^2 / 2) = 1e-7 at x = 5.678.
  const float most = 5.6778424f * sigma;
  const int32_t bound = most < static_cast<float>(a.reach) ? static_cast<int32_t>(most) : a.reach;
  for (int32_t k = t; k <= bound; k += kLargeThreads) {
    const float x = static_cast<float>(k) * inverse;
    weight[k] = portable_exp(-0.5f * x * x);
  }
  __syncthreads();
  if (t == 0) {
    float total = weight[0];
    for (int32_t k = 1; k <= bound; ++k) total += 2.0f * weight[k];
    scale[0] = 1.0f / total;
  }
  __syncthreads();
  const float gain = scale[0];
  for (int32_t k = t; k <= bound; k += kLargeThreads) weight[k] *= gain;
  __syncthreads();
  return bound;
}

__global__ void __launch_bounds__(kLargeThreads) blur_kernel(const LargeArguments a) {
  SELA_DYNAMIC_SHARED(float, weight);
  const uint32_t blocks = blocks_per_image(a);
  const int64_t number = blockIdx.x / blocks;
  const AugmentEffects e = a.plans[number].effects;
  if (!(e.blur > 0.0f)) return;
  const int32_t reach = blur_weights(a, e.blur, weight);
  const int32_t size = a.options.size, pixels = size * size;
  const int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * kStepPixels;
  const int32_t end = first + kStepPixels < pixels ? first + kStepPixels : pixels;
#pragma unroll 1
  for (int32_t c = 0; c < a.channels; ++c) {
    const float* from = buffer_of(a, in_spare_before_blur(e), number) + c * a.plane;
    float* to = buffer_of(a, in_spare_after_blur(e), number) + c * a.plane;
#pragma unroll 1
    for (int32_t at = first + static_cast<int32_t>(threadIdx.x); at < end; at += kLargeThreads) {
      const int32_t y = at / size;
      float total = from[at] * weight[0];
      if (y >= reach && y < size - reach) {
        int32_t up = at, down = at;
#pragma unroll 4
        for (int32_t k = 1; k <= reach; ++k) {
          up -= size;
          down += size;
          total = fmaf(from[up] + from[down], weight[k], total);
        }
      } else {
        const int32_t x = at - y * size;
#pragma unroll 1
        for (int32_t k = 1; k <= reach; ++k) {
          const float sum = from[reflected(y - k, size) * size + x] + from[reflected(y + k, size) * size + x];
          total = fmaf(sum, weight[k], total);
        }
      }
      to[at] = total;
    }
  }
}

/// v + sigma * z, clamped, of pixels 64 b + 16 j + l of channel c, where counter = 16 b + l (see Note [Noise]).
__device__ __forceinline__ void add_noise(const AugmentEffects& e, uint32_t counter, uint32_t c, float (&v)[4]) {
  const PhiloxWords words = philox_pixel(counter, c, e.noise_key[0], e.noise_key[1]);
  float normal[4];
  normal_pair(words.word[0], words.word[1], &normal[0], &normal[1]);
  normal_pair(words.word[2], words.word[3], &normal[2], &normal[3]);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = __saturatef(v[j] + e.noise * normal[j]);
}

__global__ void __launch_bounds__(kLargeThreads) last_kernel(const LargeArguments a) {
  SELA_DYNAMIC_SHARED(float, weight);
  const uint32_t blocks = blocks_per_image(a);
  const int64_t number = blockIdx.x / blocks;
  const LargePlan& image = a.plans[number];
  if ((image.plan.flags & kEffects) == 0u) return;
  const AugmentEffects e = image.effects;
  const int32_t reach = e.blur > 0.0f ? blur_weights(a, e.blur, weight) : 0;
  const int32_t size = a.options.size, pixels = size * size;
  const int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * (kStepPixels / 4);
  const bool spare = in_spare_after_blur(e);
  const float* from = buffer_of(a, spare, number);
  float* gray_plane = buffer_of(a, !spare, number);
  const float third = 1.0f / static_cast<float>(a.channels), missing = absent(image.plan);
#pragma unroll 1
  for (int32_t n = first + static_cast<int32_t>(threadIdx.x); n < first + kStepPixels / 4; n += kLargeThreads) {
    const int32_t begin = n / 16 * 64 + n % 16;
    if (begin >= pixels) continue;
    float gray[4] = {};
    float shift = 0.0f;
    for (int32_t c = 0; c < a.channels; ++c) shift += a.shift[c] * third;
#pragma unroll
    for (int j = 0; j < 4; ++j) gray[j] = shift + missing;
#pragma unroll 1
    for (int32_t c = 0; c < a.channels; ++c, from += a.plane) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t at = begin + 16 * j;
        v[j] = 0.0f;
        if (at >= pixels) continue;
        v[j] = from[at];
        if (reach == 0) continue;
        const int32_t x = at % size;
        const float* row = from + (at - x);
        float total = v[j] * weight[0];
#pragma unroll 1
        for (int32_t k = 1; k <= reach; ++k)
          total = fmaf(row[reflected(x - k, size)] + row[reflected(x + k, size)], weight[k], total);
        v[j] = total;
      }
      if (e.noise > 0.0f) add_noise(e, static_cast<uint32_t>(n), static_cast<uint32_t>(c), v);
      const float scale = a.scale[c];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t at = begin + 16 * j;
        gray[j] = fmaf(v[j], scale * third, gray[j]);
        if (at < pixels && !a.effect_options.sobel)
          store_pixel(a, number, a.channels, c, at, fmaf(v[j], scale, a.shift[c] + missing));
      }
    }
    from -= a.channels * int64_t{a.plane};
    if (a.effect_options.sobel) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (begin + 16 * j < pixels) gray_plane[begin + 16 * j] = gray[j];
    }
  }
}

__global__ void __launch_bounds__(kLargeThreads) sobel_kernel(const LargeArguments a) {
  const uint32_t blocks = blocks_per_image(a);
  const int64_t number = blockIdx.x / blocks;
  const int32_t size = a.options.size, pixels = size * size;
  const int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * kStepPixels;
  const int32_t end = first + kStepPixels < pixels ? first + kStepPixels : pixels;
  const float* gray = buffer_of(a, !in_spare_after_blur(a.plans[number].effects), number);
#pragma unroll 1
  for (int32_t at = first + static_cast<int32_t>(threadIdx.x); at < end; at += kLargeThreads) {
    const int32_t y = at / size, x = at % size;
    auto pixel = [&](int32_t dy, int32_t dx) {
      const bool inside = y + dy >= 0 && y + dy < size && x + dx >= 0 && x + dx < size;
      return inside ? gray[at + dy * size + dx] : 0.0f;
    };
    const float up_left = pixel(-1, -1), up_right = pixel(-1, 1), down_left = pixel(1, -1), down_right = pixel(1, 1);
    const float left = up_left + fmaf(pixel(0, -1), 2.0f, down_left);
    const float right = up_right + fmaf(pixel(0, 1), 2.0f, down_right);
    const float above = up_left + fmaf(pixel(-1, 0), 2.0f, up_right);
    const float under = down_left + fmaf(pixel(1, 0), 2.0f, down_right);
    store_pixel(a, number, 2, 0, at, left - right);
    store_pixel(a, number, 2, 1, at, above - under);
  }
}

}  // namespace augment_cuda
}  // namespace sela
