// The candidate search over one block of rows: the best few columns of each row in one read.
//
// Note [Bound of the list]
// A row's scores go to a buffer in the first-level cache while the maxima of 64 groups of columns (column % 64) are
// kept.  Any number that `count` of these maxima reach is reached by at least `count` columns, so the largest such
// number, found by halving an interval, bounds the list from below, and tightly when good columns are spread over the
// groups.  The columns above the bound are the list; only if there are more than 2 * count of them, the `count` best
// are chosen exactly.
//   Scores are relative to the label's, t = fma(x, scale, -scale * x[label]) + (price - label_price[label]): the large
// common part of a row cancels in an exact product.
#include "cpu/rounding_loops.h"

#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/simd.h"

namespace sela {
namespace SELA_ISA {
namespace {

constexpr int64_t W = vfloat::kLanes;
constexpr int64_t G = kCandidateGroups;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kFewGroups = 8;

inline double number(const float* x) {
  return static_cast<double>(*x);
}
inline double number(const double* x) {
  return *x;
}
template <class T>
inline double number(const T* x) {
  float lane[W];
  store(lane, load_tail(x, 1));
  return static_cast<double>(lane[0]);
}

/// Scores of one row, with the bonus when kBonus, into `scores` when kStore; maxima of the groups into `top`.  Returns
/// the largest score without the bonus.
template <bool kStore, bool kBonus, class T>
inline float sweep(const T* x, int64_t cols, const float* prices, const float* bonus, float scale, double centre,
                   float label_price, int64_t ahead, float* scores, float* top) {
  const vfloat s = set1(scale), minus = set1(static_cast<float>(-centre)), own = set1(label_price);
  vfloat best[G / W], plain = set1(-kInfinity);
  for (int64_t v = 0; v < G / W; ++v) best[v] = set1(-kInfinity);
  const auto take = [&](int64_t j, int64_t v, vfloat raw) {
    vfloat t = fma(raw, s, minus) + (load(prices + j) - own);
    if (kBonus) {
      plain = max(t, plain);
      t = t + load(bonus + j);
    }
    if (kStore) store(scores + j, t);
    best[v] = max(t, best[v]);
  };
  const int64_t full = cols / G * G;
  for (int64_t j = 0; j < full; j += G) {
#pragma GCC unroll 16
    for (int64_t v = 0; v < G / W; ++v) {
      if (v * W * static_cast<int64_t>(sizeof(T)) % 64 == 0) prefetch(x + j + v * W, ahead);
      take(j + v * W, v, load(x + j + v * W));
    }
  }
  if (full < cols) {
    for (int64_t v = 0; v < G / W; ++v) {
      const int64_t j = full + v * W;
      take(j, v, j + W <= cols ? load(x + j) : j < cols ? load_tail(x + j, cols - j) : set1(0.0f));
    }
  }
  for (int64_t v = 0; v < G / W; ++v) store(top + v * W, best[v]);
  if (!kBonus)
    for (int64_t v = 0; v < G / W; ++v) plain = max(best[v], plain);
  return reduce_max(plain);
}

/// The same for double: scores are taken in double and rounded at last.
template <bool kStore, bool kBonus>
inline float sweep(const double* x, int64_t cols, const double* prices, const float* bonus, double scale, double centre,
                   double label_price, int64_t, float* scores, float* top) {
  float plain = -kInfinity;
  for (int64_t v = 0; v < G; ++v) top[v] = -kInfinity;
  for (int64_t j = 0; j < cols; j += G) {
    const int64_t count = cols - j < G ? cols - j : G;
    for (int64_t v = 0; v < count; ++v) {
      float t = static_cast<float>((x[j + v] * scale - centre) + (prices[j + v] - label_price));
      plain = t > plain ? t : plain;
      if (kBonus) t += bonus[j + v];
      if (kStore) scores[j + v] = t;
      top[v] = t > top[v] ? t : top[v];
    }
    if (kStore)
      for (int64_t v = count; v < G; ++v) scores[j + v] = -kInfinity;
  }
  return plain;
}

/// Largest of n numbers.
template <int64_t n>
inline float largest(const float* x) {
  vfloat top = load(x);
  for (int64_t v = W; v < n; v += W) top = max(top, load(x + v));
  return reduce_max(top);
}

/// How many of n numbers are above `bound`.
template <int64_t n>
inline int32_t count_above(const float* x, float bound) {
  const vfloat b = set1(bound);
  int32_t count = 0;
  for (int64_t v = 0; v < n; v += W) count += __builtin_popcount(bits(not_below(load(x + v), b)));
  return count;
}

inline float below(float x) {
  return candidate_below(x);
}

/// A number that at least `count` of n maxima are above, found by halving; below(floor) when no more are above that.
template <int64_t n>
inline float halved(const float* top, int32_t count, float floor) {
  if (count_above<n>(top, below(floor)) <= count) return below(floor);
  const vfloat nothing = set1(-kInfinity), everything = set1(kInfinity);
  vfloat least = everything;
  for (int64_t v = 0; v < n; v += W) {
    const vfloat t = load(top + v);
    least = min(select_greater(t, nothing, t, everything), least);
  }
  float low = -reduce_max(set1(0.0f) - least), high = largest<n>(top);
  low = below(low > floor ? low : floor);
  for (int step = 0; step < kCandidateHalvings; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    const int32_t above = count_above<n>(top, middle);
    if (above == count) return middle;
    if (above > count)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/// The bound that the columns of a row's list are above.  Short lists need no more than the maxima of 16 larger groups.
inline float bound_of(const float* top, int32_t count, float floor) {
  if (count >= G) return below(floor);
  if (count > kCandidateShort) return halved<G>(top, count, floor);
  float larger[G / 4];
  for (int64_t v = 0; v < G / 4; v += W)
    store(larger + v,
          max(max(load(top + v), load(top + v + G / 4)), max(load(top + v + G / 2), load(top + v + 3 * G / 4))));
  return halved<G / 4>(larger, count, floor);
}

/// Columns above `bound` (and not -inf) in ascending order; returns their number.
inline int64_t collect(const float* scores, const float* top, int64_t padded, float bound, float* hits,
                       int32_t* columns) {
  int64_t n = 0;
  // Few groups reach the bound: only their columns are looked at.
  int32_t groups[kFewGroups], count = 0;
  const vfloat least = set1(bound);
  for (int32_t v = 0; v < G && count <= kFewGroups; v += W)
    for (uint32_t left = bits(not_below(load(top + v), least)); left != 0; left &= left - 1) {
      if (count < kFewGroups) groups[count] = v + __builtin_ctz(left);
      ++count;
    }
  if (count <= kFewGroups) {
    for (int64_t j = 0; j < padded; j += G)
      for (int32_t k = 0; k < count; ++k)
        if (scores[j + groups[k]] > bound) {
          hits[n] = scores[j + groups[k]];
          columns[n++] = static_cast<int32_t>(j) + groups[k];
        }
    return n;
  }
  for (int64_t j = 0; j < padded; j += W) {
    const vmask above = not_below(load(scores + j), least);
    for (uint32_t left = bits(above); left != 0; left &= left - 1) {
      const int64_t l = j + __builtin_ctz(left);
      hits[n] = scores[l];
      columns[n++] = static_cast<int32_t>(l);
    }
  }
  return n;
}

/// The first `count` columns from `start` on, cyclically, that are above `bound`, in ascending order; returns their
/// number.
inline int64_t collect_in_turn(const float* scores, int64_t cols, float bound, int32_t count, int64_t start,
                               float* hits, int32_t* columns) {
  int64_t n = 0, before = 0;  // the columns before `start` come last and go to the front
  for (int64_t step = 0; step < cols && n < count; ++step) {
    const int64_t j = start + step < cols ? start + step : start + step - cols;
    if (!(scores[j] > bound)) continue;
    int64_t at = j < start ? before++ : n;
    for (int64_t k = n; k > at; --k) {
      hits[k] = hits[k - 1];
      columns[k] = columns[k - 1];
    }
    hits[at] = scores[j];
    columns[at] = static_cast<int32_t>(j);
    ++n;
  }
  return n;
}

/// Keeps the `count` best of n hits: of equal ones those whose column follows
/// `start` first, cyclically.
inline int64_t keep_best(float* hits, int32_t* columns, float* order, int64_t n, int32_t count, int64_t start) {
  if (n <= 2 * count) return n;
  // The count-th largest: quickselect on a copy.
  for (int64_t k = 0; k < n; ++k) order[k] = hits[k];
  int64_t low = 0, high = n - 1;
  const int64_t place = count - 1;
  while (low < high) {
    const float pivot = order[(low + high) / 2];
    int64_t a = low, b = high;
    while (a <= b) {
      while (order[a] > pivot) ++a;
      while (order[b] < pivot) --b;
      if (a <= b) {
        const float swapped = order[a];
        order[a++] = order[b];
        order[b--] = swapped;
      }
    }
    if (place <= b)
      high = b;
    else if (place >= a)
      low = a;
    else
      break;
  }
  const float last = order[place];
  int64_t above = 0, after = 0;
  for (int64_t k = 0; k < n; ++k) {
    above += hits[k] > last;
    after += hits[k] == last && columns[k] >= start;
  }
  int64_t free = count - above;
  int64_t from_start = free < after ? free : after, from_zero = free - from_start, kept = 0;
  for (int64_t k = 0; k < n; ++k) {
    bool take = hits[k] > last;
    if (hits[k] == last) {
      int64_t& left = columns[k] >= start ? from_start : from_zero;
      take = left > 0;
      left -= take;
    }
    if (!take) continue;
    hits[kept] = hits[k];
    columns[kept++] = columns[k];
  }
  return kept;
}

template <bool kBonus, class T, class P>
void block_of(const CandidateTask& task, const P* prices, const P* label_prices, int64_t block,
              const CandidateScratch& scratch) {
  const CandidateSearch& in = task.search;
  const int64_t width = 2 * in.count + 2;
  const int64_t last =
      (block + 1) * kCandidateRows < in.selected_count ? (block + 1) * kCandidateRows : in.selected_count;
  const P scale = static_cast<P>(in.scale);
  float top[G];
  // The processor's own prefetcher stops at the end of a page, which is about a row.
  const int64_t ahead = 2 * in.stride * static_cast<int64_t>(sizeof(T));
  for (int64_t i = block * kCandidateRows; i < last; ++i) {
    const int64_t row = in.selected != nullptr ? in.selected[i] : i;
    const int32_t label = in.labels[row];
    task.out.found[i] = 0;
    task.out.regret[i] = 0.0f;
    if (label < 0) continue;
    const T* x = static_cast<const T*>(in.logits) + row * in.stride;
    const double own = number(x + label);
    // A label at -inf is no place to measure from.
    const bool possible = !std::isinf(own);
    const double base = possible ? own * static_cast<double>(scale) : 0.0;
    const P label_price = label_prices[label];
    const bool listed = in.slack < 0.0f;
    const float best =
        listed
            ? sweep<true, kBonus>(x, in.cols, prices, task.bonus, scale, base, label_price, ahead, scratch.scores, top)
            : sweep<false, false>(x, in.cols, prices, task.bonus, scale, base, label_price, ahead, scratch.scores, top);
    // The label's own score, in the same arithmetic: what rounding left of base.
    const float mine = possible ? static_cast<float>(base - static_cast<double>(static_cast<P>(base))) : -kInfinity;
    const float regret = best > -kInfinity ? best - mine : -kInfinity;
    task.out.regret[i] = regret;
    if (!(regret > in.slack)) continue;
    if (!listed)
      sweep<true, kBonus>(x, in.cols, prices, task.bonus, scale, base, label_price, ahead, scratch.scores, top);

    const float good = best + in.floor, tied = largest<G>(top) - in.tie;
    const int64_t start = (in.first_row + row) * in.count % in.cols;
    const bool in_turn = in.tie > 0.0f && count_above<G>(top, below(tied)) > 2 * in.count;
    int64_t n = in_turn ? collect_in_turn(scratch.scores, in.cols, below(tied > good ? tied : good), in.count, start,
                                          scratch.hits, scratch.columns)
                        : collect(scratch.scores, top, task.padded, bound_of(top, in.count, good), scratch.hits,
                                  scratch.columns);
    int32_t first = label;
    double highest = -std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < n; ++k) {
      const int32_t column = scratch.columns[k];
      double score = static_cast<double>(scratch.hits[k]);
      if (kBonus)
        score = (number(x + column) * static_cast<double>(scale) - base) +
                (static_cast<double>(prices[column]) - static_cast<double>(label_price));
      if (score > highest) {
        highest = score;
        first = column;
      }
    }
    n = keep_best(scratch.hits, scratch.columns, scratch.order, n, in.count, start);
    int32_t* columns = task.out.columns + i * width;
    float* values = task.out.values + i * width;
    int32_t length = 0;
    const auto add = [&](int32_t column) {
      columns[length] = column;
      values[length++] = static_cast<float>(number(x + column) * static_cast<double>(scale) - base);
    };
    add(first);
    bool has_label = first == label;
    for (int64_t k = 0; k < n; ++k) {
      if (scratch.columns[k] == first) continue;
      has_label = has_label || scratch.columns[k] == label;
      add(scratch.columns[k]);
    }
    if (!has_label) add(label);
    task.out.found[i] = length;
  }
}

/// Sorts the losses of a block of rows into the smallest ones of each column.
template <class T, class P>
void margins_of(const CandidateTask& task, const P* prices, int64_t block, const CandidateScratch& scratch) {
  const CandidateSearch& in = task.search;
  const int64_t last =
      (block + 1) * kCandidateRows < in.selected_count ? (block + 1) * kCandidateRows : in.selected_count;
  const vfloat infinity = set1(kInfinity), zero = set1(0.0f);
  float top[G];
  for (int64_t i = block * kCandidateRows; i < last; ++i) {
    const int64_t row = in.selected != nullptr ? in.selected[i] : i;
    if (in.labels[row] < 0) continue;
    const T* x = static_cast<const T*>(in.logits) + row * in.stride;
    const double own = number(x + in.labels[row]);
    const P scale = static_cast<P>(in.scale);
    const double base = std::isinf(own) ? 0.0 : own * static_cast<double>(scale);
    const float best = sweep<true, false>(x, in.cols, prices, nullptr, scale, base, P(0), 0, scratch.scores, top);
    if (!(best > -kInfinity)) continue;
    const vfloat b = set1(best);
    for (int64_t j = 0; j < task.padded; j += W) {
      vfloat loss = b - load(scratch.scores + j);
      loss = select_greater(loss, zero, loss, infinity);
      for (int64_t m = 0; m < kColumnMargins; ++m) {
        float* place = scratch.smallest + m * task.padded + j;
        const vfloat kept = load(place);
        store(place, min(loss, kept));
        loss = max(loss, kept);
      }
    }
  }
}

/// Terms of a group of rows: sharpness * value + sharp[column], then their exponentials relative to the largest of the
/// row, which go to `terms`; weight / sum to `factor`.
inline void group_terms(const int32_t* columns, const float* values, const float* weights, int32_t length,
                        float sharpness, const float* sharp, float* terms, float* factor) {
  constexpr int64_t V = kSmoothRows / W;
  const vfloat s = set1(sharpness);
  vfloat top[V], sum[V];
  for (int64_t v = 0; v < V; ++v) {
    top[v] = set1(-kInfinity);
    sum[v] = set1(0.0f);
  }
  for (int32_t k = 0; k < length; ++k) {
    float price[kSmoothRows];
    for (int64_t l = 0; l < kSmoothRows; ++l) price[l] = sharp[columns[k * kSmoothRows + l]];
    for (int64_t v = 0; v < V; ++v) {
      const vfloat t = fma(load(values + k * kSmoothRows + v * W), s, load(price + v * W));
      store(terms + k * kSmoothRows + v * W, t);
      top[v] = max(t, top[v]);
    }
  }
  for (int32_t k = 0; k < length; ++k)
    for (int64_t v = 0; v < V; ++v) {
      const vfloat e = exp(load(terms + k * kSmoothRows + v * W) - top[v]);
      store(terms + k * kSmoothRows + v * W, e);
      sum[v] = sum[v] + e;
    }
  float total[kSmoothRows];
  for (int64_t v = 0; v < V; ++v) store(total + v * W, sum[v]);
  for (int64_t l = 0; l < kSmoothRows; ++l) factor[l] = weights[l] / total[l];
}

}  // namespace

void smooth_part(const SmoothPart& part, float sharpness, const float* sharp, double* sum) {
  const FlushToZero flush_to_zero;
  const int32_t* columns = part.columns.data();
  const float* values = part.values.data();
  const float* weights = part.weights.data();
  constexpr int32_t kTerms = 32;
  float few[kTerms * kSmoothRows], factor[kSmoothRows];
  std::unique_ptr<float[]> many;  // no vector: its members would become functions of their own (CONTRIBUTING.md)
  int64_t room = 0;
  for (const int32_t length : part.lengths) {
    float* terms = few;
    if (length > kTerms) {
      if (length * kSmoothRows > room) {
        room = length * kSmoothRows;
        many.reset(new float[static_cast<size_t>(room)]);
      }
      terms = many.get();
    }
    group_terms(columns, values, weights, length, sharpness, sharp, terms, factor);
    for (int32_t k = 0; k < length; ++k)
      for (int64_t l = 0; l < kSmoothRows; ++l)
        sum[columns[k * kSmoothRows + l]] += static_cast<double>(terms[k * kSmoothRows + l] * factor[l]);
    columns += length * kSmoothRows;
    values += length * kSmoothRows;
    weights += kSmoothRows;
  }
}

void candidates_block(const CandidateTask& task, int64_t block, const CandidateScratch& scratch) {
  const FlushToZero flush_to_zero;
  const auto run = [&](auto bonus) {
    constexpr bool kBonus = decltype(bonus)::value;
    switch (task.search.type) {
      case LogitsType::float64:
        return block_of<kBonus, double>(task, task.search.prices, task.search.label_prices, block, scratch);
      case LogitsType::float16:
        return block_of<kBonus, half_bits>(task, task.prices, task.label_prices, block, scratch);
      case LogitsType::bfloat16:
        return block_of<kBonus, bfloat_bits>(task, task.prices, task.label_prices, block, scratch);
      default:
        return block_of<kBonus, float>(task, task.prices, task.label_prices, block, scratch);
    }
  };
  if (task.bonus != nullptr)
    run(std::true_type());
  else
    run(std::false_type());
}

void margins_block(const CandidateTask& task, int64_t block, const CandidateScratch& scratch) {
  const FlushToZero flush_to_zero;
  switch (task.search.type) {
    case LogitsType::float64:
      return margins_of<double>(task, task.search.prices, block, scratch);
    case LogitsType::float16:
      return margins_of<half_bits>(task, task.prices, block, scratch);
    case LogitsType::bfloat16:
      return margins_of<bfloat_bits>(task, task.prices, block, scratch);
    default:
      return margins_of<float>(task, task.prices, block, scratch);
  }
}

}  // namespace SELA_ISA
}  // namespace sela
