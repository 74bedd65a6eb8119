// Samples to pixels: libjpeg's upsampling and colour conversion, row by row, bit for bit.
//
// Note [Colour in 16 bits]
// libjpeg adds tables of products rounded at 16 bits of fraction, R = y + ((91881 cr + 2^15) >> 16) and so on.  Whole
// multiples of cb and cr come out of the shift unchanged, which leaves weights that fit 16 bits:
//   91881 = 65536 + 26345,  116130 = 2 * 65536 - 14942,  -46802 = -65536 + 18734;
// and (w x + 2^15) >> 16 = (high16(w * 2x) + 1) >> 1.
#include <cstdint>
#include <cstring>

#include "cpu/jpeg_loops.h"
#include "cpu/jpeg_simd.h"

namespace sela {
namespace SELA_ISA {
namespace {

inline uint8_t clamped(int32_t value) {
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

#if defined(SELA_ISA_avx512)

constexpr int64_t kPixels = 32;
using Row = __m512i;
inline Row load_row(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Row add(Row a, Row b) {
  return _mm512_add_epi16(a, b);
}
inline Row subtract(Row a, Row b) {
  return _mm512_sub_epi16(a, b);
}
inline Row high_half(Row a, Row b) {
  return _mm512_mulhi_epi16(a, b);
}
inline Row halved(Row a) {
  return _mm512_srai_epi16(a, 1);
}
inline Row shuffle(Row a, Row b) {
  return _mm512_shuffle_epi8(a, b);
}
inline Row in_all_lanes(__m128i a) {
  return _mm512_broadcast_i32x4(a);
}
/// 24 bytes of each lane.
inline void store_lanes(Row sixteen, Row eight, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(sixteen));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 16), _mm512_castsi512_si128(eight));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 24), _mm512_extracti32x4_epi32(sixteen, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 40), _mm512_extracti32x4_epi32(eight, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 48), _mm512_extracti32x4_epi32(sixteen, 2));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 64), _mm512_extracti32x4_epi32(eight, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 72), _mm512_extracti32x4_epi32(sixteen, 3));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 88), _mm512_extracti32x4_epi32(eight, 3));
}

#elif defined(SELA_ISA_avx2)

constexpr int64_t kPixels = 16;
using Row = __m256i;
inline Row load_row(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Row add(Row a, Row b) {
  return _mm256_add_epi16(a, b);
}
inline Row subtract(Row a, Row b) {
  return _mm256_sub_epi16(a, b);
}
inline Row high_half(Row a, Row b) {
  return _mm256_mulhi_epi16(a, b);
}
inline Row halved(Row a) {
  return _mm256_srai_epi16(a, 1);
}
inline Row shuffle(Row a, Row b) {
  return _mm256_shuffle_epi8(a, b);
}
inline Row in_all_lanes(__m128i a) {
  return _mm256_broadcastsi128_si256(a);
}
inline void store_lanes(Row sixteen, Row eight, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(sixteen));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 16), _mm256_castsi256_si128(eight));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 24), _mm256_extracti128_si256(sixteen, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 40), _mm256_extracti128_si256(eight, 1));
}

#endif

#if defined(SELA_ISA_avx512) || defined(SELA_ISA_avx2)

/// kPixels pixels out of 16-bit numbers, clamped.
inline void store_pixels(Row r, Row g, Row b, uint8_t* rgb) {
  // Per lane: eight of r, eight of g; eight of b twice.
  const Row red_green = pack_bytes(r, g), blue = pack_bytes(b, b);
  const char z = static_cast<char>(0x80);
  const Row from_rg = in_all_lanes(_mm_setr_epi8(0, 8, z, 1, 9, z, 2, 10, z, 3, 11, z, 4, 12, z, 5));
  const Row from_b = in_all_lanes(_mm_setr_epi8(z, z, 0, z, z, 1, z, z, 2, z, z, 3, z, z, 4, z));
  const Row more_rg = in_all_lanes(_mm_setr_epi8(13, z, 6, 14, z, 7, 15, z, z, z, z, z, z, z, z, z));
  const Row more_b = in_all_lanes(_mm_setr_epi8(z, 5, z, z, 6, z, z, 7, z, z, z, z, z, z, z, z));
  store_lanes(either(shuffle(red_green, from_rg), shuffle(blue, from_b)),
              either(shuffle(red_green, more_rg), shuffle(blue, more_b)), rgb);
}

inline void ycc_pixels(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, uint8_t* rgb) {
  const Row middle = set1_shorts(128), one = set1_shorts(1);
  const Row light = load_row(y), b = subtract(load_row(cb), middle), r = subtract(load_row(cr), middle);
  const Row b2 = add(b, b), r2 = add(r, r);
  const Row red = add(add(light, r), halved(add(high_half(r2, set1_shorts(26345)), one)));
  const Row blue = add(add(light, b2), halved(add(high_half(b2, set1_shorts(-14942)), one)));
  const Row weights = pair_of(-22554, 18734), half = set1_ints(32768);
  const Row green_low = shift_ints<16>(add_ints(multiply_pairs(low16(b, r), weights), half));
  const Row green_high = shift_ints<16>(add_ints(multiply_pairs(high16(b, r), weights), half));
  const Row green = add(subtract(light, r), pack_ints(green_low, green_high));
  store_pixels(red, green, blue, rgb);
}

/// Calls do_pixels for whole vectors of a row; the last one is taken from the end again.  False if there is none.
template <class Function>
inline bool whole_row(int64_t n, const Function& do_pixels) {
  if (n < kPixels) return false;
  int64_t i = 0;
  for (; i + kPixels <= n; i += kPixels) do_pixels(i);
  if (i < n) do_pixels(n - kPixels);
  return true;
}

#endif

}  // namespace

void jpeg_blend_rows(const uint8_t* near, const uint8_t* far, int64_t n, uint16_t* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<uint16_t>(3 * near[i] + far[i]);
}

void jpeg_widen_row(const uint8_t* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}

void jpeg_interpolate(const uint16_t* in, int64_t n, int shift, uint8_t* out) {
  // libjpeg rounds up at one of the two and down at the other: 8 and 7 of 16, 1 and 2 of 4.
  const uint16_t before = shift == 4 ? 8 : 1, after = shift == 4 ? 7 : 2;
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t own = static_cast<uint16_t>(3 * in[i]);
    const uint16_t left = static_cast<uint16_t>(static_cast<uint16_t>(own + in[i - 1] + before) >> shift);
    const uint16_t right = static_cast<uint16_t>(static_cast<uint16_t>(own + in[i + 1] + after) >> shift);
    out[2 * i] = static_cast<uint8_t>(left);
    out[2 * i + 1] = static_cast<uint8_t>(right);
  }
}

void jpeg_quarter(const uint16_t* sum, int64_t n, int bias, uint8_t* out) {
  const uint16_t b = static_cast<uint16_t>(bias);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(static_cast<uint16_t>(sum[i] + b) >> 2);
}

void jpeg_repeat(const uint8_t* in, int64_t n, int times, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int k = 0; k < times; ++k) out[i * times + k] = in[i];
}

void jpeg_ycc_row(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int64_t n, uint8_t* rgb) {
#if defined(SELA_ISA_avx512) || defined(SELA_ISA_avx2)
  if (whole_row(n, [&](int64_t i) { ycc_pixels(y + i, cb + i, cr + i, rgb + 3 * i); })) return;
#endif
  for (int64_t i = 0; i < n; ++i) {
    const int32_t b = cb[i] - 128, r = cr[i] - 128;
    rgb[3 * i] = clamped(y[i] + ((91881 * r + 32768) >> 16));
    rgb[3 * i + 1] = clamped(y[i] + ((-22554 * b - 46802 * r + 32768) >> 16));
    rgb[3 * i + 2] = clamped(y[i] + ((116130 * b + 32768) >> 16));
  }
}

void jpeg_rgb_row(const uint8_t* r, const uint8_t* g, const uint8_t* b, int64_t n, uint8_t* rgb) {
#if defined(SELA_ISA_avx512) || defined(SELA_ISA_avx2)
  if (whole_row(n, [&](int64_t i) { store_pixels(load_row(r + i), load_row(g + i), load_row(b + i), rgb + 3 * i); }))
    return;
#endif
  for (int64_t i = 0; i < n; ++i) {
    rgb[3 * i] = r[i];
    rgb[3 * i + 1] = g[i];
    rgb[3 * i + 2] = b[i];
  }
}

}  // namespace SELA_ISA
}  // namespace sela
