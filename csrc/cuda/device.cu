// Questions about the CUDA devices.
#include <cuda_runtime.h>

#include "sela/device.h"

namespace sela {

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // no driver or no card is an answer here, not an error: clear it
    return 0;
  }
  return count;
}

}  // namespace sela
