// What the fuzzers do with one input: everything the decoder offers, on copies of exactly the right size, so that
// AddressSanitizer sees the first byte too far.  Beside memory faults, a difference between two ways to the same pixels
// ends the process.
#include "sela/jpeg.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fuzz/jpeg_fuzz.h"
#include "sela/jpeg_batch.h"

namespace sela {
namespace {

/// Larger images take too long to be worth it.
constexpr int64_t kMostPixels = 1 << 15;

void fail(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

uint32_t number(const uint8_t* p) {
  return static_cast<uint32_t>(p[0] | p[1] << 8);
}

struct Decoded {
  JpegStatus status;
  std::vector<uint8_t> rgb;
};

Decoded decoded(const std::vector<uint8_t>& data, const JpegFile& file, const JpegBox& box, int scale,
                const JpegIndex* index, JpegIndex* built, Isa isa) {
  Decoded out;
  out.rgb.resize(static_cast<size_t>(box.height * box.width * 3));
  out.status = decode_jpeg_rgb(data.data(), data.size(), file, box, scale, out.rgb.data(), index, built, isa);
  return out;
}

bool is_crop(const Decoded& whole, const JpegBox& all, const Decoded& part, const JpegBox& box) {
  for (int64_t y = 0; y < box.height; ++y)
    if (std::memcmp(whole.rgb.data() + ((box.top + y) * all.width + box.left) * 3, part.rgb.data() + y * box.width * 3,
                    static_cast<size_t>(box.width * 3)) != 0)
      return false;
  return true;
}

template <class T>
std::vector<T> records(const std::vector<uint8_t>& upload, int64_t at, int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  if (count > 0) std::memcpy(out.data(), upload.data() + at, out.size() * sizeof(T));
  return out;
}

/// Plans an upload for a CUDA device; whatever the index says, nothing in it may point out of the device's memory.
void plan(const std::vector<uint8_t>& data, const std::vector<uint8_t>& index, const JpegBox& box) {
  const JpegRequest request{data.data(), data.size(), index.data(), index.size(), box};
  const JpegRequest requests[2] = {request, request};
  const JpegBatchPlan plan(requests, 2, INT64_MAX, kMostPixels);
  const JpegBatchSizes& s = plan.sizes();
  std::vector<uint8_t> upload(static_cast<size_t>(s.bytes));
  plan.write(upload.data());
  const auto images = records<JpegDeviceImage>(upload, s.images, s.image_count);
  const int64_t blocks = s.coefficient_bytes / 128, scans = s.bytes - s.scans - kJpegScanRoom;
  for (const JpegDeviceEntry& e : records<JpegDeviceEntry>(upload, s.entries, s.entry_count))
    if (e.begin > e.end || e.end > scans || e.image >= images.size() || e.mcus < 1 || e.mcus > kJpegGroup ||
        e.bit > 7 || (e.checked != 0 && e.end < e.begin + 2))
      fail("an entry that reads elsewhere");
  int64_t entry = 0, block = 0;
  for (const JpegDeviceWork& w : records<JpegDeviceWork>(upload, s.works, s.work_count)) {
    if (w.set >= s.set_count || w.first != entry || w.first_block != block || w.count < 1 || w.count > kJpegWorkEntries)
      fail("work that is not in order");
    entry += w.count;
    block += w.blocks;
  }
  if (entry != s.entry_count || block != blocks) fail("work left out");
  for (const JpegDeviceTile& t : records<JpegDeviceTile>(upload, s.tiles, s.tile_count)) {
    if (t.image >= images.size() || t.component >= kJpegComponents) fail("a tile of no image");
    const JpegDeviceImage& image = images[t.image];
    const JpegDeviceComponent& c = image.component[t.component];
    const int64_t last = t.first_block + int64_t{image.groups * kJpegGroup - 1} * image.blocks + c.h - 1;
    const uint64_t end = c.plane + (uint64_t{t.row} * 8 + 7) * c.stride + uint64_t{image.groups} * kJpegGroup * c.h * 8;
    if (last >= blocks || end > static_cast<uint64_t>(s.plane_bytes) || c.quant >= s.quant_count)
      fail("a tile that lies elsewhere");
  }
}

void one(const uint8_t* head, const std::vector<uint8_t>& data) {
  JpegFile file;
  if (read_jpeg_header(data.data(), data.size(), file) != JpegStatus::ok) return;
  const int orientation = jpeg_orientation(data.data(), data.size(), file);
  if (orientation < 0 || orientation > 8) fail("an orientation that does not exist");
  if (file.height * file.width > kMostPixels) return;
  int scale = 1 << head[0] % 4;
  while (scale > std::min(file.height, file.width)) scale /= 2;
  const Isa best = cpu_isa();
  const Isa isa = static_cast<Isa>(head[1] % (static_cast<int>(best) + 1));
  const JpegBox all{0, 0, jpeg_scaled(file.height, scale), jpeg_scaled(file.width, scale)};
  JpegBox box;
  box.top = number(head + 2) % all.height;
  box.left = number(head + 4) % all.width;
  box.height = 1 + number(head + 6) % (all.height - box.top);
  box.width = 1 + number(head + 8) % (all.width - box.left);

  const Decoded whole = decoded(data, file, all, scale, nullptr, nullptr, isa);
  JpegIndex built;
  const Decoded again = decoded(data, file, all, scale, nullptr, &built, best);
  if (whole.status != again.status) fail("two instruction sets disagree whether the file is in order");
  const Decoded part = decoded(data, file, box, scale, nullptr, nullptr, isa);
  if (whole.status == JpegStatus::ok) {
    if (whole.rgb != again.rgb) fail("two instruction sets give different pixels");
    if (part.status != JpegStatus::ok || !is_crop(whole, all, part, box)) fail("a crop is not the crop of the whole");
    std::vector<uint8_t> bytes = write_jpeg_index(data.data(), data.size(), file, built);
    JpegIndex read, spoilt;
    if (!read_jpeg_index(bytes.data(), bytes.size(), data.data(), data.size(), file, read)) fail("index lost");
    const size_t place = number(head + 10) % bytes.size();
    bytes[place] = static_cast<uint8_t>(bytes[place] ^ (1 + head[10] % 255));
    if (read_jpeg_index(bytes.data(), bytes.size(), data.data(), data.size(), file, spoilt))
      fail("a spoilt index passed");
    bytes.resize(place);
    bytes.shrink_to_fit();
    if (read_jpeg_index(bytes.data(), bytes.size(), data.data(), data.size(), file, spoilt)) fail("a cut index passed");
    if (scale == 1) plan(data, write_jpeg_index(data.data(), data.size(), file, built), box);
    const Decoded indexed = decoded(data, file, box, scale, &read, nullptr, isa);
    if (indexed.status != JpegStatus::ok || !is_crop(whole, all, indexed, box)) fail("an index gives other pixels");
  }

  // An index of another file: whatever it says.
  built.resize(static_cast<size_t>((file.mcus_x + kJpegGroup - 1) / kJpegGroup * file.mcus_y));
  uint64_t state = number(head + 8) * 2654435769u + number(head + 10) + 1;
  for (JpegCheckpoint& at : built) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t bits = static_cast<uint32_t>(state >> 32);
    if (bits % 8 == 0) at.offset = bits % 16 == 0 ? bits : static_cast<uint32_t>((bits >> 8) % (data.size() + 9));
    if (bits % 8 == 1) at.bit = static_cast<uint8_t>(bits >> 8);
    if (bits % 8 == 2) at.dc[bits % 3] = static_cast<int16_t>(bits >> 16);
  }
  if (scale == 1) plan(data, write_jpeg_index(data.data(), data.size(), file, built), box);
  decoded(data, file, box, scale, &built, nullptr, isa);
  const JpegLayout layout = jpeg_layout(file, box, scale);
  std::vector<uint8_t> planes(static_cast<size_t>(layout.bytes));
  decode_jpeg_planes(data.data(), data.size(), file, layout, planes.data(), &built, nullptr, isa);
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
