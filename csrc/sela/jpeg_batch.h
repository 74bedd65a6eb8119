#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sela/jpeg.h"

// Batches of indexed JPEG files for a CUDA device: what is uploaded, and the kernels that make planes of it.
//
// The host reads headers and indexes, and lays out the upload: one stretch of memory with the entropy-coded bytes that
// the boxes need and records that say what they are.  On the device each checkpoint is an entry: a thread that decodes
// the (at most kJpegGroup) MCUs behind it.  Their coefficients go to a workspace, which a second kernel transforms to
// samples.  The samples are those of decode_jpeg_planes with the same index; a file with any anomaly gets a status
// other than 0, and is for the CPU.

namespace sela {

/// Bits of a look-up on the device.
constexpr int kJpegFastBits = 11;
/// Huffman codes that the images of one set may have: what fits into shared memory.
constexpr int kJpegSetCodes = 4;
/// Entries that a block of threads decodes at a time, all of them with the same codes.
constexpr int kJpegWorkEntries = 64;
/// Readable bytes behind the entropy-coded ones, which are read as words.
constexpr int kJpegScanRoom = 16;
/// Blocks side by side that a warp transforms at a time.
constexpr int kJpegStrip = 4;

/// What a kernel found wrong with an image, or-ed.
constexpr uint32_t kJpegBadData = 1;    ///< a bad code, missing data, a marker out of place, a number out of range
constexpr uint32_t kJpegBadTurn = 2;    ///< an entry ended elsewhere than the next checkpoint says
constexpr uint32_t kJpegBadSample = 4;  ///< coefficients or samples out of range

/// A Huffman code: the way from 16 bits to a symbol.
struct JpegDeviceCode {
  uint32_t bound[16];    ///< [length - 1]: 16 bits below this are a code of at most this length
  int32_t first[16];     ///< [length - 1]: index of the first symbol minus its code
  uint8_t symbols[256];  ///< in the order of the codes
};

/// The codes of some images.
struct alignas(16) JpegDeviceSet {
  JpegDeviceCode code[kJpegSetCodes];
  uint8_t place[64];  ///< of the k-th coefficient in zigzag order, column by column
};

/// The same with look-ups, made on the device.
struct alignas(16) JpegDeviceTables {
  uint16_t fast[kJpegSetCodes][1 << kJpegFastBits];  ///< by the next bits: length << 8 | symbol; 0: longer, or bad
  JpegDeviceSet set;
};

/// A component of an image on the device.
struct JpegDeviceComponent {
  uint64_t plane;       ///< bytes, of the first sample of the first block in the output
  uint32_t stride;      ///< bytes from row to row of samples
  uint32_t h;           ///< blocks of an MCU side by side
  uint32_t reciprocal;  ///< x / h is x * reciprocal >> 16
  uint32_t quant;       ///< which divisors
};

/// An image on the device.
struct JpegDeviceImage {
  JpegDeviceComponent component[kJpegComponents];
  uint32_t first_block;       ///< of coefficients in the workspace
  uint32_t first_entry;       ///< row by row, `groups` per row of MCUs
  uint32_t groups;            ///< entries per row
  uint32_t blocks;            ///< per MCU
  uint32_t component_of;      ///< two bits per block of an MCU
  uint32_t codes;             ///< per component four bits: which code of the set is that of DC (2), of AC (2)
  uint32_t restart_interval;  ///< MCUs, 0 = none
  uint32_t reserved;
};

/// A checkpoint on the device.
struct alignas(16) JpegDeviceEntry {
  uint32_t begin;                 ///< uploaded byte that holds the next bit
  uint32_t end;                   ///< nothing is read from here on; 2 behind where the next checkpoint lies
  uint32_t image;                 ///<
  uint32_t mcu;                   ///< number of the first MCU in the image
  int16_t dc[kJpegComponents];    ///< predictors
  int16_t next[kJpegComponents];  ///< of the next checkpoint
  uint8_t bit, next_bit;          ///< bits of the byte that are used up, here and at the next checkpoint
  uint8_t mcus;                   ///< to be decoded, 1..kJpegGroup
  uint8_t checked;                ///< whether the decoder must end where the next checkpoint lies
};

/// Entries of images of one set of codes, for a block of threads.
struct alignas(16) JpegDeviceWork {
  uint32_t set;
  uint32_t first;        ///< entry
  uint32_t count;        ///< 1..kJpegWorkEntries
  uint32_t first_block;  ///< of their coefficients, which follow each other
  uint32_t blocks;       ///<
  uint32_t reserved[3];
};

/// A row of blocks of a component, for a warp.
struct alignas(16) JpegDeviceTile {
  uint32_t image;
  uint32_t component;
  uint32_t first_block;  ///< of coefficients, of the row's first block
  uint32_t row;          ///< of blocks in the output
};

/// One file and what is wanted of it.  Nothing is kept of data and index after JpegBatchPlan::write.
struct JpegRequest {
  const uint8_t* data = nullptr;
  size_t size = 0;
  const uint8_t* index = nullptr;  ///< the bytes of write_jpeg_index; nullptr: none, then it is not for the device
  size_t index_size = 0;
  JpegBox box;  ///< height 0: the whole image
};

/// What became of a request.
struct JpegPlanned {
  JpegStatus status = JpegStatus::unsupported;
  JpegFile file;           ///< if status is ok
  JpegLayout layout;       ///<
  JpegBox box;             ///<
  int64_t image = -1;      ///< number on the device
  int64_t planes = 0;      ///< bytes, where its planes begin in the output
  int64_t entries = 0;     ///< threads that decode it
  int64_t scan_bytes = 0;  ///< entropy-coded bytes that are uploaded
};

/// Where the parts of an upload lie, bytes from its begin; multiples of 64.  Sizes of the workspace and the output.
struct JpegBatchSizes {
  int64_t bytes = 0;  ///< of the upload
  int64_t entries = 0, images = 0, sets = 0, quants = 0, works = 0, tiles = 0, scans = 0;
  int64_t entry_count = 0, image_count = 0, set_count = 0, quant_count = 0, work_count = 0, tile_count = 0;
  int64_t coefficient_bytes = 0;  ///< a multiple of 128
  int64_t workspace_bytes = 0;    ///< coefficients and tables, aligned to 16
  int64_t plane_bytes = 0;        ///< output, aligned to 64
};

/// The layout of a batch.
class JpegBatchPlan {
 public:
  /// Takes requests from the first on, as many as fit, but at least one.
  /// most_coefficients: bytes of them.  most_pixels: what a header may claim.
  /// Throws std::invalid_argument for a box that is not within its image.
  JpegBatchPlan(const JpegRequest* requests, int64_t count, int64_t most_coefficients, int64_t most_pixels);

  /// Requests that were taken, whatever became of them.
  int64_t taken() const { return static_cast<int64_t>(planned_.size()); }
  const std::vector<JpegPlanned>& planned() const { return planned_; }
  const JpegBatchSizes& sizes() const { return sizes_; }
  /// Writes the upload to out[sizes().bytes].  The requests' data must still be there.
  void write(uint8_t* out) const;

 private:
  /// Bytes of a file that go to the upload: what a row of the box needs.
  struct Stretch {
    const uint8_t* from;
    uint32_t to, size;
  };
  struct Codes {
    JpegCode code[kJpegSetCodes];
    int count = 0;
  };
  struct Quant {
    uint16_t by_column[64];
  };

  bool add(const JpegRequest& request, JpegPlanned& planned, const JpegIndex& index);
  bool add_codes(const JpegFile& file, uint32_t* set, uint32_t* codes);
  uint32_t add_quant(const uint16_t* by_row);
  void add_works();

  std::vector<JpegPlanned> planned_;
  JpegBatchSizes sizes_;
  std::vector<JpegDeviceImage> images_;
  std::vector<uint32_t> set_of_image_;
  std::vector<JpegDeviceEntry> entries_;
  std::vector<JpegDeviceWork> works_;
  std::vector<JpegDeviceTile> tiles_;
  std::vector<Codes> sets_;
  std::vector<Quant> quants_;
  std::vector<Stretch> stretches_;
  int64_t scan_bytes_ = 0;
};

/// Planes of a batch that lies on the current device.
/// upload: what JpegBatchPlan::write wrote.  workspace: its contents do not matter.  planes: output.  All three begin
/// at multiples of 16.  status: [sizes.image_count], or-ed to; 0 = its planes are those of decode_jpeg_planes.
void decode_jpeg_cuda(const JpegBatchSizes& sizes, const uint8_t* upload, void* workspace, uint8_t* planes,
                      uint32_t* status, void* stream);

}  // namespace sela
