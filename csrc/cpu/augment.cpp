// Drives the image loops: draws parameters, checks them, shares images out over threads, picks the instruction set.
#include "sela/augment.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/augment_loops.h"
#include "sela/dispatch.h"
#include "sela/parallel.h"
#include "sela/resample.h"

namespace sela {
namespace {

/// Images that a worker takes at a time.
constexpr int64_t kBlockImages = 16;

/// A thread costs about as much to start as this many values to read or write (some 30 microseconds).
constexpr int64_t kThreadValues = 1 << 16;

int64_t round_up(int64_t n) {
  return (n + kScratchLanes - 1) / kScratchLanes * kScratchLanes;
}

/// Floats of scratch for one image; the layout is in augment_loops.cpp.
int64_t scratch_floats(const AugmentOptions& options, const ImageView& image, int32_t channels,
                       const AugmentParameters& p) {
  const bool center = options.crop == Crop::center;
  const int64_t height = center ? image.height : p.height, width = center ? image.width : p.width;
  const int64_t size = options.size, padded = round_up(size);
  const int64_t taps_x = most_taps(width, resampled_length(options, p.width));
  const int64_t taps_y = most_taps(height, resampled_length(options, p.height));
  const int64_t planes = channels * (round_up(size * size) + 2 * kScratchLanes);
  const int64_t middle = (size + 2) * channels * padded;
  const int64_t row = kBlockRows * channels * (round_up(width + taps_x) + 2 * kScratchLanes);
  return planes + middle + row + (6 + taps_x + taps_y) * padded + 10 * kScratchLanes;
}

void augment_image(Isa isa, const AugmentJob& job) {
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

void augment_images(const AugmentOptions& options, const ImageView* images, int32_t channels,
                    const AugmentParameters* parameters, int64_t count, const AugmentOutput& out, int threads) {
  if (count <= 0) return;
  const Isa isa = cpu_isa();
  const int64_t values = int64_t{channels} * options.size * options.size;
  const int64_t bytes = values * (out.type == PixelType::float32 ? 4 : 2);
  if (threads <= 0) threads = available_threads();
  const int64_t pixels = int64_t{images[0].height} * images[0].width;
  const int64_t work = count * std::max(values, channels * pixels);
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / (2 * kThreadValues))));
  const int64_t per_block = std::max<int64_t>(1, std::min(kBlockImages, (count + threads - 1) / threads));
  const int64_t blocks = (count + per_block - 1) / per_block;
  struct Scratch {
    std::unique_ptr<float[]> data;
    int64_t floats = 0;
  };
  std::vector<Scratch> scratch(static_cast<size_t>(std::min<int64_t>(threads, blocks)));

  parallel_blocks(blocks, threads, [&](int64_t block, int worker) {
    Scratch& mine = scratch[static_cast<size_t>(worker)];
    const int64_t end = std::min(count, (block + 1) * per_block);
    for (int64_t i = block * per_block; i < end; ++i) {
      if (i + 1 < end) prefetch(images[i + 1].data, images[i + 1].height * images[i + 1].row_stride);
      const int64_t needed = scratch_floats(options, images[i], channels, parameters[i]);
      if (mine.floats < needed) {
        mine.data.reset(new float[static_cast<size_t>(needed)]());
        mine.floats = needed;
      }
      augment_image(isa, {&options, images[i], channels, &parameters[i], static_cast<char*>(out.data) + i * bytes,
                          out.type, out.channels_last, mine.data.get()});
    }
  });
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
