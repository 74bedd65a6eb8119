// The test module _simt: all that sela_ext._core has, its CUDA kernels executed by the SIMT runner, and the runner's
// own switches. Addresses that _core wants on a device are addresses of host memory here.
#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"
#include "simt/planted.h"
#include "simt/probes.h"
#include "simt/runner.h"

namespace py = pybind11;

namespace {

py::dict statistics() {
  const sela::simt::Statistics s = sela::simt::statistics();
  py::dict counts;
  counts["launches"] = s.launches;
  counts["blocks"] = s.blocks;
  counts["threads"] = s.threads;
  counts["switches"] = s.switches;
  counts["barriers"] = s.barriers;
  counts["warp_operations"] = s.warp_operations;
  counts["dynamic_shared"] = s.dynamic_shared;
  return counts;
}

using Shape = std::array<unsigned, 3>;

dim3 shape(const Shape& sizes) {
  return dim3(sizes[0], sizes[1], sizes[2]);
}

void probe(const std::string& name, const std::string& type, uintptr_t in, uintptr_t out, const Shape& grid,
           const Shape& block, size_t dynamic_shared, int a, int b, int c) {
  const sela::simt::ProbeArguments arguments = {reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), a, b,
                                                c};
  sela::simt::run_probe(name, type, arguments, shape(grid), shape(block), dynamic_shared);
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "sela_ext._core with its CUDA kernels executed on the CPU, thread by thread. For tests.";
  py::register_exception<sela::simt::Error>(m, "SimtError", PyExc_RuntimeError);
  m.attr("variant") = sela::simt::variant();
  m.def("set_schedule", &sela::simt::set_schedule, py::arg("seed"),
        "0: blocks, warps and lanes run in order; any other seed: in a shuffled order.");
  m.def("set_device", &sela::simt::set_device, py::arg("multiprocessors"), py::arg("resident_blocks"),
        "What the launchers believe of the device.");
  m.def("statistics", &statistics, "Counts over all launches of this process.");
  m.def("planted_names", &sela::simt::planted_names, "The planted bugs.");
  m.def("planted", &sela::simt::run_planted, py::arg("name"), py::arg("with_bug") = true,
        "Runs the kernel of a planted bug, with it or without; returns what the kernel wrote.");
  m.def("probe", &probe, py::arg("name"), py::arg("type"), py::arg("input"), py::arg("output"), py::arg("grid"),
        py::arg("block"), py::arg("dynamic_shared") = 0, py::arg("a") = 0, py::arg("b") = 0, py::arg("c") = 0,
        "Runs one of the kernels in csrc/simt/probes.cu on arrays at these addresses.");
  sela::bind_all(m);
}
