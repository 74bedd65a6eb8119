// Twins of everything in csrc/cuda for a build without CUDA, so that the API does not change with the build.
#include <stdexcept>

#include "sela/augment.h"
#include "sela/device.h"
#include "sela/logits.h"
#include "sela/rounding.h"
#include "sela/sinkhorn.h"

namespace sela {

int cuda_device_count() {
  return 0;
}

SinkhornWorkspace sinkhorn_workspace_cuda(const SinkhornPass&, SinkhornSample, bool) {
  return {};
}

void sinkhorn_candidates_cuda(const SinkhornPass&, SinkhornSample, double, const void*, const int64_t*, int32_t*,
                              float*, void*) {
  throw std::runtime_error(
      "sinkhorn_candidates: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

void sinkhorn_pass_cuda(const SinkhornPass&, const SinkhornSums&, double*, int64_t*, void*, void*, SinkhornSample,
                        SinkhornMarks) {
  throw std::runtime_error(
      "sinkhorn_pass: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

void store_logits_cuda(const StoreLogits&, int64_t*, void*) {
  throw std::runtime_error(
      "store_logits: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

void find_candidates_cuda(const CandidateSearch&, const DevicePrices&, const CandidateLists&, void*) {
  throw std::runtime_error(
      "find_candidates: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
}

int64_t column_margins_workspace_cuda(int64_t, int64_t) {
  return 0;
}

void column_margins_cuda(const CandidateSearch&, const DevicePrices&, float*, void*, void*) {
  throw std::runtime_error(
      "column_margins: this build has no CUDA kernels; install with nvcc on the PATH, or use the CPU");
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
