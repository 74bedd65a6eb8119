// One image: crop, antialiased bilinear resampling, flip, colour operations, normalisation.
//
// Fused so that the image is read once and the output written once; what lies between stays in one worker's scratch:
//   weights      per output column and row, as torch's antialiased interpolation computes them, in float; the flip is
//                a reversed table and the division by 255 a factor of the horizontal weights
//   resample     enlarging: every input row horizontally, then rows are mixed; reducing: rows are mixed first, so that
//                the horizontal pass runs once per output row
//   colour       operations before the contrast, with the luma's sum; then contrast, the rest, and normalisation with
//                the store. Each order of operations is its own loop, all channels of a pixel in registers
// Note [Gray images]: once all channels are equal the image stays one plane up to the store: brightness, contrast and
// saturation are then each clamp(v * a + b), and hue changes nothing.
#include "cpu/augment_loops.h"

#include "cpu/simd_image.h"
#include "sela/colour.h"
#include "sela/resample.h"

namespace sela::SELA_ISA {
namespace {

using namespace pixels;

constexpr float kLumaSum = kLumaRed + kLumaGreen + kLumaBlue;

inline int64_t round_up(int64_t n) {
  return (n + kScratchLanes - 1) / kScratchLanes * kScratchLanes;
}

// ---------------------------------------------------------------- weights

/// Output i is sum over k < count[i] of weight[k * stride + i] * input[start[i] + k].
struct Axis {
  int32_t* start;
  int32_t* count;
  float* weight;
  float* total;  ///< [stride] floats to work with
  int64_t stride;
  int32_t taps;         ///< at least every count; weights from count[i] to taps are zero
  int32_t first, last;  ///< inputs in use: [first, last)
};

/// length inputs resampled to `resampled`, of which outputs offset .. offset + size are wanted, times gain.
/// taps: most_taps(length, resampled).
void make_axis(Axis* axis, int32_t length, int32_t resampled, int32_t offset, int32_t size, bool flip, float gain,
               int32_t taps) {
  const AxisScale scale = axis_scale(length, resampled, taps);
  const int32_t from = flip ? offset + size - 1 : offset, step = flip ? -1 : 1;
  const int32_t lanes = static_cast<int32_t>(axis->stride);  // those behind the last column repeat it
  for (int32_t i = 0; i < lanes; ++i) {
    const AxisSpan span = axis_span(scale, axis_middle(scale, from + step * (i < size ? i : size - 1)));
    axis->start[i] = span.start;
    axis->count[i] = span.count;
  }
  const int32_t low = flip ? size - 1 : 0, high = flip ? 0 : size - 1;
  axis->first = axis->start[low];
  axis->last = axis->start[high] + axis->count[high];
  axis->taps = taps;

  float* total = axis->total;
  for (int32_t i = 0; i < lanes; ++i) total[i] = 0.0f;
  for (int32_t k = 0; k < taps; ++k) {
    float* weight = axis->weight + k * axis->stride;
    for (int32_t i = 0; i < lanes; ++i) {
      const float middle = axis_middle(scale, from + step * (i < size ? i : size - 1));
      const float w = axis_weight(scale, middle, {axis->start[i], axis->count[i]}, k);
      weight[i] = w;
      total[i] += w;
    }
  }
  for (int32_t i = 0; i < lanes; ++i) total[i] = total[i] > 0.0f ? gain / total[i] : 0.0f;
  for (int32_t k = 0; k < taps; ++k) {
    float* weight = axis->weight + k * axis->stride;
    for (int32_t i = 0; i < lanes; ++i) weight[i] *= total[i];
  }
}

// ---------------------------------------------------------------- resampling

/// Scratch of one image, laid out in job.scratch.
struct Buffers {
  Axis x, y;
  float* row;          ///< [kBlockRows, channels, row_stride]: rows of the input, or of the mixed input
  int64_t row_stride;  ///<
  float* middle;       ///< [rows, channels, middle_stride]: horizontally resampled rows
  int64_t middle_stride;
  float* plane;  ///< [channels, plane_stride]: the resampled image
  int64_t plane_stride;
};

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

/// out[line][i] = sum over k of weight[k, i] * in[line][start[i] - x.first + k] for `lines` lines and all columns.
/// What depends on the columns alone is found once per vector of columns, not once per line.
template <int kTaps>
void resample_lines(const Axis& x, int32_t size, int lines, const float* in, int64_t in_stride, float* out,
                    int64_t out_stride) {
  const int32_t taps = kTaps > 0 ? kTaps : x.taps;
  for (int32_t i = 0; i < size; i += kLanes) {
    const int32_t* start = x.start + i;
    const float* weight = x.weight + i;
    const int32_t ends[2] = {start[0], start[kLanes - 1]};  // starts rise, or fall in a flipped table
    const int32_t low = ends[0] < ends[1] ? ends[0] : ends[1], high = ends[0] < ends[1] ? ends[1] : ends[0];
    const float* base = in + (low - x.first);
    const Ints index = add(load_ints(start), -low);
    auto each_line = [&](auto resampled) {
      for (int line = 0; line < lines; ++line) {
        const Floats total = resampled(base + line * in_stride);
        float* to = out + line * out_stride + i;
        if (i + kLanes <= size) {
          store(to, total);
        } else {
          float tail[kLanes];
          store(tail, total);
          std::memcpy(to, tail, static_cast<size_t>(size - i) * sizeof(float));
        }
      }
    };
#if !defined(SELA_ISA_generic)
    const int32_t span = high - low + taps;
    if (span <= kLanes) {
      each_line([&](const float* from) {
        const Floats inputs = load(from);
        Floats total = look_up(inputs, index) * load(weight);
        for (int32_t k = 1; k < taps; ++k)
          total = fma(look_up(inputs, add(index, k)), load(weight + k * x.stride), total);
        return total;
      });
      continue;
    }
    if (span <= 2 * kLanes) {
      each_line([&](const float* from) {
        const Floats inputs = load(from), more = load(from + kLanes);
        Floats total = look_up(inputs, more, index) * load(weight);
        for (int32_t k = 1; k < taps; ++k)
          total = fma(look_up(inputs, more, add(index, k)), load(weight + k * x.stride), total);
        return total;
      });
      continue;
    }
#else
    (void)high;
#endif
    each_line([&](const float* from) {
      Floats total = gather(from, index) * load(weight);
      for (int32_t k = 1; k < taps; ++k) total = fma(gather(from + k, index), load(weight + k * x.stride), total);
      return total;
    });
  }
}

void resample_lines(const Axis& x, int32_t size, int lines, const float* in, int64_t in_stride, float* out,
                    int64_t out_stride) {
  if (x.taps == 2) {
    resample_lines<2>(x, size, lines, in, in_stride, out, out_stride);
  } else {
    resample_lines<0>(x, size, lines, in, in_stride, out, out_stride);
  }
}

template <int Channels>
void resample(const AugmentJob& job, const Buffers& b, int32_t top, int32_t left) {
  const int32_t size = job.options->size;
  const int64_t stride = job.image.row_stride;
  const uint8_t* end = job.image.data + (job.image.height - 1) * stride + int64_t{Channels} * job.image.width;
  const uint8_t* corner = job.image.data + top * stride + int64_t{Channels} * (left + b.x.first);
  const int32_t width = b.x.last - b.x.first, height = b.y.last - b.y.first;
  const int64_t block_row = Channels * b.row_stride;
  if (height <= size + 2) {  // enlarging: horizontally first
    const float one = 1.0f;
    const int64_t middle_row = Channels * b.middle_stride;
    for (int32_t begin = 0; begin < height; begin += kBlockRows) {
      const int32_t rows = height - begin < kBlockRows ? height - begin : kBlockRows;
      for (int32_t y = 0; y < rows; ++y)
        mix_input_rows<Channels>(corner + (b.y.first + begin + y) * stride, stride, end, width, &one, 0, 1,
                                 b.row + y * block_row, b.row_stride);
      resample_lines(b.x, size, rows * Channels, b.row, b.row_stride, b.middle + begin * middle_row, b.middle_stride);
    }
    for (int32_t y = 0; y < size; ++y) {
      const float* from = b.middle + (b.y.start[y] - b.y.first) * middle_row;
      const float* weight = b.y.weight + y;
      const int32_t count = b.y.count[y];
      for (int c = 0; c < Channels; ++c, from += b.middle_stride) {
        float* to = b.plane + c * b.plane_stride + int64_t{y} * size;
        for (int32_t x = 0; x < size; x += kLanes) {
          Floats total = load(from + x) * splat(weight[0]);
          for (int32_t k = 1; k < count; ++k)
            total = fma(load(from + k * middle_row + x), splat(weight[k * b.y.stride]), total);
          store(to + x, total);  // what passes the row's end is overwritten by the next row
        }
      }
    }
  } else {
    for (int32_t begin = 0; begin < size; begin += kBlockRows) {
      const int32_t rows = size - begin < kBlockRows ? size - begin : kBlockRows;
      for (int32_t y = 0; y < rows; ++y)
        mix_input_rows<Channels>(corner + b.y.start[begin + y] * stride, stride, end, width, b.y.weight + begin + y,
                                 b.y.stride, b.y.count[begin + y], b.row + y * block_row, b.row_stride);
      for (int c = 0; c < Channels; ++c)
        resample_lines(b.x, size, rows, b.row + c * b.row_stride, block_row,
                       b.plane + c * b.plane_stride + int64_t{begin} * size, size);
    }
  }
}

// ---------------------------------------------------------------- colour

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
      store(out[0] + i, r);
      store(out[1] + i, g);
      store(out[2] + i, b);
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

/// out[0 .. count) = v * scale + shift
void normalise(const float* plane, int64_t pixels, float scale, float shift, float* out) {
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const Floats v = fma(load(plane + i), splat(scale), splat(shift));
    if (pixels - i >= kLanes) {
      store(out + i, v);
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

// ---------------------------------------------------------------- output

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

template <typename T>
void interleave(const T* r, const T* g, const T* b, int64_t pixels, T* out) {
  for (int64_t i = 0; i < pixels; ++i) {
    out[3 * i] = r[i];
    out[3 * i + 1] = g[i];
    out[3 * i + 2] = b[i];
  }
}

/// Pixels converted or interleaved at a time, from a small buffer.
constexpr int64_t kChunk = 512;

/// Normalised planes to the output's type and memory order.
void write_output(const AugmentJob& job, float* const planes[3], int64_t pixels) {
  const bool interleaved = job.channels_last && job.channels == 3;
  if (job.type == PixelType::float32) {
    interleave(planes[0], planes[1], planes[2], pixels, static_cast<float*>(job.out));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(job.out);
  if (!interleaved) {
    for (int32_t c = 0; c < job.channels; ++c) convert(planes[c], pixels, job.type, out + c * pixels);
    return;
  }
  uint16_t chunk[3][kChunk];
  for (int64_t i = 0; i < pixels; i += kChunk) {
    const int64_t n = pixels - i < kChunk ? pixels - i : kChunk;
    for (int c = 0; c < 3; ++c) convert(planes[c] + i, n, job.type, chunk[c]);
    interleave(chunk[0], chunk[1], chunk[2], n, out + 3 * i);
  }
}

/// Lays the buffers out in job.scratch, in the order that scratch_floats counts them.
Buffers lay_out(const AugmentJob& job) {
  const AugmentOptions& options = *job.options;
  const AugmentParameters& p = *job.parameters;
  const int32_t height = options.crop == Crop::center ? job.image.height : p.height;
  const int32_t width = options.crop == Crop::center ? job.image.width : p.width;
  const int64_t size = options.size, padded = round_up(size);
  const int64_t taps_x = most_taps(width, resampled_length(options, p.width));
  const int64_t taps_y = most_taps(height, resampled_length(options, p.height));
  float* at = job.scratch;
  auto take = [&at](int64_t floats) {
    float* begin = at;
    at += round_up(floats);
    return begin;
  };
  Buffers b;
  b.plane_stride = round_up(size * size) + 2 * kScratchLanes;
  b.plane = take(job.channels * b.plane_stride);
  b.middle_stride = padded;
  b.middle = take((size + 2) * job.channels * b.middle_stride);
  b.row_stride = round_up(width + taps_x) + 2 * kScratchLanes;
  b.row = take(kBlockRows * job.channels * b.row_stride);
  auto take_axis = [&](Axis* axis, int64_t taps) {
    axis->stride = padded;
    axis->start = reinterpret_cast<int32_t*>(take(padded));
    axis->count = reinterpret_cast<int32_t*>(take(padded));
    axis->total = take(padded);
    axis->weight = take(taps * padded);
  };
  take_axis(&b.x, taps_x);
  take_axis(&b.y, taps_y);
  const bool center = options.crop == Crop::center;
  make_axis(&b.x, width, resampled_length(options, p.width), center ? p.left : 0, options.size, p.flip != 0,
            1.0f / 255.0f, static_cast<int32_t>(taps_x));
  make_axis(&b.y, height, resampled_length(options, p.height), center ? p.top : 0, options.size, false, 1.0f,
            static_cast<int32_t>(taps_y));
  return b;
}

}  // namespace

void augment_image(const AugmentJob& job) {
  const AugmentOptions& options = *job.options;
  const AugmentParameters& p = *job.parameters;
  const Buffers b = lay_out(job);
  const bool center = options.crop == Crop::center;
  const int32_t top = center ? 0 : p.top, left = center ? 0 : p.left;
  if (job.channels == 3) {
    resample<3>(job, b, top, left);
  } else {
    resample<1>(job, b, top, left);
  }

  const int64_t pixels = int64_t{options.size} * options.size;
  float* const plane[3] = {b.plane, b.plane + b.plane_stride, b.plane + 2 * b.plane_stride};
  const bool direct = job.type == PixelType::float32 && !(job.channels_last && job.channels == 3);
  float* out[3];
  for (int c = 0; c < job.channels; ++c) out[c] = direct ? static_cast<float*>(job.out) + c * pixels : plane[c];

  Factors f;
  for (int c = 0; c < 3; ++c) {
    f.scale[c] = 1.0f / options.std[c];
    f.shift[c] = -options.mean[c] / options.std[c];
  }
  const bool gray_now = job.channels == 3 && p.gray && options.gray_first;
  if (gray_now) {
    for (int64_t i = 0; i < pixels; i += kLanes)
      store(plane[0] + i, luma(load(plane[0] + i), load(plane[1] + i), load(plane[2] + i)));
  }
  if (job.channels == 1 || gray_now) {
    if (p.jitter) colour_gray(p, gray_now ? kLumaSum : 1.0f, gray_now, plane[0], pixels);
    for (int c = job.channels - 1; c >= 0; --c) normalise(plane[0], pixels, f.scale[c], f.shift[c], out[c]);
  } else if (p.jitter || p.gray) {
    colour_rgb(p, p.gray != 0, &f, {plane[0], plane[1], plane[2], pixels}, out);
  } else {
    for (int c = 0; c < 3; ++c) normalise(plane[c], pixels, f.scale[c], f.shift[c], out[c]);
  }
  if (!direct) write_output(job, out, pixels);
}

}  // namespace sela::SELA_ISA
