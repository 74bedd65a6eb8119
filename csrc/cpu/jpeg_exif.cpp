// The orientation in a file's EXIF data, as Pillow's ImageOps.exif_transpose finds it.
//
// Only what leaves no doubt is answered: one EXIF segment, well-formed, the tag in it once as one 16-bit number.  XMP
// data, several segments and damage are Pillow's business.
#include <cstring>

#include "sela/jpeg.h"

namespace sela {
namespace {

constexpr char kExif[] = "Exif\0", kXmp[] = "http://ns.adobe.com/xap/1.0/";
constexpr int kDoubt = 0, kUpright = 1;

/// TIFF numbers of either byte order, within [begin, end).
struct Tiff {
  const uint8_t* begin;
  const uint8_t* end;
  bool big;

  int64_t size() const { return end - begin; }
  uint32_t number(int64_t at, int bytes) const {
    uint32_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      const uint32_t byte = begin[at + i];
      value = big ? value << 8 | byte : value | byte << (8 * i);
    }
    return value;
  }
};

int orientation_of(const uint8_t* begin, const uint8_t* end) {
  constexpr int64_t kHead = 8, kEntry = 12;
  constexpr uint32_t kTag = 0x0112, kShort = 3;
  Tiff tiff = {begin, end, false};
  if (tiff.size() < kHead) return kDoubt;
  if (std::memcmp(begin, "MM\0*", 4) == 0)
    tiff.big = true;
  else if (std::memcmp(begin, "II*\0", 4) != 0)
    return kDoubt;
  const int64_t table = tiff.number(4, 4);
  if (table < kHead || table > tiff.size() - 2) return kDoubt;
  const int64_t entries = tiff.number(table, 2);
  if (entries * kEntry > tiff.size() - table - 2) return kDoubt;
  int found = -1;
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t entry = table + 2 + i * kEntry;
    if (tiff.number(entry, 2) != kTag) continue;
    if (found >= 0 || tiff.number(entry + 2, 2) != kShort || tiff.number(entry + 4, 4) != 1) return kDoubt;
    found = static_cast<int>(tiff.number(entry + 8, 2));
  }
  return found >= 1 && found <= 8 ? found : found < 0 ? -1 : kUpright;
}

}  // namespace

int jpeg_orientation(const uint8_t* data, size_t size, const JpegFile& file) {
  if (file.scan <= 0 || static_cast<size_t>(file.scan) > size) return kDoubt;
  const uint8_t* const end = data + file.scan;
  const uint8_t* at = data + 2;
  bool exif = false, xmp = false;
  int found = -1;  // no such tag
  while (end - at >= 4 && at[0] == 0xFF) {
    if (at[1] == 0xFF) {
      ++at;
      continue;
    }
    const int marker = at[1], length = at[2] << 8 | at[3];
    if (length < 2 || length > end - at - 2) return kDoubt;
    const uint8_t* const body = at + 4;
    at += 2 + length;
    const int64_t left = at - body;
    if (marker != 0xE1) continue;
    if (left >= 6 && std::memcmp(body, kExif, 6) == 0) {
      if (exif) return kDoubt;
      exif = true;
      found = orientation_of(body + 6, at);
      if (found == kDoubt) return kDoubt;
    } else if (left >= static_cast<int64_t>(sizeof(kXmp)) && std::memcmp(body, kXmp, sizeof(kXmp)) == 0) {
      xmp = true;
    }
  }
  if (found >= 1) return found;
  return xmp ? kDoubt : kUpright;  // Pillow looks into XMP data where EXIF has no such tag
}

}  // namespace sela
