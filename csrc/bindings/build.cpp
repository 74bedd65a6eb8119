// What this build holds: version, CUDA, instruction set, compiler.
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "sela/device.h"
#include "sela/dispatch.h"

namespace py = pybind11;

namespace sela {
namespace {

[[maybe_unused]] std::vector<std::string> split_words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

py::dict build_info() {
  py::dict info;
  info["version"] = SELA_VERSION;
  const std::string cuda_version = SELA_CUDA_VERSION;  // empty without CUDA
  info["cuda"] = !cuda_version.empty();
  info["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::str(cuda_version);
  info["cuda_archs"] = split_words(SELA_CUDA_ARCHS);
  info["cuda_ptx"] = split_words(SELA_CUDA_PTX);
  info["cpu_isa"] = isa_name(cpu_isa());
  info["compiler"] = SELA_COMPILER;
  return info;
}

}  // namespace

void bind_build(py::module_& m) {
  m.def("build_info", &build_info, "Version, CUDA version and architectures, CPU instruction set in use, compiler.");
  m.def("cuda_device_count", &cuda_device_count, "Number of CUDA devices; 0 without CUDA, without a driver or a card.");
}

}  // namespace sela
