// Twins of everything in csrc/cuda for a build without CUDA, so that the API does not change with the build.
#include "sela/device.h"

namespace sela {

int cuda_device_count() {
  return 0;
}

}  // namespace sela
