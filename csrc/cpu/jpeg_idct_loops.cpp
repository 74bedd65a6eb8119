// Coefficients to samples: libjpeg's integer transforms, bit for bit.
//
// Note [The islow transform in pairs]
// libjpeg's accurate integer transform (Loeffler, Ligtenberg and Moschytz, 13 bits of fraction, two bits kept between
// the passes) is a fixed linear map with integer weights, rounded twice.  Integer sums do not depend on how they are
// grouped, so the odd part's twelve multiplications and many additions become four sums of four products, two products
// per instruction; the weights are those that libjpeg's factorisation multiplies out to.
//
// Note [What is out of range]
// Implementations differ where numbers overflow: libjpeg in C wraps results at 10 bits, its SIMD forms saturate.  Files
// written by an encoder never get there; one that does is "damaged", and left to libjpeg itself.  In range is where
// every product coefficient * divisor fits 16 bits, and every result lies in -512..511.  The second includes that
// nothing overflowed in between: both passes are orthogonal up to a factor, so that a value which saturates 16 bits
// between them, or a sum of two that wraps there, makes a result above 512; and a 32-bit sum that wraps, which takes
// 2^18 of at most 363,000 units, still lies outside after wrapping.  Results are biased by kJpegBias, or-ed, and looked
// at once per image.
#include <cstdint>
#include <cstring>

#include "cpu/jpeg_loops.h"
#include "cpu/jpeg_simd.h"

namespace sela {
namespace SELA_ISA {
namespace {

constexpr int kBits = 13, kKept = 2;

inline uint8_t sample(int32_t biased) {
  const int32_t value = biased - (kJpegBias - 128);
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

#if defined(SELA_ISA_avx512) || defined(SELA_ISA_avx2)

/// One pass over eight vectors; v[i] holds the i-th input of every column.  bias: what to add to the results, which
/// are the sums shifted to the right by kShift.
template <int kShift>
inline void pass(Shorts* v, int bias) {
  const Shorts rounding = set1_ints((bias << kShift) + (1 << (kShift - 1)));
  const Shorts first = low16(v[0], v[4]), last = high16(v[0], v[4]);
  const Shorts first26 = low16(v[2], v[6]), last26 = high16(v[2], v[6]);
  const Shorts first13 = low16(v[1], v[3]), last13 = high16(v[1], v[3]);
  const Shorts first57 = low16(v[5], v[7]), last57 = high16(v[5], v[7]);
  const Shorts plus = pair_of(8192, 8192), minus = pair_of(8192, -8192);
  const Shorts e3 = pair_of(10703, 4433), e2 = pair_of(4433, -10704);
  const Shorts even[2][4] = {
      {add_ints(multiply_pairs(first, plus), rounding), add_ints(multiply_pairs(first, minus), rounding),
       multiply_pairs(first26, e2), multiply_pairs(first26, e3)},
      {add_ints(multiply_pairs(last, plus), rounding), add_ints(multiply_pairs(last, minus), rounding),
       multiply_pairs(last26, e2), multiply_pairs(last26, e3)}};
  Shorts base[4][2];
  for (int half = 0; half < 2; ++half) {
    base[0][half] = add_ints(even[half][0], even[half][3]);
    base[1][half] = add_ints(even[half][1], even[half][2]);
    base[2][half] = subtract_ints(even[half][1], even[half][2]);
    base[3][half] = subtract_ints(even[half][0], even[half][3]);
  }
  // Weights of inputs 1, 3 and 5, 7 in the odd part of results 0 / 7, 1 / 6, 2 / 5, 3 / 4.
  const Shorts odd[4][2] = {{pair_of(11363, 9633), pair_of(6437, 2260)},
                            {pair_of(9633, -2259), pair_of(-11362, -6436)},
                            {pair_of(6437, -11362), pair_of(2261, 9633)},
                            {pair_of(2260, -6436), pair_of(9633, -11363)}};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Shorts a = add_ints(multiply_pairs(first13, odd[i][0]), multiply_pairs(first57, odd[i][1]));
    const Shorts b = add_ints(multiply_pairs(last13, odd[i][0]), multiply_pairs(last57, odd[i][1]));
    v[i] = pack_ints(shift_ints<kShift>(add_ints(base[i][0], a)), shift_ints<kShift>(add_ints(base[i][1], b)));
    v[7 - i] =
        pack_ints(shift_ints<kShift>(subtract_ints(base[i][0], a)), shift_ints<kShift>(subtract_ints(base[i][1], b)));
  }
}

inline void transpose(Shorts* v) {
  const Shorts a0 = low16(v[0], v[1]), a1 = high16(v[0], v[1]), a2 = low16(v[2], v[3]), a3 = high16(v[2], v[3]);
  const Shorts a4 = low16(v[4], v[5]), a5 = high16(v[4], v[5]), a6 = low16(v[6], v[7]), a7 = high16(v[6], v[7]);
  const Shorts b0 = low32(a0, a2), b1 = high32(a0, a2), b2 = low32(a1, a3), b3 = high32(a1, a3);
  const Shorts b4 = low32(a4, a6), b5 = high32(a4, a6), b6 = low32(a5, a7), b7 = high32(a5, a7);
  v[0] = low64(b0, b4);
  v[1] = high64(b0, b4);
  v[2] = low64(b1, b5);
  v[3] = high64(b1, b5);
  v[4] = low64(b2, b6);
  v[5] = high64(b2, b6);
  v[6] = low64(b3, b7);
  v[7] = high64(b3, b7);
}

/// kLanes blocks of 8 x 8.
inline void islow(const int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  Shorts v[8];
  Shorts seen = load_shorts(range);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = load_shorts(in + 8 * kLanes * i);
  if (task.limits != nullptr) {
    Shorts beyond = zero_shorts();
    for (int i = 0; i < 8; ++i)
      beyond = either(beyond, subtract_to_zero(abs_shorts(v[i]), repeat_eight(task.limits + 8 * i)));
    seen = either(seen, marked(beyond));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = multiply(v[i], repeat_eight(task.quant + 8 * i));
  pass<kBits - kKept>(v, 0);
  transpose(v);
  pass<kBits + kKept + 3>(v, kJpegBias);
  const Shorts down = set1_shorts(kJpegBias - 128);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    seen = either(seen, v[i]);
    v[i] = subtract_to_zero(v[i], down);
  }
  store_shorts(range, seen);
  // v[x] holds column x: bytes back to rows.
  const Shorts p04 = pack_bytes(v[0], v[4]), p15 = pack_bytes(v[1], v[5]), p26 = pack_bytes(v[2], v[6]),
               p37 = pack_bytes(v[3], v[7]);
  const Shorts c01 = low8(p04, p15), c45 = high8(p04, p15), c23 = low8(p26, p37), c67 = high8(p26, p37);
  const Shorts top03 = low16(c01, c23), low03 = high16(c01, c23), top47 = low16(c45, c67), low47 = high16(c45, c67);
  store_two_rows(low32(top03, top47), out, out + stride);
  store_two_rows(high32(top03, top47), out + 2 * stride, out + 3 * stride);
  store_two_rows(low32(low03, low47), out + 4 * stride, out + 5 * stride);
  store_two_rows(high32(low03, low47), out + 6 * stride, out + 7 * stride);
}

#else

/// The product of a weight and a number, modulo 2^32 as in a vector.
inline uint32_t times(int32_t weight, int32_t x) {
  return static_cast<uint32_t>(weight) * static_cast<uint32_t>(x);
}

inline int32_t rounded(uint32_t sum, int shift) {
  const int32_t value = static_cast<int32_t>(sum) >> shift;
  return value < -32768 ? -32768 : value > 32767 ? 32767 : value;
}

/// One pass over eight numbers that lie `step` apart.
inline void pass(int32_t* v, int step, int shift, int32_t bias) {
  const int32_t x0 = v[0], x1 = v[step], x2 = v[2 * step], x3 = v[3 * step], x4 = v[4 * step], x5 = v[5 * step],
                x6 = v[6 * step], x7 = v[7 * step];
  const uint32_t rounding = static_cast<uint32_t>((bias << shift) + (1 << (shift - 1)));
  const uint32_t sum = times(8192, x0 + x4) + rounding, difference = times(8192, x0 - x4) + rounding;
  const uint32_t e2 = times(4433, x2) - times(10704, x6), e3 = times(10703, x2) + times(4433, x6);
  const uint32_t base[4] = {sum + e3, difference + e2, difference - e2, sum - e3};
  const uint32_t odd[4] = {times(11363, x1) + times(9633, x3) + times(6437, x5) + times(2260, x7),
                           times(9633, x1) - times(2259, x3) - times(11362, x5) - times(6436, x7),
                           times(6437, x1) - times(11362, x3) + times(2261, x5) + times(9633, x7),
                           times(2260, x1) - times(6436, x3) + times(9633, x5) - times(11363, x7)};
  for (int i = 0; i < 4; ++i) {
    v[i * step] = rounded(base[i] + odd[i], shift);
    v[(7 - i) * step] = rounded(base[i] - odd[i], shift);
  }
}

inline void islow(const int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  int32_t v[64];
  uint32_t wrong = 0;
  for (int i = 0; i < 64; ++i) {
    const int32_t product = in[i] * task.quant[i];
    wrong |= static_cast<uint32_t>(product + 32768) >> 16;
    v[i] = static_cast<int16_t>(product);
  }
  uint32_t seen = wrong != 0 ? 0x8000 : 0;
  for (int x = 0; x < 8; ++x) pass(v + x, 8, kBits - kKept, 0);
  for (int y = 0; y < 8; ++y) {
    pass(v + 8 * y, 1, kBits + kKept + 3, kJpegBias);
    for (int x = 0; x < 8; ++x) {
      seen |= static_cast<uint32_t>(v[8 * y + x]);
      out[y * stride + x] = sample(v[8 * y + x]);
    }
  }
  range[0] |= static_cast<uint16_t>(seen);
}

#endif

/// Blocks without AC coefficients.
inline void flat(const int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t biased = ((in[8 * lane] * task.quant[0] + 4) >> 3) + kJpegBias;
    range[0] |= static_cast<uint16_t>(biased | (biased >> 16));
    const uint64_t eight = 0x0101010101010101u * sample(biased);
    for (int y = 0; y < 8; ++y) std::memcpy(out + y * stride + 8 * lane, &eight, 8);
  }
}

/// Four numbers of a pass of the transform to 4 x 4.
inline void four(const int64_t* x, int shift, int64_t bias, int64_t* out) {
  const int64_t sum = x[0] * 16384 + (bias << shift) + (int64_t{1} << (shift - 1));
  const int64_t even = x[2] * 15137 - x[6] * 6270;
  const int64_t near = -1730 * x[7] + 11893 * x[5] - 17799 * x[3] + 8697 * x[1];
  const int64_t far = -4176 * x[7] - 4926 * x[5] + 7373 * x[3] + 20995 * x[1];
  out[0] = (sum + even + far) >> shift;
  out[3] = (sum + even - far) >> shift;
  out[1] = (sum - even + near) >> shift;
  out[2] = (sum - even - near) >> shift;
}

/// Two numbers of a pass of the transform to 2 x 2.
inline void two(const int64_t* x, int shift, int64_t bias, int64_t* out) {
  const int64_t sum = x[0] * 32768 + (bias << shift) + (int64_t{1} << (shift - 1));
  const int64_t odd = -5906 * x[7] + 6967 * x[5] - 10426 * x[3] + 29692 * x[1];
  out[0] = (sum + odd) >> shift;
  out[1] = (sum - odd) >> shift;
}

/// One block to 4 x 4, 2 x 2 or 1 x 1 samples: libjpeg's reduced transforms.
void reduced(const int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  constexpr int64_t kLargest = 16383;
  int64_t x[64], columns[4][8] = {}, result[4];
  int64_t wrong = 0;
  for (int i = 0; i < 64; ++i) {
    x[i] = int64_t{in[(i >> 3) * 8 * kLanes + (i & 7)]} * task.quant[i];
    wrong |= x[i] > kLargest || x[i] < -kLargest;
  }
  const int n = task.size;
  if (n == 1) {
    columns[0][0] = ((x[0] + 4) >> 3) + kJpegBias;
  } else {
    for (int c = 0; c < 8; ++c) {
      if (n == 4 ? c == 4 : (c != 0 && c % 2 == 0)) continue;  // not read by the second pass
      int64_t column[8];
      for (int r = 0; r < 8; ++r) column[r] = x[8 * r + c];
      if (n == 4)
        four(column, kBits - kKept + 1, 0, result);
      else
        two(column, kBits - kKept + 2, 0, result);
      for (int r = 0; r < n; ++r) {
        columns[r][c] = result[r];
        wrong |= result[r] > kLargest || result[r] < -kLargest;
      }
    }
  }
  int64_t seen = wrong != 0 ? 0x8000 : 0;
  for (int r = 0; r < n; ++r) {
    if (n == 4)
      four(columns[r], kBits + kKept + 4, kJpegBias, result);
    else if (n == 2)
      two(columns[r], kBits + kKept + 5, kJpegBias, result);
    else
      result[0] = columns[0][0];
    for (int c = 0; c < n; ++c) {
      seen |= result[c] < 0 || result[c] > 1023 ? 0x8000 : result[c];
      out[r * stride + c] = sample(static_cast<int32_t>(result[c] < 0 ? 0 : result[c] > 1023 ? 1023 : result[c]));
    }
  }
  range[0] |= static_cast<uint16_t>(seen);
}

}  // namespace

void jpeg_transform(const JpegTransform& task, JpegCoefficients& work, uint8_t* out, int64_t stride) {
  const int batches = task.blocks / kLanes;
  for (int row = 0; row < task.rows; ++row) {
    for (int i = 0; i < batches; ++i) {
      const int batch = task.first_batch + row * batches + i;
      int16_t* const block = work.value + batch * kJpegBlockRoom * kLanes;
      uint8_t* const to = out + row * task.size * stride + i * kLanes * task.size;
      if (task.size != 8) {
        for (int lane = 0; lane < kLanes; ++lane)
          reduced(block + 8 * lane, task, work.range, to + lane * task.size, stride);
      } else if (work.ac[batch] == 0) {
        flat(block, task, work.range, to, stride);
      } else {
        islow(block, task, work.range, to, stride);
      }
      std::memset(block, 0, 64 * kLanes * sizeof(int16_t));
      work.ac[batch] = 0;
    }
  }
}

}  // namespace SELA_ISA
}  // namespace sela
