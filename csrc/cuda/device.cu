// Questions about the CUDA devices.
#include "cuda/launch.h"
#include "sela/device.h"

namespace sela {

int cuda_device_count() {
  return device_count();
}

}  // namespace sela
