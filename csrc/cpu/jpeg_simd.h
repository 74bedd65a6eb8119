#pragma once
// 16-bit vectors for the JPEG loops, one implementation per instruction set, all inside namespace SELA_ISA.
// kLanes 128-bit lanes per vector; every operation stays within its lane.
#include <cstdint>
#include <cstring>
#if defined(SELA_ISA_avx2) || defined(SELA_ISA_avx512)
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 header for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace sela::SELA_ISA {

#if defined(SELA_ISA_avx512)

constexpr int kLanes = 4;
constexpr int kCopied = 64;
using Shorts = __m512i;

/// Copies kCopied bytes; returns how many come before the first 0xFF.
inline int64_t copy_to_ff(const uint8_t* from, uint8_t* to) {
  const __m512i v = _mm512_loadu_si512(from);
  _mm512_storeu_si512(to, v);
  const uint64_t mask = _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(-1));
  return mask != 0 ? __builtin_ctzll(mask) : kCopied;
}
inline Shorts load_shorts(const void* p) {
  return _mm512_loadu_si512(p);
}
inline void store_shorts(void* p, Shorts v) {
  _mm512_storeu_si512(p, v);
}
/// Eight numbers, the same in each lane.
inline Shorts repeat_eight(const uint16_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Shorts zero_shorts() {
  return _mm512_setzero_si512();
}
/// a, b, a, b, ...
inline Shorts pair_of(int a, int b) {
  return _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(b) << 16 | (static_cast<uint32_t>(a) & 0xFFFF)));
}
inline Shorts set1_ints(int a) {
  return _mm512_set1_epi32(a);
}
inline Shorts set1_shorts(int a) {
  return _mm512_set1_epi16(static_cast<short>(a));
}
inline Shorts multiply(Shorts a, Shorts b) {
  return _mm512_mullo_epi16(a, b);
}
inline Shorts abs_shorts(Shorts a) {
  return _mm512_abs_epi16(a);
}
inline Shorts subtract_to_zero(Shorts a, Shorts b) {
  return _mm512_subs_epu16(a, b);
}
inline Shorts either(Shorts a, Shorts b) {
  return _mm512_or_si512(a, b);
}
/// The highest bit of every number that is not zero.
inline Shorts marked(Shorts a) {
  return _mm512_maskz_set1_epi16(_mm512_test_epi16_mask(a, a), static_cast<short>(0x8000));
}
inline Shorts low16(Shorts a, Shorts b) {
  return _mm512_unpacklo_epi16(a, b);
}
inline Shorts high16(Shorts a, Shorts b) {
  return _mm512_unpackhi_epi16(a, b);
}
inline Shorts low32(Shorts a, Shorts b) {
  return _mm512_unpacklo_epi32(a, b);
}
inline Shorts high32(Shorts a, Shorts b) {
  return _mm512_unpackhi_epi32(a, b);
}
inline Shorts low64(Shorts a, Shorts b) {
  return _mm512_unpacklo_epi64(a, b);
}
inline Shorts high64(Shorts a, Shorts b) {
  return _mm512_unpackhi_epi64(a, b);
}
inline Shorts low8(Shorts a, Shorts b) {
  return _mm512_unpacklo_epi8(a, b);
}
inline Shorts high8(Shorts a, Shorts b) {
  return _mm512_unpackhi_epi8(a, b);
}
inline Shorts multiply_pairs(Shorts a, Shorts b) {
  return _mm512_madd_epi16(a, b);
}
inline Shorts add_ints(Shorts a, Shorts b) {
  return _mm512_add_epi32(a, b);
}
inline Shorts subtract_ints(Shorts a, Shorts b) {
  return _mm512_sub_epi32(a, b);
}
template <int kShift>
inline Shorts shift_ints(Shorts a) {
  return _mm512_srai_epi32(a, kShift);
}
inline Shorts pack_ints(Shorts a, Shorts b) {
  return _mm512_packs_epi32(a, b);
}
inline Shorts pack_bytes(Shorts a, Shorts b) {
  return _mm512_packus_epi16(a, b);
}
/// Eight bytes of two rows per lane: the rows of all lanes behind each other.
inline void store_two_rows(Shorts v, uint8_t* first, uint8_t* second) {
  const __m512i rows = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(rows, 1));
}

#elif defined(SELA_ISA_avx2)

constexpr int kLanes = 2;
constexpr int kCopied = 32;
using Shorts = __m256i;

inline int64_t copy_to_ff(const uint8_t* from, uint8_t* to) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8(-1))));
  return mask != 0 ? __builtin_ctz(mask) : kCopied;
}
inline Shorts load_shorts(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_shorts(void* p, Shorts v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
inline Shorts repeat_eight(const uint16_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Shorts zero_shorts() {
  return _mm256_setzero_si256();
}
inline Shorts pair_of(int a, int b) {
  return _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(b) << 16 | (static_cast<uint32_t>(a) & 0xFFFF)));
}
inline Shorts set1_ints(int a) {
  return _mm256_set1_epi32(a);
}
inline Shorts set1_shorts(int a) {
  return _mm256_set1_epi16(static_cast<short>(a));
}
inline Shorts multiply(Shorts a, Shorts b) {
  return _mm256_mullo_epi16(a, b);
}
inline Shorts abs_shorts(Shorts a) {
  return _mm256_abs_epi16(a);
}
inline Shorts subtract_to_zero(Shorts a, Shorts b) {
  return _mm256_subs_epu16(a, b);
}
inline Shorts either(Shorts a, Shorts b) {
  return _mm256_or_si256(a, b);
}
inline Shorts marked(Shorts a) {
  return _mm256_andnot_si256(_mm256_cmpeq_epi16(a, _mm256_setzero_si256()),
                             _mm256_set1_epi16(static_cast<short>(0x8000)));
}
inline Shorts low16(Shorts a, Shorts b) {
  return _mm256_unpacklo_epi16(a, b);
}
inline Shorts high16(Shorts a, Shorts b) {
  return _mm256_unpackhi_epi16(a, b);
}
inline Shorts low32(Shorts a, Shorts b) {
  return _mm256_unpacklo_epi32(a, b);
}
inline Shorts high32(Shorts a, Shorts b) {
  return _mm256_unpackhi_epi32(a, b);
}
inline Shorts low64(Shorts a, Shorts b) {
  return _mm256_unpacklo_epi64(a, b);
}
inline Shorts high64(Shorts a, Shorts b) {
  return _mm256_unpackhi_epi64(a, b);
}
inline Shorts low8(Shorts a, Shorts b) {
  return _mm256_unpacklo_epi8(a, b);
}
inline Shorts high8(Shorts a, Shorts b) {
  return _mm256_unpackhi_epi8(a, b);
}
inline Shorts multiply_pairs(Shorts a, Shorts b) {
  return _mm256_madd_epi16(a, b);
}
inline Shorts add_ints(Shorts a, Shorts b) {
  return _mm256_add_epi32(a, b);
}
inline Shorts subtract_ints(Shorts a, Shorts b) {
  return _mm256_sub_epi32(a, b);
}
template <int kShift>
inline Shorts shift_ints(Shorts a) {
  return _mm256_srai_epi32(a, kShift);
}
inline Shorts pack_ints(Shorts a, Shorts b) {
  return _mm256_packs_epi32(a, b);
}
inline Shorts pack_bytes(Shorts a, Shorts b) {
  return _mm256_packus_epi16(a, b);
}
inline void store_two_rows(Shorts v, uint8_t* first, uint8_t* second) {
  const __m256i rows = _mm256_permute4x64_epi64(v, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(rows));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(rows, 1));
}

#else

constexpr int kLanes = 1;
constexpr int kCopied = 8;

inline int64_t copy_to_ff(const uint8_t* from, uint8_t* to) {
  int64_t n = 0;
  for (; n < kCopied && from[n] != 0xFF; ++n) to[n] = from[n];
  return n;
}

#endif

}  // namespace sela::SELA_ISA
