// The one way to launch a kernel, and what launchers may ask of the device.  Includes the host form of the same
// functions when the SIMT runner stands in for the device.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sela {

/// Throws std::runtime_error: "NAME: WHAT: CUDA's reason; what to do".
inline void check_cuda(cudaError_t status, const char* name, const char* what) {
  if (status == cudaSuccess) return;
  const char* remedy = "run with CUDA_LAUNCH_BLOCKING=1 to see which call failed first";
  if (status == cudaErrorNoKernelImageForDevice)
    remedy = "install with SELA_CUDA_ARCHS set to the device's architecture, or use the CPU";
  else if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver)
    remedy = "install a driver for this version of CUDA, or use the CPU";
  else if (status == cudaErrorMemoryAllocation)
    remedy = "free device memory, or take fewer rows at a time";
  throw std::runtime_error(std::string(name) + ": " + what + ": " + cudaGetErrorString(status) + "; " + remedy);
}

/// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "multiprocessors", "no current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors",
             "device attributes");
  return count;
}

/// Lets a kernel have more dynamic shared memory than the 48 KB that every kernel may have.
template <class Kernel>
void allow_dynamic_shared(const char* name, Kernel kernel, size_t dynamic_shared) {
  if (dynamic_shared > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared)),
        name, "dynamic shared memory");
}

/// Blocks of this kernel that one multiprocessor runs at a time; 0: it cannot run at all.
template <class Kernel>
int resident_blocks(const char* name, Kernel kernel, int threads, size_t dynamic_shared) {
  allow_dynamic_shared(name, kernel, dynamic_shared);
  int count = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, dynamic_shared), name, "occupancy");
  return count;
}

/// Enqueues the kernel on `stream` (a cudaStream_t); waits for nothing. Errors of the launch itself are thrown here.
template <class Kernel, class... Args>
void launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t dynamic_shared, void* stream, Args... args) {
  allow_dynamic_shared(name, kernel, dynamic_shared);
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check_cuda(cudaGetLastError(), name, "launch failed");
}

/// Usable devices; 0 without a driver or a card.
inline int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // no driver or no card is an answer here, not an error: clear it
    return 0;
  }
  return count;
}

}  // namespace sela
#else
#include "simt/launch.h"
#endif
