// Twins of everything in csrc/cuda for a build without CUDA, so that the API does not change with the build.
#include <stdexcept>

#include "sela/augment.h"
#include "sela/device.h"
#include "sela/jpeg_batch.h"
#include "sela/sinkhorn.h"

namespace sela {

int cuda_device_count() {
  return 0;
}

void decode_jpeg_cuda(const JpegBatchSizes&, const uint8_t*, void*, uint8_t*, uint32_t*, void*) {
  throw std::runtime_error(
      "decode_jpeg: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

SinkhornWorkspace sinkhorn_workspace_cuda(int64_t, int64_t, LogitsType) {
  return {};
}

void sinkhorn_pass_cuda(const SinkhornPass&, const SinkhornSums&, double*, int64_t*, void*, void*) {
  throw std::runtime_error(
      "sinkhorn_pass: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

void augment_resident_cuda(const AugmentOptions&, const ResidentImages&, const int64_t*, int64_t, const DrawKey&,
                           const AugmentParameters*, AugmentParameters*, const AugmentOutput&, void*) {
  throw std::runtime_error("augment: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

void sample_parameters_cuda(const AugmentOptions&, int32_t, int32_t, const int64_t*, int64_t, const DrawKey&,
                            AugmentParameters*, void*) {
  throw std::runtime_error(
      "sample_parameters: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

}  // namespace sela
