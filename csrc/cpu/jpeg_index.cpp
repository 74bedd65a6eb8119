// A checkpoint index as bytes.
//
// Layout, little-endian: "SJIX", u16 version, u16 MCUs per checkpoint, u32 MCUs per row, u32 rows of MCUs, u64 size of
// the file, u64 digest of the file, then 11 bytes per checkpoint (u32 offset, u8 bit, 3 x i16 predictors), and at the
// end u64 digest of all bytes before it.
#include <algorithm>
#include <cstring>

#include "sela/jpeg.h"

namespace sela {
namespace {

constexpr char kMagic[4] = {'S', 'J', 'I', 'X'};
constexpr uint64_t kVersion = 1;
constexpr size_t kHead = 32, kEntry = 11, kTail = 8;

/// A 64-bit digest of a stretch of bytes; not meant to withstand intent, which bounds on every read do.
uint64_t digest(uint64_t seed, const uint8_t* data, size_t size) {
  uint64_t h = seed ^ (size * 0x9E3779B97F4A7C15u);
  for (size_t i = 0; i < size; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + i, std::min<size_t>(8, size - i));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    h = (h ^ word) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
  }
  return h;
}

/// Of the headers, and of stretches spread over the rest.
uint64_t digest_of_file(const uint8_t* data, size_t size, const JpegFile& file) {
  constexpr size_t kStretches = 32, kLength = 64;
  const size_t scan = static_cast<size_t>(file.scan), rest = size - scan;
  uint64_t h = digest(kVersion, data, std::min<size_t>(scan, 4096));
  if (rest <= kStretches * kLength) return digest(h, data + scan, rest);
  for (size_t i = 0; i < kStretches; ++i) h = digest(h, data + scan + (rest - kLength) / (kStretches - 1) * i, kLength);
  return h;
}

void put(std::vector<uint8_t>& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<uint8_t>(value >> (8 * i)));
}

uint64_t take(const uint8_t* p, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(p[i]) << (8 * i);
  return value;
}

size_t checkpoints_of(const JpegFile& file) {
  return static_cast<size_t>((file.mcus_x + kJpegGroup - 1) / kJpegGroup * file.mcus_y);
}

}  // namespace

uint64_t jpeg_digest(const uint8_t* data, size_t size, const JpegFile& file) {
  return digest_of_file(data, size, file);
}

std::vector<uint8_t> write_jpeg_index(const uint8_t* data, size_t size, const JpegFile& file, const JpegIndex& index) {
  std::vector<uint8_t> out;
  out.reserve(kHead + index.size() * kEntry + kTail);
  for (char letter : kMagic) out.push_back(static_cast<uint8_t>(letter));
  put(out, kVersion, 2);
  put(out, kJpegGroup, 2);
  put(out, static_cast<uint64_t>(file.mcus_x), 4);
  put(out, static_cast<uint64_t>(file.mcus_y), 4);
  put(out, size, 8);
  put(out, digest_of_file(data, size, file), 8);
  for (const JpegCheckpoint& at : index) {
    put(out, at.offset, 4);
    put(out, at.bit, 1);
    for (int16_t predictor : at.dc) put(out, static_cast<uint16_t>(predictor), 2);
  }
  put(out, digest(0, out.data(), out.size()), 8);
  return out;
}

bool read_jpeg_index(const uint8_t* bytes, size_t length, const uint8_t* data, size_t size, const JpegFile& file,
                     JpegIndex& index) {
  const size_t count = checkpoints_of(file);
  if (length != kHead + count * kEntry + kTail || std::memcmp(bytes, kMagic, sizeof(kMagic)) != 0) return false;
  if (take(bytes + 4, 2) != kVersion || take(bytes + 6, 2) != kJpegGroup) return false;
  if (take(bytes + 8, 4) != static_cast<uint64_t>(file.mcus_x)) return false;
  if (take(bytes + 12, 4) != static_cast<uint64_t>(file.mcus_y)) return false;
  if (take(bytes + 16, 8) != size || take(bytes + 24, 8) != digest_of_file(data, size, file)) return false;
  if (take(bytes + length - kTail, 8) != digest(0, bytes, length - kTail)) return false;
  index.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const uint8_t* p = bytes + kHead + i * kEntry;
    index[i].offset = static_cast<uint32_t>(take(p, 4));
    index[i].bit = static_cast<uint8_t>(take(p + 4, 1));
    for (int c = 0; c < kJpegComponents; ++c) index[i].dc[c] = static_cast<int16_t>(take(p + 5 + 2 * c, 2));
  }
  return true;
}

}  // namespace sela
