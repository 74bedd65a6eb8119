#pragma once
#include <cstdint>

#include "sela/host_device.h"

// libjpeg's accurate integer transform, one number at a time: the arithmetic that the CPU's generic loops and the CUDA
// kernel share.  Note [The islow transform in pairs] and Note [What is out of range] in csrc/cpu/jpeg_idct_loops.cpp
// say why these weights and this rounding are libjpeg's, bit for bit.

namespace sela {

/// Bits of fraction of the weights, and those that are kept between the two passes.
constexpr int kJpegWeightBits = 13, kJpegKeptBits = 2;
/// What the sums of the first and the second pass are shifted to the right by.
constexpr int kJpegFirstShift = kJpegWeightBits - kJpegKeptBits;
constexpr int kJpegSecondShift = kJpegWeightBits + kJpegKeptBits + 3;
/// Results of a transform are biased by this, and in range while they lie in 0..1023.
constexpr int kJpegBias = 512;

/// The product of a weight and a number, modulo 2^32 as in a vector.
SELA_SHARED_INLINE uint32_t jpeg_times(int32_t weight, int32_t x) {
  return static_cast<uint32_t>(weight) * static_cast<uint32_t>(x);
}

/// A sum without its fraction, held within 16 bits.
SELA_SHARED_INLINE int32_t jpeg_rounded(uint32_t sum, int shift) {
  const int32_t value = static_cast<int32_t>(sum) >> shift;
  return value < -32768 ? -32768 : value > 32767 ? 32767 : value;
}

/// One pass over eight numbers that lie `step` apart.  bias: what to add to the results, which are the sums shifted to
/// the right by `shift`.
SELA_SHARED_INLINE void jpeg_pass(int32_t* v, int step, int shift, int32_t bias) {
  const int32_t x0 = v[0], x1 = v[step], x2 = v[2 * step], x3 = v[3 * step], x4 = v[4 * step], x5 = v[5 * step],
                x6 = v[6 * step], x7 = v[7 * step];
  const uint32_t rounding = static_cast<uint32_t>((bias << shift) + (1 << (shift - 1)));
  const uint32_t sum = jpeg_times(8192, x0 + x4) + rounding, difference = jpeg_times(8192, x0 - x4) + rounding;
  const uint32_t e2 = jpeg_times(4433, x2) - jpeg_times(10704, x6);
  const uint32_t e3 = jpeg_times(10703, x2) + jpeg_times(4433, x6);
  const uint32_t base[4] = {sum + e3, difference + e2, difference - e2, sum - e3};
  const uint32_t odd[4] = {jpeg_times(11363, x1) + jpeg_times(9633, x3) + jpeg_times(6437, x5) + jpeg_times(2260, x7),
                           jpeg_times(9633, x1) - jpeg_times(2259, x3) - jpeg_times(11362, x5) - jpeg_times(6436, x7),
                           jpeg_times(6437, x1) - jpeg_times(11362, x3) + jpeg_times(2261, x5) + jpeg_times(9633, x7),
                           jpeg_times(2260, x1) - jpeg_times(6436, x3) + jpeg_times(9633, x5) - jpeg_times(11363, x7)};
  for (int i = 0; i < 4; ++i) {
    v[i * step] = jpeg_rounded(base[i] + odd[i], shift);
    v[(7 - i) * step] = jpeg_rounded(base[i] - odd[i], shift);
  }
}

/// The biased result of a block's samples that has no coefficient but its first, which is `product` with its divisor.
SELA_SHARED_INLINE int32_t jpeg_flat(int32_t product) {
  return ((product + 4) >> 3) + kJpegBias;
}

/// A biased result as a sample.
SELA_SHARED_INLINE uint8_t jpeg_sample(int32_t biased) {
  const int32_t value = biased - (kJpegBias - 128);
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

}  // namespace sela
