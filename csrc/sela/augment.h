#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sela/effects.h"
#include "sela/host_device.h"
#include "sela/philox.h"

namespace sela {

/// Which part of the image becomes the output.
enum class Crop : int32_t {
  random = 0,  ///< a random box, resampled to size x size (torchvision's RandomResizedCrop)
  center = 1,  ///< short side resampled to `resize`, then the middle size x size window (Resize + CenterCrop)
  resize = 2,  ///< the whole image, resampled to size x size
};

/// How parameters are drawn and images are finished.  Ranges are [low, high].
struct AugmentOptions {
  int32_t size = 224;                 ///< side of the square output, pixels
  Crop crop = Crop::resize;           ///< part of the image that is shown
  int32_t resize = 256;               ///< short side before the central window, pixels; Crop::center only
  float scale[2] = {0.08f, 1.0f};     ///< share of the image's area that a random box covers
  float log_ratio[2] = {0.0f, 0.0f};  ///< log of width / height of a random box
  float ratio[2] = {1.0f, 1.0f};      ///< the same, not as a logarithm: for the fallback box
  float flip_probability = 0.0f;      ///< mirrored left to right
  float gray_probability = 0.0f;      ///< all three channels replaced by the luma
  float jitter_probability = 0.0f;    ///< the four colour operations applied
  float brightness[2] = {1.0f, 1.0f};
  float contrast[2] = {1.0f, 1.0f};
  float saturation[2] = {1.0f, 1.0f};
  float hue[2] = {0.0f, 0.0f};               ///< turns, within [-0.5, 0.5]
  bool gray_first = true;                    ///< gray before the colour operations (else after)
  float mean[3] = {0.485f, 0.456f, 0.406f};  ///< subtracted from channels in [0, 1] ...
  float std[3] = {0.229f, 0.224f, 0.225f};   ///< ... which are then divided by this
};

/// What was drawn for one image; the memory layout of `sela_ext.kernels.PARAMETERS`.
/// Crop::random, Crop::resize: (top, left, height, width) is the box in the image that is resampled to the output.
/// Crop::center: the image is resampled to height x width, and the output is its window at (top, left).
struct AugmentParameters {
  int32_t top, left, height, width;
  int32_t flip;      ///< 0 or 1
  int32_t gray;      ///< 0 or 1
  int32_t jitter;    ///< 0 or 1; 0: the order and the factors below are not used
  int32_t order[4];  ///< the colour operations, first to last: 0 brightness, 1 contrast, 2 saturation, 3 hue
  float brightness, contrast, saturation;  ///< factors >= 0, 1 = unchanged
  float hue;                               ///< turns, 0 = unchanged
};
static_assert(sizeof(AugmentParameters) == 60, "AugmentParameters must match the numpy record");

/// Luma weights of torchvision.  They add up to .9999, which is kept: saturation and contrast see it.
constexpr float kLumaRed = 0.2989f, kLumaGreen = 0.587f, kLumaBlue = 0.114f;

/// exp(x) for |x| < 80, built from operations that every processor rounds alike; within 2 units in the last place.
SELA_HOST_DEVICE inline float portable_exp(float x) {
  const float n = rintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;  // 2^n
  float power;
  memcpy(&power, &bits, sizeof(power));
  return p * power;
}

/// Integer nearest to x (ties to even), as an int; x < 2^31.
SELA_HOST_DEVICE inline int32_t nearest(float x) {
  return static_cast<int32_t>(rintf(x));
}

/// The box of torchvision's RandomResizedCrop: ten tries, then the largest centred box of an allowed ratio.
SELA_HOST_DEVICE inline void sample_box(const AugmentOptions& options, int32_t height, int32_t width, uint64_t seed,
                                        uint32_t epoch, uint64_t image, uint32_t view, AugmentParameters* out) {
  const float area = static_cast<float>(height) * static_cast<float>(width);
  for (uint32_t draw = 0; draw < 10; ++draw) {
    const PhiloxWords u = philox_image(seed, epoch, image, view, draw, Purpose::crop);
    const float target = area * (options.scale[0] + (options.scale[1] - options.scale[0]) * unit_float(u.word[0]));
    const float ratio =
        portable_exp(options.log_ratio[0] + (options.log_ratio[1] - options.log_ratio[0]) * unit_float(u.word[1]));
    const float wide = rintf(sqrtf(target * ratio)), tall = rintf(sqrtf(target / ratio));
    if (!(wide >= 1.0f && tall >= 1.0f && wide <= static_cast<float>(width) && tall <= static_cast<float>(height)))
      continue;
    out->width = static_cast<int32_t>(wide);
    out->height = static_cast<int32_t>(tall);
    out->top = below(u.word[2], height - out->height + 1);
    out->left = below(u.word[3], width - out->width + 1);
    return;
  }
  const float image_ratio = static_cast<float>(width) / static_cast<float>(height);
  int32_t tall = height, wide = width;
  if (image_ratio < options.ratio[0]) {
    tall = nearest(static_cast<float>(width) / options.ratio[0]);
  } else if (image_ratio > options.ratio[1]) {
    wide = nearest(static_cast<float>(height) * options.ratio[1]);
  }
  out->height = tall < 1 ? 1 : tall > height ? height : tall;
  out->width = wide < 1 ? 1 : wide > width ? width : wide;
  out->top = (height - out->height) / 2;
  out->left = (width - out->width) / 2;
}

/// (length - size) / 2, a half rounded to even: where torchvision's CenterCrop starts.
SELA_HOST_DEVICE inline int32_t center_offset(int32_t length, int32_t size) {
  const int32_t extra = length - size, half = extra / 2;
  return half + ((extra & 1) & (half & 1));
}

/// word with bytes i and j exchanged.
SELA_HOST_DEVICE inline uint32_t swap_bytes(uint32_t word, int32_t i, int32_t j) {
  const uint32_t differ = ((word >> (8 * i)) ^ (word >> (8 * j))) & 255u;
  return word ^ ((differ << (8 * i)) | (differ << (8 * j)));
}

/// Draws everything for one view of one image.  height, width: of the image, >= 1.
SELA_HOST_DEVICE inline AugmentParameters sample_parameters(const AugmentOptions& options, int32_t height,
                                                            int32_t width, uint64_t seed, uint32_t epoch,
                                                            uint64_t image, uint32_t view) {
  AugmentParameters p;
  if (options.crop == Crop::random) {
    sample_box(options, height, width, seed, epoch, image, view, &p);
  } else if (options.crop == Crop::center) {
    const int64_t side = options.resize;
    p.height = height <= width ? options.resize : static_cast<int32_t>(side * height / width);
    p.width = width <= height ? options.resize : static_cast<int32_t>(side * width / height);
    p.top = center_offset(p.height, options.size);
    p.left = center_offset(p.width, options.size);
  } else {
    p.top = p.left = 0;
    p.height = height;
    p.width = width;
  }

  p.flip = p.gray = p.jitter = 0;
  if (options.flip_probability > 0.0f || options.gray_probability > 0.0f || options.jitter_probability > 0.0f) {
    const PhiloxWords u = philox_image(seed, epoch, image, view, 0, Purpose::flip);
    p.flip = unit_float(u.word[0]) < options.flip_probability;
    p.gray = unit_float(u.word[1]) < options.gray_probability;
    p.jitter = unit_float(u.word[2]) < options.jitter_probability;
  }

  uint32_t order = 0x03020100u;  // a byte each: an array indexed by what is drawn would leave a GPU's registers
  p.brightness = p.contrast = p.saturation = 1.0f;
  p.hue = 0.0f;
  if (p.jitter) {
    const PhiloxWords u = philox_image(seed, epoch, image, view, 0, Purpose::colour);
    p.brightness = options.brightness[0] + (options.brightness[1] - options.brightness[0]) * unit_float(u.word[0]);
    p.contrast = options.contrast[0] + (options.contrast[1] - options.contrast[0]) * unit_float(u.word[1]);
    p.saturation = options.saturation[0] + (options.saturation[1] - options.saturation[0]) * unit_float(u.word[2]);
    p.hue = options.hue[0] + (options.hue[1] - options.hue[0]) * unit_float(u.word[3]);
    const PhiloxWords v = philox_image(seed, epoch, image, view, 1, Purpose::colour);
    order = swap_bytes(order, 3, below(v.word[3], 4));  // Fisher-Yates
    order = swap_bytes(order, 2, below(v.word[2], 3));
    order = swap_bytes(order, 1, below(v.word[1], 2));
  }
  for (int32_t i = 0; i < 4; ++i) p.order[i] = static_cast<int32_t>((order >> (8 * i)) & 255u);
  return p;
}

/// One uint8 image in memory: [height, width, channels], rows row_stride bytes apart, pixels contiguous.
struct ImageView {
  const uint8_t* data;
  int32_t height, width;
  int64_t row_stride;
};

/// uint8: not normalised, [0, 1] becomes 0..255, rounded to nearest; CPU only.
enum class PixelType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2, uint8 = 3 };

/// Where images go: [count, channels, size, size], contiguous, as NCHW or (channels_last) NHWC memory.
/// With EffectOptions::sobel there are two channels.
struct AugmentOutput {
  void* data;
  PixelType type;
  bool channels_last;
};

/// Draws parameters[i] for image index[i] of heights[i] x widths[i]; index[i] in [0, 2^40), view < 256.
void sample_parameters(const AugmentOptions& options, const int32_t* heights, const int32_t* widths,
                       const int64_t* index, int64_t count, uint64_t seed, uint32_t epoch, uint32_t view,
                       AugmentParameters* parameters);

/// Why parameters do not fit an image of height x width; nullptr when they do.
const char* check_parameters(const AugmentOptions& options, const AugmentParameters& parameters, int32_t height,
                             int32_t width);

/// out[i] = normalise(noise(blur(tone(jitter(gray(flip(resample(crop(images[i])))))))), in one pass over memory per
/// image, and its gradients with EffectOptions::sobel.
/// Equal to torchvision v2 run in float on the same parameters, within 0.01 of 255.
/// images: count views of `channels` (1 or 3) channels; parameters: [count], checked by check_parameters; effects:
/// [count], checked by check_effects, or null: none.
/// With one channel gray, saturation and hue change nothing.  Same bits for every number of threads (<= 0: all).
void augment_images(const AugmentOptions& options, const EffectOptions& effect_options, const ImageView* images,
                    int32_t channels, const AugmentParameters* parameters, const AugmentEffects* effects, int64_t count,
                    const AugmentOutput& out, int threads);

/// Longest side of images, and of the output, that the CUDA kernel takes: what fits the shared memory of every card.
constexpr int32_t kAugmentCudaSide = 64;

/// uint8 images of one size in device memory: [count, height, width, channels], contiguous, at any address.
struct ResidentImages {
  const uint8_t* data;
  int64_t count;
  int32_t height, width, channels;
};

/// The key that parameters are drawn with; view < 256.
struct DrawKey {
  uint64_t seed;
  uint32_t epoch, view;
};

/// augment_images for images index[i] of `images`, on the current CUDA device, in one launch on `stream` (0: the
/// default one), which it does not wait for.  All pointers are device memory and must live until then.
/// index: [count]; a number outside [0, images.count) makes that output NaN.  given: [count] parameters that
/// check_parameters has passed, or null: they are drawn with `key`, the same bits as sample_parameters gives, and are
/// left in drawn, [count], unless that is null.  Sides <= kAugmentCudaSide, channels 1 or 3.
/// Within 1e-6 of augment_images before normalisation; the same bits in every run and for every count.
void augment_resident_cuda(const AugmentOptions& options, const ResidentImages& images, const int64_t* index,
                           int64_t count, const DrawKey& key, const AugmentParameters* given, AugmentParameters* drawn,
                           const AugmentOutput& out, void* stream);

/// sample_parameters on the current CUDA device for images of one size; index and drawn, [count], are device memory.
void sample_parameters_cuda(const AugmentOptions& options, int32_t height, int32_t width, const int64_t* index,
                            int64_t count, const DrawKey& key, AugmentParameters* drawn, void* stream);

/// Fisher-Yates shuffle of 0 .. count - 1 into out, keyed by (seed, epoch), purpose shuffle.
void shuffle(int64_t count, uint64_t seed, uint32_t epoch, int64_t* out);

}  // namespace sela
