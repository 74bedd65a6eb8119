#pragma once
#include <cstdint>

#include "sela/augment.h"
#include "sela/effects.h"
#include "sela/planes.h"

// The fused pass on a CUDA device for images and outputs of any size, from three kinds of sources, with all effects.
// Small resident images without effects have a kernel of their own (augment_resident_cuda), which is faster for them.

namespace sela {

/// A batch of images in device memory: one of the three sources.  height, width: no image is larger; >= 1.
struct DeviceImages {
  ResidentImages resident;    ///< images of one size, of which index says which are taken; data null: not this one
  const ImageView* crops;     ///< [count] images of any sizes, in device memory as what they point to; or null
  const PlanarImage* planes;  ///< [count] images as planes, passed by check_planes, likewise; or null
  const int64_t* index;       ///< [count] ids of the images, with which parameters are drawn; may be null with `given`
  int32_t channels;           ///< of the output, 1 or 3
  int32_t height, width;
  bool exact;  ///< of planes: PlanarOptions::exact
};

/// What of a batch is known before its launch: steps that no image needs are not launched.
struct AugmentNeeds {
  bool contrast = true;  ///< some image may have its contrast changed, which takes the mean of all of its pixels
  bool tone = true;      ///< ... a tone operation
  bool effects = true;   ///< ... any effect
  float blur = 0.0f;     ///< largest deviation of a blur, pixels; 0: none is blurred
};

/// What the kernel leaves between launches.
struct AugmentWorkspace {
  int64_t bytes;  ///< device memory, at a multiple of 16
  int64_t batch;  ///< images per round of launches: as many as stay in the second-level cache, >= 1
};
AugmentWorkspace augment_workspace_cuda(const AugmentOptions& options, const EffectOptions& effect_options,
                                        const DeviceImages& images, int64_t count, const AugmentNeeds& needs);

/// Longest blur that the CUDA kernels take, pixels from its middle; what fits the shared memory of every card.
constexpr int32_t kBlurCudaRadius = 8192;

/// augment_images, or augment_planes, of `count` images on the current CUDA device, in a few launches on `stream` (0:
/// the default one), which it does not wait for.  All pointers are device memory and must live until then.
/// given: [count] parameters that check_parameters has passed, or null: they are drawn with `key`, the same bits as
/// sample_parameters gives.  given_effects: likewise.  drawn: where the drawn parameters are left, or null.
/// An index outside of the resident images makes that output NaN.  Within 0.01 of 255 of the CPU; the same bits in
/// every run, for every count, device and workspace.
void augment_device_cuda(const AugmentOptions& options, const EffectOptions& effect_options, const DeviceImages& images,
                         int64_t count, const AugmentNeeds& needs, const DrawKey& key, const AugmentParameters* given,
                         const AugmentEffects* given_effects, AugmentParameters* drawn, void* workspace,
                         const AugmentOutput& out, void* stream);

}  // namespace sela
