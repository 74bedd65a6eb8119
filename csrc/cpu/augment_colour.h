#pragma once
// Gray and the four colour operations on planes of floats in [0, 1], with normalisation in the same loop.
//
// Operations before the contrast, with the luma's sum; then contrast, the rest, and normalisation with the store. Each
// order of operations is its own loop, all channels of a pixel in registers.
// Note [Gray images]: once all channels are equal the image stays one plane up to the store: brightness, contrast and
// saturation are then each clamp(v * a + b), and hue changes nothing.
#include "cpu/augment_layout.h"
#include "cpu/simd_image.h"
#include "sela/colour.h"

namespace sela::SELA_ISA {
namespace {

using namespace pixels;

constexpr float kLumaSum = kLumaRed + kLumaGreen + kLumaBlue;

inline Floats clamp(Floats v) {
  return min(max(v, splat(0.0f)), splat(1.0f));
}
inline Floats luma(Floats r, Floats g, Floats b) {
  return fma(b, splat(kLumaBlue), fma(g, splat(kLumaGreen), r * splat(kLumaRed)));
}

struct Factors {
  float brightness, saturation;
  float hue;                        ///< in sixths of a turn
  float contrast, contrast_offset;  ///< v * contrast + contrast_offset
  float scale[3], shift[3];         ///< v * scale + shift normalises
  bool stream;                      ///< what is written goes past the caches
};

template <uint32_t kOp>
inline void apply(const Factors& f, Floats* r, Floats* g, Floats* b) {
  if constexpr (kOp == kBrightness) {  // v and the factor are >= 0
    const Floats a = splat(f.brightness), one = splat(1.0f);
    *r = min(*r * a, one);
    *g = min(*g * a, one);
    *b = min(*b * a, one);
  } else if constexpr (kOp == kSaturation) {
    const Floats a = splat(f.saturation), gray = luma(*r, *g, *b) * splat(1.0f - f.saturation);
    *r = clamp(fma(*r, a, gray));
    *g = clamp(fma(*g, a, gray));
    *b = clamp(fma(*b, a, gray));
  } else if constexpr (kOp == kHue) {
    // RGB -> hue in sixths -> turned -> RGB: every channel is low + range * ramp(hue), so neither the saturation nor
    // the six cases of the sector are formed.
    const Floats high = max(max(*r, *g), *b), low = min(min(*r, *g), *b), range = high - low;
    const Floats inverse = splat(1.0f) / max(range, splat(1e-12f));
    Floats hue = select_equal(high, *g, fma(*b - *r, inverse, splat(2.0f)), fma(*r - *g, inverse, splat(4.0f)));
    hue = select_equal(high, *r, (*g - *b) * inverse, hue) + splat(f.hue);
    hue = fma(floor(hue * splat(1.0f / 6.0f)), splat(-6.0f), hue);
    const Floats red = clamp(abs(hue - splat(3.0f)) - splat(1.0f));
    const Floats green = clamp(splat(2.0f) - abs(hue - splat(2.0f)));
    const Floats blue = clamp(splat(2.0f) - abs(hue - splat(4.0f)));
    *r = fma(range, red, low);
    *g = fma(range, green, low);
    *b = fma(range, blue, low);
  }
}

/// Planes of one image, [count] pixels each, with room for kLanes more.
struct Planes {
  float* r;
  float* g;
  float* b;
  int64_t count;
};

/// Sums are kept in float over this many pixels, then in double.
constexpr int64_t kSumPixels = 2048;

/// The operations before the contrast, in place.  Returns the sum of the luma.
template <uint32_t kA, uint32_t kB, uint32_t kC>
double before_contrast(const Factors& f, const Planes& p) {
  double total = 0.0;
  for (int64_t begin = 0; begin < p.count; begin += kSumPixels) {
    const int64_t end = begin + kSumPixels < p.count ? begin + kSumPixels : p.count;
    Floats part = splat(0.0f);
    for (int64_t i = begin; i < end; i += kLanes) {
      Floats r = load(p.r + i), g = load(p.g + i), b = load(p.b + i);
      apply<kA>(f, &r, &g, &b);
      apply<kB>(f, &r, &g, &b);
      apply<kC>(f, &r, &g, &b);
      if constexpr (kA != kNone) {
        store(p.r + i, r);
        store(p.g + i, g);
        store(p.b + i, b);
      }
      const Floats y = luma(r, g, b);
      part = part + (end - i < kLanes ? first_lanes(y, static_cast<int>(end - i)) : y);
    }
    total += sum(part);
  }
  return total;
}

/// Contrast, the operations after it, gray where asked, normalisation.  Writes out[c][0 .. count) and nothing else.
template <uint32_t kA, uint32_t kB, uint32_t kC, bool kGray>
void after_contrast(const Factors& f, const Planes& p, float* const out[3]) {
  const Floats contrast = splat(f.contrast), offset = splat(f.contrast_offset);
  for (int64_t i = 0; i < p.count; i += kLanes) {
    Floats r = clamp(fma(load(p.r + i), contrast, offset));
    Floats g = clamp(fma(load(p.g + i), contrast, offset));
    Floats b = clamp(fma(load(p.b + i), contrast, offset));
    apply<kA>(f, &r, &g, &b);
    apply<kB>(f, &r, &g, &b);
    apply<kC>(f, &r, &g, &b);
    if constexpr (kGray) r = g = b = luma(r, g, b);
    r = fma(r, splat(f.scale[0]), splat(f.shift[0]));
    g = fma(g, splat(f.scale[1]), splat(f.shift[1]));
    b = fma(b, splat(f.scale[2]), splat(f.shift[2]));
    if (p.count - i >= kLanes) {
      if (f.stream) {
        stream(out[0] + i, r);
        stream(out[1] + i, g);
        stream(out[2] + i, b);
      } else {
        store(out[0] + i, r);
        store(out[1] + i, g);
        store(out[2] + i, b);
      }
    } else {
      float tail[3][kLanes];
      store(tail[0], r);
      store(tail[1], g);
      store(tail[2], b);
      for (int c = 0; c < 3; ++c) std::memcpy(out[c] + i, tail[c], static_cast<size_t>(p.count - i) * sizeof(float));
    }
  }
}

using Before = double (*)(const Factors&, const Planes&);
using After = void (*)(const Factors&, const Planes&, float* const[3]);

/// Loops of one sequence of operations; sequences with gaps or repetitions do not occur and have none.
template <int kCode>
struct Sequence {
  static constexpr uint32_t kA = kCode & 3, kB = (kCode >> 2) & 3, kC = kCode >> 4;
  static constexpr bool kGap = (kA == kNone && kB != kNone) || (kB == kNone && kC != kNone);
  static constexpr bool kTwice = (kA != kNone && (kA == kB || kA == kC)) || (kB != kNone && kB == kC);
  static constexpr Before before() {
    if constexpr (kGap || kTwice)
      return nullptr;
    else
      return &before_contrast<kA, kB, kC>;
  }
  template <bool kGray>
  static constexpr After after() {
    if constexpr (kGap || kTwice)
      return nullptr;
    else
      return &after_contrast<kA, kB, kC, kGray>;
  }
};

struct Table {
  Before before[64];
  After after[2][64];
};
template <int... kCode>
constexpr Table make_table() {
  return {{Sequence<kCode>::before()...},
          {{Sequence<kCode>::template after<false>()...}, {Sequence<kCode>::template after<true>()...}}};
}
template <int kCount, int... kCode>
struct TableOf : TableOf<kCount - 1, kCount - 1, kCode...> {};
template <int... kCode>
struct TableOf<0, kCode...> {
  static constexpr Table value = make_table<kCode...>();
};
constexpr Table kTable = TableOf<64>::value;

/// v -> clamp(v * scale + shift)
struct Step {
  float scale, shift;
};

/// All steps in turn, in place.  Returns the sum.
double gray_steps(const Step* steps, int count, float* plane, int64_t pixels) {
  double total = 0.0;
  for (int64_t begin = 0; begin < pixels; begin += kSumPixels) {
    const int64_t end = begin + kSumPixels < pixels ? begin + kSumPixels : pixels;
    Floats part = splat(0.0f);
    for (int64_t i = begin; i < end; i += kLanes) {
      Floats v = load(plane + i);
      for (int k = 0; k < count; ++k) v = clamp(fma(v, splat(steps[k].scale), splat(steps[k].shift)));
      store(plane + i, v);
      part = part + (end - i < kLanes ? first_lanes(v, static_cast<int>(end - i)) : v);
    }
    total += sum(part);
  }
  return total;
}

/// out[0 .. count) = v * scale + shift; streamed: past the caches.
void normalise(const float* plane, int64_t pixels, float scale, float shift, float* out, bool streamed) {
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const Floats v = fma(load(plane + i), splat(scale), splat(shift));
    if (pixels - i >= kLanes) {
      if (streamed) {
        stream(out + i, v);
      } else {
        store(out + i, v);
      }
    } else {
      float tail[kLanes];
      store(tail, v);
      std::memcpy(out + i, tail, static_cast<size_t>(pixels - i) * sizeof(float));
    }
  }
}

/// The colour operations of one plane (see Note [Gray images]); luma_sum: what the luma weights add up to.
void colour_gray(const AugmentParameters& p, float luma_sum, bool saturate, float* plane, int64_t pixels) {
  Step steps[4] = {};
  int count = 0;
  for (int32_t op : p.order) {
    if (op == 0) {
      steps[count++] = {p.brightness, 0.0f};
    } else if (op == 1 && p.contrast != 1.0f) {
      const double mean = gray_steps(steps, count, plane, pixels) / static_cast<double>(pixels) * luma_sum;
      steps[0] = {p.contrast, static_cast<float>((1.0 - p.contrast) * mean)};
      count = 1;
    } else if (op == 2 && saturate) {
      steps[count++] = {p.saturation + (1.0f - p.saturation) * luma_sum, 0.0f};
    }
  }
  gray_steps(steps, count, plane, pixels);
}

/// The colour operations of three planes, and normalisation into out.
void colour_rgb(const AugmentParameters& p, bool gray_last, Factors* f, const Planes& planes, float* const out[3]) {
  const ColourPlan plan = colour_plan(p, true, true);
  f->brightness = p.brightness;
  f->saturation = p.saturation;
  f->hue = 6.0f * p.hue;
  f->contrast = 1.0f;
  f->contrast_offset = 0.0f;
  if (plan.contrast) {
    const double mean = kTable.before[plan.before](*f, planes) / static_cast<double>(planes.count);
    f->contrast = p.contrast;
    f->contrast_offset = static_cast<float>((1.0 - p.contrast) * mean);
  }
  kTable.after[gray_last ? 1 : 0][plan.after](*f, planes, out);
}

}  // namespace
}  // namespace sela::SELA_ISA
