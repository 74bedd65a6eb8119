#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sela/host_device.h"
#include "sela/philox.h"

namespace sela {

/// The operation that "one of equalize, autocontrast, sharpness" picked, each as torchvision defines it.
enum class Tone : int32_t { none = 0, equalize = 1, autocontrast = 2, sharpness = 3 };

/// What follows the colour operations.  Ranges are [low, high].
struct EffectOptions {
  float blur_probability = 0.0f;        ///< Gaussian blur applied
  float blur_sigma[2] = {0.1f, 2.0f};   ///< its deviation, pixels of the output, > 0
  int32_t blur_radius = 0;              ///< its kernel is 2 * radius + 1 pixels wide; < size
  float tone_probability = 0.0f;        ///< one of the three tone operations applied, each as often
  float sharpness[2] = {1.0f, 1.0f};    ///< factor of Tone::sharpness, >= 0, 1 = unchanged
  float noise_probability = 0.0f;       ///< Gaussian noise added
  float noise_sigma[2] = {0.0f, 0.0f};  ///< its deviation, of channels in [0, 1]
  bool sobel = false;                   ///< the output is two channels: horizontal and vertical gradient
};

/// What was drawn for one image; the memory layout of `sela_ext.kernels.EFFECTS`.
struct AugmentEffects {
  float blur;             ///< deviation, pixels; 0: none
  Tone tone;              ///< the operation
  float sharpness;        ///< factor, used by Tone::sharpness
  float noise;            ///< deviation, of channels in [0, 1]; 0: none
  uint32_t noise_key[2];  ///< Philox key of the noise of every pixel
};
static_assert(sizeof(AugmentEffects) == 24, "AugmentEffects must match the numpy record");

/// Draws the effects of one view of one image.
SELA_HOST_DEVICE inline AugmentEffects sample_effects(const EffectOptions& options, uint64_t seed, uint32_t epoch,
                                                      uint64_t image, uint32_t view) {
  const PhiloxWords u = philox_image(seed, epoch, image, view, 0, Purpose::effects);
  const PhiloxWords v = philox_image(seed, epoch, image, view, 1, Purpose::effects);
  const PhiloxWords w = philox_image(seed, epoch, image, view, 2, Purpose::effects);
  AugmentEffects e = {0.0f, Tone::none, 1.0f, 0.0f, {w.word[0], w.word[1]}};
  if (unit_float(u.word[0]) < options.blur_probability)
    e.blur = options.blur_sigma[0] + (options.blur_sigma[1] - options.blur_sigma[0]) * unit_float(u.word[1]);
  if (unit_float(u.word[2]) < options.tone_probability) e.tone = static_cast<Tone>(1 + below(u.word[3], 3));
  if (e.tone == Tone::sharpness)
    e.sharpness = options.sharpness[0] + (options.sharpness[1] - options.sharpness[0]) * unit_float(v.word[0]);
  if (unit_float(v.word[1]) < options.noise_probability)
    e.noise = options.noise_sigma[0] + (options.noise_sigma[1] - options.noise_sigma[0]) * unit_float(v.word[2]);
  return e;
}

// Note [Noise]: normal numbers by the polar form of Box and Muller, from 24 bits each of two Philox words: radius
// sqrt(-2 log u), so at most 5.8 deviations.  Counter n of channel c yields four numbers; counters 16 b .. 16 b + 15
// fill the pixels 64 b .. 64 b + 63 of the output image in such a way that number j of counter 16 b + l belongs to
// pixel 64 b + 16 j + l: sixteen counters side by side write whole vectors.  All operations are rounded alike
// everywhere.

/// Four random words for counter `counter` of channel `channel`.
SELA_SHARED_INLINE PhiloxWords philox_pixel(uint32_t counter, uint32_t channel, uint32_t key0, uint32_t key1) {
  return philox4x32({{counter, channel, 0, static_cast<uint32_t>(Purpose::noise)}}, key0, key1);
}

/// log(x) for normal x > 0, within 2 units in the last place.
SELA_SHARED_INLINE float portable_log(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const int32_t power = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // x = m * 2^power, sqrt(1/2) <= m < sqrt(2)
  bits -= static_cast<uint32_t>(power) << 23;
  float m;
  memcpy(&m, &bits, sizeof(m));
  const float f = m - 1.0f, square = f * f, n = static_cast<float>(power);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float low = (p * f * square - n * 2.12194440e-4f) - 0.5f * square;
  return (f + low) + n * 0.693359375f;
}

/// Two independent standard normal numbers from two random words.
SELA_SHARED_INLINE void normal_pair(uint32_t first, uint32_t second, float* cosine, float* sine) {
  const float u = static_cast<float>((first >> 8) + 1u) * (1.0f / 16777216.0f);  // (0, 1]
  const float turn = static_cast<float>(second >> 8) * (1.0f / 16777216.0f);     // [0, 1)
  const float radius = sqrtf(-2.0f * portable_log(u));
  // The angle is a whole number of quarter turns and a rest within an eighth.
  const int32_t quarter = static_cast<int32_t>(turn * 4.0f + 0.5f);
  const float x = (turn - static_cast<float>(quarter) * 0.25f) * 6.28318531f, z = x * x;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const bool odd = (quarter & 1) != 0;
  const float along = odd ? s : c, across = odd ? c : s;
  *cosine = radius * (((quarter + 1) & 2) != 0 ? -along : along);
  *sine = radius * ((quarter & 2) != 0 ? -across : across);
}

/// Draws effects[i] for image index[i]; index[i] in [0, 2^40), view < 256.
void sample_effects(const EffectOptions& options, const int64_t* index, int64_t count, uint64_t seed, uint32_t epoch,
                    uint32_t view, AugmentEffects* effects);

/// Why effects cannot be applied; nullptr when they can.
const char* check_effects(const AugmentEffects& effects);

}  // namespace sela
