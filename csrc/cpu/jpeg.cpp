// The JPEG decoder's driver: what is read, what is stepped over, where samples go.
//
// Work goes group by group (kJpegGroup MCUs of a row): their coefficients, at most 6 kB, are transformed while they are
// in the first-level cache.  Entropy-coded data are copied without their stuffed zeros first, up to the next marker, or
// with an index only as far as a row of the box goes.
#include "sela/jpeg.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/jpeg_loops.h"
#include "cpu/thread_local.h"

namespace sela {
namespace {

/// The loop bodies of one instruction set.
struct Loops {
  decltype(&generic::jpeg_lanes) lanes;
  decltype(&generic::jpeg_read) read;
  decltype(&generic::jpeg_skip) skip;
  decltype(&generic::jpeg_transform) transform;
  decltype(&generic::jpeg_unstuff) unstuff;
  decltype(&generic::jpeg_blend_rows) blend_rows;
  decltype(&generic::jpeg_widen_row) widen_row;
  decltype(&generic::jpeg_interpolate) interpolate;
  decltype(&generic::jpeg_quarter) quarter;
  decltype(&generic::jpeg_repeat) repeat;
  decltype(&generic::jpeg_ycc_row) ycc_row;
  decltype(&generic::jpeg_rgb_row) rgb_row;
};

#define SELA_JPEG_LOOPS(isa)                                                                \
  {&isa::jpeg_lanes,   &isa::jpeg_read,       &isa::jpeg_skip,      &isa::jpeg_transform,   \
   &isa::jpeg_unstuff, &isa::jpeg_blend_rows, &isa::jpeg_widen_row, &isa::jpeg_interpolate, \
   &isa::jpeg_quarter, &isa::jpeg_repeat,     &isa::jpeg_ycc_row,   &isa::jpeg_rgb_row}

const Loops& loops_of(Isa isa) {
  static const Loops generic_loops = SELA_JPEG_LOOPS(generic);
#if defined(__x86_64__)
  static const Loops avx2_loops = SELA_JPEG_LOOPS(avx2);
  static const Loops avx512_loops = SELA_JPEG_LOOPS(avx512);
  if (isa == Isa::avx512) return avx512_loops;
  if (isa == Isa::avx2) return avx2_loops;
#endif
  (void)isa;
  return generic_loops;
}
#undef SELA_JPEG_LOOPS

/// Memory that a thread keeps from call to call: fresh pages would cost more than what is done with them.
struct Scratch {
  std::vector<uint8_t> bytes;   ///< entropy-coded data without stuffing
  std::vector<uint32_t> marks;  ///< where the stuffing was
  std::vector<uint8_t> planes;
  std::vector<uint16_t> sums;
  std::vector<uint8_t> rows;
  std::unique_ptr<JpegCoefficients> work;

  /// Gives back what only large images need.
  void trim() {
    constexpr size_t kKept = 8 << 20;
    if (bytes.size() > kKept) std::vector<uint8_t>().swap(bytes);
    if (marks.size() * sizeof(uint32_t) > kKept) std::vector<uint32_t>().swap(marks);
    if (planes.size() > kKept) std::vector<uint8_t>().swap(planes);
  }
};

template <class T>
T* room(std::vector<T>& memory, int64_t count) {
  if (memory.size() < static_cast<size_t>(count)) memory.resize(static_cast<size_t>(count));
  return memory.data();
}

Scratch& scratch_of_thread() {
  Scratch& scratch = of_thread<Scratch>();
  if (scratch.work == nullptr) scratch.work.reset(new JpegCoefficients());
  return scratch;
}

struct Trimmed {
  Scratch& scratch;
  ~Trimmed() { scratch.trim(); }
};

/// Entropy-coded data from some place on, up to a marker.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size, const JpegFile& file, const Loops& loops, Scratch& scratch)
      : scan_(data + file.scan), end_(data + size), file_(file), loops_(loops), scratch_(scratch) {}

  JpegBits bits;
  int32_t dc[kJpegComponents] = {};

  /// Begins anew at a checkpoint, the one before MCU `mcu`; data from `until` on are not looked at.
  bool begin(const JpegCheckpoint& from, int64_t mcu, int64_t until) {
    const int64_t all = end_ - scan_;
    until = std::min(until, all);
    if (from.offset > until || from.bit > 7) return false;
    load(scan_ + from.offset, scan_ + until);
    if (from.bit > 0) {
      bits.held = static_cast<uint64_t>(segment_[0]) << (56 + from.bit);
      bits.count = 8 - from.bit;
      bits.at = segment_ + 1;
    }
    for (int c = 0; c < kJpegComponents; ++c) dc[c] = from.dc[c];
    next_restart_ = file_.restart_interval > 0 ? static_cast<int>(mcu / file_.restart_interval % 8) : 0;
    return true;
  }

  /// Goes on behind the restart marker that must come now.
  bool restart() {
    if (!used_up()) return false;
    const uint8_t* marker = skip_fill(stop_);
    if (end_ - marker < 2 || marker[1] != 0xD0 + next_restart_) return false;
    next_restart_ = (next_restart_ + 1) % 8;
    load(marker + 2, end_);
    for (int32_t& predictor : dc) predictor = 0;
    return true;
  }

  /// Whether this is the proper end of the image.
  bool finished() const {
    if (!used_up()) return false;
    const uint8_t* marker = skip_fill(stop_);
    return end_ - marker >= 2 && marker[1] == 0xD9;
  }

  JpegCheckpoint position() {
    const int64_t used = used_bits(), byte = used >> 3;
    while (next_mark_ < marks_found_ && scratch_.marks[static_cast<size_t>(next_mark_)] <= byte) ++next_mark_;
    JpegCheckpoint at;
    at.offset = static_cast<uint32_t>(raw_ - scan_ + byte + next_mark_);
    at.bit = static_cast<uint8_t>(used & 7);
    for (int c = 0; c < kJpegComponents; ++c) at.dc[c] = static_cast<int16_t>(dc[c]);
    return at;
  }

  bool within() const { return used_bits() <= length_ * 8; }

 private:
  int64_t used_bits() const { return (bits.at - segment_) * 8 - bits.count; }

  bool used_up() const {
    const int64_t left = length_ * 8 - used_bits();
    return left >= 0 && left < 8;
  }

  const uint8_t* skip_fill(const uint8_t* marker) const {
    while (end_ - marker >= 2 && marker[1] == 0xFF) ++marker;
    return marker;
  }

  void load(const uint8_t* from, const uint8_t* until) {
    // Restart intervals are short, so room for all that is left is asked for once, at the first of them.
    uint8_t* const out = room(scratch_.bytes, end_ - scan_ + kJpegSlack);
    uint32_t* const marks = room(scratch_.marks, (end_ - scan_) / 2 + 1);
    raw_ = from;
    next_mark_ = 0;
    length_ = loops_.unstuff(from, until, out, marks, &marks_found_, &stop_);
    std::memset(out + length_, 0, 64);
    segment_ = out;
    bits.at = out;
    bits.held = 0;
    bits.count = 0;
    bits.last = out + length_ + 8;  // 8 bytes may have been loaded ahead
  }

  const uint8_t* const scan_;
  const uint8_t* const end_;
  const JpegFile& file_;
  const Loops& loops_;
  Scratch& scratch_;
  const uint8_t* segment_ = nullptr;
  const uint8_t* raw_ = nullptr;
  const uint8_t* stop_ = nullptr;
  int64_t length_ = 0, next_mark_ = 0, marks_found_ = 0;
  int next_restart_ = 0;
};

/// Divisors of a component in both orders.
struct Divisors {
  alignas(16) uint16_t by_row[64];
  alignas(16) uint16_t limits[64];
  uint16_t zigzag[64];
  bool large = false;  ///< products with values out of the table may overflow
};

/// Largest value that comes out of a table (9 bits) times this fits 16 bits.
constexpr int kSmallDivisor = 64;

struct Plan {
  JpegScan scan;
  Divisors divisors[kJpegComponents];
  JpegTransform transform[kJpegComponents];
};

void make_plan(const JpegFile& file, const JpegLayout& layout, int lanes, Plan& plan) {
  int batch = 0;
  for (int c = 0; c < file.components; ++c) {
    const JpegComponent& component = file.component[c];
    Divisors& d = plan.divisors[c];
    std::memcpy(d.by_row, file.quant[component.quant], sizeof(d.by_row));
    for (int k = 0; k < 64; ++k) {
      d.zigzag[k] = d.by_row[kJpegZigzag[k]];
      d.limits[k] = static_cast<uint16_t>(32767 / d.by_row[k]);
      d.large = d.large || d.by_row[k] > kSmallDivisor;
    }
    plan.scan.dc[c] = jpeg_dc_table(file.dc[component.dc]);
    plan.scan.ac[c] = jpeg_ac_table(file.ac[component.ac]);
    plan.scan.quant[c] = d.zigzag;
    plan.scan.dc_limit[c] = d.limits[0];

    JpegTransform& t = plan.transform[c];
    t.quant = d.by_row;
    t.limits = d.large ? d.limits : nullptr;
    t.size = layout.plane[c].size;
    t.rows = component.v;
    t.blocks = kJpegGroup * component.h;
    t.first_batch = batch;
    const int per_row = t.blocks / lanes;
    for (int y = 0; y < component.v; ++y) {
      for (int x = 0; x < component.h; ++x) {
        JpegBlock& block = plan.scan.block[plan.scan.blocks++];
        block.component = c;
        for (int m = 0; m < kJpegGroup; ++m) {
          const int column = m * component.h + x;
          block.batch[m] = batch + y * per_row + column / lanes;
          block.place[m] = block.batch[m] * kJpegBlockRoom * lanes + column % lanes * 8;
        }
      }
    }
    batch += component.v * per_row;
  }
}

bool same(const JpegCheckpoint& a, const JpegCheckpoint& b) {
  return a.offset == b.offset && a.bit == b.bit && std::memcmp(a.dc, b.dc, sizeof(a.dc)) == 0;
}

int64_t groups_of(const JpegFile& file) {
  return (file.mcus_x + kJpegGroup - 1) / kJpegGroup;
}

/// One decoding: the state that its steps share.
class Decoding {
 public:
  Decoding(const uint8_t* data, size_t size, const JpegFile& file, const JpegLayout& layout, uint8_t* planes,
           const Loops& loops, Scratch& scratch)
      : file_(file),
        layout_(layout),
        planes_(planes),
        loops_(loops),
        work_(*scratch.work),
        reader_(data, size, file, loops, scratch) {
    make_plan(file, layout, loops.lanes(), plan_);
    std::memset(&work_, 0, sizeof(work_));
  }

  JpegStatus all(JpegIndex* built) {
    if (!reader_.begin(JpegCheckpoint(), 0, kWhole)) return JpegStatus::damaged;
    if (built != nullptr) {
      built->clear();
      built->reserve(static_cast<size_t>(groups_of(file_) * file_.mcus_y));
    }
    const int64_t bottom = built != nullptr ? file_.mcus_y : layout_.mcu_bottom;
    for (int64_t y = 0; y < bottom; ++y) {
      const bool last = y + 1 == bottom && built == nullptr;
      if (!row(y, 0, last ? layout_.mcu_right : file_.mcus_x, nullptr, built)) return JpegStatus::damaged;
    }
    const bool to_the_end = bottom == file_.mcus_y && (built != nullptr || layout_.mcu_right == file_.mcus_x);
    if (to_the_end ? !reader_.finished() : !reader_.within()) return JpegStatus::damaged;
    return in_range() ? JpegStatus::ok : JpegStatus::damaged;
  }

  JpegStatus indexed(const JpegIndex& index) {
    const int64_t groups = groups_of(file_), first = layout_.mcu_left / kJpegGroup;
    const int64_t behind = (layout_.mcu_right + kJpegGroup - 1) / kJpegGroup;
    if (static_cast<int64_t>(index.size()) != groups * file_.mcus_y) return JpegStatus::foreign_index;
    for (int64_t y = layout_.mcu_top; y < layout_.mcu_bottom; ++y) {
      const size_t next = static_cast<size_t>(y * groups + behind);
      // The byte that the next group begins in may belong to this one, and may be followed by a stuffed zero.
      const int64_t until = next < index.size() ? static_cast<int64_t>(index[next].offset) + 2 : kWhole;
      if (!reader_.begin(index[static_cast<size_t>(y * groups + first)], y * file_.mcus_x + layout_.mcu_left, until))
        return JpegStatus::foreign_index;
      if (!row(y, layout_.mcu_left, layout_.mcu_right, &index, nullptr)) return JpegStatus::foreign_index;
      if (!reader_.within()) return JpegStatus::foreign_index;
    }
    return in_range() ? JpegStatus::ok : JpegStatus::damaged;
  }

 private:
  static constexpr int64_t kWhole = INT64_MAX;

  /// MCUs from..to-1 of a row.  The index is compared at the last group, or built at each.
  bool row(int64_t y, int64_t from, int64_t to, const JpegIndex* index, JpegIndex* built) {
    const bool rows_wanted = y >= layout_.mcu_top && y < layout_.mcu_bottom;
    const int64_t interval = file_.restart_interval;
    for (int64_t x = from; x < to;) {
      const int64_t mcu = y * file_.mcus_x + x;
      if (interval > 0 && mcu > 0 && mcu % interval == 0 && (index == nullptr || x > from) && !reader_.restart())
        return false;
      const bool wanted = rows_wanted && x >= layout_.mcu_left && x < layout_.mcu_right;
      int64_t stop = to;
      if (interval > 0) stop = std::min(stop, x + interval - mcu % interval);
      if (wanted || built != nullptr)
        stop = std::min(stop, x - x % kJpegGroup + kJpegGroup);
      else if (rows_wanted && x < layout_.mcu_left)
        stop = std::min(stop, layout_.mcu_left);
      if (x % kJpegGroup == 0) {
        if (built != nullptr) built->push_back(reader_.position());
        // A wrong turn does not come back to the right bit and predictors, so the last group of a row tells for all.
        if (index != nullptr && x > from && x + kJpegGroup >= to &&
            !same(reader_.position(), (*index)[static_cast<size_t>(y * groups_of(file_) + x / kJpegGroup)]))
          return false;
      }
      if (!wanted) {
        if (!loops_.skip(plan_.scan, reader_.bits, stop - x, reader_.dc)) return false;
      } else {
        stop = std::min(stop, layout_.mcu_right);
        const int first = static_cast<int>(x % kJpegGroup);
        if (!loops_.read(plan_.scan, reader_.bits, first, first + static_cast<int>(stop - x), reader_.dc, work_))
          return false;
        if (stop % kJpegGroup == 0 || stop == layout_.mcu_right) transform(y, x / kJpegGroup);
      }
      x = stop;
    }
    return true;
  }

  void transform(int64_t y, int64_t group) {
    for (int c = 0; c < file_.components; ++c) {
      const JpegPlane& plane = layout_.plane[c];
      const JpegTransform& t = plan_.transform[c];
      uint8_t* const out = planes_ + plane.block_offset + (y - layout_.mcu_top) * t.rows * t.size * plane.stride +
                           (group - layout_.mcu_left / kJpegGroup) * t.blocks * t.size;
      loops_.transform(t, work_, out, plane.stride);
    }
  }

  bool in_range() const {
    uint16_t seen = 0;
    for (uint16_t bits : work_.range) seen = static_cast<uint16_t>(seen | bits);
    return seen < 2 * kJpegBias;
  }

  const JpegFile& file_;
  const JpegLayout& layout_;
  uint8_t* const planes_;
  const Loops& loops_;
  JpegCoefficients& work_;
  Reader reader_;
  Plan plan_;
};

JpegStatus decode(const uint8_t* data, size_t size, const JpegFile& file, const JpegLayout& layout, uint8_t* planes,
                  const JpegIndex* index, JpegIndex* built, const Loops& loops, Scratch& scratch) {
  if (file.scan <= 0 || static_cast<size_t>(file.scan) > size) return JpegStatus::damaged;
  // Offsets of an index have 32 bits.
  if (built != nullptr && size > UINT32_MAX) return JpegStatus::unsupported;
  Decoding decoding(data, size, file, layout, planes, loops, scratch);
  return index != nullptr && built == nullptr ? decoding.indexed(*index) : decoding.all(built);
}

/// Rows of one component at the resolution of the image.
class Upsampler {
 public:
  Upsampler(const JpegPlane& plane, const uint8_t* planes, const JpegBox& box, const Loops& loops, uint16_t* sums,
            uint8_t* row)
      : plane_(plane), samples_(planes + plane.offset), box_(box), loops_(loops), sums_(sums + 1), row_(row) {
    first_ = std::min(box.left / plane.step_x, plane.full_width - 1);
    last_ = std::min((box.left + box.width - 1) / plane.step_x, plane.full_width - 1);
  }

  /// Numbers of scratch that are needed.
  static int64_t sums(const JpegBox& box) { return box.width + 4; }
  static int64_t row(const JpegBox& box) { return 2 * (box.width + 8); }

  /// Row y of the image, from the left of the box on.
  const uint8_t* at(int64_t y) {
    const int64_t source = std::min(y / plane_.step_y, plane_.full_height - 1);
    const int64_t count = last_ - first_ + 1;
    if (plane_.step_x == 1 && !plane_.smooth_y) return line(source) + first_ - plane_.left;
    if (!plane_.smooth_x && !plane_.smooth_y) {
      loops_.repeat(line(source) + first_ - plane_.left, count, plane_.step_x, row_);
      return row_ + (box_.left - first_ * plane_.step_x);
    }
    const uint8_t* near = line(source) + first_ - plane_.left;
    if (plane_.smooth_y) {
      const int64_t other =
          y % 2 == 0 ? std::max<int64_t>(source - 1, 0) : std::min(source + 1, plane_.full_height - 1);
      const uint8_t* far = line(other) + first_ - plane_.left;
      if (!plane_.smooth_x) {
        loops_.blend_rows(near, far, count, sums_);
        loops_.quarter(sums_, count, y % 2 == 0 ? 1 : 2, row_);
        return row_;
      }
      const int64_t before = first_ > 0, after = last_ + 1 < plane_.full_width;
      loops_.blend_rows(near - before, far - before, count + before + after, sums_ - before);
    } else {
      const int64_t before = first_ > 0, after = last_ + 1 < plane_.full_width;
      loops_.widen_row(near - before, count + before + after, sums_ - before);
    }
    if (first_ == 0) sums_[-1] = sums_[0];
    if (last_ + 1 == plane_.full_width) sums_[count] = sums_[count - 1];
    loops_.interpolate(sums_, count, plane_.smooth_y ? 4 : 2, row_);
    return row_ + (box_.left - first_ * 2);
  }

 private:
  const uint8_t* line(int64_t y) const { return samples_ + (y - plane_.top) * plane_.stride; }

  const JpegPlane& plane_;
  const uint8_t* const samples_;
  const JpegBox& box_;
  const Loops& loops_;
  uint16_t* const sums_;
  uint8_t* const row_;
  int64_t first_ = 0, last_ = 0;
};

void to_rgb(const JpegFile& file, const JpegLayout& layout, const uint8_t* planes, const JpegBox& box,
            const Loops& loops, Scratch& scratch, uint8_t* rgb) {
  const int64_t sums = Upsampler::sums(box), rows = 4 * Upsampler::row(box);
  uint16_t* const sum = room(scratch.sums, sums);
  uint8_t* const row = room(scratch.rows, kJpegComponents * rows);
  const int last = file.components - 1;
  Upsampler a(layout.plane[0], planes, box, loops, sum, row);
  Upsampler b(layout.plane[last > 0 ? 1 : 0], planes, box, loops, sum, row + rows);
  Upsampler c(layout.plane[last], planes, box, loops, sum, row + 2 * rows);
  for (int64_t y = 0; y < box.height; ++y) {
    uint8_t* const out = rgb + y * box.width * 3;
    const uint8_t* first = a.at(box.top + y);
    if (last == 0)
      loops.rgb_row(first, first, first, box.width, out);
    else if (file.colour == JpegColour::rgb)
      loops.rgb_row(first, b.at(box.top + y), c.at(box.top + y), box.width, out);
    else
      loops.ycc_row(first, b.at(box.top + y), c.at(box.top + y), box.width, out);
  }
}

}  // namespace

int64_t jpeg_scaled(int64_t pixels, int scale) {
  return (pixels + scale - 1) / scale;
}

JpegLayout jpeg_layout(const JpegFile& file, const JpegBox& box, int scale) {
  JpegLayout layout;
  layout.scale = scale;
  const int smallest = 8 / scale;
  layout.mcu_left = file.mcus_x;
  layout.mcu_top = file.mcus_y;
  for (int c = 0; c < file.components; ++c) {
    const JpegComponent& component = file.component[c];
    JpegPlane& plane = layout.plane[c];
    // libjpeg prefers a larger transform to upsampling.
    plane.size = smallest;
    while (plane.size < 8 && file.max_h * smallest % (component.h * plane.size * 2) == 0 &&
           file.max_v * smallest % (component.v * plane.size * 2) == 0)
      plane.size *= 2;
    plane.step_x = file.max_h * smallest / (component.h * plane.size);
    plane.step_y = file.max_v * smallest / (component.v * plane.size);
    plane.full_width = (file.width * component.h * plane.size + 8 * file.max_h - 1) / (8 * file.max_h);
    plane.full_height = (file.height * component.v * plane.size + 8 * file.max_v - 1) / (8 * file.max_v);
    const bool fancy = smallest > 1;
    plane.smooth_x = fancy && plane.step_x == 2 && plane.step_y <= 2 && plane.full_width > 2;
    plane.smooth_y = fancy && plane.step_y == 2 && (plane.step_x == 1 || plane.smooth_x);

    const int64_t right = std::min((box.left + box.width - 1) / plane.step_x + 1 + plane.smooth_x, plane.full_width);
    const int64_t bottom = std::min((box.top + box.height - 1) / plane.step_y + 1 + plane.smooth_y, plane.full_height);
    plane.left = std::max<int64_t>(std::min(box.left / plane.step_x, plane.full_width - 1) - plane.smooth_x, 0);
    plane.top = std::max<int64_t>(std::min(box.top / plane.step_y, plane.full_height - 1) - plane.smooth_y, 0);
    plane.width = right - plane.left;
    plane.height = bottom - plane.top;
    const int64_t wide = component.h * plane.size, high = component.v * plane.size;
    layout.mcu_left = std::min(layout.mcu_left, plane.left / wide);
    layout.mcu_right = std::max(layout.mcu_right, (right - 1) / wide + 1);
    layout.mcu_top = std::min(layout.mcu_top, plane.top / high);
    layout.mcu_bottom = std::max(layout.mcu_bottom, (bottom - 1) / high + 1);
  }
  layout.mcu_left -= layout.mcu_left % kJpegGroup;
  const int64_t groups = (layout.mcu_right - layout.mcu_left + kJpegGroup - 1) / kJpegGroup;
  for (int c = 0; c < file.components; ++c) {
    const JpegComponent& component = file.component[c];
    JpegPlane& plane = layout.plane[c];
    const int64_t wide = component.h * plane.size, high = component.v * plane.size;
    plane.stride = groups * kJpegGroup * wide;
    plane.block_offset = layout.bytes;
    plane.offset =
        plane.block_offset + (plane.top - layout.mcu_top * high) * plane.stride + plane.left - layout.mcu_left * wide;
    layout.bytes += ((layout.mcu_bottom - layout.mcu_top) * high * plane.stride + 63) / 64 * 64;
  }
  return layout;
}

JpegStatus decode_jpeg_planes(const uint8_t* data, size_t size, const JpegFile& file, const JpegLayout& layout,
                              uint8_t* planes, const JpegIndex* index, JpegIndex* built, Isa isa) {
  Scratch& scratch = scratch_of_thread();
  const Trimmed trimmed{scratch};
  return decode(data, size, file, layout, planes, index, built, loops_of(isa), scratch);
}

JpegStatus decode_jpeg_rgb(const uint8_t* data, size_t size, const JpegFile& file, const JpegBox& box, int scale,
                           uint8_t* rgb, const JpegIndex* index, JpegIndex* built, Isa isa) {
  Scratch& scratch = scratch_of_thread();
  const Trimmed trimmed{scratch};
  const Loops& loops = loops_of(isa);
  const JpegLayout layout = jpeg_layout(file, box, scale);
  uint8_t* const planes = room(scratch.planes, layout.bytes);
  const JpegStatus status = decode(data, size, file, layout, planes, index, built, loops, scratch);
  if (status == JpegStatus::ok) to_rgb(file, layout, planes, box, loops, scratch, rgb);
  return status;
}

}  // namespace sela
