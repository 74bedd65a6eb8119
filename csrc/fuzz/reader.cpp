// The reader's way from a file to its views, with and without an index, on buffers of exactly the right size.  Beside
// memory faults, a result that depends on the index ends the process.
#include "sela/reader.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "fuzz/jpeg_fuzz.h"

namespace sela {
namespace {

/// Larger images take too long to be worth it.
constexpr int64_t kMostPixels = 1 << 14;

void fail(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

ReadView view_of(uint8_t choice, uint8_t size) {
  ReadView view;
  AugmentOptions& o = view.options;
  o.size = 1 + size % 40;
  o.crop = static_cast<Crop>(choice % 3);
  o.resize = o.size + choice / 64;
  o.log_ratio[0] = -0.3f;
  o.log_ratio[1] = 0.3f;
  o.ratio[0] = 0.74f;
  o.ratio[1] = 1.35f;
  o.flip_probability = 0.5f;
  o.gray_probability = 0.2f;
  o.jitter_probability = choice & 8 ? 0.8f : 0.0f;
  o.contrast[0] = 0.6f;
  o.hue[1] = 0.3f;
  if (choice & 16) {
    view.effects.blur_probability = view.effects.tone_probability = view.effects.noise_probability = 0.5f;
    view.effects.blur_radius = o.size / 4;
    view.effects.noise_sigma[1] = 0.1f;
  }
  return view;
}

struct Result {
  uint8_t status = 0;
  int32_t error = 0, height = 0, width = 0;
  std::vector<std::vector<uint8_t>> out;
  std::vector<AugmentParameters> parameters;

  bool same(const Result& other) const {
    if (status != other.status) return false;
    if (status != static_cast<uint8_t>(ReadStatus::ok)) return true;
    return height == other.height && width == other.width && out == other.out;
  }
};

int64_t bytes_of(PixelType type) {
  return type == PixelType::float32 ? 4 : type == PixelType::uint8 ? 1 : 2;
}

Result read(Reader& reader, const std::vector<uint8_t>& data, uint32_t epoch, const std::vector<uint8_t>* index) {
  Result result;
  const ReaderOptions& options = reader.options();
  const size_t views = options.views.size();
  result.parameters.resize(views);
  std::vector<AugmentEffects> effects(views);
  const int64_t number = 7;
  ReadRequest request;
  ReadItem item;
  item.data = data.data();
  item.size = data.size();
  if (index != nullptr) {
    item.index = index->data();
    item.index_size = index->size();
  }
  request.items.push_back(item);
  request.index = &number;
  request.epoch = epoch;
  request.status = &result.status;
  request.error = &result.error;
  request.height = &result.height;
  request.width = &result.width;
  for (size_t v = 0; v < views; ++v) {
    const ReadView& view = options.views[v];
    const int64_t channels = view.effects.sobel ? 2 : options.channels;
    const int64_t bytes = channels * view.options.size * view.options.size * bytes_of(options.type);
    result.out.emplace_back(static_cast<size_t>(bytes));
    ReadTarget target;
    target.out = result.out.back().data();
    target.parameters = &result.parameters[v];
    target.effects = view.effects.blur_probability > 0.0f ? &effects[v] : nullptr;
    target.view = static_cast<uint32_t>(v);
    request.targets.push_back(target);
  }
  const std::shared_ptr<ReadBatch> batch = reader.submit(std::move(request));
  while (!Reader::wait(*batch, 1000)) {
  }
  return result;
}

/// The samples of the image's views, in exactly the memory that they need; then in less.
void keep(Reader& reader, const std::vector<uint8_t>& data, uint32_t epoch, const Result& expected) {
  const size_t views = reader.options().views.size();
  int64_t wanted = 0, offset = 0;
  const int64_t number = 7;
  auto run = [&](int64_t bytes) {
    std::vector<uint8_t> memory(static_cast<size_t>(bytes));
    std::vector<PlanarImage> images(views);
    std::vector<AugmentParameters> parameters(views);
    std::vector<AugmentEffects> effects(views);
    uint8_t status = 0;
    int32_t error = 0, height = 0, width = 0;
    ReadRequest request;
    ReadItem item;
    item.data = data.data();
    item.size = data.size();
    request.items.push_back(item);
    request.index = &number;
    request.epoch = epoch;
    request.status = &status;
    request.error = &error;
    request.height = &height;
    request.width = &width;
    for (size_t v = 0; v < views; ++v)
      request.targets.push_back({nullptr, &parameters[v], &effects[v], static_cast<uint32_t>(v)});
    request.arena = {memory.data(), bytes, images.data(), &offset, &wanted};
    const std::shared_ptr<ReadBatch> batch = reader.submit(std::move(request));
    while (!Reader::wait(*batch, 1000)) {
    }
    if (status != static_cast<uint8_t>(ReadStatus::ok)) return status;
    for (const PlanarImage& image : images) {
      if (image.height != expected.height || image.width != expected.width) fail("an image of another size");
      for (int32_t c = 0; c < image.count; ++c) {
        const PlaneView& plane = image.plane[c];
        const uint8_t* const end = plane.data + (plane.height - 1) * plane.stride + plane.width;
        if (plane.data < memory.data() || end > memory.data() + bytes) fail("samples outside of the arena");
      }
    }
    return status;
  };
  const auto ok = static_cast<uint8_t>(ReadStatus::ok), no_room = static_cast<uint8_t>(ReadStatus::no_room);
  if (run(0) == ok) fail("samples in an empty arena");
  const int64_t needed = wanted;
  if (expected.status == ok && needed <= 0) fail("an image that needs no samples");
  if (run(needed) != expected.status) fail("an arena changes the status");
  if (needed > 0 && wanted != needed) fail("what is needed depends on the arena");
  if (needed > 0 && expected.status == ok && run(needed - kArenaAlignment) != no_room)
    fail("a place that is too small");
}

void one(const uint8_t* head, const std::vector<uint8_t>& data) {
  ReaderOptions options;
  options.threads = 1;
  options.isa = static_cast<Isa>(head[0] % (static_cast<int>(cpu_isa()) + 1));
  options.exact = head[1] & 1;
  options.exif = head[1] & 2;
  options.reduce = head[1] & 4;
  options.channels_last = head[1] & 8;
  options.channels = head[1] & 16 ? 1 : 3;
  options.small_side = head[1] & 32 ? kSmallSide : 0;
  options.type = static_cast<PixelType>(head[2] % 4);
  options.max_pixels = kMostPixels;
  options.views.push_back(view_of(head[3], head[4]));
  options.views.push_back(view_of(head[5], head[6]));
  if (options.type != PixelType::uint8 && (head[2] & 4) != 0) options.views.back().effects.sobel = true;
  const uint32_t epoch = head[7];

  const auto store = std::make_shared<IndexStore>("", 0);
  Reader indexed(options, store);
  options.cache_bytes = 0;
  Reader plain(options, nullptr);
  const Result expected = read(plain, data, epoch, nullptr);
  for (int touch = 0; touch < 2; ++touch)
    if (!read(indexed, data, epoch, nullptr).same(expected)) fail("what is stored changes the result");
  if (options.channels == 3) {
    keep(plain, data, epoch, expected);
    keep(indexed, data, epoch, expected);
  }
  std::vector<uint8_t> payload;
  bool known = false;
  if (store->find({7, data.size(), 0}, payload, &known) != StoredKind::index) return;
  payload.shrink_to_fit();
  if (!read(plain, data, epoch, &payload).same(expected)) fail("an index changes the result");
  payload[head[8] % payload.size()] ^= head[9];
  if (!read(plain, data, epoch, &payload).same(expected)) fail("a spoilt index changes the result");
}

}  // namespace
}  // namespace sela

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < sela::kFuzzHead) return 0;
  uint8_t head[sela::kFuzzHead];
  std::memcpy(head, data, sizeof(head));
  sela::one(head, std::vector<uint8_t>(data + sela::kFuzzHead, data + size));
  return 0;
}
