// Rows of feature vectors, by addresses: sela_ext.kernels has checked shapes, types and ranges before.
#include "sela/vectors.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace py = pybind11;

namespace sela {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void vector_rows(std::uintptr_t rows, const std::string& type, int64_t width, std::uintptr_t index,
                 std::uintptr_t number, int64_t count, std::uintptr_t mean, std::uintptr_t noise, uint32_t dropout,
                 uint64_t seed, uint32_t epoch, uint32_t view, std::uintptr_t out, std::uintptr_t finite, int threads) {
  VectorRows task;
  task.rows = pointer<const void>(rows);
  task.type = logits_type(type);
  task.width = width;
  task.index = pointer<const int64_t>(index);
  task.number = pointer<const int64_t>(number);
  task.count = count;
  task.mean = pointer<const float>(mean);
  task.noise = pointer<const float>(noise);
  task.dropout = dropout;
  task.seed = seed;
  task.epoch = epoch;
  task.view = view;
  const py::gil_scoped_release release;
  vector_rows_cpu(task, pointer<float>(out), pointer<uint8_t>(finite), threads);
}

}  // namespace

void bind_vectors(py::module_& m) {
  m.def("vector_rows_cpu", &vector_rows, py::arg("rows"), py::arg("type"), py::arg("width"), py::arg("index"),
        py::arg("number"), py::arg("count"), py::arg("mean"), py::arg("noise"), py::arg("dropout"), py::arg("seed"),
        py::arg("epoch"), py::arg("view"), py::arg("out"), py::arg("finite"), py::arg("threads"),
        "Rows of feature vectors in float32, as they are or as noisy views, by addresses (0 = absent).");
  m.attr("most_features") = kMostFeatures;
}

}  // namespace sela
