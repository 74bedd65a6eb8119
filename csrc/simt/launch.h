// The host form of cuda/launch.h: the SIMT runner stands in for the device.
#pragma once
#include "simt/runner.h"

namespace sela {

template <class Kernel, class... Args>
void launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t dynamic_shared, void*, Args... args) {
  const auto thread = [=] { kernel(args...); };
  simt::run_grid(
      name, grid, block, dynamic_shared, [](const void* data) { (*static_cast<const decltype(thread)*>(data))(); },
      &thread);
}

inline int multiprocessors() {
  return simt::multiprocessors();
}

template <class Kernel>
int resident_blocks(const char*, Kernel, int, size_t) {
  return simt::resident_blocks();
}

inline int device_count() {
  return 1;
}

}  // namespace sela
