// Totals of a pass as integers, see Note [Exact totals].
#include <algorithm>
#include <cmath>
#include <limits>

#include "sela/sinkhorn.h"

namespace sela {
namespace {

constexpr double kLargest = 0x1p76;  // units of a block's total
constexpr int kWordBits = 32;

int exponent_of(double largest_weight) {
  int exponent = 0;
  std::frexp(largest_weight, &exponent);
  return exponent;
}

}  // namespace

void sinkhorn_exact_totals(const double* totals, int64_t blocks, double largest_weight, int64_t* words) {
  const double scale = std::ldexp(1.0, -exponent_of(largest_weight));
  for (int which = 0; which < 2; ++which) {
    int64_t* sums = words + which * kSinkhornWords;
    std::fill_n(sums, kSinkhornWords, int64_t{0});
    for (int64_t b = 0; b < blocks; ++b) {
      double x = totals[which * blocks + b] * scale;
      x = x < kLargest ? std::max(x, -kLargest) : kLargest;  // NaN, too
      for (int k = 0; k < kSinkhornWords; ++k) {
        const double unit = std::ldexp(1.0, kWordBits - kWordBits * k);
        const double word = std::nearbyint(x / unit);
        x -= word * unit;
        sums[k] += static_cast<int64_t>(word);
      }
    }
  }
}

double sinkhorn_total(const int64_t* words, double largest_weight) {
  __extension__ typedef __int128 wide;
  static_assert(kSinkhornWords == 4, "written out for four words");
  constexpr wide kOne = 1;
  const int unit = exponent_of(largest_weight) + kWordBits - kWordBits * (kSinkhornWords - 1);
  // The value is high 2^96 + low, with 0 <= low < 2^96.
  wide low = words[1] * (kOne << 64) + words[2] * (kOne << 32) + words[3];
  const int64_t high = words[0] + static_cast<int64_t>(low >> 96);
  low &= (kOne << 96) - 1;
  constexpr int64_t kFits = int64_t{1} << 30;
  if (-kFits < high && high < kFits) return std::ldexp(static_cast<double>(high * (kOne << 96) + low), unit);
  // Too wide: without the last word, of which the rounding only needs to know whether it is 0.
  const wide rest = low & 0xffffffff;
  const wide value = high * (kOne << 64) + (low >> kWordBits);
  return std::ldexp(static_cast<double>(rest != 0 ? value | 1 : value), unit + kWordBits);
}

}  // namespace sela
