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

/// Up to here in zigzag order, coefficients lie in the first four rows and columns.
constexpr int kFewLast = 9;

#if defined(SELA_ISA_avx512) || defined(SELA_ISA_avx2)

/// Weights of inputs 1, 3 in the odd part of results 0 / 7, 1 / 6, 2 / 5, 3 / 4; then those of inputs 5, 7.
constexpr int kOdd13[4][2] = {{11363, 9633}, {9633, -2259}, {6437, -11362}, {2260, -6436}};
constexpr int kOdd57[4][2] = {{6437, 2260}, {-11362, -6436}, {2261, 9633}, {9633, -11363}};

/// The pass below where only the first four inputs are not zero.
template <int kShift>
inline void short_pass(Shorts* v, int bias) {
  const Shorts rounding = set1_ints((bias << kShift) + (1 << (kShift - 1)));
  const Shorts first02 = low16(v[0], v[2]), last02 = high16(v[0], v[2]);
  const Shorts first13 = low16(v[1], v[3]), last13 = high16(v[1], v[3]);
  constexpr int kEven[4] = {10703, 4433, -4433, -10703};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Shorts even = pair_of(8192, kEven[i]), odd = pair_of(kOdd13[i][0], kOdd13[i][1]);
    const Shorts even_a = add_ints(multiply_pairs(first02, even), rounding);
    const Shorts even_b = add_ints(multiply_pairs(last02, even), rounding);
    const Shorts a = multiply_pairs(first13, odd), b = multiply_pairs(last13, odd);
    v[7 - i] = pack_ints(shift_ints<kShift>(subtract_ints(even_a, a)), shift_ints<kShift>(subtract_ints(even_b, b)));
    // The first four are still needed: their results go where the upper inputs were.
    v[8 + i] = pack_ints(shift_ints<kShift>(add_ints(even_a, a)), shift_ints<kShift>(add_ints(even_b, b)));
  }
  for (int i = 0; i < 4; ++i) v[i] = v[8 + i];
}

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
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Shorts odd13 = pair_of(kOdd13[i][0], kOdd13[i][1]), odd57 = pair_of(kOdd57[i][0], kOdd57[i][1]);
    const Shorts a = add_ints(multiply_pairs(first13, odd13), multiply_pairs(first57, odd57));
    const Shorts b = add_ints(multiply_pairs(last13, odd13), multiply_pairs(last57, odd57));
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

/// kLanes blocks of 8 x 8; kFew: nothing is outside of their first four rows and columns.  Clears the coefficients.
template <bool kFew>
inline void islow(int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  constexpr int kRows = kFew ? 4 : 8;
  Shorts v[12];
  Shorts seen = load_shorts(range);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    v[i] = load_shorts(in + 8 * kLanes * i);
    store_shorts(in + 8 * kLanes * i, zero_shorts());
  }
  if (task.limits != nullptr) {
    Shorts beyond = zero_shorts();
    for (int i = 0; i < kRows; ++i)
      beyond = either(beyond, subtract_to_zero(abs_shorts(v[i]), repeat_eight(task.limits + 8 * i)));
    seen = either(seen, marked(beyond));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) v[i] = multiply(v[i], repeat_eight(task.quant + 8 * i));
  if (kFew) {
    short_pass<kJpegFirstShift>(v, 0);
    transpose(v);
    short_pass<kJpegSecondShift>(v, kJpegBias);
  } else {
    pass<kJpegFirstShift>(v, 0);
    transpose(v);
    pass<kJpegSecondShift>(v, kJpegBias);
  }
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

template <bool kFew>
inline void islow(int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  int32_t v[64];
  uint32_t wrong = 0;
  for (int i = 0; i < 64; ++i) {
    const int32_t product = in[i] * task.quant[i];
    wrong |= static_cast<uint32_t>(product + 32768) >> 16;
    v[i] = static_cast<int16_t>(product);
  }
  std::memset(in, 0, 64 * sizeof(int16_t));
  uint32_t seen = wrong != 0 ? 0x8000 : 0;
  for (int x = 0; x < 8; ++x) jpeg_pass(v + x, 8, kJpegFirstShift, 0);
  for (int y = 0; y < 8; ++y) {
    jpeg_pass(v + 8 * y, 1, kJpegSecondShift, kJpegBias);
    for (int x = 0; x < 8; ++x) {
      seen |= static_cast<uint32_t>(v[8 * y + x]);
      out[y * stride + x] = jpeg_sample(v[8 * y + x]);
    }
  }
  range[0] |= static_cast<uint16_t>(seen);
}

#endif

/// kLanes blocks without AC coefficients, n x n samples each.  Clears the others.
template <int n>
inline void flat(int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t biased = jpeg_flat(in[8 * lane] * task.quant[0]);
    range[0] |= static_cast<uint16_t>(biased | (biased >> 16));
    const uint64_t eight = 0x0101010101010101u * jpeg_sample(biased);
    for (int y = 0; y < n; ++y) std::memcpy(out + y * stride + n * lane, &eight, n);
    in[8 * lane] = 0;
  }
}

/// Inputs [8][n] to outputs [kSize][n]: a pass of the transform to 4 x 4 or 2 x 2.  Rows of x that have no weight are
/// not read.  The compiler makes vectors of the loop.
template <int kSize, int n>
inline void reduced_pass(const int32_t (*__restrict x)[n], int shift, int32_t bias, int32_t (*__restrict out)[n]) {
  const int32_t rounding = (bias << shift) + (1 << (shift - 1));
  for (int i = 0; i < n; ++i) {
    if (kSize == 4) {
      const int32_t sum = x[0][i] * 16384 + rounding, even = x[2][i] * 15137 - x[6][i] * 6270;
      const int32_t inner = -1730 * x[7][i] + 11893 * x[5][i] - 17799 * x[3][i] + 8697 * x[1][i];
      const int32_t outer = -4176 * x[7][i] - 4926 * x[5][i] + 7373 * x[3][i] + 20995 * x[1][i];
      out[0][i] = (sum + even + outer) >> shift;
      out[1][i] = (sum - even + inner) >> shift;
      out[2][i] = (sum - even - inner) >> shift;
      out[3][i] = (sum + even - outer) >> shift;
    } else {
      const int32_t sum = x[0][i] * 32768 + rounding;
      const int32_t odd = -5906 * x[7][i] + 6967 * x[5][i] - 10426 * x[3][i] + 29692 * x[1][i];
      out[0][i] = (sum + odd) >> shift;
      out[1][i] = (sum - odd) >> shift;
    }
  }
}

/// Numbers up to this in either pass are known not to overflow in any implementation: with all weights of a result,
/// 85,759 at most, and the bias they stay below 2^31.
constexpr int32_t kLargest = 16400;

/// Not 0 if any of the numbers is larger.
template <int kRows, int n>
inline uint32_t too_large(const int32_t (*x)[n]) {
  uint32_t wrong = 0;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < n; ++c)
      wrong |= static_cast<uint32_t>(static_cast<uint32_t>(x[r][c] + kLargest) > 2u * kLargest);
  return wrong;
}

/// kLanes blocks to 4 x 4 or 2 x 2 samples each: libjpeg's reduced transforms.  A block without AC coefficients gets
/// there only when its samples are out of range: so it does not matter whether it is transformed here or, with others
/// like it, by flat().
template <int kSize>
inline void reduced(const int16_t* in, const JpegTransform& task, uint16_t* range, uint8_t* out, int64_t stride) {
  constexpr int kWide = 8 * kLanes, kNarrow = kSize * kLanes;
  alignas(64) int32_t x[8][kWide], columns[kSize][kWide], turned[8][kNarrow], rows[kSize][kNarrow];
  for (int r = 0; r < 8; ++r)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int c = 0; c < 8; ++c)
        x[r][8 * lane + c] = in[r * kWide + 8 * lane + c] * static_cast<int32_t>(task.quant[8 * r + c]);
  uint32_t wrong = too_large<8>(x);
  if (wrong == 0) {
    reduced_pass<kSize>(x, kJpegFirstShift + (kSize == 4 ? 1 : 2), 0, columns);
    wrong = too_large<kSize>(columns);
  }
  if (wrong != 0) {
    range[0] |= 0x8000;
    return;
  }
  for (int c = 0; c < 8; ++c) {
    if (c == 4 || (kSize == 2 && c > 0 && c % 2 == 0)) continue;  // has no weight
    for (int lane = 0; lane < kLanes; ++lane)
      for (int r = 0; r < kSize; ++r) turned[c][kSize * lane + r] = columns[r][8 * lane + c];
  }
  reduced_pass<kSize>(turned, kJpegSecondShift + (kSize == 4 ? 1 : 2), kJpegBias, rows);
  uint32_t seen = 0;
  for (int c = 0; c < kSize; ++c)
    for (int i = 0; i < kNarrow; ++i) seen |= static_cast<uint32_t>(rows[c][i]);
  range[0] |= static_cast<uint16_t>(seen | (seen >> 16));
  for (int r = 0; r < kSize; ++r)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int c = 0; c < kSize; ++c) out[r * stride + kSize * lane + c] = jpeg_sample(rows[c][kSize * lane + r]);
}

/// kLanes blocks of any size.  Clears the coefficients.
template <int n>
inline void transformed(int16_t* block, int last, const JpegTransform& task, uint16_t* range, uint8_t* out,
                        int64_t stride) {
  if (last == 0 || n == 1) {
    flat<n>(block, task, range, out, stride);
  } else if (n == 8) {
    if (last <= kFewLast)
      islow<true>(block, task, range, out, stride);
    else
      islow<false>(block, task, range, out, stride);
    return;
  } else {
    reduced<n == 2 ? 2 : 4>(block, task, range, out, stride);
  }
  if (last != 0) std::memset(block, 0, 64 * kLanes * sizeof(int16_t));
}

}  // namespace

void jpeg_transform(const JpegTransform& task, JpegCoefficients& work, uint8_t* out, int64_t stride) {
  const int batches = task.blocks / kLanes;
  for (int row = 0; row < task.rows; ++row) {
    for (int i = 0; i < batches; ++i) {
      const int batch = task.first_batch + row * batches + i;
      int16_t* const block = work.value + batch * kJpegBlockRoom * kLanes;
      uint8_t* const to = out + row * task.size * stride + i * kLanes * task.size;
      const int last = work.last[batch];
      if (task.size == 8)
        transformed<8>(block, last, task, work.range, to, stride);
      else if (task.size == 4)
        transformed<4>(block, last, task, work.range, to, stride);
      else if (task.size == 2)
        transformed<2>(block, last, task, work.range, to, stride);
      else
        transformed<1>(block, last, task, work.range, to, stride);
      work.last[batch] = 0;
    }
  }
}

}  // namespace SELA_ISA
}  // namespace sela
