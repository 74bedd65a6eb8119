// One row of logits to 16 bits: a sweep for the maximum and for what makes a row bad, a sweep that writes.
// Every operation is exact or rounded once, so all instruction sets give the same bits.
#include "cpu/logits_loops.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace sela {
namespace SELA_ISA {
namespace {

constexpr int64_t W = vfloat::kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

/// How a kind is written: from distances below the maximum, in its unit, of which those above kLimit become -inf.
template <class Kind>
struct Format;
template <>
struct Format<fixed_bits> {
  static constexpr float kLimit = kFixedLimit;
  static constexpr uint16_t kBad = kFixedBad;
  static void put(fixed_bits* out, vfloat distance) { store(out, min(distance, set1(65535.0f))); }
};
template <>
struct Format<half_bits> {
  static constexpr float kLimit = kHalfLimit;
  static constexpr uint16_t kBad = kHalfBad;
  static void put(half_bits* out, vfloat distance) { store(out, set1(0.0f) - distance); }
};
template <>
struct Format<bfloat_bits> {
  static constexpr float kLimit = kBfloatLimit;
  static constexpr uint16_t kBad = kBfloatBad;
  static void put(bfloat_bits* out, vfloat distance) { store(out, set1(0.0f) - distance); }
};

/// x[0 .. count), -inf behind them.
template <class T>
inline vfloat load_first(const T* x, int64_t count) {
  if (count >= W) return load(x);
  float lanes[W];
  store(lanes, load_tail(x, count));
  for (int64_t l = count; l < W; ++l) lanes[l] = -kInfinity;
  return load(lanes);
}

/// Whether a row with this maximum can be used, given that it holds neither NaN nor +inf.
inline bool fits(double maximum, double lambda) {
  const double scaled = maximum * lambda, largest = static_cast<double>(kLargest);
  return maximum >= -largest && maximum <= largest && scaled >= -largest && scaled <= largest;
}

template <class Kind>
int64_t mask_row(Kind* out, int64_t cols, float* maximum) {
  *maximum = std::numeric_limits<float>::quiet_NaN();
  for (int64_t j = 0; j < cols; ++j) out[j].bits = Format<Kind>::kBad;
  return 0;
}

template <class Kind, class T>
int64_t row_of(const T* x, int64_t cols, double lambda, Kind* out, float* maximum) {
  vfloat top = set1(-kInfinity);
  vmask bad = not_below(top, set1(kLargest));  // of no lane
  for (int64_t j = 0; j < cols; j += W) {
    const vfloat v = load_first(x + j, cols - j);
    bad = bad | not_below(v, set1(kLargest));
    top = max(v, top);
  }
  const float best = reduce_max(top);
  if (any(bad) || !fits(best, lambda)) return mask_row(out, cols, maximum);
  *maximum = best;
  const vfloat m = set1(best);
  const vfloat factor = set1(std::is_same_v<Kind, fixed_bits> ? static_cast<float>(kFixedSteps * lambda) : 1.0f);
  int64_t saturated = 0;
  for (int64_t j = 0; j < cols; j += W) {
    const vfloat v = load_first(x + j, cols - j);
    const vfloat distance = (m - v) * factor;
    const vmask beyond = not_below(distance, set1(Format<Kind>::kLimit));
    if (any(beyond)) saturated += __builtin_popcount(bits(beyond) & bits(not_below(v, set1(-kInfinity))));
    if (j + W <= cols) {
      Format<Kind>::put(out + j, distance);
    } else {
      Kind last[W];
      Format<Kind>::put(last, distance);
      std::memcpy(out + j, last, static_cast<size_t>(cols - j) * sizeof(Kind));
    }
  }
  return saturated;
}

/// float64: differences in double, then as the others.
template <class Kind>
int64_t row_of(const double* x, int64_t cols, double lambda, Kind* out, float* maximum) {
  double best = -std::numeric_limits<double>::infinity();
  bool bad = false;
  for (int64_t j = 0; j < cols; ++j) {
    bad |= !(x[j] <= std::numeric_limits<double>::max());
    best = x[j] > best ? x[j] : best;
  }
  if (bad || !fits(best, lambda)) return mask_row(out, cols, maximum);
  *maximum = static_cast<float>(best);
  const double factor = std::is_same_v<Kind, fixed_bits> ? kFixedSteps * lambda : 1.0;
  int64_t saturated = 0;
  for (int64_t j = 0; j < cols; j += W) {
    float lanes[W];
    for (int64_t l = 0; l < W; ++l) lanes[l] = l < cols - j ? static_cast<float>((best - x[j + l]) * factor) : 0.0f;
    const int64_t count = cols - j < W ? cols - j : W;
    for (int64_t l = 0; l < count; ++l)
      saturated += lanes[l] > Format<Kind>::kLimit && x[j + l] > -std::numeric_limits<double>::infinity();
    Kind last[W];
    Format<Kind>::put(last, load(lanes));
    std::memcpy(out + j, last, static_cast<size_t>(count) * sizeof(Kind));
  }
  return saturated;
}

template <class Kind>
int64_t row_to(const StoreLogits& task, int64_t row) {
  Kind* out = reinterpret_cast<Kind*>(task.values) + row * (task.values_stride != 0 ? task.values_stride : task.cols);
  const auto from = [&](auto* logits) {
    return row_of(logits + row * task.stride, task.cols, task.lambda, out, task.maxima + row);
  };
  switch (task.type) {
    case LogitsType::float64:
      return from(static_cast<const double*>(task.logits));
    case LogitsType::float16:
      return from(static_cast<const half_bits*>(task.logits));
    case LogitsType::bfloat16:
      return from(static_cast<const bfloat_bits*>(task.logits));
    default:
      return from(static_cast<const float*>(task.logits));
  }
}

}  // namespace

int64_t store_row(const StoreLogits& task, int64_t row) {
  switch (task.kind) {
    case LogitsType::float16:
      return row_to<half_bits>(task, row);
    case LogitsType::bfloat16:
      return row_to<bfloat_bits>(task, row);
    default:
      return row_to<fixed_bits>(task, row);
  }
}

}  // namespace SELA_ISA
}  // namespace sela
