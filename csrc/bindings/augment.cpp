// Augmentation: options, sampled parameters and effects, the fused pass, the shuffle.
#include "sela/augment.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"
#include "bindings/planar_image.h"
#include "sela/planes.h"

namespace py = pybind11;

namespace sela {

PixelType pixel_type(const std::string& dtype) {
  if (dtype == "float32") return PixelType::float32;
  if (dtype == "float16") return PixelType::float16;
  if (dtype == "bfloat16") return PixelType::bfloat16;
  if (dtype == "uint8") return PixelType::uint8;
  throw std::invalid_argument("dtype: expected float32, float16, bfloat16 or uint8, found " + dtype);
}

namespace {

using Pair = std::array<float, 2>;
using Triple = std::array<float, 3>;
using Longs = py::array_t<int64_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

Crop crop_of(const std::string& name) {
  if (name == "random") return Crop::random;
  if (name == "center") return Crop::center;
  if (name == "resize") return Crop::resize;
  throw std::invalid_argument("crop: expected random, center or resize, found " + name);
}

AugmentOptions make_options(int32_t size, const std::string& crop, int32_t resize, Pair scale, Pair log_ratio,
                            Pair ratio, float flip_probability, float gray_probability, float jitter_probability,
                            Pair brightness, Pair contrast, Pair saturation, Pair hue, bool gray_first, Triple mean,
                            Triple std) {
  AugmentOptions o;
  o.size = size;
  o.crop = crop_of(crop);
  o.resize = resize;
  o.flip_probability = flip_probability;
  o.gray_probability = gray_probability;
  o.jitter_probability = jitter_probability;
  o.gray_first = gray_first;
  for (int i = 0; i < 2; ++i) {
    o.scale[i] = scale[i];
    o.log_ratio[i] = log_ratio[i];
    o.ratio[i] = ratio[i];
    o.brightness[i] = brightness[i];
    o.contrast[i] = contrast[i];
    o.saturation[i] = saturation[i];
    o.hue[i] = hue[i];
  }
  for (int i = 0; i < 3; ++i) {
    o.mean[i] = mean[i];
    o.std[i] = std[i];
  }
  return o;
}

EffectOptions make_effects(float blur_probability, Pair blur_sigma, int32_t blur_radius, float tone_probability,
                           Pair sharpness, float noise_probability, Pair noise_sigma, bool sobel) {
  EffectOptions o;
  o.blur_probability = blur_probability;
  o.blur_radius = blur_radius;
  o.tone_probability = tone_probability;
  o.noise_probability = noise_probability;
  o.sobel = sobel;
  for (int i = 0; i < 2; ++i) {
    o.blur_sigma[i] = blur_sigma[i];
    o.sharpness[i] = sharpness[i];
    o.noise_sigma[i] = noise_sigma[i];
  }
  return o;
}

/// The records of a contiguous numpy array, which Python has checked to be of the dtype PARAMETERS.
const AugmentParameters* records(const py::array& parameters) {
  if (parameters.itemsize() != static_cast<py::ssize_t>(sizeof(AugmentParameters)) ||
      !(parameters.flags() & py::array::c_style))
    throw std::invalid_argument("parameters: expected a contiguous array of records of 60 bytes");
  return static_cast<const AugmentParameters*>(parameters.data());
}

/// The same for the dtype EFFECTS; null for None.
const AugmentEffects* effect_records(const std::optional<py::array>& effects, int64_t count) {
  if (!effects) return nullptr;
  if (effects->itemsize() != static_cast<py::ssize_t>(sizeof(AugmentEffects)) ||
      !(effects->flags() & py::array::c_style) || effects->size() != count)
    throw std::invalid_argument("effects: expected a contiguous array of " + std::to_string(count) +
                                " records of 24 bytes");
  const auto* records = static_cast<const AugmentEffects*>(effects->data());
  for (int64_t i = 0; i < count; ++i)
    if (const char* expected = check_effects(records[i]))
      throw std::invalid_argument("effects[" + std::to_string(i) + "]: expected " + expected);
  return records;
}

void bind_sample_effects(const EffectOptions& options, const Longs& index, uint64_t seed, uint32_t epoch, uint32_t view,
                         py::array& out) {
  if (out.size() != index.size()) throw std::invalid_argument("sample_effects: index and out differ in length");
  effect_records(out, out.size());  // checks the size of a record; zeros pass
  auto* effects = static_cast<AugmentEffects*>(out.mutable_data());
  const int64_t* i = index.data();
  const int64_t count = index.size();
  py::gil_scoped_release unlocked;
  sample_effects(options, i, count, seed, epoch, view, effects);
}

void bind_sample(const AugmentOptions& options, const Ints& heights, const Ints& widths, const Longs& index,
                 uint64_t seed, uint32_t epoch, uint32_t view, py::array& out) {
  const int64_t count = index.size();
  if (heights.size() != count || widths.size() != count || out.size() != count)
    throw std::invalid_argument("sample_parameters: heights, widths, index and out differ in length");
  records(out);  // checks
  AugmentParameters* parameters = static_cast<AugmentParameters*>(out.mutable_data());
  const int32_t* h = heights.data();
  const int32_t* w = widths.data();
  const int64_t* i = index.data();
  py::gil_scoped_release unlocked;
  sample_parameters(options, h, w, i, count, seed, epoch, view, parameters);
}

/// Refuses the first of count parameters that does not fit its image.  size_of(i): {height, width} of image i.
template <class SizeOf>
void check_all(const AugmentOptions& options, const AugmentParameters* p, int64_t count, SizeOf size_of) {
  for (int64_t i = 0; i < count; ++i) {
    const auto [height, width] = size_of(i);
    if (const char* expected = check_parameters(options, p[i], height, width))
      throw std::invalid_argument("params[" + std::to_string(i) + "]: expected " + expected + ", found top " +
                                  std::to_string(p[i].top) + ", left " + std::to_string(p[i].left) + ", height " +
                                  std::to_string(p[i].height) + ", width " + std::to_string(p[i].width) +
                                  " for an image of " + std::to_string(height) + " x " + std::to_string(width));
  }
}

/// Where a batch goes and how.
struct Target {
  uintptr_t out;
  const std::string& dtype;
  bool channels_last;
  int threads;
  AugmentOutput output() const { return {reinterpret_cast<void*>(out), pixel_type(dtype), channels_last}; }
};

const AugmentParameters* records(const py::array& parameters, int64_t count) {
  if (parameters.size() != count)
    throw std::invalid_argument("params: expected " + std::to_string(count) + " records, found " +
                                std::to_string(parameters.size()));
  return records(parameters);
}

void run(const AugmentOptions& options, const EffectOptions& effect_options, const std::vector<ImageView>& images,
         int32_t channels, const py::array& parameters, const std::optional<py::array>& effects, const Target& target) {
  const int64_t count = static_cast<int64_t>(images.size());
  const AugmentParameters* p = records(parameters, count);
  const AugmentEffects* e = effect_records(effects, count);
  py::gil_scoped_release unlocked;
  check_all(options, p, count, [&images](int64_t i) {
    const ImageView& image = images[static_cast<size_t>(i)];
    return std::make_pair(image.height, image.width);
  });
  augment_images(options, effect_options, images.data(), channels, p, e, count, target.output(), target.threads);
}

void bind_augment_array(const AugmentOptions& options, const EffectOptions& effect_options,
                        const py::array_t<uint8_t>& source, const Longs& rows, const py::array& parameters,
                        const std::optional<py::array>& effects, uintptr_t out, const std::string& dtype,
                        bool channels_last, int threads) {
  const uint8_t* data = source.data();
  const int64_t total = source.shape(0), step = source.strides(0);
  ImageView view = {nullptr, static_cast<int32_t>(source.shape(1)), static_cast<int32_t>(source.shape(2)),
                    source.strides(1)};
  std::vector<ImageView> images(static_cast<size_t>(rows.size()), view);
  const int64_t* row = rows.data();
  for (size_t i = 0; i < images.size(); ++i) {
    if (row[i] < 0 || row[i] >= total)
      throw std::invalid_argument("rows: expected image numbers in [0, " + std::to_string(total) + "), found " +
                                  std::to_string(row[i]));
    images[i].data = data + row[i] * step;
  }
  run(options, effect_options, images, static_cast<int32_t>(source.shape(3)), parameters, effects,
      {out, dtype, channels_last, threads});
}

void bind_augment_list(const AugmentOptions& options, const EffectOptions& effect_options,
                       const std::vector<py::array_t<uint8_t>>& source, const py::array& parameters,
                       const std::optional<py::array>& effects, uintptr_t out, const std::string& dtype,
                       bool channels_last, int threads) {
  std::vector<ImageView> images;
  images.reserve(source.size());
  int32_t channels = 1;
  for (const auto& image : source) {
    channels = static_cast<int32_t>(image.shape(2));
    images.push_back(
        {image.data(), static_cast<int32_t>(image.shape(0)), static_cast<int32_t>(image.shape(1)), image.strides(0)});
  }
  run(options, effect_options, images, channels, parameters, effects, {out, dtype, channels_last, threads});
}

void bind_augment_planes(const AugmentOptions& options, const EffectOptions& effect_options,
                         const std::vector<PlanarTuple>& source, bool exact, int32_t channels,
                         const py::array& parameters, const std::optional<py::array>& effects, uintptr_t out,
                         const std::string& dtype, bool channels_last, int threads) {
  const int64_t count = static_cast<int64_t>(source.size());
  const AugmentParameters* p = records(parameters, count);
  const AugmentEffects* e = effect_records(effects, count);
  const Target target = {out, dtype, channels_last, threads};
  std::vector<PlanarImage> images;
  images.reserve(source.size());
  for (const PlanarTuple& image : source) {
    images.push_back(planar_image(image));
    if (channels == 1 && images.back().count != 1)
      throw std::invalid_argument("channels: expected 3 for images of 3 planes, found 1");
  }
  py::gil_scoped_release unlocked;
  check_all(options, p, count, [&images](int64_t i) {
    const PlanarImage& image = images[static_cast<size_t>(i)];
    return std::make_pair(image.height, image.width);
  });
  for (int64_t i = 0; i < count; ++i)
    if (const char* expected = check_planes(options, p[i], images[static_cast<size_t>(i)]))
      throw std::invalid_argument("planes[" + std::to_string(i) + "]: expected " + expected);
  PlanarOptions planar;
  planar.exact = exact;
  augment_planes(options, effect_options, planar, images.data(), channels, p, e, count, target.output(), threads);
}

py::array_t<int32_t> bind_needed_boxes(const AugmentOptions& options, const py::array& parameters, const Ints& heights,
                                       const Ints& widths, const Steps& steps, const Smooth& smooth) {
  const int64_t count = parameters.size();
  const AugmentParameters* p = records(parameters, count);
  if (heights.size() != count || widths.size() != count)
    throw std::invalid_argument("needed_boxes: heights, widths and parameters differ in length");
  const int32_t* h = heights.data();
  const int32_t* w = widths.data();
  check_all(options, p, count, [h, w](int64_t i) { return std::make_pair(h[i], w[i]); });
  py::array_t<int32_t> out({count, int64_t{4}});
  auto* boxes = static_cast<PixelBox*>(static_cast<void*>(out.mutable_data()));
  for (int64_t i = 0; i < count; ++i)
    boxes[i] = needed_box(options, p[i],
                          planar_geometry(3, {1, 1, false, false}, subsampling_of(steps, smooth, w[i]), h[i], w[i]));
  return out;
}

void bind_check_parameters(const AugmentOptions& options, const py::array& parameters, int32_t height, int32_t width) {
  check_all(options, records(parameters), parameters.size(),
            [height, width](int64_t) { return std::make_pair(height, width); });
}

void bind_augment_resident_cuda(const AugmentOptions& options, uintptr_t images, int64_t images_count, int32_t height,
                                int32_t width, int32_t channels, uintptr_t index, int64_t count, uint64_t seed,
                                uint32_t epoch, uint32_t view, uintptr_t given, uintptr_t drawn, uintptr_t out,
                                const std::string& dtype, bool channels_last, uintptr_t stream) {
  if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16")
    throw std::invalid_argument("dtype: expected float32, float16 or bfloat16 on CUDA, found " + dtype);
  py::gil_scoped_release unlocked;
  augment_resident_cuda(options, {reinterpret_cast<const uint8_t*>(images), images_count, height, width, channels},
                        reinterpret_cast<const int64_t*>(index), count, {seed, epoch, view},
                        reinterpret_cast<const AugmentParameters*>(given), reinterpret_cast<AugmentParameters*>(drawn),
                        {reinterpret_cast<void*>(out), pixel_type(dtype), channels_last},
                        reinterpret_cast<void*>(stream));
}

void bind_sample_parameters_cuda(const AugmentOptions& options, int32_t height, int32_t width, uintptr_t index,
                                 int64_t count, uint64_t seed, uint32_t epoch, uint32_t view, uintptr_t drawn,
                                 uintptr_t stream) {
  py::gil_scoped_release unlocked;
  sample_parameters_cuda(options, height, width, reinterpret_cast<const int64_t*>(index), count, {seed, epoch, view},
                         reinterpret_cast<AugmentParameters*>(drawn), reinterpret_cast<void*>(stream));
}

py::array_t<int64_t> bind_shuffle(int64_t count, uint64_t seed, uint32_t epoch) {
  py::array_t<int64_t> out(count);
  int64_t* data = out.mutable_data();
  py::gil_scoped_release unlocked;
  shuffle(count, seed, epoch, data);
  return out;
}

py::array_t<uint32_t> bind_philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const PhiloxWords words = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::array_t<uint32_t>(4, words.word);
}

}  // namespace

void bind_augment(py::module_& m) {
  py::class_<AugmentOptions>(m, "AugmentOptions", py::module_local(),
                             "How parameters are drawn and images are finished.")
      .def(py::init(&make_options), py::kw_only(), py::arg("size"), py::arg("crop"), py::arg("resize"),
           py::arg("scale"), py::arg("log_ratio"), py::arg("ratio"), py::arg("flip_probability"),
           py::arg("gray_probability"), py::arg("jitter_probability"), py::arg("brightness"), py::arg("contrast"),
           py::arg("saturation"), py::arg("hue"), py::arg("gray_first"), py::arg("mean"), py::arg("std"));
  m.def("sample_parameters", &bind_sample, py::arg("options"), py::arg("heights"), py::arg("widths"), py::arg("index"),
        py::arg("seed"), py::arg("epoch"), py::arg("view"), py::arg("out"),
        "Draws augmentation parameters into the records of out.");
  py::class_<EffectOptions>(m, "EffectOptions", py::module_local(), "What follows the colour operations.")
      .def(py::init(&make_effects), py::kw_only(), py::arg("blur_probability"), py::arg("blur_sigma"),
           py::arg("blur_radius"), py::arg("tone_probability"), py::arg("sharpness"), py::arg("noise_probability"),
           py::arg("noise_sigma"), py::arg("sobel"));
  m.def("sample_effects", &bind_sample_effects, py::arg("options"), py::arg("index"), py::arg("seed"), py::arg("epoch"),
        py::arg("view"), py::arg("out"), "Draws effects into the records of out, which are zeros.");
  m.def("augment_array", &bind_augment_array, py::arg("options"), py::arg("effect_options"), py::arg("source"),
        py::arg("rows"), py::arg("parameters"), py::arg("effects"), py::arg("out"), py::arg("dtype"),
        py::arg("channels_last"), py::arg("threads"),
        "The fused pass over rows of one array [N, H, W, C]; out is an address.");
  m.def("augment_list", &bind_augment_list, py::arg("options"), py::arg("effect_options"), py::arg("source"),
        py::arg("parameters"), py::arg("effects"), py::arg("out"), py::arg("dtype"), py::arg("channels_last"),
        py::arg("threads"), "The fused pass over a list of arrays [H, W, C] of any sizes; out is an address.");
  m.def(
      "augment_planes", &bind_augment_planes, py::arg("options"), py::arg("effect_options"), py::arg("source"),
      py::arg("exact"), py::arg("channels"), py::arg("parameters"), py::arg("effects"), py::arg("out"),
      py::arg("dtype"), py::arg("channels_last"), py::arg("threads"),
      "The fused pass over images as planes: (arrays, top, left, height, width, pixels per chroma sample, smooth, rgb, "
      "pixels per luma sample) each; out is an address.");
  m.def("needed_boxes", &bind_needed_boxes, py::arg("options"), py::arg("parameters"), py::arg("heights"),
        py::arg("widths"), py::arg("steps"), py::arg("smooth"),
        "Top, left, bottom, right of the pixels whose samples each record of parameters needs, [count, 4].");
  m.def("check_parameters", &bind_check_parameters, py::arg("options"), py::arg("parameters"), py::arg("height"),
        py::arg("width"), "Raises ValueError for parameters that do not fit images of height x width.");
  m.def("augment_resident_cuda", &bind_augment_resident_cuda, py::arg("options"), py::arg("images"),
        py::arg("images_count"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("index"),
        py::arg("count"), py::arg("seed"), py::arg("epoch"), py::arg("view"), py::arg("given"), py::arg("drawn"),
        py::arg("out"), py::arg("dtype"), py::arg("channels_last"), py::arg("stream"),
        "The fused pass over images of the current CUDA device, by device addresses (0 = absent).");
  m.def("sample_parameters_cuda", &bind_sample_parameters_cuda, py::arg("options"), py::arg("height"), py::arg("width"),
        py::arg("index"), py::arg("count"), py::arg("seed"), py::arg("epoch"), py::arg("view"), py::arg("drawn"),
        py::arg("stream"), "Draws augmentation parameters on the current CUDA device, by device addresses.");
  m.attr("AUGMENT_CUDA_SIDE") = kAugmentCudaSide;
  m.def("shuffle", &bind_shuffle, py::arg("count"), py::arg("seed"), py::arg("epoch"),
        "A random permutation of 0 .. count - 1, keyed by (seed, epoch).");
  m.def("philox4x32", &bind_philox, py::arg("counter"), py::arg("key"),
        "Four random words: Philox4x32-10 of one counter.");
}

}  // namespace sela
