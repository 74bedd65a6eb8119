// A thin vector of floats for the loop bodies: one type, vfloat, and free functions on it, for the instruction set that
// the including file is compiled for (SELA_ISA: generic, avx2, avx512; see cmake/SelaLoops.cmake).
//
// Everything lives in namespace sela::SELA_ISA: an inline function shared between the builds could be taken by the
// linker from the object with the widest instructions, and would then crash on a smaller processor.
//
// The generic form uses the compilers' vector extensions (GCC and clang, any processor).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(SELA_ISA_avx512) || defined(SELA_ISA_avx2)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined values that its own headers use on purpose for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace sela {
namespace SELA_ISA {

/// Storage types of 16 bits; only their bits are kept here.
struct half_bits {
  uint16_t bits;
};
struct bfloat_bits {
  uint16_t bits;
};
/// A whole number, +infinity for kInfiniteBits.
struct fixed_bits {
  static constexpr uint16_t kInfiniteBits = 65535;
  uint16_t bits;
};

#if defined(SELA_ISA_avx512)

struct vfloat {
  static constexpr int kLanes = 16;
  __m512 v;
};
inline vfloat set1(float x) {
  return {_mm512_set1_ps(x)};
}
inline vfloat load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline vfloat widen(__m256i raw, const half_bits*) {
  return {_mm512_cvtph_ps(raw)};
}
inline vfloat widen(__m256i raw, const bfloat_bits*) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline vfloat widen(__m256i narrow, const fixed_bits*) {
  const __m512i raw = _mm512_cvtepu16_epi32(narrow);
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(raw, _mm512_set1_epi32(fixed_bits::kInfiniteBits));
  return {_mm512_mask_cvtepi32_ps(_mm512_set1_ps(__builtin_inff()), finite, raw)};
}
/// Storage of 16 bits.
template <class T>
inline vfloat load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
inline void store(float* p, vfloat a) {
  _mm512_storeu_ps(p, a.v);
}
/// Rounded to nearest, ties to even, as all stores of 16 bits.
inline void store(half_bits* p, vfloat a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
/// Not for NaN.
inline void store(bfloat_bits* p, vfloat a) {
  const __m512i raw = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(raw, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
/// For 0 .. 65535.
inline void store(fixed_bits* p, vfloat a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
inline vfloat operator+(vfloat a, vfloat b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline vfloat operator-(vfloat a, vfloat b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline vfloat operator*(vfloat a, vfloat b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
/// a * b + c in one rounding (generic: see there).
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
/// Like the instruction: b where either is NaN.
inline vfloat max(vfloat a, vfloat b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline vfloat min(vfloat a, vfloat b) {
  return {_mm512_min_ps(a.v, b.v)};
}
/// One truth per lane.
struct vmask {
  __mmask16 m;
};
inline vmask operator|(vmask a, vmask b) {
  return {_kor_mask16(a.m, b.m)};
}
inline bool any(vmask a) {
  return a.m != 0;
}
/// One bit per lane, the first lane lowest.
inline uint32_t bits(vmask a) {
  return a.m;
}
/// !(a[i] <= b[i]): true for NaN.
inline vmask not_below(vfloat a, vfloat b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ)};
}
/// a[i] > b[i] ? x[i] : y[i].
inline vfloat select_greater(vfloat a, vfloat b, vfloat x, vfloat y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
inline float reduce_add(vfloat a) {
  return _mm512_reduce_add_ps(a.v);
}
inline float reduce_max(vfloat a) {
  return _mm512_reduce_max_ps(a.v);
}
/// out[0 .. 4): largest lane of a, b, c and d.
inline void reduce_max4(vfloat a, vfloat b, vfloat c, vfloat d, float* out) {
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 all = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(SELA_ISA_avx2)

struct vfloat {
  static constexpr int kLanes = 8;
  __m256 v;
};
inline vfloat set1(float x) {
  return {_mm256_set1_ps(x)};
}
inline vfloat load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
inline vfloat load(const half_bits* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline vfloat load(const bfloat_bits* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
inline vfloat load(const fixed_bits* p) {
  const __m256i raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i infinite = _mm256_cmpeq_epi32(raw, _mm256_set1_epi32(fixed_bits::kInfiniteBits));
  const __m256 infinity = _mm256_and_ps(_mm256_castsi256_ps(infinite), _mm256_set1_ps(__builtin_inff()));
  return {_mm256_add_ps(_mm256_cvtepi32_ps(raw), infinity)};
}
inline void store(float* p, vfloat a) {
  _mm256_storeu_ps(p, a.v);
}
inline void store(half_bits* p, vfloat a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
/// Eight numbers below 65536, in 16 bits each.
inline void store_low(void* p, __m256i a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, a), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(bfloat_bits* p, vfloat a) {
  const __m256i raw = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  store_low(p, _mm256_srli_epi32(up, 16));
}
inline void store(fixed_bits* p, vfloat a) {
  store_low(p, _mm256_cvtps_epi32(a.v));
}
inline vfloat operator+(vfloat a, vfloat b) {
  return {_mm256_add_ps(a.v, b.v)};
}
inline vfloat operator-(vfloat a, vfloat b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
inline vfloat operator*(vfloat a, vfloat b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline vfloat max(vfloat a, vfloat b) {
  return {_mm256_max_ps(a.v, b.v)};
}
inline vfloat min(vfloat a, vfloat b) {
  return {_mm256_min_ps(a.v, b.v)};
}
struct vmask {
  __m256 m;
};
inline vmask operator|(vmask a, vmask b) {
  return {_mm256_or_ps(a.m, b.m)};
}
inline bool any(vmask a) {
  return _mm256_movemask_ps(a.m) != 0;
}
inline uint32_t bits(vmask a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(a.m));
}
inline vmask not_below(vfloat a, vfloat b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)};
}
inline vfloat select_greater(vfloat a, vfloat b, vfloat x, vfloat y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
inline float reduce_add(vfloat a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(vfloat a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline void reduce_max4(vfloat a, vfloat b, vfloat c, vfloat d, float* out) {
  const __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  const __m256 all = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

#else

struct vfloat {
  static constexpr int kLanes = 4;
  typedef float raw __attribute__((vector_size(16)));
  raw v;
};
typedef int32_t vint_raw __attribute__((vector_size(16)));
typedef uint32_t vuint_raw __attribute__((vector_size(16)));

inline vfloat set1(float x) {
  return {vfloat::raw{x, x, x, x}};
}
inline vfloat load(const float* p) {
  vfloat a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
inline vfloat load(const bfloat_bits* p) {
  const vuint_raw bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  return {reinterpret_cast<vfloat::raw>(bits << 16)};
}
/// Exact for every half, subnormals too, also when denormal operands count as zero.
inline vfloat load(const half_bits* p) {
  const vuint_raw h = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const vuint_raw magnitude = (h & 0x7fffu) << 13;
  const vuint_raw exponent = magnitude & (0x1fu << 23);
  const vuint_raw special = reinterpret_cast<vuint_raw>(exponent == (0x1fu << 23)) & (112u << 23);
  const vuint_raw normal = magnitude + (112u << 23) + special;
  const vfloat::raw small = reinterpret_cast<vfloat::raw>(magnitude + (113u << 23)) - 6.103515625e-05f;
  const vuint_raw is_small = reinterpret_cast<vuint_raw>(exponent == 0);
  const vuint_raw bits = (is_small & reinterpret_cast<vuint_raw>(small)) | (~is_small & normal);
  return {reinterpret_cast<vfloat::raw>(bits | ((h & 0x8000u) << 16))};
}
inline vfloat load(const fixed_bits* p) {
  vfloat a;
  for (int i = 0; i < vfloat::kLanes; ++i)
    a.v[i] = p[i].bits == fixed_bits::kInfiniteBits ? __builtin_inff() : static_cast<float>(p[i].bits);
  return a;
}
inline void store(float* p, vfloat a) {
  std::memcpy(p, &a.v, sizeof(a.v));
}
inline void store(half_bits* p, vfloat a) {
  for (int i = 0; i < vfloat::kLanes; ++i) {
    uint32_t raw;
    const float x = a.v[i];
    std::memcpy(&raw, &x, sizeof(raw));
    const uint32_t sign = raw >> 16 & 0x8000u;
    uint32_t magnitude = raw & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      magnitude = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 65536
      magnitude = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // 2^-14: adding 1/2 leaves multiples of 2^-24
      float small;
      std::memcpy(&small, &magnitude, sizeof(small));
      small += 0.5f;
      std::memcpy(&magnitude, &small, sizeof(magnitude));
      magnitude -= 0x3f000000u;
    } else {
      magnitude = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    p[i].bits = static_cast<uint16_t>(sign | magnitude);
  }
}
inline void store(bfloat_bits* p, vfloat a) {
  const vuint_raw raw = reinterpret_cast<vuint_raw>(a.v);
  const vuint_raw up = (raw + (raw >> 16 & 1u) + 0x7fffu) >> 16;
  for (int i = 0; i < vfloat::kLanes; ++i) p[i].bits = static_cast<uint16_t>(up[i]);
}
inline void store(fixed_bits* p, vfloat a) {
  const vuint_raw whole = reinterpret_cast<vuint_raw>(a.v + 8388608.0f);  // 2^23
  for (int i = 0; i < vfloat::kLanes; ++i) p[i].bits = static_cast<uint16_t>(whole[i]);
}
inline vfloat operator+(vfloat a, vfloat b) {
  return {a.v + b.v};
}
inline vfloat operator-(vfloat a, vfloat b) {
  return {a.v - b.v};
}
inline vfloat operator*(vfloat a, vfloat b) {
  return {a.v * b.v};
}
/// The product is exact (computed in double), so cancellation against c costs nothing; the sum is rounded to double and
/// then to float, which differs from one rounding only when the double lies on the middle of two floats.
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
  vfloat r;
  for (int i = 0; i < vfloat::kLanes; ++i)
    r.v[i] =
        static_cast<float>(static_cast<double>(a.v[i]) * static_cast<double>(b.v[i]) + static_cast<double>(c.v[i]));
  return r;
}
inline vfloat blend(vint_raw mask, vfloat x, vfloat y) {
  return {reinterpret_cast<vfloat::raw>((mask & reinterpret_cast<vint_raw>(x.v)) |
                                        (~mask & reinterpret_cast<vint_raw>(y.v)))};
}
inline vfloat max(vfloat a, vfloat b) {
  return blend(a.v > b.v, a, b);
}
inline vfloat min(vfloat a, vfloat b) {
  return blend(a.v < b.v, a, b);
}
struct vmask {
  vint_raw m;
};
inline vmask operator|(vmask a, vmask b) {
  return {a.m | b.m};
}
inline bool any(vmask a) {
  return (a.m[0] | a.m[1] | a.m[2] | a.m[3]) != 0;
}
inline uint32_t bits(vmask a) {
  return static_cast<uint32_t>((a.m[0] & 1) | (a.m[1] & 2) | (a.m[2] & 4) | (a.m[3] & 8));
}
inline vmask not_below(vfloat a, vfloat b) {
  return {~(a.v <= b.v)};
}
inline vfloat select_greater(vfloat a, vfloat b, vfloat x, vfloat y) {
  return blend(a.v > b.v, x, y);
}
inline float reduce_add(vfloat a) {
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}
inline float reduce_max(vfloat a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
inline void reduce_max4(vfloat a, vfloat b, vfloat c, vfloat d, float* out) {
  out[0] = reduce_max(a);
  out[1] = reduce_max(b);
  out[2] = reduce_max(c);
  out[3] = reduce_max(d);
}

#endif

/// The first `count` (< kLanes) elements at p, zeros behind them; reads nothing past them.
template <class T>
inline vfloat load_tail(const T* p, int64_t count) {
#if defined(SELA_ISA_avx512)
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p), p);
#else
  T padded[vfloat::kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
#endif
}
inline vfloat load_tail(const float* p, int64_t count) {
#if defined(SELA_ISA_avx512)
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
#else
  float padded[vfloat::kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(float));
  return load(padded);
#endif
}

/// Writes the lanes of a that are larger than `level`, packed, to `values` and their numbers first, first + 1, .. to
/// `columns`; both have room for kLanes more.  Returns how many.
inline int pack_greater(vfloat a, float level, int32_t first, float* values, int32_t* columns) {
#if defined(SELA_ISA_avx512)
  const __mmask16 mask = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(level), _CMP_GT_OQ);
  // No way out for an empty mask: a branch that is guessed wrong costs more than the rest.
  const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, a.v));
  _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(number, _mm512_set1_epi32(first))));
  return __builtin_popcount(mask);
#else
  if (!any(not_below(a, set1(level)))) return 0;
  float lanes[vfloat::kLanes];
  store(lanes, a);
  int count = 0;
  for (int l = 0; l < vfloat::kLanes; ++l) {  // no branch: the next entry overwrites one that does not count
    values[count] = lanes[l];
    columns[count] = first + l;
    count += lanes[l] > level;
  }
  return count;
#endif
}

/// Asks for the cache line `bytes` behind p, into the second-level cache; any address is allowed.
inline void prefetch(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)), 0,
                     2);
}

/// e^x with a relative error below 2e-7 for x in [-80, 80]; 0 (or below 1e-37) for smaller x, -inf included; NaN for
/// NaN; for larger x, +inf or a number above 1e34.
inline vfloat exp(vfloat x) {
#if defined(SELA_ISA_avx512)
  // 2^(y - floor(y)) by a polynomial, then scalef, which applies floor(y) itself and gets -inf and overflow right.
  const __m512 y = _mm512_mul_ps(x.v, _mm512_set1_ps(1.44269504f));
  const __m512 r = _mm512_reduce_ps(y, 0x09);  // y - floor(y), no exceptions; 0 for infinities
  __m512 p = _mm512_set1_ps(0.00187757669f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00898934063f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0558263175f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240153611f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693153083f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99999994f));
  return {_mm512_scalef_ps(p, y)};
#else
  // Clamped so that the exponent can be added to the bits; the order of arguments lets NaN through.
  x = min(set1(80.0f), max(set1(-86.0f), x));
  const vfloat log2e = set1(1.44269504f), magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
#if defined(SELA_ISA_avx2)
  const vfloat shifted = fma(x, log2e, magic);
  const vfloat r = fma(x, log2e, magic - shifted);
#else
  const vfloat y = x * log2e;
  const vfloat shifted = y + magic;
  const vfloat r = y + (magic - shifted);
#endif
  const float c[6] = {1.00000012f, 0.693146944f, 0.240221202f, 0.0555071309f, 0.00967554096f, 0.00132764713f};
  vfloat p = set1(c[5]);
#if defined(SELA_ISA_avx2)
  for (int i = 4; i >= 0; --i) p = fma(p, r, set1(c[i]));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), exponent))};
#else
  for (int i = 4; i >= 0; --i) p = p * r + set1(c[i]);
  const vuint_raw exponent = reinterpret_cast<vuint_raw>(shifted.v) << 23;
  return {reinterpret_cast<vfloat::raw>(reinterpret_cast<vuint_raw>(p.v) + exponent)};
#endif
#endif
}

/// Numbers too small for a normal float count as zero while an object of this class lives (they cost up to 100 cycles
/// each otherwise); the caller's setting comes back at its end.  Does nothing on processors without such a switch.
class FlushToZero {
 public:
  FlushToZero() {
#if defined(__SSE__)
    saved_ = _mm_getcsr();
    _mm_setcsr(saved_ | 0x8040u);  // flush results (bit 15), treat operands as zero (bit 6)
#endif
  }
  ~FlushToZero() {
#if defined(__SSE__)
    _mm_setcsr(saved_);
#endif
  }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if defined(__SSE__)
  unsigned saved_ = 0;
#endif
};

}  // namespace SELA_ISA
}  // namespace sela
