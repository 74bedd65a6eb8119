#pragma once
// Vectors of floats for the image loops, one implementation per instruction set, all inside namespace SELA_ISA::pixels:
// apart from csrc/cpu/simd.h, whose functions of the same names work on another type.
// kLanes floats per vector.  Arithmetic operators are those of the compiler's vector types.
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(SELA_ISA_avx2) || defined(SELA_ISA_avx512)
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 header for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace sela::SELA_ISA::pixels {

#if defined(SELA_ISA_avx512)

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

inline Floats load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, Floats v) {
  _mm512_storeu_ps(p, v);
}
/// The same past the caches, for what is not read again soon; p is a multiple of kStreamAlignment.
inline void stream(float* p, Floats v) {
  _mm512_stream_ps(p, v);
}
inline Floats splat(float x) {
  return _mm512_set1_ps(x);
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Floats min(Floats a, Floats b) {
  return _mm512_min_ps(a, b);
}
inline Floats max(Floats a, Floats b) {
  return _mm512_max_ps(a, b);
}
inline Floats abs(Floats a) {
  return _mm512_abs_ps(a);
}
inline Floats floor(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
/// where a == b: yes, else no
inline Floats select_equal(Floats a, Floats b, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
}
inline float sum(Floats a) {
  return _mm512_reduce_add_ps(a);
}
inline Floats first_lanes(Floats a, int n) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), a);
}

inline Ints load_ints(const int32_t* p) {
  return _mm512_loadu_si512(p);
}
inline Ints add(Ints a, int32_t b) {
  return _mm512_add_epi32(a, _mm512_set1_epi32(b));
}
/// p[index] where all indices are below kLanes and v = load(p).
inline Floats look_up(Floats v, Ints index) {
  return _mm512_permutexvar_ps(index, v);
}
/// p[index] where all indices are below 2 kLanes, low = load(p), high = load(p + kLanes).
inline Floats look_up(Floats low, Floats high, Ints index) {
  return _mm512_permutex2var_ps(low, index, high);
}
inline Floats gather(const float* p, Ints index) {
  return _mm512_i32gather_ps(index, p, 4);
}

inline void store_half(uint16_t* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bfloat16(uint16_t* p, Floats v) {  // finite values, ties to even
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

/// kLanes gray pixels.
inline Floats load_gray(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
/// kLanes interleaved RGB pixels; reads exactly 3 kLanes bytes.
inline void load_rgb(const uint8_t* p, Floats* red, Floats* green, Floats* blue) {
  const __m512i bytes = _mm512_maskz_loadu_epi32(0x0FFF, p);
  // Every 128-bit lane gets the 12 bytes of its four pixels; a byte shuffle then widens one channel.
  const __m512i pixels =
      _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), bytes);
  const __m512i pick_red =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1));
  const __m512i pick_green =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, -1, -1, -1, 4, -1, -1, -1, 7, -1, -1, -1, 10, -1, -1, -1));
  const __m512i pick_blue =
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, -1, -1, 5, -1, -1, -1, 8, -1, -1, -1, 11, -1, -1, -1));
  *red = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(pixels, pick_red));
  *green = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(pixels, pick_green));
  *blue = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(pixels, pick_blue));
}

#elif defined(SELA_ISA_avx2)

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

inline Floats load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store(float* p, Floats v) {
  _mm256_storeu_ps(p, v);
}
inline void stream(float* p, Floats v) {
  _mm256_stream_ps(p, v);
}
inline Floats splat(float x) {
  return _mm256_set1_ps(x);
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Floats min(Floats a, Floats b) {
  return _mm256_min_ps(a, b);
}
inline Floats max(Floats a, Floats b) {
  return _mm256_max_ps(a, b);
}
inline Floats abs(Floats a) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
inline Floats floor(Floats a) {
  return _mm256_floor_ps(a);
}
inline Floats select_equal(Floats a, Floats b, Floats yes, Floats no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
inline float sum(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Floats first_lanes(Floats a, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}

inline Ints load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Ints add(Ints a, int32_t b) {
  return _mm256_add_epi32(a, _mm256_set1_epi32(b));
}
inline Floats look_up(Floats v, Ints index) {
  return _mm256_permutevar8x32_ps(v, index);
}
inline Floats look_up(Floats low, Floats high, Ints index) {
  const __m256 use_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), use_high);
}
inline Floats gather(const float* p, Ints index) {
  return _mm256_i32gather_ps(p, index, 4);
}

inline void store_half(uint16_t* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bfloat16(uint16_t* p, Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

inline Floats load_gray(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void load_rgb(const uint8_t* p, Floats* red, Floats* green, Floats* blue) {
  const __m128i front = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i back = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16));
  const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(front), back, 1);
  const __m256i pixels = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5));
  const __m256i pick_red =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1));
  const __m256i pick_green =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(1, -1, -1, -1, 4, -1, -1, -1, 7, -1, -1, -1, 10, -1, -1, -1));
  const __m256i pick_blue =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(2, -1, -1, -1, 5, -1, -1, -1, 8, -1, -1, -1, 11, -1, -1, -1));
  *red = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(pixels, pick_red));
  *green = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(pixels, pick_green));
  *blue = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(pixels, pick_blue));
}

#else  // generic: the compiler's own vectors of four

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Floats v) {
  std::memcpy(p, &v, sizeof(v));
}
inline void stream(float* p, Floats v) {
  store(p, v);
}
inline Floats splat(float x) {
  return Floats{x, x, x, x};
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return a * b + c;
}
inline Floats min(Floats a, Floats b) {
  return a < b ? a : b;
}
inline Floats max(Floats a, Floats b) {
  return a > b ? a : b;
}
inline Floats abs(Floats a) {
  return max(a, -a);
}
inline Floats floor(Floats a) {  // |a| < 2^31
  const Floats whole = __builtin_convertvector(__builtin_convertvector(a, Ints), Floats);
  return whole > a ? whole - 1.0f : whole;
}
inline Floats select_equal(Floats a, Floats b, Floats yes, Floats no) {
  return a == b ? yes : no;
}
inline float sum(Floats a) {
  return (a[0] + a[2]) + (a[1] + a[3]);
}
inline Floats first_lanes(Floats a, int n) {
  return Ints{0, 1, 2, 3} < n ? a : splat(0.0f);
}

inline Ints load_ints(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Ints add(Ints a, int32_t b) {
  return a + b;
}
inline Floats gather(const float* p, Ints i) {
  return Floats{p[i[0]], p[i[1]], p[i[2]], p[i[3]]};
}

inline uint16_t half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65536 and above, infinity
  if (bits < 0x38800000u) {  // below 2^-14: subnormal halves are multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::rint(magnitude * 16777216.0f)));
  }
  bits += 0xFFFu + ((bits >> 13) & 1u);  // ties to even
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}
inline void store_half(uint16_t* p, Floats v) {
  for (int i = 0; i < kLanes; ++i) p[i] = half_bits(v[i]);
}
inline void store_bfloat16(uint16_t* p, Floats v) {
  for (int i = 0; i < kLanes; ++i) {
    const float x = v[i];
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    p[i] = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline Floats load_gray(const uint8_t* p) {
  return Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
inline void load_rgb(const uint8_t* p, Floats* red, Floats* green, Floats* blue) {
  *red = Floats{static_cast<float>(p[0]), static_cast<float>(p[3]), static_cast<float>(p[6]), static_cast<float>(p[9])};
  *green =
      Floats{static_cast<float>(p[1]), static_cast<float>(p[4]), static_cast<float>(p[7]), static_cast<float>(p[10])};
  *blue =
      Floats{static_cast<float>(p[2]), static_cast<float>(p[5]), static_cast<float>(p[8]), static_cast<float>(p[11])};
}

#endif

constexpr uintptr_t kStreamAlignment = kLanes * sizeof(float);

/// Makes streamed stores visible to other threads before anything that this thread does next.
inline void finish_streams() {
#if !defined(SELA_ISA_generic)
  _mm_sfence();
#endif
}

}  // namespace sela::SELA_ISA::pixels
