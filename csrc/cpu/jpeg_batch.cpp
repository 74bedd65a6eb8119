// Batches of indexed JPEG files: what a CUDA device needs of them, laid out for one upload.
#include "sela/jpeg_batch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/jpeg_loops.h"

namespace sela {
namespace {

/// Entropy-coded bytes that the entries of a batch may have: their offsets have 32 bits.
constexpr int64_t kMostScanBytes = int64_t{1} << 30;
/// Bytes that the last entry of a file may use up: all coefficients as long as they can be, every byte stuffed.
constexpr int64_t kMostEntryBytes = kJpegGroup * kJpegBlocks * 64 * 4 * 2;

bool same(const JpegCode& a, const JpegCode& b) {
  return a.total == b.total && std::memcmp(a.counts, b.counts, sizeof(a.counts)) == 0 &&
         std::memcmp(a.symbols, b.symbols, static_cast<size_t>(a.total)) == 0;
}

int64_t up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int blocks_of(const JpegFile& file) {
  int blocks = 0;
  for (int c = 0; c < file.components; ++c) blocks += file.component[c].h * file.component[c].v;
  return blocks;
}

void fill(const JpegCode& code, JpegDeviceCode& out) {
  std::memcpy(out.symbols, code.symbols, sizeof(out.symbols));
  uint32_t next = 0;
  int k = 0;
  for (int length = 1; length <= 16; ++length, next <<= 1) {
    out.first[length - 1] = k - static_cast<int32_t>(next);
    next += code.counts[length - 1];
    k += code.counts[length - 1];
    out.bound[length - 1] = next << (16 - length);
  }
}

template <class T>
void put(uint8_t* out, int64_t at, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(out + at, values.data(), values.size() * sizeof(T));
}

/// The box that is meant; throws where there is none within the image.
JpegBox box_of(const JpegFile& file, const JpegBox& box, int64_t number) {
  if (box.height == 0) return {0, 0, file.height, file.width};
  if (box.top < 0 || box.left < 0 || box.height < 1 || box.width < 1 || box.top > file.height - box.height ||
      box.left > file.width - box.width)
    throw std::invalid_argument("boxes[" + std::to_string(number) + "]: expected one within " +
                                std::to_string(file.height) + " x " + std::to_string(file.width) + ", found " +
                                std::to_string(box.height) + " x " + std::to_string(box.width) + " at " +
                                std::to_string(box.top) + ", " + std::to_string(box.left));
  return box;
}

}  // namespace

JpegBatchPlan::JpegBatchPlan(const JpegRequest* requests, int64_t count, int64_t most_coefficients,
                             int64_t most_pixels) {
  JpegIndex index;
  for (int64_t i = 0; i < count; ++i) {
    const JpegRequest& request = requests[i];
    JpegPlanned planned;
    JpegFile& file = planned.file;
    planned.status = read_jpeg_header(request.data, request.size, file);
    if (planned.status == JpegStatus::ok && file.height * file.width > most_pixels)
      planned.status = JpegStatus::unsupported;
    if (planned.status == JpegStatus::ok) {
      planned.box = box_of(file, request.box, i);
      if (request.index == nullptr ||
          !read_jpeg_index(request.index, request.index_size, request.data, request.size, file, index))
        planned.status = JpegStatus::foreign_index;
    }
    if (planned.status == JpegStatus::ok) {
      planned.layout = jpeg_layout(file, planned.box, 1);
      const JpegLayout& l = planned.layout;
      const int64_t groups = (l.mcu_right - l.mcu_left + kJpegGroup - 1) / kJpegGroup;
      planned.entries = groups * (l.mcu_bottom - l.mcu_top);
      const int64_t room = planned.entries * kJpegGroup * blocks_of(file) * 64 * static_cast<int64_t>(sizeof(int16_t));
      if (!planned_.empty() && sizes_.coefficient_bytes + room > most_coefficients) break;
      const int64_t most =
          std::min<int64_t>(static_cast<int64_t>(request.size) + 2 * (l.mcu_bottom - l.mcu_top), kMostScanBytes);
      if (!planned_.empty() && scan_bytes_ + most > kMostScanBytes) break;
      if (!add(request, planned, index)) planned.image = -1;
    }
    planned_.push_back(planned);
  }
  add_works();

  JpegBatchSizes& s = sizes_;
  s.entry_count = static_cast<int64_t>(entries_.size());
  s.image_count = static_cast<int64_t>(images_.size());
  s.set_count = static_cast<int64_t>(sets_.size());
  s.quant_count = static_cast<int64_t>(quants_.size());
  s.work_count = static_cast<int64_t>(works_.size());
  s.tile_count = static_cast<int64_t>(tiles_.size());
  int64_t at = 0;
  const auto part = [&at](int64_t bytes) {
    const int64_t begin = at;
    at = up_to(at + bytes, 64);
    return begin;
  };
  s.entries = part(s.entry_count * static_cast<int64_t>(sizeof(JpegDeviceEntry)));
  s.images = part(s.image_count * static_cast<int64_t>(sizeof(JpegDeviceImage)));
  s.sets = part(s.set_count * static_cast<int64_t>(sizeof(JpegDeviceSet)));
  s.quants = part(s.quant_count * static_cast<int64_t>(sizeof(Quant)));
  s.works = part(s.work_count * static_cast<int64_t>(sizeof(JpegDeviceWork)));
  s.tiles = part(s.tile_count * static_cast<int64_t>(sizeof(JpegDeviceTile)));
  s.scans = part(scan_bytes_ + kJpegScanRoom);
  s.bytes = at;
  s.workspace_bytes = s.coefficient_bytes + s.set_count * static_cast<int64_t>(sizeof(JpegDeviceTables));
}

/// Adds an image, or sets a status other than ok and leaves out its entries.
bool JpegBatchPlan::add(const JpegRequest& request, JpegPlanned& planned, const JpegIndex& index) {
  const JpegFile& file = planned.file;
  const JpegLayout& layout = planned.layout;
  JpegDeviceImage image = {};
  uint32_t set = 0;
  if (!add_codes(file, &set, &image.codes)) {
    planned.status = JpegStatus::unsupported;
    return false;
  }
  const int64_t all_groups = (file.mcus_x + kJpegGroup - 1) / kJpegGroup, left = layout.mcu_left / kJpegGroup;
  const int64_t groups = planned.entries / (layout.mcu_bottom - layout.mcu_top);
  const int64_t scan_size = static_cast<int64_t>(request.size) - file.scan;
  const size_t entries_before = entries_.size(), stretches_before = stretches_.size();
  const int64_t bytes_before = scan_bytes_;
  const auto refuse = [&](JpegStatus status) {
    entries_.resize(entries_before);
    stretches_.resize(stretches_before);
    scan_bytes_ = bytes_before;
    planned.status = status;
    return false;
  };

  image.first_block = static_cast<uint32_t>(sizes_.coefficient_bytes / 128);
  image.first_entry = static_cast<uint32_t>(entries_before);
  image.groups = static_cast<uint32_t>(groups);
  image.blocks = static_cast<uint32_t>(blocks_of(file));
  image.restart_interval = static_cast<uint32_t>(file.restart_interval);
  for (int64_t y = layout.mcu_top; y < layout.mcu_bottom; ++y) {
    const size_t first = static_cast<size_t>(y * all_groups + left), behind = first + static_cast<size_t>(groups);
    const int64_t from = index[first].offset;
    const int64_t until = behind < index.size()
                              ? int64_t{index[behind].offset} + 2
                              : std::min(scan_size, int64_t{index[behind - 1].offset} + kMostEntryBytes);
    if (from > until || until > scan_size) return refuse(JpegStatus::foreign_index);
    if (scan_bytes_ + until - from > kMostScanBytes) return refuse(JpegStatus::unsupported);
    for (int64_t g = 0; g < groups; ++g) {
      const size_t number = first + static_cast<size_t>(g);
      const JpegCheckpoint& at = index[number];
      const bool follows = number + 1 < index.size();
      const JpegCheckpoint next = follows ? index[number + 1] : JpegCheckpoint();
      const int64_t begin = at.offset, end = follows ? int64_t{next.offset} + 2 : until;
      if (begin < from || begin > end - (follows ? 2 : 0) || end > until || at.bit > 7 || next.bit > 7)
        return refuse(JpegStatus::foreign_index);
      const int64_t x = layout.mcu_left + g * kJpegGroup;
      const int64_t all = std::min<int64_t>(kJpegGroup, file.mcus_x - x);
      const int64_t wanted = std::min<int64_t>(all, layout.mcu_right - x);
      JpegDeviceEntry entry = {};
      entry.begin = static_cast<uint32_t>(scan_bytes_ + begin - from);
      entry.end = static_cast<uint32_t>(scan_bytes_ + end - from);
      entry.image = static_cast<uint32_t>(images_.size());
      entry.mcu = static_cast<uint32_t>(y * file.mcus_x + x);
      std::memcpy(entry.dc, at.dc, sizeof(entry.dc));
      std::memcpy(entry.next, next.dc, sizeof(entry.next));
      entry.bit = at.bit;
      entry.next_bit = next.bit;
      entry.mcus = static_cast<uint8_t>(wanted);
      entry.checked = follows && wanted == all;
      entries_.push_back(entry);
    }
    stretches_.push_back(
        {request.data + file.scan + from, static_cast<uint32_t>(scan_bytes_), static_cast<uint32_t>(until - from)});
    scan_bytes_ += until - from;
  }

  planned.image = static_cast<int64_t>(images_.size());
  planned.planes = sizes_.plane_bytes;
  planned.scan_bytes = scan_bytes_ - bytes_before;
  uint32_t block = 0;
  for (int c = 0; c < file.components; ++c) {
    const JpegComponent& component = file.component[c];
    const JpegPlane& plane = layout.plane[c];
    const uint32_t h = static_cast<uint32_t>(component.h), v = static_cast<uint32_t>(component.v);
    JpegDeviceComponent& out = image.component[c];
    out.plane = static_cast<uint64_t>(planned.planes + plane.block_offset);
    out.stride = static_cast<uint32_t>(plane.stride);
    out.h = h;
    out.reciprocal = 65536 / h + 1;  // exact below 2^15 blocks in a row, of which 65535 pixels have 2^13
    out.quant = add_quant(file.quant[component.quant]);
    for (uint32_t row = 0; row < static_cast<uint32_t>(layout.mcu_bottom - layout.mcu_top) * v; ++row)
      tiles_.push_back({static_cast<uint32_t>(images_.size()), static_cast<uint32_t>(c),
                        image.first_block + row / v * image.groups * kJpegGroup * image.blocks + block + row % v * h,
                        row});
    for (uint32_t b = 0; b < h * v; ++b, ++block) image.component_of |= static_cast<uint32_t>(c) << (2 * block);
  }
  sizes_.coefficient_bytes += planned.entries * kJpegGroup * image.blocks * 128;
  sizes_.plane_bytes += layout.bytes;
  images_.push_back(image);
  set_of_image_.push_back(set);
  return true;
}

/// The set that has all codes of a file, made if there is none; false when one cannot hold them.
bool JpegBatchPlan::add_codes(const JpegFile& file, uint32_t* set, uint32_t* codes) {
  const auto find = [&file](const Codes& known, bool may_add, Codes& grown, uint32_t* found) {
    grown = known;
    *found = 0;
    for (int c = 0; c < file.components; ++c) {
      const JpegCode* const wanted[2] = {&file.dc[file.component[c].dc], &file.ac[file.component[c].ac]};
      for (int kind = 0; kind < 2; ++kind) {
        int k = 0;
        while (k < grown.count && !same(grown.code[k], *wanted[kind])) ++k;
        if (k == grown.count) {
          if (!may_add || k == kJpegSetCodes) return false;
          grown.code[grown.count++] = *wanted[kind];
        }
        *found |= static_cast<uint32_t>(k) << (4 * c + 2 * kind);
      }
    }
    return true;
  };
  Codes grown;
  for (size_t i = 0; i < sets_.size(); ++i) {
    if (!find(sets_[i], false, grown, codes)) continue;
    *set = static_cast<uint32_t>(i);
    return true;
  }
  if (!find(Codes(), true, grown, codes)) return false;
  *set = static_cast<uint32_t>(sets_.size());
  sets_.push_back(grown);
  return true;
}

uint32_t JpegBatchPlan::add_quant(const uint16_t* by_row) {
  Quant quant;
  for (int k = 0; k < 64; ++k) quant.by_column[k] = by_row[k % 8 * 8 + k / 8];
  for (size_t i = 0; i < quants_.size(); ++i)
    if (std::memcmp(&quants_[i], &quant, sizeof(quant)) == 0) return static_cast<uint32_t>(i);
  quants_.push_back(quant);
  return static_cast<uint32_t>(quants_.size() - 1);
}

/// Runs of entries with the same codes, cut into pieces for blocks of threads.
void JpegBatchPlan::add_works() {
  uint32_t block = 0;
  for (uint32_t e = 0; e < entries_.size(); ++e) {
    const uint32_t image = entries_[e].image, set = set_of_image_[image];
    const uint32_t blocks = images_[image].blocks * kJpegGroup;
    if (works_.empty() || works_.back().set != set || works_.back().count == kJpegWorkEntries)
      works_.push_back({set, e, 0, block, 0, {}});
    ++works_.back().count;
    works_.back().blocks += blocks;
    block += blocks;
  }
}

void JpegBatchPlan::write(uint8_t* out) const {
  std::memset(out, 0, static_cast<size_t>(sizes_.scans));
  put(out, sizes_.entries, entries_);
  put(out, sizes_.images, images_);
  put(out, sizes_.quants, quants_);
  put(out, sizes_.works, works_);
  put(out, sizes_.tiles, tiles_);
  for (size_t i = 0; i < sets_.size(); ++i) {
    JpegDeviceSet set = {};
    for (int k = 0; k < sets_[i].count; ++k) fill(sets_[i].code[k], set.code[k]);
    for (int k = 0; k < 64; ++k) set.place[k] = static_cast<uint8_t>(kJpegZigzag[k] % 8 * 8 + kJpegZigzag[k] / 8);
    std::memcpy(out + sizes_.sets + static_cast<int64_t>(i * sizeof(set)), &set, sizeof(set));
  }
  for (const Stretch& stretch : stretches_) std::memcpy(out + sizes_.scans + stretch.to, stretch.from, stretch.size);
  std::memset(out + sizes_.scans + scan_bytes_, 0, static_cast<size_t>(sizes_.bytes - sizes_.scans - scan_bytes_));
}

}  // namespace sela
