// What the kernels for images of any size have in common: their arguments, the plan of an image, the first launch,
// which makes the plans, and how an output is written.
#pragma once
#include <stdint.h>

#include "cuda/augment_pixels.cuh"
#include "cuda/gpu.cuh"
#include "sela/augment_device.h"

namespace sela {
namespace augment_cuda {

constexpr int kPlanThreads = 128;
constexpr int kLargeThreads = 256;  // of all other launches: at most, of tile_kernel, which has one per column
constexpr int kCounts = 256;        // levels that equalize counts

constexpr uint32_t kStaged = 128;   // left in the stage, to be finished by a later launch
constexpr uint32_t kEffects = 256;  // and left there once more, for the effects

/// All of one image.
struct alignas(16) LargePlan {
  Plan plan;
  ImageView view;  ///< of images with interleaved channels
  AugmentEffects effects;
};

/// What equalize and autocontrast have to know of an image; the extremes as the bits of floats >= 0.
struct ToneFacts {
  uint32_t counts[3][kCounts];
  uint32_t least[3], most[3];
};

/// What the kernels are given. Pointers are device memory; null: absent. Those of a round start at its first image.
struct LargeArguments {
  AugmentOptions options;
  EffectOptions effect_options;
  ResidentImages resident;
  const ImageView* crops;
  const PlanarImage* planes;
  const int64_t* index;
  int32_t channels;
  bool exact;
  int64_t count;
  uint64_t seed;
  uint32_t epoch, view;
  const AugmentParameters* given;
  const AugmentEffects* given_effects;
  AugmentParameters* drawn;
  LargePlan* plans;
  float* stage;     // [images, channels, plane]: the image in [0, 1]
  float* spare;     // the same again
  float* partial;   // [images, row_tiles * column_tiles]: sums of the luma
  ToneFacts* tone;  // [images]
  int32_t plane;    // floats from one channel to the next, a multiple of 8
  int32_t columns;  // of the output per tile
  int32_t row_tiles, column_tiles;
  int32_t reach;  // longest blur, pixels
  void* out;      // of the first image of the round
  PixelType type;
  bool last;     // channels last
  bool aligned;  // every image (plane, without channels last) of the output starts at a multiple of 16 bytes
  float inverse_pixels;
  float scale[3], shift[3];
};

/// The plan of every image, one thread each: draws parameters and effects where they are not given.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const LargeArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x;
  if (i >= a.count) return;
  const int64_t id = a.index != nullptr ? a.index[i] : i;
  LargePlan plan;
  bool there = true;
  if (a.planes != nullptr) {
    plan.view = {nullptr, a.planes[i].height, a.planes[i].width, 0};
  } else if (a.crops != nullptr) {
    plan.view = a.crops[i];
  } else {
    const ResidentImages& all = a.resident;
    const int64_t row = int64_t{all.channels} * all.width;
    there = id >= 0 && id < all.count;
    plan.view = {there ? all.data + id * all.height * row : all.data, all.height, all.width, row};
  }
  AugmentParameters p;
  if (a.given != nullptr) {
    p = a.given[i];
  } else {
    p = sample_parameters(a.options, plan.view.height, plan.view.width, a.seed, a.epoch, static_cast<uint64_t>(id),
                          a.view);
    if (a.drawn != nullptr) a.drawn[i] = p;
  }
  plan.effects = a.given_effects != nullptr
                     ? a.given_effects[i]
                     : sample_effects(a.effect_options, a.seed, a.epoch, static_cast<uint64_t>(id), a.view);
  plan.plan = make_plan(a.options, a.channels == 3, plan.view.height, plan.view.width, p, there ? 0 : -1);
  const AugmentEffects& e = plan.effects;
  const bool effects = e.blur > 0.0f || e.tone != Tone::none || e.noise > 0.0f || a.effect_options.sobel;
  if (effects) plan.plan.flags |= kEffects | kStaged;
  if ((plan.plan.flags & kContrast) != 0u) plan.plan.flags |= kStaged;
  a.plans[i] = plan;
}

/// One value of any type.
__device__ __forceinline__ void store_typed(const LargeArguments& a, int64_t at, float x) {
  if (a.type == PixelType::float32) {
    static_cast<float*>(a.out)[at] = x;
  } else if (a.type == PixelType::float16) {
    static_cast<__half*>(a.out)[at] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(a.out)[at] = __float2bfloat16_rn(x);
  }
}

/// kCount values, a multiple of 8, from `at` on, where they start at a multiple of 16 bytes.
template <int kCount, class Element>
__device__ __forceinline__ void store_values(const LargeArguments& a, int64_t at, Element element) {
  if (a.type == PixelType::float32) {
#pragma unroll
    for (int s = 0; s < kCount; s += 4)
      store_16(static_cast<float*>(a.out) + at + s, [&](int e) { return element(s + e); });
  } else if (a.type == PixelType::float16) {
#pragma unroll
    for (int s = 0; s < kCount; s += 8)
      store_16(static_cast<__half*>(a.out) + at + s, [&](int e) { return element(s + e); });
  } else {
#pragma unroll
    for (int s = 0; s < kCount; s += 8)
      store_16(static_cast<__nv_bfloat16*>(a.out) + at + s, [&](int e) { return element(s + e); });
  }
}

/// Channel c of pixel `at` of image i of the round, normalised, into the output.
__device__ __forceinline__ void store_pixel(const LargeArguments& a, int64_t image, int32_t channels, int32_t c,
                                            int32_t at, float x) {
  const int32_t pixels = a.options.size * a.options.size;
  store_typed(a, image * channels * pixels + (a.last ? int64_t{at} * channels + c : int64_t{c} * pixels + at), x);
}

/// NaN for an image that does not exist: added to what is written.
__device__ __forceinline__ float absent(const Plan& p) {
  return p.image < 0 ? NAN : 0.0f;
}

}  // namespace augment_cuda
}  // namespace sela
