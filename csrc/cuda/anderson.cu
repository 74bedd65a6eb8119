// Launcher of Anderson's step between two passes.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/anderson_kernels.cuh"
#include "cuda/launch.h"
#include "sela/anderson_device.h"

namespace sela {

void anderson_step_cuda(const AndersonStep& step, void* stream) {
  using namespace anderson_cuda;
  if (step.cols < 1)
    throw std::invalid_argument("anderson_step: expected columns >= 1, found " + std::to_string(step.cols));
  const int64_t warps = (step.cols + kWarp - 1) / kWarp;
  const int threads = static_cast<int>(std::min<int64_t>(kAndersonThreads, warps * kWarp));
  launch("anderson_kernel", anderson_kernel, dim3(1), dim3(threads), 0, stream, step);
}

}  // namespace sela
