// Drives the image loops: draws parameters, checks them, shares images out over threads, picks the instruction set.
#include "sela/augment.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/augment_layout.h"
#include "cpu/augment_loops.h"
#include "cpu/augment_one.h"
#include "sela/dispatch.h"
#include "sela/parallel.h"
#include "sela/planes.h"

namespace sela {
namespace {

/// Images that a worker takes at a time.
constexpr int64_t kBlockImages = 16;

/// A thread costs about as much to start as this many values to read or write (some 30 microseconds).
constexpr int64_t kThreadValues = 1 << 16;

/// Asks for the memory of the next image.  A small image is over before the processor's own prefetching notices a
/// pattern.  (The output is not asked for: so many lines at once hold back the loads that matter.)
void prefetch(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64, kMost = 16384;
  const char* begin = static_cast<const char*>(data);
  if (bytes > kMost) return;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(begin + i);
}

}  // namespace

void sample_parameters(const AugmentOptions& options, const int32_t* heights, const int32_t* widths,
                       const int64_t* index, int64_t count, uint64_t seed, uint32_t epoch, uint32_t view,
                       AugmentParameters* parameters) {
  for (int64_t i = 0; i < count; ++i)
    parameters[i] =
        sample_parameters(options, heights[i], widths[i], seed, epoch, static_cast<uint64_t>(index[i]), view);
}

const char* check_parameters(const AugmentOptions& options, const AugmentParameters& p, int32_t height, int32_t width) {
  if (p.height < 1 || p.width < 1 || p.top < 0 || p.left < 0)
    return "a box of at least 1 x 1 pixels at (top, left) >= 0";
  if (options.crop == Crop::center) {
    if (p.top > p.height - options.size || p.left > p.width - options.size)
      return "a window of size x size pixels inside height x width, the resampled image";
  } else if (p.top > height - p.height || p.left > width - p.width) {
    return "a box inside the image";
  }
  int seen = 0;
  for (int32_t op : p.order)
    if (op >= 0 && op < 4) seen |= 1 << op;
  if (p.jitter && seen != 15) return "an order that names each of 0, 1, 2, 3 once";
  if (p.jitter && !(p.brightness >= 0 && p.contrast >= 0 && p.saturation >= 0 && std::fabs(p.hue) <= 0.5f &&
                    std::isfinite(p.brightness) && std::isfinite(p.contrast) && std::isfinite(p.saturation)))
    return "finite factors >= 0 and a hue within [-0.5, 0.5]";
  return nullptr;
}

void sample_effects(const EffectOptions& options, const int64_t* index, int64_t count, uint64_t seed, uint32_t epoch,
                    uint32_t view, AugmentEffects* effects) {
  for (int64_t i = 0; i < count; ++i)
    effects[i] = sample_effects(options, seed, epoch, static_cast<uint64_t>(index[i]), view);
}

const char* check_effects(const AugmentEffects& e) {
  if (!(e.blur >= 0.0f && std::isfinite(e.blur))) return "a finite blur >= 0";
  if (e.tone < Tone::none || e.tone > Tone::sharpness) return "a tone of 0, 1, 2 or 3";
  if (!(e.sharpness >= 0.0f && std::isfinite(e.sharpness))) return "a finite sharpness >= 0";
  if (!(e.noise >= 0.0f && std::isfinite(e.noise))) return "a finite noise >= 0";
  return nullptr;
}

PixelBox needed_box(const AugmentOptions& options, const AugmentParameters& parameters, const PlanarImage& image) {
  PixelBox box = shown_box(options, parameters, image.height, image.width);
  const PixelBox shown = box;
  for (int32_t c = 0; c < image.count; ++c) {
    const PlaneView& plane = image.plane[c];
    int32_t first, last;
    sample_range(shown.top, shown.bottom, plane.step_y, plane.smooth_y, plane.full_height, &first, &last);
    box.top = std::min(box.top, first * plane.step_y);
    box.bottom = std::max(box.bottom, std::min(last * plane.step_y, image.height));
    sample_range(shown.left, shown.right, plane.step_x, plane.smooth_x, plane.full_width, &first, &last);
    box.left = std::min(box.left, first * plane.step_x);
    box.right = std::max(box.right, std::min(last * plane.step_x, image.width));
  }
  return box;
}

const char* check_planes(const AugmentOptions& options, const AugmentParameters& parameters, const PlanarImage& image) {
  if (image.count != 1 && image.count != 3) return "1 or 3 planes";
  const PixelBox shown = shown_box(options, parameters, image.height, image.width);
  for (int32_t c = 0; c < image.count; ++c) {
    const PlaneView& plane = image.plane[c];
    for (int32_t step : {plane.step_y, plane.step_x})
      if (!is_step(step)) return "1, 2, 4, 8, 16 or 32 pixels per sample";
    if ((plane.smooth_y && plane.step_y != 2) || (plane.smooth_x && plane.step_x != 2))
      return "interpolation only of 2 pixels per sample";
    if (int64_t{plane.full_height} * plane.step_y < image.height ||
        int64_t{plane.full_width} * plane.step_x < image.width)
      return "components that cover the image";
    int32_t top, bottom, left, right;
    sample_range(shown.top, shown.bottom, plane.step_y, plane.smooth_y, plane.full_height, &top, &bottom);
    sample_range(shown.left, shown.right, plane.step_x, plane.smooth_x, plane.full_width, &left, &right);
    if (plane.top < 0 || plane.left < 0 || plane.height > plane.full_height - plane.top ||
        plane.width > plane.full_width - plane.left || top < plane.top || left < plane.left ||
        bottom > plane.top + plane.height || right > plane.left + plane.width)
      return "planes that hold the samples of needed_box";
  }
  return nullptr;
}

void AugmentScratch::grow(const ScratchSize& needed) {
  if (size_.floats < needed.floats) {
    floats_.reset();
    size_.floats = 0;
    floats_.reset(new float[static_cast<size_t>(needed.floats)]());
    size_.floats = needed.floats;
  }
  if (size_.bytes < needed.bytes) {
    bytes_.reset();
    size_.bytes = 0;
    bytes_.reset(new uint8_t[static_cast<size_t>(needed.bytes)]());
    size_.bytes = needed.bytes;
  }
}

void augment_one(Isa isa, AugmentJob job, AugmentScratch& scratch) {
  Buffers buffers;
  scratch.grow(lay_out(job, &buffers));
  job.scratch = scratch.floats();
  job.bytes = scratch.bytes();
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::augment_image(job);
    case Isa::avx2:
      return avx2::augment_image(job);
#endif
    default:
      return generic::augment_image(job);
  }
}

namespace {

/// Scratch that calls leave for the next ones: fresh pages cost a quarter of the time of a small batch.
class KeptScratch {
 public:
  AugmentScratch take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_.empty()) return {};
    AugmentScratch last = std::move(kept_.back());
    kept_.pop_back();
    return last;
  }
  void give_back(AugmentScratch scratch) {
    if (scratch.held() > kMostBytes) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_.size() < kMost) kept_.push_back(std::move(scratch));
  }

 private:
  static constexpr size_t kMost = 64;                       // threads
  static constexpr int64_t kMostBytes = int64_t{16} << 20;  // each: outputs of 224 pixels need 3 to 5 MiB
  std::mutex mutex_;
  std::vector<AugmentScratch> kept_;
};

KeptScratch& kept_scratch() {
  static KeptScratch* const kept = new KeptScratch;  // never destroyed: threads may outlive static objects
  return *kept;
}

/// Shares count images out over threads.  job_of(i): everything but the scratch of image i; before(i): called when
/// image i is about to be the next one.
template <class JobOf, class Before>
void run_jobs(int64_t count, int64_t values, int64_t pixels, int threads, JobOf job_of, Before before) {
  if (count <= 0) return;
  const Isa isa = cpu_isa();
  if (threads <= 0) threads = available_threads();
  const int64_t work = count * std::max(values, pixels);
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / (2 * kThreadValues))));
  const int64_t per_block = std::max<int64_t>(1, std::min(kBlockImages, (count + threads - 1) / threads));
  const int64_t blocks = (count + per_block - 1) / per_block;
  std::vector<AugmentScratch> scratch(static_cast<size_t>(std::min<int64_t>(threads, blocks)));
  for (AugmentScratch& one : scratch) one = kept_scratch().take();

  parallel_blocks(blocks, threads, [&](int64_t block, int worker) {
    AugmentScratch& mine = scratch[static_cast<size_t>(worker)];
    const int64_t end = std::min(count, (block + 1) * per_block);
    for (int64_t i = block * per_block; i < end; ++i) {
      if (i + 1 < end) before(i + 1);
      augment_one(isa, job_of(i), mine);
    }
  });
  for (AugmentScratch& one : scratch) kept_scratch().give_back(std::move(one));
}

}  // namespace

void augment_images(const AugmentOptions& options, const EffectOptions& effect_options, const ImageView* images,
                    int32_t channels, const AugmentParameters* parameters, const AugmentEffects* effects, int64_t count,
                    const AugmentOutput& out, int threads) {
  if (count <= 0) return;
  const int64_t pixels = int64_t{options.size} * options.size;
  const int64_t bytes = (effect_options.sobel ? 2 : channels) * pixels * bytes_of(out.type);
  run_jobs(
      count, channels * pixels, int64_t{channels} * images[0].height * images[0].width, threads,
      [&](int64_t i) -> AugmentJob {
        return {&options,
                &effect_options,
                images[i],
                nullptr,
                false,
                channels,
                &parameters[i],
                effects != nullptr ? effects[i] : kNoEffects,
                static_cast<char*>(out.data) + i * bytes,
                out.type,
                out.channels_last,
                nullptr,
                nullptr};
      },
      [&](int64_t i) { prefetch(images[i].data, images[i].height * images[i].row_stride); });
}

void augment_planes(const AugmentOptions& options, const EffectOptions& effect_options, const PlanarOptions& planar,
                    const PlanarImage* images, int32_t channels, const AugmentParameters* parameters,
                    const AugmentEffects* effects, int64_t count, const AugmentOutput& out, int threads) {
  if (count <= 0) return;
  const int64_t pixels = int64_t{options.size} * options.size;
  const int64_t bytes = (effect_options.sobel ? 2 : channels) * pixels * bytes_of(out.type);
  run_jobs(
      count, channels * pixels, int64_t{channels} * images[0].plane[0].height * images[0].plane[0].width, threads,
      [&](int64_t i) -> AugmentJob {
        return {&options,
                &effect_options,
                {nullptr, images[i].height, images[i].width, 0},
                &images[i],
                planar.exact,
                channels,
                &parameters[i],
                effects != nullptr ? effects[i] : kNoEffects,
                static_cast<char*>(out.data) + i * bytes,
                out.type,
                out.channels_last,
                nullptr,
                nullptr};
      },
      [](int64_t) {});
}

void shuffle(int64_t count, uint64_t seed, uint32_t epoch, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = i;
  PhiloxWords words = {};
  for (int64_t i = count - 1; i > 0; --i) {
    // Two 64-bit draws per block of four words: positions 2 b and 2 b + 1 share block b.
    const uint64_t block = static_cast<uint64_t>(i) / 2;
    if ((i & 1) || i == count - 1)
      words = philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), epoch,
                           static_cast<uint32_t>(Purpose::shuffle)}},
                         static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const int half = (i & 1) ? 2 : 0;
    const uint64_t draw = (static_cast<uint64_t>(words.word[half + 1]) << 32) | words.word[half];
    const auto product = static_cast<unsigned __int128>(draw) * static_cast<uint64_t>(i + 1);
    std::swap(out[i], out[static_cast<int64_t>(product >> 64)]);
  }
}

}  // namespace sela
