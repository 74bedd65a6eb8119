// The JPEG decoder: statuses as words, pixels and planes as numpy arrays.  sela_ext.kernels decides what becomes of
// files that are not decoded here.
#include "sela/jpeg.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace py = pybind11;

namespace sela {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

struct Input {
  py::buffer_info info;
  const uint8_t* data;
  size_t size;
};

Input input_of(const py::buffer& buffer) {
  py::buffer_info info = buffer.request();
  if (info.itemsize != 1 || info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != 1))
    throw std::invalid_argument("jpeg: expected contiguous bytes");
  const uint8_t* data = static_cast<const uint8_t*>(info.ptr);
  const size_t size = static_cast<size_t>(info.size);
  return {std::move(info), data, size};
}

/// Checks what the caller has looked up in the headers before; a height of 0 means the whole image.
JpegBox box_of(const JpegFile& file, const JpegBox& box, int scale) {
  if (scale != 1 && scale != 2 && scale != 4 && scale != 8)
    throw std::invalid_argument("scale: expected 1, 2, 4 or 8, found " + std::to_string(scale));
  const int64_t height = jpeg_scaled(file.height, scale), width = jpeg_scaled(file.width, scale);
  if (scale > std::min(file.height, file.width))
    throw std::invalid_argument("scale: expected at most the " + std::to_string(std::min(file.height, file.width)) +
                                " pixels of the shorter side, found " + std::to_string(scale));
  if (box.height == 0) return {0, 0, height, width};
  if (box.top < 0 || box.left < 0 || box.height < 1 || box.width < 1 || box.top > height - box.height ||
      box.left > width - box.width)
    throw std::invalid_argument("box: expected one within " + std::to_string(height) + " x " + std::to_string(width));
  return box;
}

/// A file whose headers are read, with its index if it has one.
struct Opened {
  Input input;
  JpegFile file;
  JpegStatus status;
  JpegIndex index;
  bool indexed = false;

  Opened(const py::buffer& data, const py::object& index_bytes)
      : input(input_of(data)), status(read_jpeg_header(input.data, input.size, file)) {
    if (status != JpegStatus::ok || index_bytes.is_none()) return;
    const Input given = input_of(py::cast<py::buffer>(index_bytes));
    indexed = read_jpeg_index(given.data, given.size, input.data, input.size, file, index);
    if (!indexed) status = JpegStatus::foreign_index;
  }
  const JpegIndex* index_or_null() const { return indexed ? &index : nullptr; }
};

py::object index_bytes(const Opened& opened, const JpegIndex& built, bool build) {
  if (!build) return py::none();
  const std::vector<uint8_t> bytes = write_jpeg_index(opened.input.data, opened.input.size, opened.file, built);
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

py::dict jpeg_header(const py::buffer& data) {
  const Opened opened(data, py::none());
  py::dict out;
  out["status"] = name_of(opened.status);
  if (opened.status != JpegStatus::ok) return out;
  const JpegFile& file = opened.file;
  py::list sampling;
  for (int c = 0; c < file.components; ++c) sampling.append(py::make_tuple(file.component[c].h, file.component[c].v));
  out["height"] = file.height;
  out["width"] = file.width;
  out["colour"] = name_of(file.colour);
  out["sampling"] = py::tuple(sampling);
  out["restart_interval"] = file.restart_interval;
  return out;
}

py::tuple jpeg_rgb(const py::buffer& data, int64_t top, int64_t left, int64_t height, int64_t width, int scale,
                   const py::object& index, bool build, int64_t max_pixels, const std::string& isa) {
  const Opened opened(data, index);
  if (opened.status != JpegStatus::ok) return py::make_tuple(name_of(opened.status), py::none(), py::none());
  if (opened.file.height * opened.file.width > max_pixels) return py::make_tuple("too large", py::none(), py::none());
  const JpegBox box = box_of(opened.file, {top, left, height, width}, scale);
  const Isa chosen = isa_of(isa);
  Bytes rgb({box.height, box.width, int64_t{3}});
  uint8_t* const out = rgb.mutable_data();
  JpegIndex built;
  JpegStatus status = JpegStatus::ok;
  {
    const py::gil_scoped_release release;
    status = decode_jpeg_rgb(opened.input.data, opened.input.size, opened.file, box, scale, out, opened.index_or_null(),
                             build ? &built : nullptr, chosen);
  }
  if (status != JpegStatus::ok) return py::make_tuple(name_of(status), py::none(), py::none());
  return py::make_tuple("ok", rgb, index_bytes(opened, built, build));
}

py::tuple jpeg_planes(const py::buffer& data, int64_t top, int64_t left, int64_t height, int64_t width, int scale,
                      const py::object& index, bool build, int64_t max_pixels, const std::string& isa) {
  const Opened opened(data, index);
  if (opened.status != JpegStatus::ok) return py::make_tuple(name_of(opened.status), py::none(), py::none());
  if (opened.file.height * opened.file.width > max_pixels) return py::make_tuple("too large", py::none(), py::none());
  const JpegBox box = box_of(opened.file, {top, left, height, width}, scale);
  const JpegLayout layout = jpeg_layout(opened.file, box, scale);
  const Isa chosen = isa_of(isa);
  Bytes memory(layout.bytes);
  uint8_t* const planes = memory.mutable_data();
  JpegIndex built;
  JpegStatus status = JpegStatus::ok;
  {
    const py::gil_scoped_release release;
    status = decode_jpeg_planes(opened.input.data, opened.input.size, opened.file, layout, planes,
                                opened.index_or_null(), build ? &built : nullptr, chosen);
  }
  if (status != JpegStatus::ok) return py::make_tuple(name_of(status), py::none(), py::none());
  py::list out;
  for (int c = 0; c < opened.file.components; ++c) {
    const JpegPlane& plane = layout.plane[c];
    py::dict one;
    one["samples"] =
        py::array_t<uint8_t>({plane.height, plane.width}, {plane.stride, int64_t{1}}, planes + plane.offset, memory);
    one["top"] = plane.top;
    one["left"] = plane.left;
    one["full_height"] = plane.full_height;
    one["full_width"] = plane.full_width;
    one["step_y"] = plane.step_y;
    one["step_x"] = plane.step_x;
    one["smooth_y"] = plane.smooth_y;
    one["smooth_x"] = plane.smooth_x;
    out.append(one);
  }
  return py::make_tuple("ok", py::make_tuple(name_of(opened.file.colour), py::tuple(out)),
                        index_bytes(opened, built, build));
}

}  // namespace

const char* name_of(JpegStatus status) {
  switch (status) {
    case JpegStatus::ok:
      return "ok";
    case JpegStatus::unsupported:
      return "unsupported";
    case JpegStatus::damaged:
      return "damaged";
    default:
      return "foreign index";
  }
}

const char* name_of(JpegColour colour) {
  return colour == JpegColour::grey ? "grey" : colour == JpegColour::ycc ? "ycc" : "rgb";
}

void bind_jpeg(py::module_& m) {
  m.def("jpeg_header", &jpeg_header, py::arg("data"),
        "What the headers say; status \"ok\" if the file may be decoded.");
  m.def("jpeg_rgb", &jpeg_rgb, py::arg("data"), py::arg("top"), py::arg("left"), py::arg("height"), py::arg("width"),
        py::arg("scale"), py::arg("index"), py::arg("build"), py::arg("max_pixels"), py::arg("isa"),
        "(status, uint8 [height, width, 3], index); height 0 = the whole image.");
  m.def("jpeg_planes", &jpeg_planes, py::arg("data"), py::arg("top"), py::arg("left"), py::arg("height"),
        py::arg("width"), py::arg("scale"), py::arg("index"), py::arg("build"), py::arg("max_pixels"), py::arg("isa"),
        "(status, (colour, planes), index); height 0 = the whole image.");
}

}  // namespace sela
