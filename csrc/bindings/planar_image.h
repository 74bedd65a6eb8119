#pragma once
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "sela/planes.h"

// An image as planes, as Python hands it over.

namespace sela {

namespace py = pybind11;

using Bytes = py::array_t<uint8_t>;

using Steps = std::array<int32_t, 2>;
using Smooth = std::optional<std::array<bool, 2>>;

/// steps: pixels per chroma sample, (rows, columns); smooth: None = where libjpeg interpolates.
inline Subsampling subsampling_of(const Steps& steps, const Smooth& smooth, int32_t width) {
  for (int32_t step : steps)
    if (!is_step(step))
      throw std::invalid_argument("subsampling: expected 1, 2, 4, 8, 16 or 32 pixels per sample, found " +
                                  std::to_string(step));
  if (!smooth) return libjpeg_subsampling(steps[0], steps[1], width);
  return {steps[0], steps[1], (*smooth)[0], (*smooth)[1]};
}

/// (planes [height, width], top, left, height and width of the image, pixels per chroma sample, smooth, rgb, pixels per
/// luma sample in both directions)
using PlanarTuple = std::tuple<std::vector<Bytes>, int32_t, int32_t, int32_t, int32_t, Steps, Smooth, bool, int32_t>;

inline PlanarImage planar_image(const PlanarTuple& source) {
  const auto& [data, top, left, height, width, steps, smooth, rgb, reduced] = source;
  if (data.size() != 1 && data.size() != 3) throw std::invalid_argument("planes: expected 1 or 3 of them");
  const auto chroma = subsampling_of(steps, smooth, width);
  const Subsampling luma = subsampling_of({reduced, reduced}, std::array<bool, 2>{false, false}, width);
  PlanarImage image = planar_geometry(static_cast<int32_t>(data.size()), luma, chroma, height, width);
  image.rgb = rgb;
  for (size_t c = 0; c < data.size(); ++c) {
    const Bytes& array = data[c];
    if (array.ndim() != 2 || (array.shape(1) > 1 && array.strides(1) != 1) || array.strides(0) < array.shape(1))
      throw std::invalid_argument("planes: expected uint8 [height, width] with the pixels of a row side by side");
    PlaneView& plane = image.plane[c];
    plane.data = array.data();
    plane.stride = array.strides(0);
    plane.top = top / plane.step_y;
    plane.left = left / plane.step_x;
    plane.height = static_cast<int32_t>(array.shape(0));
    plane.width = static_cast<int32_t>(array.shape(1));
  }
  return image;
}

}  // namespace sela
