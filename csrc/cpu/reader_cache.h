#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace sela {

/// A decoded image of [height, width, channels] bytes.
struct SmallImage {
  std::unique_ptr<uint8_t[]> pixels;
  int32_t height = 0, width = 0;
};

/// Decoded small images by number, for as long as the cache lives: what was put in stays where it is.
class SmallImages {
 public:
  explicit SmallImages(int64_t room) : room_(room) {}
  /// source: a digest of where the image came from, or of its bytes.  nullptr: not here.
  const SmallImage* find(int64_t image, uint64_t source) const;
  /// Keeps the image if there is room and nothing of this number yet.
  void keep(int64_t image, uint64_t source, const uint8_t* pixels, int32_t height, int32_t width, int32_t channels);
  int64_t bytes() const;

 private:
  struct Entry {
    uint64_t source;
    SmallImage image;
  };
  struct Shard {
    mutable std::mutex mutex;
    std::unordered_map<int64_t, Entry> entries;
  };
  static constexpr int kShards = 16;
  Shard shards_[kShards];
  mutable std::mutex mutex_;
  int64_t room_, held_ = 0;
};

/// A digest of bytes, for finding them again.
uint64_t digest_bytes(const void* data, size_t size);

}  // namespace sela
