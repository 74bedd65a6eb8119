// Augmentation of images of any size on a CUDA device: records of what lies there, the workspace, the launches.
#include "sela/augment_device.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"
#include "bindings/planar_image.h"

namespace sela {
namespace {

static_assert(sizeof(ImageView) == 24, "ImageView must match the numpy record CROPS");

/// (contrast, tone, effects, blur)
using NeedsTuple = std::tuple<bool, bool, bool, float>;

AugmentNeeds needs_of(const NeedsTuple& tuple) {
  AugmentNeeds needs;
  std::tie(needs.contrast, needs.tone, needs.effects, needs.blur) = tuple;
  return needs;
}

int64_t bind_workspace(const AugmentOptions& options, const EffectOptions& effect_options, int32_t channels,
                       int32_t height, int32_t width, int64_t count, const NeedsTuple& needs) {
  DeviceImages images = {};
  images.channels = channels;
  images.height = height;
  images.width = width;
  return augment_workspace_cuda(options, effect_options, images, count, needs_of(needs)).bytes;
}

void bind_run(const AugmentOptions& options, const EffectOptions& effect_options, uintptr_t resident,
              int64_t resident_count, uintptr_t crops, uintptr_t planes, bool exact, int32_t height, int32_t width,
              int32_t channels, uintptr_t index, int64_t count, const NeedsTuple& needs, uint64_t seed, uint32_t epoch,
              uint32_t view, uintptr_t given, uintptr_t given_effects, uintptr_t drawn, uintptr_t workspace,
              uintptr_t out, const std::string& dtype, bool channels_last, uintptr_t stream) {
  if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16")
    throw std::invalid_argument("dtype: expected float32, float16 or bfloat16 on CUDA, found " + dtype);
  DeviceImages images = {};
  if (resident != 0)
    images.resident = {reinterpret_cast<const uint8_t*>(resident), resident_count, height, width, channels};
  images.crops = reinterpret_cast<const ImageView*>(crops);
  images.planes = reinterpret_cast<const PlanarImage*>(planes);
  images.index = reinterpret_cast<const int64_t*>(index);
  images.channels = channels;
  images.height = height;
  images.width = width;
  images.exact = exact;
  py::gil_scoped_release unlocked;
  augment_device_cuda(
      options, effect_options, images, count, needs_of(needs), {seed, epoch, view},
      reinterpret_cast<const AugmentParameters*>(given), reinterpret_cast<const AugmentEffects*>(given_effects),
      reinterpret_cast<AugmentParameters*>(drawn), reinterpret_cast<void*>(workspace),
      {reinterpret_cast<void*>(out), pixel_type(dtype), channels_last}, reinterpret_cast<void*>(stream));
}

/// Records of images whose planes lie at `addresses`, [count, 3], row after row without gaps.
py::array_t<uint8_t> bind_plane_records(const std::vector<PlanarTuple>& source,
                                        const py::array_t<int64_t, py::array::c_style>& addresses) {
  const int64_t count = static_cast<int64_t>(source.size());
  if (addresses.ndim() != 2 || addresses.shape(0) != count || addresses.shape(1) != 3)
    throw std::invalid_argument("addresses: expected [" + std::to_string(count) + ", 3]");
  py::array_t<uint8_t> out({count, static_cast<int64_t>(sizeof(PlanarImage))});
  auto* records = static_cast<PlanarImage*>(static_cast<void*>(out.mutable_data()));
  for (int64_t i = 0; i < count; ++i) {
    PlanarImage image = planar_image(source[static_cast<size_t>(i)]);
    for (int32_t c = 0; c < image.count; ++c) {
      image.plane[c].data = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(addresses.at(i, c)));
      image.plane[c].stride = image.plane[c].width;
    }
    records[i] = image;
  }
  return out;
}

void bind_check_planes(const AugmentOptions& options, const std::vector<PlanarTuple>& source,
                       const py::array& parameters) {
  const int64_t count = static_cast<int64_t>(source.size());
  if (parameters.itemsize() != static_cast<py::ssize_t>(sizeof(AugmentParameters)) || parameters.size() != count ||
      !(parameters.flags() & py::array::c_style))
    throw std::invalid_argument("params: expected a contiguous array of " + std::to_string(count) +
                                " records of 60 bytes");
  const auto* p = static_cast<const AugmentParameters*>(parameters.data());
  for (int64_t i = 0; i < count; ++i) {
    const PlanarImage image = planar_image(source[static_cast<size_t>(i)]);
    if (const char* expected = check_parameters(options, p[i], image.height, image.width))
      throw std::invalid_argument("params[" + std::to_string(i) + "]: expected " + expected);
    if (const char* expected = check_planes(options, p[i], image))
      throw std::invalid_argument("planes[" + std::to_string(i) + "]: expected " + expected);
  }
}

}  // namespace

void bind_augment_device(py::module_& m) {
  m.def("augment_workspace_cuda", &bind_workspace, py::arg("options"), py::arg("effect_options"), py::arg("channels"),
        py::arg("height"), py::arg("width"), py::arg("count"), py::arg("needs"),
        "Bytes that augment_device_cuda needs for its workspace; needs: (contrast, tone, effects, longest blur).");
  m.def("augment_device_cuda", &bind_run, py::arg("options"), py::arg("effect_options"), py::arg("resident"),
        py::arg("resident_count"), py::arg("crops"), py::arg("planes"), py::arg("exact"), py::arg("height"),
        py::arg("width"), py::arg("channels"), py::arg("index"), py::arg("count"), py::arg("needs"), py::arg("seed"),
        py::arg("epoch"), py::arg("view"), py::arg("given"), py::arg("given_effects"), py::arg("drawn"),
        py::arg("workspace"), py::arg("out"), py::arg("dtype"), py::arg("channels_last"), py::arg("stream"),
        "The fused pass over images of any size of the current CUDA device, by device addresses (0 = absent).");
  m.def("plane_records", &bind_plane_records, py::arg("source"), py::arg("addresses"),
        "Records for augment_device_cuda of images as augment_planes takes them, whose planes lie at these addresses.");
  m.def("check_planes", &bind_check_planes, py::arg("options"), py::arg("source"), py::arg("parameters"),
        "Raises ValueError for planes that lack samples, or parameters that do not fit them.");
}

}  // namespace sela
