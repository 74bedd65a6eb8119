// Batches of JPEG files for a CUDA device: a plan of the upload, its bytes, and the launch.
#include "sela/jpeg_batch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace py = pybind11;

namespace sela {
namespace {

using Four = std::array<int64_t, 4>;

py::buffer_info bytes_of(const py::buffer& buffer) {
  py::buffer_info info = buffer.request();
  if (info.itemsize != 1 || info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != 1))
    throw std::invalid_argument("jpeg: expected contiguous bytes");
  return info;
}

/// A plan, and the buffers that it points to.
class Batch {
 public:
  Batch(const std::vector<py::buffer>& files, const std::vector<std::optional<py::buffer>>& indexes,
        const std::vector<Four>& boxes, int64_t most_coefficients, int64_t most_pixels) {
    if (indexes.size() != files.size() || boxes.size() != files.size())
      throw std::invalid_argument("files, indexes and boxes differ in length");
    std::vector<JpegRequest> requests(files.size());
    held_.reserve(2 * files.size());
    for (size_t i = 0; i < files.size(); ++i) {
      JpegRequest& request = requests[i];
      held_.push_back(bytes_of(files[i]));
      request.data = static_cast<const uint8_t*>(held_.back().ptr);
      request.size = static_cast<size_t>(held_.back().size);
      if (indexes[i]) {
        held_.push_back(bytes_of(*indexes[i]));
        request.index = static_cast<const uint8_t*>(held_.back().ptr);
        request.index_size = static_cast<size_t>(held_.back().size);
      }
      request.box = {boxes[i][0], boxes[i][1], boxes[i][2], boxes[i][3]};
    }
    const py::gil_scoped_release unlocked;
    plan_.emplace(requests.data(), static_cast<int64_t>(requests.size()), most_coefficients, most_pixels);
  }

  const JpegBatchPlan& plan() const { return *plan_; }

  void write(uintptr_t out) const {
    const py::gil_scoped_release unlocked;
    plan().write(reinterpret_cast<uint8_t*>(out));
  }

  /// One dictionary per request: "status"; if it is "ok" also "image", "colour", "box", "entries", "scan_bytes" and
  /// "planes".
  py::list images() const {
    py::list out;
    for (const JpegPlanned& planned : plan().planned()) {
      py::dict one;
      one["status"] = name_of(planned.status);
      if (planned.status == JpegStatus::ok) {
        one["image"] = planned.image;
        one["colour"] = name_of(planned.file.colour);
        one["box"] = py::make_tuple(planned.box.top, planned.box.left, planned.box.height, planned.box.width);
        one["entries"] = planned.entries;
        one["scan_bytes"] = planned.scan_bytes;
        py::list planes;
        for (int c = 0; c < planned.file.components; ++c) {
          const JpegPlane& plane = planned.layout.plane[c];
          py::dict shape;
          shape["offset"] = planned.planes + plane.offset;
          shape["stride"] = plane.stride;
          shape["height"] = plane.height;
          shape["width"] = plane.width;
          shape["top"] = plane.top;
          shape["left"] = plane.left;
          shape["full_height"] = plane.full_height;
          shape["full_width"] = plane.full_width;
          shape["step_y"] = plane.step_y;
          shape["step_x"] = plane.step_x;
          shape["smooth_y"] = plane.smooth_y;
          shape["smooth_x"] = plane.smooth_x;
          planes.append(shape);
        }
        one["planes"] = planes;
      }
      out.append(one);
    }
    return out;
  }

 private:
  std::vector<py::buffer_info> held_;
  std::optional<JpegBatchPlan> plan_;
};

void decode(const Batch& batch, uintptr_t upload, uintptr_t workspace, uintptr_t planes, uintptr_t status,
            uintptr_t stream) {
  const py::gil_scoped_release unlocked;
  decode_jpeg_cuda(batch.plan().sizes(), reinterpret_cast<const uint8_t*>(upload), reinterpret_cast<void*>(workspace),
                   reinterpret_cast<uint8_t*>(planes), reinterpret_cast<uint32_t*>(status),
                   reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_jpeg_batch(py::module_& m) {
  const auto number = [](int64_t JpegBatchSizes::* member) {
    return [member](const Batch& batch) { return batch.plan().sizes().*member; };
  };
  py::class_<Batch>(m, "JpegBatch", py::module_local(), "What a CUDA device needs of some indexed JPEG files.")
      .def(py::init<const std::vector<py::buffer>&, const std::vector<std::optional<py::buffer>>&,
                    const std::vector<Four>&, int64_t, int64_t>(),
           py::arg("files"), py::arg("indexes"), py::arg("boxes"), py::arg("most_coefficients"), py::arg("most_pixels"))
      .def("images", &Batch::images, "What became of each file that was taken, and where its planes will lie.")
      .def("write", &Batch::write, py::arg("out"), "Writes the upload to an address.")
      .def_property_readonly("taken", [](const Batch& batch) { return batch.plan().taken(); })
      .def_property_readonly("upload_bytes", number(&JpegBatchSizes::bytes))
      .def_property_readonly("coefficient_bytes", number(&JpegBatchSizes::coefficient_bytes))
      .def_property_readonly("plane_bytes", number(&JpegBatchSizes::plane_bytes))
      .def_property_readonly("image_count", number(&JpegBatchSizes::image_count), "Statuses that the device writes.")
      .def_property_readonly("workspace_bytes", number(&JpegBatchSizes::workspace_bytes))
      .def_property_readonly("work_count", number(&JpegBatchSizes::work_count), "Blocks of threads that decode.")
      .def_property_readonly("tile_count", number(&JpegBatchSizes::tile_count), "Warps that transform.");
  m.def("decode_jpeg_cuda", &decode, py::arg("batch"), py::arg("upload"), py::arg("workspace"), py::arg("planes"),
        py::arg("status"), py::arg("stream"),
        "Planes of a batch whose upload lies on the current CUDA device, by device addresses.");
}

}  // namespace sela
