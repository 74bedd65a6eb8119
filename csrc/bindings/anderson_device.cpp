// Anderson's step on a CUDA device, by addresses: sela_ext.kernels has checked shapes, types and devices before.
#include "sela/anderson_device.h"

#include <cstdint>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace sela {
namespace {

void step(std::uintptr_t columns, std::uintptr_t potential, std::uintptr_t next, std::uintptr_t target,
          std::uintptr_t vectors, std::uintptr_t state, int64_t cols, double unit, double faint, double restart,
          double cap, bool accelerate, bool round, std::uintptr_t stream) {
  AndersonStep a;
  a.columns = reinterpret_cast<const int64_t*>(columns);
  a.potential = reinterpret_cast<const double*>(potential);
  a.next = reinterpret_cast<double*>(next);
  a.target = reinterpret_cast<const double*>(target);
  a.vectors = reinterpret_cast<double*>(vectors);
  a.state = reinterpret_cast<AndersonDeviceState*>(state);
  a.cols = cols;
  a.unit = unit;
  a.faint = faint;
  a.restart = restart;
  a.cap = cap;
  a.accelerate = accelerate;
  a.round = round;
  const py::gil_scoped_release release;
  anderson_step_cuda(a, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_anderson_device(py::module_& m) {
  m.attr("ANDERSON_MEMORY") = kAndersonMemory;
  m.attr("ANDERSON_VECTORS") = static_cast<int>(kAndersonVectors);
  m.def("anderson_step_cuda", &step, py::arg("columns"), py::arg("potential"), py::arg("next"), py::arg("target"),
        py::arg("vectors"), py::arg("state"), py::arg("cols"), py::arg("unit"), py::arg("faint"), py::arg("restart"),
        py::arg("cap"), py::arg("accelerate"), py::arg("round"), py::arg("stream"),
        "The next potential from the column sums of a pass, by device addresses.");
}

}  // namespace sela
