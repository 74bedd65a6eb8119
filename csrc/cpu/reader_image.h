#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/augment_one.h"
#include "cpu/reader_cache.h"
#include "sela/jpeg.h"
#include "sela/planes.h"
#include "sela/reader.h"

namespace sela {

/// Memory that only grows, and is given back when it has become large.
class Room {
 public:
  uint8_t* of(size_t bytes) {
    if (size_ < bytes) {
      memory_.reset();
      size_ = 0;
      memory_.reset(new uint8_t[bytes]);
      size_ = bytes;
    }
    return memory_.get();
  }
  void trim(size_t most) {
    if (size_ <= most) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  size_t size_ = 0;
};

/// Reads images, one after the other, in the memory of one thread.
class ImageReader {
 public:
  /// All must outlive it; store may be nullptr.
  ImageReader(const ReaderOptions& options, IndexStore* store, SmallImages& small)
      : options_(options), store_(store), small_(small) {}

  /// Everything that there is to do for image i of a batch.  turn: its turn to take a place in the arena, if there is
  /// one.
  void read(const ReadRequest& request, int64_t i, ArenaTurn& turn) noexcept;

 private:
  /// The image at hand.
  struct Place {
    const ReadRequest& request;
    int64_t i;
    ArenaTurn& turn;
    bool to_arena() const { return request.arena.images != nullptr; }
    size_t views() const { return request.targets.size(); }
    /// The record of view v in the arena.
    PlanarImage& record(size_t v) const {
      return request.arena.images[v * request.items.size() + static_cast<size_t>(i)];
    }
    int64_t number() const { return request.index[i]; }
    uint64_t key() const { return static_cast<uint64_t>((request.keys != nullptr ? request.keys : request.index)[i]); }
    const ReadItem& item() const { return request.items[static_cast<size_t>(i)]; }
  };

  /// What is decoded at once for an arena: all that some views need, at one resolution.
  struct Piece {
    PixelBox box;  ///< of the shown image
    int scale;
    JpegLayout layout;  ///< of planes
    int64_t bytes;
    std::vector<size_t> views;
  };

  ReadStatus run(const Place& at);
  ReadStatus load(const ReadItem& item, int32_t* error);
  ReadStatus read_small(const Place& at, uint64_t source, bool lookable);
  ReadStatus show_small(const Place& at, const uint8_t* pixels, int32_t height, int32_t width);
  ReadStatus read_large(const Place& at);
  JpegStatus show_planes(const Place& at, size_t v);
  JpegStatus show_pixels(const Place& at, size_t v);
  int scale_of(const Place& at, size_t v) const;
  PixelBox planes_box(const Place& at, size_t v, int scale) const;
  uint8_t* take_room(const Place& at, int64_t bytes);
  ReadStatus keep_small(const Place& at, uint8_t* room, const uint8_t* pixels, int32_t height, int32_t width);
  ReadStatus keep_large(const Place& at, int32_t height, int32_t width, bool planes);
  void plan_pieces(const Place& at, int32_t height, int32_t width, bool planes);
  JpegStatus keep_planes(const Place& at, const Piece& piece, uint8_t* room);
  JpegStatus keep_pixels(const Place& at, const Piece& piece, uint8_t* room);
  JpegStatus describe(const Place& at, const Piece& piece, const PlanarImage& image) const;
  bool find_index(const ReadItem& item);
  bool condemned();
  JpegStatus decode_planes(const JpegLayout& layout, uint8_t* planes);
  JpegStatus decode_pixels(const JpegBox& box, uint8_t* pixels);
  template <class Decode>
  JpegStatus touch(Decode decode);
  void draw(const Place& at, size_t v, int32_t height, int32_t width);
  AugmentJob job(const Place& at, size_t v);

  const ReaderOptions& options_;
  IndexStore* const store_;
  SmallImages& small_;

  // Of the image at hand.
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  StoredKey key_;
  JpegFile file_;
  int orientation_ = 1;
  JpegIndex index_;
  bool indexed_ = false;  ///< index_ is of this image
  bool known_ = false;    ///< the store has a record of it
  bool stored_ = true;    ///< what is found out about it goes to the store

  Room file_room_, plane_room_, pixel_room_, turned_room_;
  std::vector<uint8_t> payload_;
  std::vector<Piece> pieces_;
  AugmentScratch scratch_;
};

}  // namespace sela
