// What the kernels of the augmentation share: the plan of an image, colour operations on pixels in registers, and
// stores. Arithmetic is that of the AVX2 and AVX-512 loops (cpu/augment_colour.h), multiply-add for multiply-add; only
// the hue's reciprocal is the hardware's (1 unit in the last place). float to [0, 1] costs nothing: it is a modifier of
// the multiply-add.
#pragma once
#include <math.h>
#include <stdint.h>

#include "cuda/gpu.cuh"
#include "sela/augment.h"
#include "sela/colour.h"
#include "sela/resample.h"

namespace sela {
namespace augment_cuda {

constexpr int kRows = 4;  // output rows that a thread resamples and colours together
constexpr unsigned kEveryLane = 0xFFFFFFFFu;

/// What is to be done with one image.
struct alignas(16) Plan {
  int64_t image;                 ///< < 0: there is no such image, and the output is NaN
  int32_t top, left;             ///< of the box that is read
  int32_t height, width;         ///< of that box
  int32_t tall, wide;            ///< what the box is resampled to
  int32_t first_row, first_col;  ///< of the output, within tall x wide
  uint32_t flags;                ///< kFlip ...
  uint32_t operations;           ///< 6 bits each: before the contrast, after it
  float brightness, contrast, saturation;
  float hue;  ///< in sixths of a turn
};

constexpr uint32_t kFlip = 1;        // mirrored
constexpr uint32_t kGrayFirst = 2;   // luma before the colour operations
constexpr uint32_t kGrayLast = 4;    // luma after them
constexpr uint32_t kContrast = 8;    // the mean of the luma is needed
constexpr uint32_t kColour = 16;     // values are clamped to [0, 1] where the contrast would be
constexpr uint32_t kEnlarges = 32;   // neither side shrinks: two inputs per axis
constexpr uint32_t kRowsFirst = 64;  // rows are mixed before columns

/// Turns parameters of an image of height x width into a plan. colour_image: three channels; image: < 0 where there is
/// none.
__device__ __forceinline__ Plan make_plan(const AugmentOptions& options, bool colour_image, int32_t height,
                                          int32_t width, const AugmentParameters& p, int64_t image) {
  const bool center = options.crop == Crop::center;
  Plan plan;
  plan.image = image;
  plan.top = center ? 0 : p.top;
  plan.left = center ? 0 : p.left;
  plan.height = center ? height : p.height;
  plan.width = center ? width : p.width;
  plan.tall = resampled_length(options, p.height);
  plan.wide = resampled_length(options, p.width);
  plan.first_row = center ? p.top : 0;
  plan.first_col = center ? p.left : 0;
  const bool gray = colour_image && p.gray != 0, gray_first = gray && options.gray_first;
  const ColourPlan colour = colour_plan(p, colour_image, colour_image && !gray_first);
  plan.operations = colour.before | (colour.after << 6);
  plan.flags = (p.flip != 0 ? kFlip : 0u) | (gray_first ? kGrayFirst : 0u) | (gray && !gray_first ? kGrayLast : 0u);
  const bool clamps = colour_image && !gray_first && (p.jitter != 0 || gray);
  plan.flags |= (colour.contrast ? kContrast : 0u) | (colour.contrast || clamps ? kColour : 0u);
  if (plan.height <= plan.tall && plan.width <= plan.wide) {
    plan.flags |= kEnlarges;
  } else {
    const int32_t taps = static_cast<int32_t>(most_taps(plan.height, plan.tall));
    const AxisScale axis = axis_scale(plan.height, plan.tall, taps);
    const AxisSpan first = axis_span(axis, axis_middle(axis, plan.first_row));
    const AxisSpan last = axis_span(axis, axis_middle(axis, plan.first_row + options.size - 1));
    if (last.start + last.count - first.start > options.size + 2) plan.flags |= kRowsFirst;
  }
  plan.brightness = p.brightness;
  plan.contrast = colour.contrast ? p.contrast : 1.0f;
  plan.saturation = p.saturation;
  plan.hue = 6.0f * p.hue;
  return plan;
}

/// 1 / x; infinity for 0.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// ---- 16 bytes of output.

__device__ __forceinline__ uint32_t word_of(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  return word;
}
__device__ __forceinline__ uint32_t words_of(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ __forceinline__ uint32_t words_of(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ __forceinline__ void store_one(float* to, float x) {
  *to = x;
}
__device__ __forceinline__ void store_one(__half* to, float x) {
  *to = __float2half_rn(x);
}
__device__ __forceinline__ void store_one(__nv_bfloat16* to, float x) {
  *to = __float2bfloat16_rn(x);
}

template <class T>
constexpr int kPixels = 16 / static_cast<int>(sizeof(T));  ///< values of 16 bytes

/// 16 bytes at `to` from element(0), element(1), ...
template <class T, class Element>
__device__ __forceinline__ void store_16(T* to, Element element) {
  uint4 words;
  if constexpr (sizeof(T) == 4) {
    words = make_uint4(word_of(element(0)), word_of(element(1)), word_of(element(2)), word_of(element(3)));
  } else {
    words = make_uint4(words_of(T(), element(0), element(1)), words_of(T(), element(2), element(3)),
                       words_of(T(), element(4), element(5)), words_of(T(), element(6), element(7)));
  }
#if defined(__CUDA_ARCH__)  // written out: the compiler splits some of these stores into four
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = words;
#endif
}

// ---- Colour.

__device__ __forceinline__ float luma(float r, float g, float b) {
  return fmaf(b, kLumaBlue, fmaf(g, kLumaGreen, r * kLumaRed));
}

/// Luma of pixel j.
template <int kChannels, int kCount>
__device__ __forceinline__ float brightness_of(const float (&v)[kChannels][kCount], int j) {
  if constexpr (kChannels == 3) {
    return luma(v[0][j], v[1][j], v[2][j]);
  } else {
    return v[0][j];
  }
}

/// RGB -> hue in sixths -> turned -> RGB: every channel is low + range * ramp(hue). Where the range is 0 the hue is not
/// a number, of which __saturatef makes a ramp of 0.
__device__ __forceinline__ void turn_hue(float turn, float& r, float& g, float& b) {
  const float high = fmaxf(fmaxf(r, g), b), low = fminf(fminf(r, g), b), range = high - low;
  const float inverse = reciprocal(range);
  float hue = high == g ? fmaf(b - r, inverse, 2.0f) : fmaf(r - g, inverse, 4.0f);
  hue = (high == r ? (g - b) * inverse : hue) + turn;
  hue = fmaf(floorf(hue * (1.0f / 6.0f)), -6.0f, hue);
  r = fmaf(range, __saturatef(fabsf(hue - 3.0f) - 1.0f), low);
  g = fmaf(range, __saturatef(2.0f - fabsf(hue - 2.0f)), low);
  b = fmaf(range, __saturatef(2.0f - fabsf(hue - 4.0f)), low);
}

/// The operations of `code`, 2 bits each, on kCount pixels.
template <int kChannels, int kCount>
__device__ __forceinline__ void apply(uint32_t code, const Plan& p, float (&v)[kChannels][kCount]) {
  for (; code != 0; code >>= 2) {
    const uint32_t op = code & 3u;
    if (op == kBrightness) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[c][j] = __saturatef(v[c][j] * p.brightness);
    } else if constexpr (kChannels == 3) {
      if (op == kSaturation) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float gray = luma(v[0][j], v[1][j], v[2][j]) * (1.0f - p.saturation);
#pragma unroll
          for (int c = 0; c < 3; ++c) v[c][j] = __saturatef(fmaf(v[c][j], p.saturation, gray));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) turn_hue(p.hue, v[0][j], v[1][j], v[2][j]);
      }
    }
  }
}

template <int kChannels, int kCount>
__device__ __forceinline__ void make_gray(float (&v)[kChannels][kCount]) {
  if constexpr (kChannels == 3) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[0][j] = v[1][j] = v[2][j] = luma(v[0][j], v[1][j], v[2][j]);
  }
}

}  // namespace augment_cuda
}  // namespace sela
