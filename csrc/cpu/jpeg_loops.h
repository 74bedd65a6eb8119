#pragma once
#include <cstddef>
#include <cstdint>

#include "sela/jpeg.h"
#include "sela/jpeg_transform.h"

// Between the driver of the JPEG decoder (jpeg.cpp) and its loop bodies (jpeg_entropy_loops.cpp, jpeg_idct_loops.cpp,
// jpeg_colour_loops.cpp, one copy per instruction set).

namespace sela {

/// Blocks of an MCU at most (the format's own limit).
constexpr int kJpegBlocks = 10;
/// Bits of one look-up.
constexpr int kJpegDcBits = 10;
constexpr int kJpegAcBits = 11;
/// Readable bytes that must follow the entropy-coded ones: what one MCU can use up at most, 10 blocks of 64 symbols of
/// up to 31 bits, and what is read ahead.
constexpr int64_t kJpegSlack = kJpegBlocks * 64 * 4 + 64;
/// Coefficients per block with its share of the place for writes that go nowhere: see Note [Interleaved blocks].
constexpr int kJpegBlockRoom = 72;

/// Place, row by row, of the k-th coefficient in zigzag order.
constexpr uint8_t kJpegZigzag[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                     12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                     35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                     58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

/// The way from 16 bits to a symbol, for codes too long for a look-up.
struct JpegLongCodes {
  uint32_t bound[17];  ///< [length]: 16 bits below this are a code of at most this length
  int32_t first[17];   ///< [length]: index of the first symbol minus its code
  uint8_t symbols[256];
};

/// DC: by the next kJpegDcBits bits: length in bits 0..7 (0 = too long for the table), difference in bits 16..31.
struct JpegDcTable {
  int32_t fast[1 << kJpegDcBits];
  JpegLongCodes rest;
};

/// AC: see Note [Two coefficients per look-up] in jpeg_huffman.cpp.
struct JpegAcTable {
  uint64_t fast[1 << kJpegAcBits];
  JpegLongCodes rest;
};

/// Entropy-coded bytes without stuffing, read from the highest bit on.
struct JpegBits {
  const uint8_t* at = nullptr;    ///< the next byte to load
  uint64_t held = 0;              ///< the next bits, highest first
  int count = 0;                  ///< valid bits in `held`
  const uint8_t* last = nullptr;  ///< no MCU begins when `at` is beyond this
};

/// One block of an MCU.
struct JpegBlock {
  int component = 0;
  int32_t place[kJpegGroup] = {};  ///< in the coefficients of a group, by MCU
  int32_t batch[kJpegGroup] = {};  ///< which batch that is
};

/// Read-only data of a scan.
struct JpegScan {
  int blocks = 0;  ///< per MCU
  JpegBlock block[kJpegBlocks];
  const JpegDcTable* dc[kJpegComponents] = {};
  const JpegAcTable* ac[kJpegComponents] = {};
  const uint16_t* quant[kJpegComponents] = {};  ///< zigzag order
  int32_t dc_limit[kJpegComponents] = {};       ///< largest DC whose product with its divisor fits 16 bits
};

/// A component's share of a group.
struct JpegTransform {
  const uint16_t* quant = nullptr;   ///< [64] row by row
  const uint16_t* limits = nullptr;  ///< [64] largest coefficients whose products fit 16 bits; nullptr = all do
  int size = 8;                      ///< of the output
  int rows = 1;                      ///< of blocks
  int blocks = 4;                    ///< per row: kJpegGroup * h
  int first_batch = 0;
};

/// A part of the coefficients of a group, and what is known of its batches.
struct JpegCoefficients {
  alignas(64) int16_t value[kJpegGroup * kJpegBlocks * kJpegBlockRoom];
  uint8_t last[kJpegGroup * kJpegBlocks];  ///< [batch]: places of the last coefficients in zigzag order, or-ed
  alignas(64) uint16_t range[32];          ///< all biased results, or-ed
};

#define SELA_DECLARE_JPEG(isa)                                                                                     \
  namespace isa {                                                                                                  \
  /** Blocks that are transformed at once. */                                                                      \
  int jpeg_lanes();                                                                                                \
  /** MCUs first..last-1 of a group into `out`; dc: predictors.  False at an anomaly. */                           \
  bool jpeg_read(const JpegScan& scan, JpegBits& bits, int first, int last, int32_t* dc, JpegCoefficients& out);   \
  /** The same, only stepping over `count` MCUs. */                                                                \
  bool jpeg_skip(const JpegScan& scan, JpegBits& bits, int64_t count, int32_t* dc);                                \
  /** Coefficients of a component to samples, rows of blocks below each other; clears the coefficients. */         \
  void jpeg_transform(const JpegTransform& task, JpegCoefficients& work, uint8_t* out, int64_t stride);            \
  /** Removes stuffed zeros from [from, end) up to a marker; returns bytes written, which may be followed by up to \
      64 more.  marks: places in `out` before which a zero was, count of them in *found; stop: where it ended. */  \
  int64_t jpeg_unstuff(const uint8_t* from, const uint8_t* end, uint8_t* out, uint32_t* marks, int64_t* found,     \
                       const uint8_t** stop);                                                                      \
  /** sum[i] = 3 * near[i] + far[i] */                                                                             \
  void jpeg_blend_rows(const uint8_t* near, const uint8_t* far, int64_t n, uint16_t* sum);                         \
  void jpeg_widen_row(const uint8_t* in, int64_t n, uint16_t* out);                                                \
  /** out[2i], out[2i+1] between in[i-1], in[i], in[i+1], which exist; shift 2 or 4. */                            \
  void jpeg_interpolate(const uint16_t* in, int64_t n, int shift, uint8_t* out);                                   \
  void jpeg_quarter(const uint16_t* sum, int64_t n, int bias, uint8_t* out);                                       \
  void jpeg_repeat(const uint8_t* in, int64_t n, int times, uint8_t* out);                                         \
  void jpeg_ycc_row(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int64_t n, uint8_t* rgb);              \
  void jpeg_rgb_row(const uint8_t* r, const uint8_t* g, const uint8_t* b, int64_t n, uint8_t* rgb);                \
  }
SELA_DECLARE_JPEG(generic)
#if defined(__x86_64__)
SELA_DECLARE_JPEG(avx2)
SELA_DECLARE_JPEG(avx512)
#endif
#undef SELA_DECLARE_JPEG

/// Decoding tables of a code, kept per thread: most files have one of few codes.  The pointer is good while at most
/// seven other codes are asked for.
const JpegDcTable* jpeg_dc_table(const JpegCode& code);
const JpegAcTable* jpeg_ac_table(const JpegCode& code);

}  // namespace sela
