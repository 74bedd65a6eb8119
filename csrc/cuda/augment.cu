// Launchers of the fused augmentation of resident images: which kernel for which output, and how much shared memory.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/augment_kernels.cuh"
#include "cuda/launch.h"
#include "sela/augment.h"

namespace sela {
namespace {

using augment_cuda::Arguments;

void check(const AugmentOptions& options, const ResidentImages& images) {
  if (images.channels != 1 && images.channels != 3)
    throw std::invalid_argument("augment: expected 1 or 3 channels, found " + std::to_string(images.channels));
  for (int32_t side : {options.size, images.height, images.width})
    if (side < 1 || side > kAugmentCudaSide)
      throw std::invalid_argument("augment: expected images and outputs of 1 to " + std::to_string(kAugmentCudaSide) +
                                  " pixels a side on CUDA, found " + std::to_string(images.height) + " x " +
                                  std::to_string(images.width) + " to " + std::to_string(options.size));
}

/// As many blocks as are resident at once, never more than there is work for.
template <class Kernel>
void launch_over(const char* name, Kernel kernel, int64_t work, int threads, int64_t shared, const Arguments& a,
                 void* stream) {
  const size_t bytes = static_cast<size_t>(shared);
  const int64_t at_once =
      int64_t{std::max(1, resident_blocks(name, kernel, threads, bytes))} * std::max(1, multiprocessors());
  launch(name, kernel, dim3(static_cast<unsigned>(std::min(work, at_once))), threads, bytes, stream, a);
}

template <class T>
void launch_augment(const Arguments& a, int32_t channels, bool channels_last, void* stream) {
  using namespace augment_cuda;
  if (channels == 1)
    launch_over("augment_kernel", augment_kernel<T, 1, false>, a.count, kThreads, a.layout.bytes, a, stream);
  else if (channels_last)
    launch_over("augment_kernel", augment_kernel<T, 3, true>, a.count, kThreads, a.layout.bytes, a, stream);
  else
    launch_over("augment_kernel", augment_kernel<T, 3, false>, a.count, kThreads, a.layout.bytes, a, stream);
}

}  // namespace

void augment_resident_cuda(const AugmentOptions& options, const ResidentImages& images, const int64_t* index,
                           int64_t count, const DrawKey& key, const AugmentParameters* given, AugmentParameters* drawn,
                           const AugmentOutput& out, void* stream) {
  using namespace augment_cuda;
  if (count <= 0) return;
  check(options, images);
  const int32_t size = options.size, channels = images.channels;
  const bool interleaved = out.channels_last && channels == 3;
  const int64_t plane_bytes = int64_t{size} * size * (out.type == PixelType::float32 ? 4 : 2);
  Arguments a{};
  a.options = options;
  a.images = images.data;
  a.image_count = images.count;
  a.height = images.height;
  a.width = images.width;
  a.index = index;
  a.count = count;
  a.seed = key.seed;
  a.epoch = key.epoch;
  a.view = key.view;
  a.given = given;
  a.drawn = drawn;
  a.out = out.data;
  a.aligned = reinterpret_cast<uintptr_t>(out.data) % 16 == 0 && plane_bytes % 16 == 0;
  while ((1 << a.column_bits) < size) ++a.column_bits;
  const int32_t runs = kThreads >> a.column_bits;
  a.run = ((size + runs - 1) / runs + kRows - 1) / kRows * kRows;
  a.inverse_pixels = 1.0f / static_cast<float>(size * size);
  for (int c = 0; c < 3; ++c) {
    a.scale[c] = 1.0f / options.std[c];
    a.shift[c] = -options.mean[c] / options.std[c];
  }
  a.layout = lay_out(size, images.height, images.width, channels);
  switch (out.type) {
    case PixelType::float16:
      return launch_augment<__half>(a, channels, interleaved, stream);
    case PixelType::bfloat16:
      return launch_augment<__nv_bfloat16>(a, channels, interleaved, stream);
    default:
      return launch_augment<float>(a, channels, interleaved, stream);
  }
}

void sample_parameters_cuda(const AugmentOptions& options, int32_t height, int32_t width, const int64_t* index,
                            int64_t count, const DrawKey& key, AugmentParameters* drawn, void* stream) {
  using namespace augment_cuda;
  if (count <= 0) return;
  Arguments a{};
  a.options = options;
  a.height = height;
  a.width = width;
  a.index = index;
  a.count = count;
  a.seed = key.seed;
  a.epoch = key.epoch;
  a.view = key.view;
  a.drawn = drawn;
  launch_over("sample_kernel", sample_kernel, (count + kSampleThreads - 1) / kSampleThreads, kSampleThreads, 0, a,
              stream);
}

}  // namespace sela
