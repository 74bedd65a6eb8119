// Decoded small images: decoding one takes several times as long as augmenting it.
#include "cpu/reader_cache.h"

#include <cstring>

namespace sela {

uint64_t digest_bytes(const void* data, size_t size) {
  const char* p = static_cast<const char*>(data);
  uint64_t h = size * 0x9E3779B97F4A7C15u;
  for (size_t i = 0; i < size; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, size - i < 8 ? size - i : 8);
    h = (h ^ word) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
  }
  return h;
}

const SmallImage* SmallImages::find(int64_t image, uint64_t source) const {
  const Shard& shard = shards_[static_cast<uint64_t>(image) % kShards];
  const std::lock_guard<std::mutex> lock(shard.mutex);
  const auto found = shard.entries.find(image);
  return found == shard.entries.end() || found->second.source != source ? nullptr : &found->second.image;
}

void SmallImages::keep(int64_t image, uint64_t source, const uint8_t* pixels, int32_t height, int32_t width,
                       int32_t channels) {
  const int64_t bytes = int64_t{height} * width * channels;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (held_ + bytes > room_) return;
    held_ += bytes;
  }
  Shard& shard = shards_[static_cast<uint64_t>(image) % kShards];
  bool kept = false;
  {
    const std::lock_guard<std::mutex> lock(shard.mutex);
    if (shard.entries.find(image) == shard.entries.end()) {
      SmallImage copy = {std::unique_ptr<uint8_t[]>(new uint8_t[static_cast<size_t>(bytes)]), height, width};
      std::memcpy(copy.pixels.get(), pixels, static_cast<size_t>(bytes));
      shard.entries.emplace(image, Entry{source, std::move(copy)});
      kept = true;
    }
  }
  if (kept) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  held_ -= bytes;
}

int64_t SmallImages::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return held_;
}

}  // namespace sela
