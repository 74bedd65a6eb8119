#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sela/dispatch.h"

// Baseline JPEG (sequential Huffman, 8 bits) to planes or RGB, whole or limited to a box, on the CPU.
//
// Pixels are those of libjpeg-turbo with its defaults: integer "islow" transform, fancy upsampling, reduced transforms
// when scaled.  Only files without any anomaly are decoded; for everything else a status says so, and the caller asks
// another decoder.  No function keeps a pointer, none throws but std::bad_alloc, all may be called from any thread.

namespace sela {

/// MCUs between two checkpoints of an index, and the number that is decoded between two transforms.
constexpr int kJpegGroup = 4;
/// Components of what is decoded here: 1 or 3.
constexpr int kJpegComponents = 3;

enum class JpegStatus {
  ok,
  unsupported,    ///< a JPEG of another kind (progressive, 12 bits, CMYK, several scans, ...), or no JPEG
  damaged,        ///< an anomaly: a bad code, missing or surplus data, coefficients out of range
  foreign_index,  ///< the index is not of this file
};

/// How the components make a colour.
enum class JpegColour { grey, ycc, rgb };

struct JpegComponent {
  int h = 1, v = 1;    ///< sampling factors, 1..4
  int quant = 0;       ///< index in JpegFile::quant
  int dc = 0, ac = 0;  ///< Huffman tables
};

/// A Huffman code as the file has it.
struct JpegCode {
  bool present = false;
  uint8_t counts[16] = {};    ///< codes of length 1..16
  uint8_t symbols[256] = {};  ///< in the order of the codes
  int total = 0;              ///< symbols in use
};

/// What the headers say.
struct JpegFile {
  int64_t width = 0, height = 0;
  int components = 0;
  JpegComponent component[kJpegComponents];
  int max_h = 1, max_v = 1;
  int64_t mcus_x = 0, mcus_y = 0;
  int64_t restart_interval = 0;  ///< MCUs, 0 = none
  JpegColour colour = JpegColour::grey;
  bool quant_present[4] = {};
  uint16_t quant[4][64] = {};  ///< row by row, not in zigzag order
  JpegCode dc[4], ac[4];
  int64_t scan = 0;  ///< offset of the first entropy-coded byte
};

/// A rectangle of pixels of the (scaled) image.
struct JpegBox {
  int64_t top = 0, left = 0, height = 0, width = 0;
};

/// Where a component's samples lie in the caller's buffer, and which ones they are.
struct JpegPlane {
  int64_t offset = 0;         ///< bytes, of sample (top, left)
  int64_t stride = 0;         ///< bytes from row to row
  int64_t top = 0, left = 0;  ///< in the component's own samples
  int64_t height = 0, width = 0;
  int64_t full_height = 0, full_width = 0;  ///< of the component at this scale
  int step_x = 1, step_y = 1;               ///< pixels per sample
  int size = 8;                             ///< samples per block and direction: 8, 4, 2 or 1
  int64_t block_offset = 0;                 ///< bytes, of the first sample of the first block
  bool smooth_x = false, smooth_y = false;  ///< whether upsampling interpolates
};

/// What a box needs.
struct JpegLayout {
  JpegPlane plane[kJpegComponents];
  int64_t bytes = 0;                    ///< size of the buffer
  int64_t mcu_left = 0, mcu_right = 0;  ///< columns of MCUs that are decoded: left is a multiple of kJpegGroup
  int64_t mcu_top = 0, mcu_bottom = 0;
  int scale = 1;
};

/// Where the decoder stands before MCU (y, x), x a multiple of kJpegGroup.
struct JpegCheckpoint {
  uint32_t offset = 0;               ///< of the byte in the file, from JpegFile::scan on
  uint8_t bit = 0;                   ///< 0..7, bits of that byte that are used up
  int16_t dc[kJpegComponents] = {};  ///< DC predictors
};

/// Checkpoints, row by row, ceil(mcus_x / kJpegGroup) per row of MCUs.
using JpegIndex = std::vector<JpegCheckpoint>;

/// Reads the headers up to the first scan.  Nothing is allocated whatever they claim.
JpegStatus read_jpeg_header(const uint8_t* data, size_t size, JpegFile& file);

/// Size of the image at scale 1, 2, 4 or 8: that of libjpeg, rounded up.
int64_t jpeg_scaled(int64_t pixels, int scale);

/// What is to be decoded for a box within the image of this scale (1, 2, 4, 8), neighbours that upsampling reads
/// included.
JpegLayout jpeg_layout(const JpegFile& file, const JpegBox& box, int scale);

/// Decodes the samples of a layout into planes[layout.bytes].
/// index: nullptr, or checkpoints of this file: MCUs left of the box and above it are then not even looked at.
/// built: nullptr, or where the checkpoints of the whole file go; the entropy-coded data are then read to the end.
/// Nothing outside of data[size] is read, and nothing outside of planes[layout.bytes] written, whatever they hold.
JpegStatus decode_jpeg_planes(const uint8_t* data, size_t size, const JpegFile& file, const JpegLayout& layout,
                              uint8_t* planes, const JpegIndex* index, JpegIndex* built, Isa isa);

/// Decodes a box to rgb[height][width][3].
JpegStatus decode_jpeg_rgb(const uint8_t* data, size_t size, const JpegFile& file, const JpegBox& box, int scale,
                           uint8_t* rgb, const JpegIndex* index, JpegIndex* built, Isa isa);

/// The orientation that the EXIF data between the headers ask for, 1..8 (1 where they ask for none); 0 where it is not
/// plain what Pillow would make of them.  file: the headers, read from these data.
int jpeg_orientation(const uint8_t* data, size_t size, const JpegFile& file);

/// What tells a file from another one of the same size: a digest of the headers and of stretches of the rest.
uint64_t jpeg_digest(const uint8_t* data, size_t size, const JpegFile& file);

/// An index as bytes: a versioned head with the size and a digest of the file, the checkpoints, a checksum.  All
/// numbers are little-endian.
std::vector<uint8_t> write_jpeg_index(const uint8_t* data, size_t size, const JpegFile& file, const JpegIndex& index);

/// The inverse; false when the bytes are damaged or were not made for this file.
bool read_jpeg_index(const uint8_t* bytes, size_t length, const uint8_t* data, size_t size, const JpegFile& file,
                     JpegIndex& index);

}  // namespace sela
