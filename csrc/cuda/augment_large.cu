// Launchers of the fused augmentation of images of any size: how many tiles, how many images per round, which launches.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/augment_effects_kernels.cuh"
#include "cuda/augment_large_kernels.cuh"
#include "cuda/launch.h"
#include "sela/augment_device.h"

namespace sela {
namespace {

using augment_cuda::LargeArguments;

/// What a round may leave between its launches, per multiprocessor: on an A100 28 MB, on an H100 35 MB, which stay in
/// its second-level cache of 40 or 50 MB.
constexpr int64_t kStageBytes = int64_t{256} << 10;

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

bool staged(const EffectOptions& effects, const AugmentNeeds& needs) {
  return needs.contrast || needs.effects || effects.sobel;
}

/// How the output is cut into tiles: as wide as the inputs under them fit, if any width does.
struct Tiles {
  int32_t columns, rows_of_tiles, columns_of_tiles;
};
Tiles cut(const AugmentOptions& options, int32_t width) {
  using namespace augment_cuda;
  const int64_t size = options.size;
  const int64_t support = std::max<int64_t>(1, (width + size - 1) / size);
  int64_t count = (size + kLargeThreads - 1) / kLargeThreads, columns = 0;
  for (;; ++count) {
    columns = (size + count - 1) / count;
    const int64_t inputs = std::min<int64_t>(width, int64_t{width} * columns / size + 2 * support + 4);
    if (inputs <= kSpan || columns <= 16) break;
  }
  return {static_cast<int32_t>(columns), static_cast<int32_t>((size + kTileRows - 1) / kTileRows),
          static_cast<int32_t>((size + columns - 1) / columns)};
}

/// Bytes of the workspace for one image of a round, part by part.
struct Parts {
  int64_t stage, spare, partial, tone;
  int64_t sum() const { return stage + spare + partial + tone; }
};
Parts parts(const AugmentOptions& options, const EffectOptions& effects, const AugmentNeeds& needs, int32_t channels,
            const Tiles& tiles) {
  const int64_t plane = round_up(int64_t{options.size} * options.size, 8);
  const int64_t image = channels * plane * static_cast<int64_t>(sizeof(float));
  Parts p = {};
  if (!staged(effects, needs)) return p;
  p.stage = image;
  p.partial = round_up(int64_t{tiles.rows_of_tiles} * tiles.columns_of_tiles * 4, 16);
  if (needs.effects || effects.sobel) p.spare = image;
  if (needs.tone) p.tone = round_up(sizeof(augment_cuda::ToneFacts), 16);
  return p;
}

void check(const AugmentOptions& options, const DeviceImages& images) {
  if (images.channels != 1 && images.channels != 3)
    throw std::invalid_argument("augment: expected 1 or 3 channels, found " + std::to_string(images.channels));
  if (images.height < 1 || images.width < 1)
    throw std::invalid_argument("augment: expected images of at least 1 x 1 pixels, found " +
                                std::to_string(images.height) + " x " + std::to_string(images.width));
  if (options.size < 1 || options.size > 16384)
    throw std::invalid_argument("augment: expected outputs of 1 to 16384 pixels a side on CUDA, found " +
                                std::to_string(options.size));
}

/// Longest blur, pixels.
int32_t blur_reach(const EffectOptions& effects, const AugmentNeeds& needs) {
  const float most = 5.6778424f * needs.blur;
  return most < static_cast<float>(effects.blur_radius) ? static_cast<int32_t>(most) : effects.blur_radius;
}

void launch_tiles(const LargeArguments& a, int64_t blocks, void* stream) {
  using namespace augment_cuda;
  const dim3 grid(static_cast<unsigned>(blocks));
  const dim3 block(static_cast<unsigned>(std::max<int64_t>(64, round_up(a.columns, 32))));
  if (a.planes != nullptr && a.exact)
    launch("tile_kernel", tile_kernel<kExact>, grid, block, 0, stream, a);
  else if (a.planes != nullptr && a.channels == 3)
    launch("tile_kernel", tile_kernel<kPlanes>, grid, block, 0, stream, a);
  else if (a.channels == 3)
    launch("tile_kernel", tile_kernel<kRgb>, grid, block, 0, stream, a);
  else
    launch("tile_kernel", tile_kernel<kOne>, grid, block, 0, stream, a);
}

/// All launches for the images of one round.
void launch_round(const LargeArguments& a, int64_t images, const AugmentNeeds& needs, void* stream) {
  using namespace augment_cuda;
  const int64_t pixels = int64_t{a.options.size} * a.options.size;
  launch_tiles(a, images * a.row_tiles * a.column_tiles, stream);
  if (!staged(a.effect_options, needs)) return;
  const int64_t colour_pixels = int64_t{kLargeThreads} * kColourPixels;
  const dim3 colour_grid(static_cast<unsigned>(images * ((pixels + colour_pixels - 1) / colour_pixels)));
  if (a.channels == 3)
    launch("colour_kernel", colour_kernel<3>, colour_grid, kLargeThreads, 0, stream, a);
  else
    launch("colour_kernel", colour_kernel<1>, colour_grid, kLargeThreads, 0, stream, a);
  if (!needs.effects && !a.effect_options.sobel) return;
  const dim3 grid(static_cast<unsigned>(images * ((pixels + kStepPixels - 1) / kStepPixels)));
  const size_t weights = (static_cast<size_t>(a.reach) + 1) * sizeof(float);
  if (needs.tone) launch("tone_kernel", tone_kernel, grid, kLargeThreads, 0, stream, a);
  if (needs.blur > 0.0f) launch("blur_kernel", blur_kernel, grid, kLargeThreads, weights, stream, a);
  launch("last_kernel", last_kernel, grid, kLargeThreads, weights, stream, a);
  if (a.effect_options.sobel) launch("sobel_kernel", sobel_kernel, grid, kLargeThreads, 0, stream, a);
}

}  // namespace

AugmentWorkspace augment_workspace_cuda(const AugmentOptions& options, const EffectOptions& effect_options,
                                        const DeviceImages& images, int64_t count, const AugmentNeeds& needs) {
  check(options, images);
  const Tiles tiles = cut(options, images.width);
  const int64_t one = parts(options, effect_options, needs, images.channels, tiles).sum();
  const int64_t most_blocks = std::max<int64_t>({int64_t{tiles.rows_of_tiles} * tiles.columns_of_tiles,
                                                 int64_t{options.size} * options.size / augment_cuda::kStepPixels + 1});
  int64_t batch = std::numeric_limits<int32_t>::max() / most_blocks;
  if (one > 0) {
    const int64_t processors = std::max(1, multiprocessors());
    batch = std::min(batch, std::max<int64_t>(1, kStageBytes * processors / one));
    // Whole waves of blocks: the rest of a wave would keep the next launch waiting with most of the device idle.
    const int64_t wave = augment_cuda::kTileBlocks<augment_cuda::kRgb> * processors;
    const int64_t tiles_per_image = int64_t{tiles.rows_of_tiles} * tiles.columns_of_tiles;
    const int64_t waves = batch * tiles_per_image / wave;
    if (waves > 0) batch = std::max<int64_t>(1, waves * wave / tiles_per_image);
  }
  batch = std::max<int64_t>(1, std::min(batch, count));
  return {round_up(count * static_cast<int64_t>(sizeof(augment_cuda::LargePlan)), 16) + batch * one, batch};
}

void augment_device_cuda(const AugmentOptions& options, const EffectOptions& effect_options, const DeviceImages& images,
                         int64_t count, const AugmentNeeds& needs, const DrawKey& key, const AugmentParameters* given,
                         const AugmentEffects* given_effects, AugmentParameters* drawn, void* workspace,
                         const AugmentOutput& out, void* stream) {
  using namespace augment_cuda;
  if (count <= 0) return;
  check(options, images);
  LargeArguments a{};
  a.reach = blur_reach(effect_options, needs);
  if (needs.blur > 0.0f && a.reach > kBlurCudaRadius)
    throw std::invalid_argument("augment: expected a blur of at most " + std::to_string(kBlurCudaRadius) +
                                " pixels from its middle on CUDA, found " + std::to_string(a.reach));
  const Tiles tiles = cut(options, images.width);
  const Parts one = parts(options, effect_options, needs, images.channels, tiles);
  const int64_t batch = augment_workspace_cuda(options, effect_options, images, count, needs).batch;
  const int64_t pixels = int64_t{options.size} * options.size;
  const int32_t channels = effect_options.sobel ? 2 : images.channels;
  const int64_t value = out.type == PixelType::float32 ? 4 : 2;
  a.options = options;
  a.effect_options = effect_options;
  a.resident = images.resident;
  a.crops = images.crops;
  a.planes = images.planes;
  a.index = images.index;
  a.channels = images.channels;
  a.exact = images.exact;
  a.count = count;
  a.seed = key.seed;
  a.epoch = key.epoch;
  a.view = key.view;
  a.given = given;
  a.given_effects = given_effects;
  a.drawn = drawn;
  a.plane = static_cast<int32_t>(round_up(pixels, 8));
  a.columns = tiles.columns;
  a.row_tiles = tiles.rows_of_tiles;
  a.column_tiles = tiles.columns_of_tiles;
  a.type = out.type;
  a.last = out.channels_last && channels > 1;
  const bool whole = (a.last ? pixels * channels : pixels) * value % 16 == 0;
  a.aligned = reinterpret_cast<uintptr_t>(out.data) % 16 == 0 && whole;
  a.inverse_pixels = 1.0f / static_cast<float>(pixels);
  for (int c = 0; c < 3; ++c) {
    a.scale[c] = 1.0f / options.std[c];
    a.shift[c] = -options.mean[c] / options.std[c];
  }
  char* room = static_cast<char*>(workspace);
  a.plans = reinterpret_cast<LargePlan*>(room);
  room += round_up(count * static_cast<int64_t>(sizeof(LargePlan)), 16);
  if (one.stage > 0) a.stage = reinterpret_cast<float*>(room);
  room += batch * one.stage;
  if (one.spare > 0) a.spare = reinterpret_cast<float*>(room);
  room += batch * one.spare;
  if (one.partial > 0) a.partial = reinterpret_cast<float*>(room);
  room += batch * one.partial;
  if (one.tone > 0) a.tone = reinterpret_cast<ToneFacts*>(room);

  launch("plan_kernel", plan_kernel, dim3(static_cast<unsigned>((count + kPlanThreads - 1) / kPlanThreads)),
         kPlanThreads, 0, stream, a);
  for (int64_t first = 0; first < count; first += batch) {
    LargeArguments round = a;
    round.plans = a.plans + first;
    if (a.planes != nullptr) round.planes = a.planes + first;
    round.out = static_cast<char*>(out.data) + first * channels * pixels * value;
    launch_round(round, std::min(batch, count - first), needs, stream);
  }
}

}  // namespace sela
