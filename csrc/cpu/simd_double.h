// A vector of doubles for the loop bodies, by the compilers' vector extensions; see simd.h for the rules.
#pragma once
#include <cstdint>
#include <cstring>

namespace sela {
namespace SELA_ISA {

/// Lanes of vdouble.
#if defined(SELA_ISA_avx512)
constexpr int64_t D = 8;
#elif defined(SELA_ISA_avx2)
constexpr int64_t D = 4;
#else
constexpr int64_t D = 2;
#endif
typedef double vdouble __attribute__((vector_size(D * sizeof(double))));
typedef int64_t vlong __attribute__((vector_size(D * sizeof(double))));

inline vdouble load64(const double* p) {
  vdouble a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}

/// e^x to about 1 unit in the last place for |x| <= 700; clamped there; NaN for NaN.
inline vdouble exp64(vdouble x) {
  const vdouble zero = {};
  const vdouble low = zero - 700.0, high = zero + 700.0;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const vdouble shifted = x * 1.4426950408889634 + magic;
  const vdouble n = shifted - magic;
  const vdouble r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  vdouble p = zero + 1.0 / 6227020800.0;  // Taylor: r^14 / 14! < 5e-18 for |r| <= ln(2) / 2
  const double c[13] = {1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,      1.0 / 720,
                        1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
  for (int i = 12; i >= 0; --i) p = p * r + c[i];
  return reinterpret_cast<vdouble>(reinterpret_cast<vlong>(p) + (reinterpret_cast<vlong>(shifted) << 52));
}

}  // namespace SELA_ISA
}  // namespace sela
