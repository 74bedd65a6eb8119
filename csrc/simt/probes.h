// Small kernels that show what the runner does with one feature of CUDA each (test_runner.py).
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <string>

namespace sela::simt {

/// What every probe is given; a to c mean what the probe's comment says.
struct ProbeArguments {
  const void* in = nullptr;
  void* out = nullptr;
  int a = 0, b = 0, c = 0;
};

/// Runs the probe of this name for elements of this type (int32, uint32, uint64, float32, float64, float16, bfloat16).
void run_probe(const std::string& name, const std::string& type, const ProbeArguments& arguments, dim3 grid, dim3 block,
               size_t dynamic_shared);

}  // namespace sela::simt
