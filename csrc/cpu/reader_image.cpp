// One image: from a path or bytes to all its views.
//
// Note [What an image's status depends on]
// On nothing but the image and the boxes that are shown, so that a resumed or differently shared run draws the same
// pixels from the same decoder.  Hence entropy-coded data are read to their end whenever no index vouches for them, an
// image with a fault there is another decoder's from then on, whichever box is wanted, and coefficients out of range
// count where they are shown, with an index and without.
#include "cpu/reader_image.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

namespace sela {
namespace {

/// Room that a thread keeps of each kind from image to image.
constexpr size_t kKept = 16 << 20;
/// Bytes in memory are looked up in the cache of small images up to this size.
constexpr size_t kMostSmallBytes = 64 << 10;

/// A file handle.
class Descriptor {
 public:
  explicit Descriptor(const char* path) : number_(open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY)) {}
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  const int number_;
};

/// Nanoseconds since 1970.
int64_t modified(const struct stat& status) {
#ifdef __APPLE__
  const struct timespec& at = status.st_mtimespec;
#else
  const struct timespec& at = status.st_mtim;
#endif
  return int64_t{at.tv_sec} * 1000000000 + at.tv_nsec;
}

/// How the shown image comes from the stored one: pixel (y, x) is the stored one at (y, x), or at (x, y) if transposed,
/// counted from the other end where reversed.
struct Turn {
  bool transposed, reversed_rows, reversed_columns;  ///< of the stored image

  explicit Turn(int orientation)
      : transposed(orientation >= 5),
        reversed_rows(orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7),
        reversed_columns(orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {}

  /// The box of the stored image, of height x width pixels, that a box of the shown one is.
  JpegBox stored(const JpegBox& shown, int64_t height, int64_t width) const {
    JpegBox box = transposed ? JpegBox{shown.left, shown.top, shown.width, shown.height} : shown;
    if (reversed_rows) box.top = height - box.top - box.height;
    if (reversed_columns) box.left = width - box.left - box.width;
    return box;
  }

  /// from: [height, width, channels], the stored pixels of a box; to: the shown ones.
  void pixels(const uint8_t* from, int64_t height, int64_t width, int64_t channels, uint8_t* to) const {
    const int64_t rows = transposed ? width : height, columns = transposed ? height : width;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < columns; ++x) {
        int64_t row = transposed ? x : y, column = transposed ? y : x;
        if (reversed_rows) row = height - 1 - row;
        if (reversed_columns) column = width - 1 - column;
        for (int64_t c = 0; c < channels; ++c)
          to[(y * columns + x) * channels + c] = from[(row * width + column) * channels + c];
      }
    }
  }
};

/// Whether the fused pass takes the planes of such a file: luma at full resolution, chroma alike, 1, 2 or 4 pixels per
/// sample.
bool planar(const JpegFile& file) {
  const JpegLayout layout = jpeg_layout(file, {0, 0, 1, 1}, 1);
  const JpegPlane* const p = layout.plane;
  if (p[0].step_y != 1 || p[0].step_x != 1) return false;
  if (file.components == 1) return true;
  auto usual = [](int step) { return step == 1 || step == 2 || step == 4; };
  return usual(p[1].step_y) && usual(p[1].step_x) && p[1].step_y == p[2].step_y && p[1].step_x == p[2].step_x;
}

/// The planes of a layout at 1/scale, counted in pixels of the whole image.
PlanarImage planar_image(const JpegFile& file, const JpegLayout& layout, const uint8_t* planes) {
  const int scale = layout.scale;
  PlanarImage image = {};
  image.count = file.components;
  image.rgb = file.colour == JpegColour::rgb;
  image.height = static_cast<int32_t>(file.height);
  image.width = static_cast<int32_t>(file.width);
  const JpegLayout full = jpeg_layout(file, {0, 0, 1, 1}, 1);
  for (int c = 0; c < file.components; ++c) {
    const JpegPlane& from = layout.plane[c];
    PlaneView& to = image.plane[c];
    to.data = planes == nullptr ? nullptr : planes + from.offset;
    to.stride = from.stride;
    to.top = static_cast<int32_t>(from.top);
    to.left = static_cast<int32_t>(from.left);
    to.height = static_cast<int32_t>(from.height);
    to.width = static_cast<int32_t>(from.width);
    to.full_height = static_cast<int32_t>(from.full_height);
    to.full_width = static_cast<int32_t>(from.full_width);
    to.step_y = from.step_y * scale;
    to.step_x = from.step_x * scale;
    // Components that a reduced transform has not touched are interpolated as ever.
    to.smooth_y = from.size == full.plane[c].size && full.plane[c].smooth_y;
    to.smooth_x = from.size == full.plane[c].size && full.plane[c].smooth_x;
  }
  return image;
}

/// The box at 1/scale that holds all of a box of pixels.
JpegBox reduced(const PixelBox& box, int scale) {
  const int64_t top = box.top / scale, left = box.left / scale;
  return {top, left, (box.bottom + scale - 1) / scale - top, (box.right + scale - 1) / scale - left};
}

ReadStatus status_of(JpegStatus status) {
  return status == JpegStatus::ok ? ReadStatus::ok : ReadStatus::other;
}

/// Bytes of an arena that samples take.
int64_t arena_bytes(int64_t samples) {
  return (samples + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

/// Of a small image, all of it.
int64_t small_bytes(int64_t height, int64_t width) {
  return arena_bytes(3 * height * width);
}

/// Pixels of three channels, side by side, as planes one after the other.
void separate(const uint8_t* pixels, int64_t count, uint8_t* planes) {
  for (int64_t i = 0; i < count; ++i) {
    planes[i] = pixels[3 * i];
    planes[count + i] = pixels[3 * i + 1];
    planes[2 * count + i] = pixels[3 * i + 2];
  }
}

/// The record of `separate`d pixels of a box of an image.
PlanarImage separated_image(const uint8_t* planes, const PixelBox& box, int32_t height, int32_t width) {
  PlanarImage image = planar_geometry(3, {1, 1, false, false}, {1, 1, false, false}, height, width);
  image.rgb = true;
  const int32_t tall = box.bottom - box.top, wide = box.right - box.left;
  for (int32_t c = 0; c < 3; ++c) {
    PlaneView& plane = image.plane[c];
    plane.data = planes + int64_t{c} * tall * wide;
    plane.stride = wide;
    plane.top = box.top;
    plane.left = box.left;
    plane.height = tall;
    plane.width = wide;
  }
  return image;
}

int64_t area(const PixelBox& box) {
  return int64_t{box.bottom - box.top} * (box.right - box.left);
}

PixelBox around(const PixelBox& a, const PixelBox& b) {
  return {std::min(a.top, b.top), std::min(a.left, b.left), std::max(a.bottom, b.bottom), std::max(a.right, b.right)};
}

/// Sides that the arithmetic of the central window can hold.
bool fits(const AugmentOptions& options, int64_t height, int64_t width) {
  return options.crop != Crop::center || options.resize * std::max(height, width) / std::min(height, width) < int64_t{1}
                                                                                                                  << 30;
}

}  // namespace

int reduction_for(const AugmentOptions& options, const AugmentParameters& p, int64_t height, int64_t width) {
  const bool center = options.crop == Crop::center;
  const int64_t tall = center ? height : p.height, wide = center ? width : p.width;
  const int64_t rows = center ? p.height : options.size, columns = center ? p.width : options.size;
  int scale = 1;
  while (scale < 8 && tall >= 4 * scale * rows && wide >= 4 * scale * columns) scale *= 2;
  return scale;
}

void ImageReader::read(const ReadRequest& request, int64_t i, ArenaTurn& turn) noexcept {
  request.error[i] = 0;
  request.height[i] = request.width[i] = 0;
  if (request.arena.images != nullptr) {
    request.arena.offset[i] = -1;
    request.arena.wanted[i] = 0;
  }
  ReadStatus status = ReadStatus::no_memory;
  try {
    status = run({request, i, turn});
    file_room_.trim(kKept);
    plane_room_.trim(kKept);
    pixel_room_.trim(kKept);
    turned_room_.trim(kKept);
    if (scratch_.held() > static_cast<int64_t>(kKept)) scratch_ = AugmentScratch();
  } catch (...) {  // std::bad_alloc: nothing else is thrown
    file_room_.trim(0);
    plane_room_.trim(0);
    pixel_room_.trim(0);
    turned_room_.trim(0);
    scratch_ = AugmentScratch();
  }
  request.status[i] = static_cast<uint8_t>(status);
}

ReadStatus ImageReader::run(const Place& at) {
  const ReadItem& item = at.item();
  const bool lookable = item.path != nullptr || item.size <= kMostSmallBytes;
  uint64_t source = 0;
  if (lookable) {
    source =
        item.path != nullptr ? digest_bytes(item.path, std::strlen(item.path)) : digest_bytes(item.data, item.size);
    if (const SmallImage* kept = small_.find(at.number(), source)) {
      if (!at.to_arena()) return show_small(at, kept->pixels.get(), kept->height, kept->width);
      uint8_t* const room = take_room(at, small_bytes(kept->height, kept->width));
      return keep_small(at, room, kept->pixels.get(), kept->height, kept->width);
    }
  }
  key_ = {at.number(), 0, 0};
  const ReadStatus loaded = load(item, &at.request.error[at.i]);
  if (loaded != ReadStatus::ok) return loaded;
  if (read_jpeg_header(data_, size_, file_) != JpegStatus::ok) return ReadStatus::other;
  if (file_.height * file_.width > options_.max_pixels) return ReadStatus::too_large;
  if (options_.channels == 1 && file_.components != 1) return ReadStatus::other;
  orientation_ = options_.exif ? jpeg_orientation(data_, size_, file_) : 1;
  if (orientation_ < 1) return ReadStatus::other;
  for (const ReadView& view : options_.views)
    if (!fits(view.options, file_.height, file_.width)) return ReadStatus::other;
  indexed_ = known_ = false;
  if (file_.height <= options_.small_side && file_.width <= options_.small_side)
    return read_small(at, source, lookable);
  return read_large(at);
}

/// Small images: decoded whole, which needs no index, and kept.
ReadStatus ImageReader::read_small(const Place& at, uint64_t source, bool lookable) {
  const JpegBox whole = {0, 0, file_.height, file_.width};
  const size_t bytes = static_cast<size_t>(whole.height * whole.width * options_.channels);
  // Places do not depend on what the data turn out to be, nor on what is kept.
  uint8_t* const room = at.to_arena() ? take_room(at, small_bytes(whole.height, whole.width)) : nullptr;
  uint8_t* pixels = pixel_room_.of(bytes);
  stored_ = false;
  const JpegStatus status = decode_pixels(whole, pixels);
  if (status != JpegStatus::ok) return ReadStatus::other;
  const Turn turn(orientation_);
  if (orientation_ > 1) {
    uint8_t* const turned = turned_room_.of(bytes);
    turn.pixels(pixels, whole.height, whole.width, options_.channels, turned);
    pixels = turned;
  }
  const auto height = static_cast<int32_t>(turn.transposed ? whole.width : whole.height);
  const auto width = static_cast<int32_t>(turn.transposed ? whole.height : whole.width);
  if (lookable) small_.keep(at.number(), source, pixels, height, width, options_.channels);
  return at.to_arena() ? keep_small(at, room, pixels, height, width) : show_small(at, pixels, height, width);
}

/// The bytes of the item: data_, size_, and the rest of key_.
ReadStatus ImageReader::load(const ReadItem& item, int32_t* error) {
  if (item.path == nullptr) {
    data_ = item.data;
    size_ = item.size;
    key_.size = item.size;
    return item.size > static_cast<size_t>(kMostFileBytes) ? ReadStatus::too_large : ReadStatus::ok;
  }
  // Opening a pipe or a device can have effects: looked at before, and again what was opened.
  struct stat status;
  if (stat(item.path, &status) != 0) {
    *error = errno;
    return ReadStatus::unreadable;
  }
  if (!S_ISREG(status.st_mode)) return ReadStatus::not_regular;
  const Descriptor file(item.path);
  if (file.number() < 0 || fstat(file.number(), &status) != 0) {
    *error = errno;
    return ReadStatus::unreadable;
  }
  if (!S_ISREG(status.st_mode)) return ReadStatus::not_regular;
  if (status.st_size > kMostFileBytes) return ReadStatus::too_large;
  const size_t expected = static_cast<size_t>(status.st_size);
  uint8_t* const room = file_room_.of(expected + 1);
  size_t got = 0;
  while (got < expected) {
    const ssize_t more = ::read(file.number(), room + got, expected - got);
    if (more < 0 && errno == EINTR) continue;
    if (more < 0) {
      *error = errno;
      return ReadStatus::unreadable;
    }
    if (more == 0) break;
    got += static_cast<size_t>(more);
  }
  data_ = room;
  size_ = got;
  key_.size = got;
  key_.modified = modified(status);
  return ReadStatus::ok;
}

void ImageReader::draw(const Place& at, size_t v, int32_t height, int32_t width) {
  const ReadTarget& target = at.request.targets[v];
  const ReadView& view = options_.views[v];
  target.parameters[at.i] =
      sample_parameters(view.options, height, width, at.request.seed, at.request.epoch, at.key(), target.view);
  if (target.effects != nullptr)
    target.effects[at.i] = sample_effects(view.effects, at.request.seed, at.request.epoch, at.key(), target.view);
}

/// Everything of view v but the image.
AugmentJob ImageReader::job(const Place& at, size_t v) {
  const ReadTarget& target = at.request.targets[v];
  const ReadView& view = options_.views[v];
  const int64_t pixels = int64_t{view.options.size} * view.options.size;
  const int64_t bytes = (view.effects.sobel ? 2 : options_.channels) * pixels * bytes_of(options_.type);
  return {&view.options,
          &view.effects,
          {nullptr, 0, 0, 0},
          nullptr,
          options_.exact,
          options_.channels,
          &target.parameters[at.i],
          target.effects != nullptr ? target.effects[at.i] : kNoEffects,
          static_cast<char*>(target.out) + at.i * bytes,
          options_.type,
          options_.channels_last,
          nullptr,
          nullptr};
}

/// All views of decoded pixels.
ReadStatus ImageReader::show_small(const Place& at, const uint8_t* pixels, int32_t height, int32_t width) {
  at.request.height[at.i] = height;
  at.request.width[at.i] = width;
  for (size_t v = 0; v < options_.views.size(); ++v) {
    draw(at, v, height, width);
    AugmentJob one = job(at, v);
    one.image = {pixels, height, width, int64_t{width} * options_.channels};
    augment_one(options_.isa, one, scratch_);
  }
  return ReadStatus::ok;
}

ReadStatus ImageReader::read_large(const Place& at) {
  stored_ = true;
  const Turn turn(orientation_);
  const auto height = static_cast<int32_t>(turn.transposed ? file_.width : file_.height);
  const auto width = static_cast<int32_t>(turn.transposed ? file_.height : file_.width);
  const bool planes = orientation_ == 1 && planar(file_);
  if (at.to_arena()) return keep_large(at, height, width, planes);
  if (!find_index(at.item())) return ReadStatus::other;
  at.request.height[at.i] = height;
  at.request.width[at.i] = width;
  for (size_t v = 0; v < options_.views.size(); ++v) {
    draw(at, v, height, width);
    const JpegStatus status = planes ? show_planes(at, v) : show_pixels(at, v);
    if (status != JpegStatus::ok) return status_of(status);
  }
  return ReadStatus::ok;
}

/// At what part of the resolution view v is decoded.
int ImageReader::scale_of(const Place& at, size_t v) const {
  if (options_.exact || !options_.reduce) return 1;
  return reduction_for(options_.views[v].options, at.request.targets[v].parameters[at.i], file_.height, file_.width);
}

/// The pixels that view v needs of planes at 1/scale.
PixelBox ImageReader::planes_box(const Place& at, size_t v, int scale) const {
  const AugmentOptions& options = options_.views[v].options;
  const AugmentParameters& p = at.request.targets[v].parameters[at.i];
  if (scale == 1)  // the layout adds what upsampling reads
    return shown_box(options, p, static_cast<int32_t>(file_.height), static_cast<int32_t>(file_.width));
  return needed_box(options, p, planar_image(file_, jpeg_layout(file_, {0, 0, 1, 1}, scale), nullptr));
}

JpegStatus ImageReader::show_planes(const Place& at, size_t v) {
  const AugmentOptions& options = options_.views[v].options;
  const AugmentParameters& p = at.request.targets[v].parameters[at.i];
  const int scale = scale_of(at, v);
  const JpegLayout layout = jpeg_layout(file_, reduced(planes_box(at, v, scale), scale), scale);
  uint8_t* const planes = plane_room_.of(static_cast<size_t>(layout.bytes));
  const JpegStatus status = decode_planes(layout, planes);
  if (status != JpegStatus::ok) return status;
  const PlanarImage image = planar_image(file_, layout, planes);
  if (check_planes(options, p, image) != nullptr) return JpegStatus::unsupported;  // does not happen
  AugmentJob one = job(at, v);
  one.image = {nullptr, image.height, image.width, 0};
  one.planes = &image;
  augment_one(options_.isa, one, scratch_);
  return JpegStatus::ok;
}

/// Files that are turned, or sampled as few are: RGB of the box, which is an image of its own unless its surroundings
/// are needed to place it.
JpegStatus ImageReader::show_pixels(const Place& at, size_t v) {
  const AugmentOptions& options = options_.views[v].options;
  AugmentParameters p = at.request.targets[v].parameters[at.i];
  const Turn turn(orientation_);
  JpegBox shown = {0, 0, at.request.height[at.i], at.request.width[at.i]};
  if (options.crop != Crop::center) {
    shown = {p.top, p.left, p.height, p.width};
    p.top = p.left = 0;
  }
  const JpegBox box = turn.stored(shown, file_.height, file_.width);
  const size_t bytes = static_cast<size_t>(box.height * box.width * options_.channels);
  uint8_t* pixels = pixel_room_.of(bytes);
  const JpegStatus status = decode_pixels(box, pixels);
  if (status != JpegStatus::ok) return status;
  if (orientation_ > 1) {
    uint8_t* const turned = turned_room_.of(bytes);
    turn.pixels(pixels, box.height, box.width, options_.channels, turned);
    pixels = turned;
  }
  AugmentJob one = job(at, v);
  one.parameters = &p;
  one.image = {pixels, static_cast<int32_t>(shown.height), static_cast<int32_t>(shown.width),
               shown.width * options_.channels};
  augment_one(options_.isa, one, scratch_);
  return JpegStatus::ok;
}

// ---- Into an arena.

/// The place of an image of so many bytes, or nullptr.
uint8_t* ImageReader::take_room(const Place& at, int64_t bytes) {
  const ReadArena& arena = at.request.arena;
  arena.wanted[at.i] = bytes;
  const int64_t place = at.turn.take(bytes);
  arena.offset[at.i] = place;
  return place < 0 ? nullptr : arena.memory + place;
}

/// All of a small image, for all views. room: nullptr, there is none.
ReadStatus ImageReader::keep_small(const Place& at, uint8_t* room, const uint8_t* pixels, int32_t height,
                                   int32_t width) {
  at.request.height[at.i] = height;
  at.request.width[at.i] = width;
  if (room != nullptr) separate(pixels, int64_t{height} * width, room);
  for (size_t v = 0; v < at.views(); ++v) {
    draw(at, v, height, width);
    if (room != nullptr) at.record(v) = separated_image(room, {0, 0, height, width}, height, width);
  }
  return room != nullptr ? ReadStatus::ok : ReadStatus::no_room;
}

ReadStatus ImageReader::keep_large(const Place& at, int32_t height, int32_t width, bool planes) {
  for (size_t v = 0; v < at.views(); ++v) draw(at, v, height, width);
  plan_pieces(at, height, width, planes);
  int64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.bytes;
  // Before the index is looked for: places must not depend on what is known of the image.
  uint8_t* room = take_room(at, bytes);
  if (!find_index(at.item())) return ReadStatus::other;
  at.request.height[at.i] = height;
  at.request.width[at.i] = width;
  if (room == nullptr) return ReadStatus::no_room;
  for (const Piece& piece : pieces_) {
    const JpegStatus status = planes ? keep_planes(at, piece, room) : keep_pixels(at, piece, room);
    if (status != JpegStatus::ok) return status_of(status);
    room += piece.bytes;
  }
  return ReadStatus::ok;
}

/// What is decoded of the image: of views of one resolution the box around them, unless that is more than the boxes.
void ImageReader::plan_pieces(const Place& at, int32_t height, int32_t width, bool planes) {
  pieces_.clear();
  for (int scale = 1; scale <= 8; scale *= 2) {
    const size_t first = pieces_.size();
    for (size_t v = 0; v < at.views(); ++v) {
      if ((planes ? scale_of(at, v) : 1) != scale) continue;
      const AugmentParameters& p = at.request.targets[v].parameters[at.i];
      const PixelBox box = planes ? planes_box(at, v, scale) : shown_box(options_.views[v].options, p, height, width);
      pieces_.push_back({box, scale, {}, 0, {v}});
    }
    if (pieces_.size() - first < 2) continue;
    Piece whole = pieces_[first];
    int64_t sum = area(whole.box);
    for (size_t k = first + 1; k < pieces_.size(); ++k) {
      whole.box = around(whole.box, pieces_[k].box);
      whole.views.push_back(pieces_[k].views.front());
      sum += area(pieces_[k].box);
    }
    if (area(whole.box) > sum) continue;
    pieces_.resize(first);
    pieces_.push_back(std::move(whole));
  }
  for (Piece& piece : pieces_) {
    int64_t samples = 3 * area(piece.box);
    if (planes) {
      piece.layout = jpeg_layout(file_, reduced(piece.box, piece.scale), piece.scale);
      samples = 0;
      for (int c = 0; c < file_.components; ++c) samples += piece.layout.plane[c].height * piece.layout.plane[c].width;
    }
    piece.bytes = arena_bytes(samples);
  }
}

JpegStatus ImageReader::keep_planes(const Place& at, const Piece& piece, uint8_t* room) {
  uint8_t* const planes = plane_room_.of(static_cast<size_t>(piece.layout.bytes));
  const JpegStatus status = decode_planes(piece.layout, planes);
  if (status != JpegStatus::ok) return status;
  PlanarImage image = planar_image(file_, piece.layout, planes);
  for (int32_t c = 0; c < image.count; ++c) {  // the samples of the box alone
    PlaneView& plane = image.plane[c];
    const auto wide = static_cast<size_t>(plane.width);
    uint8_t* const begin = room;
    for (int32_t y = 0; y < plane.height; ++y, room += wide) std::memcpy(room, plane.data + y * plane.stride, wide);
    plane.data = begin;
    plane.stride = plane.width;
  }
  return describe(at, piece, image);
}

JpegStatus ImageReader::keep_pixels(const Place& at, const Piece& piece, uint8_t* room) {
  const Turn turn(orientation_);
  const PixelBox& shown = piece.box;
  const JpegBox box = turn.stored({shown.top, shown.left, shown.bottom - shown.top, shown.right - shown.left},
                                  file_.height, file_.width);
  const size_t bytes = static_cast<size_t>(3 * area(shown));
  uint8_t* pixels = pixel_room_.of(bytes);
  const JpegStatus status = decode_pixels(box, pixels);
  if (status != JpegStatus::ok) return status;
  if (orientation_ > 1) {
    uint8_t* const turned = turned_room_.of(bytes);
    turn.pixels(pixels, box.height, box.width, 3, turned);
    pixels = turned;
  }
  separate(pixels, area(shown), room);
  return describe(at, piece, separated_image(room, shown, at.request.height[at.i], at.request.width[at.i]));
}

/// Leaves the record of a piece with its views.
JpegStatus ImageReader::describe(const Place& at, const Piece& piece, const PlanarImage& image) const {
  for (size_t v : piece.views) {
    if (check_planes(options_.views[v].options, at.request.targets[v].parameters[at.i], image) != nullptr)
      return JpegStatus::unsupported;  // does not happen
    at.record(v) = image;
  }
  return JpegStatus::ok;
}

// ---- What is known of an image.

/// Looks for what is known of the image; false: that it is another decoder's.
bool ImageReader::find_index(const ReadItem& item) {
  if (item.index != nullptr) {
    indexed_ = read_jpeg_index(item.index, item.index_size, data_, size_, file_, index_);
    if (indexed_) return true;
  }
  if (store_ == nullptr) return true;
  const StoredKind kind = store_->find(key_, payload_, &known_);
  if (kind == StoredKind::index) {
    indexed_ = read_jpeg_index(payload_.data(), payload_.size(), data_, size_, file_, index_);
  } else if (kind == StoredKind::other && payload_.size() == sizeof(uint64_t)) {
    const uint64_t digest = jpeg_digest(data_, size_, file_);
    for (size_t k = 0; k < sizeof(digest); ++k)
      if (payload_[k] != static_cast<uint8_t>(digest >> (8 * k))) return true;
    return false;
  }
  return true;
}

/// decode(index, built) with the index of the image; where there is none, it is made and kept.
template <class Decode>
JpegStatus ImageReader::touch(Decode decode) {
  if (indexed_) {
    const JpegStatus status = decode(&index_, nullptr);
    if (status != JpegStatus::foreign_index) return status;
    indexed_ = false;
  }
  const JpegStatus status = decode(nullptr, &index_);
  indexed_ = status == JpegStatus::ok;
  if (store_ == nullptr || !stored_) return status;
  if (indexed_) {
    const std::vector<uint8_t> bytes = write_jpeg_index(data_, size_, file_, index_);
    store_->add(key_, StoredKind::index, bytes.data(), bytes.size(), known_);
  } else if (condemned()) {
    const uint64_t digest = jpeg_digest(data_, size_, file_);
    uint8_t bytes[sizeof(digest)];
    for (size_t k = 0; k < sizeof(digest); ++k) bytes[k] = static_cast<uint8_t>(digest >> (8 * k));
    store_->add(key_, StoredKind::other, bytes, sizeof(bytes), known_);
  }
  return status;
}

/// Whether the entropy-coded data are at fault, whatever is shown: reads them without transforming any.
bool ImageReader::condemned() {
  JpegLayout nothing = jpeg_layout(file_, {0, 0, 1, 1}, 1);
  nothing.mcu_top = nothing.mcu_bottom = 0;
  uint8_t* const planes = plane_room_.of(static_cast<size_t>(nothing.bytes));
  return decode_jpeg_planes(data_, size_, file_, nothing, planes, nullptr, &index_, options_.isa) != JpegStatus::ok;
}

JpegStatus ImageReader::decode_planes(const JpegLayout& layout, uint8_t* planes) {
  return touch([&](const JpegIndex* index, JpegIndex* built) {
    return decode_jpeg_planes(data_, size_, file_, layout, planes, index, built, options_.isa);
  });
}

/// A box of the stored image to pixels[height][width][channels].
JpegStatus ImageReader::decode_pixels(const JpegBox& box, uint8_t* pixels) {
  if (options_.channels == 3)
    return touch([&](const JpegIndex* index, JpegIndex* built) {
      return decode_jpeg_rgb(data_, size_, file_, box, 1, pixels, index, built, options_.isa);
    });
  const JpegLayout layout = jpeg_layout(file_, box, 1);
  uint8_t* const planes = plane_room_.of(static_cast<size_t>(layout.bytes));
  const JpegStatus status = decode_planes(layout, planes);
  const JpegPlane& plane = layout.plane[0];
  const uint8_t* from = planes + plane.offset + (box.top - plane.top) * plane.stride + box.left - plane.left;
  for (int64_t y = 0; y < box.height && status == JpegStatus::ok; ++y)
    std::memcpy(pixels + y * box.width, from + y * plane.stride, static_cast<size_t>(box.width));
  return status;
}

}  // namespace sela
