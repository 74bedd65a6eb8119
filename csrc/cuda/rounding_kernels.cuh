// Kernels of the candidate search behind exactly balanced labels (see sela/rounding.h for what they compute,
// cpu/rounding_loops.cpp, Note [Bound of the list], for how).  Every number is computed as the CPU computes it, so
// that lists, values and regret are the CPU's: products and sums are those of its fma, additions and flush to zero.
// (Its generic loops round a fma twice, which now and then differs in the last bit.)
//
// Bytes, operations and floor, for n rows of K columns in b-byte logits, lists of `count` columns:
//   lists_kernel: n K b bytes from memory, once: what a row needs further is read again from the caches, where its
//     6 KB (K = 3000, float16) still lie.  Per entry 1 conversion + 1 fma + 2 additions + 1 maximum.  Per row 20 bytes
//     of number, label, length and regret, and 8 (count + 2) of its list, which is all that goes to the host.
//     H100 at 3.0 TB/s, n = 1,281,167, K = 3000, float16, count = 4: 7.7 + 0.1 GB = 2.6 ms: bound by memory.
//   margin_rows_kernel, margin_columns_kernel: the rows that tell (a few thousand) are read twice, the second time
//     mostly from the cache; 16 K bytes of partial results per slab of rows, merged by margin_merge_kernel.
//
// Who does what. In lists_kernel and margin_rows_kernel a warp has a row, and nobody waits for another warp: lane
// l takes the pieces of 16 bytes l, l + 32, ..., four of them under way at a time, which is 2 KB per warp and 40 KB per
// multiprocessor at 20 warps (of which an H100 needs 18 to 25).  Since 32 pieces are a multiple of 64 columns, lane and
// place in the piece tell a column's group, and the 64 maxima need a few shuffles only.  Narrow rows leave lanes idle;
// they also make small matrices.  In margin_columns_kernel a thread has four columns, whose smallest losses it keeps in
// registers over a slab of rows.
//
// The list: once its bound is known, only columns of groups whose maximum is above it are looked at, a lane each, in
// ascending order; those above go to shared memory, and from there to the list.  A row of which more than fit there are
// above (only rows with very many equal columns have so many) is looked at again instead, as often as the choice needs.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/row_pieces.cuh"
#include "sela/rounding.h"

namespace sela {
namespace rounding_cuda {

using namespace rows_cuda;

constexpr int kListThreads = 128;  // four rows per block: blocks come and go in small steps
constexpr int kWarps = kListThreads / kWarp;
constexpr int kBlocks = 5;          // that must fit on a multiprocessor: holds registers down to 96
constexpr int kPiecesUnderWay = 4;  // pieces of 16 bytes
constexpr int kHits = 128;  // columns above the bound that shared memory holds for a row: 2 * 64 is the longest list
                            // but for those of all columns
constexpr int kGroups = static_cast<int>(kCandidateGroups);
constexpr int kMargins = kColumnMargins;
constexpr int kMarginColumns = 4;  // of a thread
constexpr int kMarginRows = 64;    // of a slab, at least
constexpr unsigned kAll = 0xffffffffu;

/// What every kernel is given.  Pointers are device memory; null: absent.
struct Arguments {
  const void* logits;
  int64_t cols, stride;
  bool aligned;  // every row begins at a multiple of 16 bytes
  double scale;
  const void* prices;        // [cols] of the arithmetic type
  const void* label_prices;  // [cols] likewise
  const float* bonus;        // [cols]
  const int32_t* labels;
  const int64_t* selected;
  int64_t places;  // rows looked at
  int64_t first_row;
  int32_t count;
  float slack, floor, tie;
  int32_t* columns;  // [places, 2 * count + 2]
  float* values;
  int32_t* found;
  float* regret;
  // Of the margins.
  double* bases;    // [places] what scores are relative to
  float* bests;     // [places] best score; -inf: the row is left out
  float* smallest;  // [slabs, kMargins, cols]
  int64_t slab_rows;
  int64_t slabs;
  float* margins;  // [kMargins, cols]
};

// ---- Wrappers of what a host cannot do or does differently.  All float arithmetic takes tiny numbers for zero, as the
// CPU's loops do.

#if !defined(__CUDA_ARCH__)
inline float without_tiny(float x) {
  return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x;
}
#endif

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
#else
  return without_tiny(fmaf(without_tiny(a), without_tiny(b), without_tiny(c)));
#endif
}
__device__ __forceinline__ float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return without_tiny(without_tiny(a) + without_tiny(b));
#endif
}
__device__ __forceinline__ float minus(float a, float b) {
  return plus(a, -b);
}
/// The nearest float, or zero for a tiny one.
__device__ __forceinline__ float rounded(double x) {
  return plus(static_cast<float>(x), 0.0f);
}

/// A logit as a double.
template <class T>
__device__ __forceinline__ double number(T x) {
  return static_cast<double>(plus(to_arithmetic(x), 0.0f));
}
__device__ __forceinline__ double number(double x) {
  return x;
}

__device__ __forceinline__ int bits_in(unsigned x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

/// Keys of floats, in the same order; both zeros have the same.
__device__ __forceinline__ uint32_t key_of(float x) {
  uint32_t bits;
  const float no_minus_zero = x + 0.0f;
  memcpy(&bits, &no_minus_zero, sizeof(bits));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// ---- Reductions over a warp; all lanes get the result.

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}
__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fminf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

/// Highest score and its column; of equal scores the lowest column.
struct Best {
  double score;
  int32_t column;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return b.score > a.score || (b.score == a.score && b.column < a.column) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Best other;
    other.score = __shfl_xor_sync(kAll, x.score, step);
    other.column = __shfl_xor_sync(kAll, x.column, step);
    x = better(x, other);
  }
  return x;
}

// ---- Scores of a row.

/// Neighbours that are loaded together, up to 16 bytes at a time.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Several {
  T at[N];
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

/// A row, and what its scores are relative to.
template <class T>
struct Row {
  using P = typename Arithmetic<T>::type;
  const T* x;
  P scale;
  double base;    // scale * logit of the label, or 0
  P own;          // price of the label
  bool possible;  // the label has a finite logit

  __device__ __forceinline__ Row(const Arguments& a, int64_t row, int32_t label, bool with_own_price)
      : x(static_cast<const T*>(a.logits) + row * a.stride), scale(static_cast<P>(a.scale)) {
    const double logit = number(x[label]);
    possible = logit != static_cast<double>(INFINITY) && logit != -static_cast<double>(INFINITY);
    base = possible ? logit * static_cast<double>(scale) : 0.0;
    own = with_own_price ? static_cast<const P*>(a.label_prices)[label] : P(0);
  }
  __device__ __forceinline__ Row(const Arguments& a, int64_t row, double known_base)
      : x(static_cast<const T*>(a.logits) + row * a.stride),
        scale(static_cast<P>(a.scale)),
        base(known_base),
        own(P(0)),
        possible(true) {}

  __device__ __forceinline__ float score(float logit, float price) const {
    return plus(multiply_add(logit, scale, static_cast<float>(-base)), minus(price, static_cast<float>(own)));
  }
  __device__ __forceinline__ float score(double logit, double price) const {
    return rounded((logit * static_cast<double>(scale) - base) + (price - static_cast<double>(own)));
  }
  /// The score of one column.
  __device__ __forceinline__ float at(const Arguments& a, int64_t column) const {
    return score(to_arithmetic(x[column]), static_cast<const P*>(a.prices)[column]);
  }
  /// scale * (logit - that of the label).
  __device__ __forceinline__ double value(int64_t column) const {
    return number(x[column]) * static_cast<double>(scale) - base;
  }
};

/// Maxima of this lane's columns by their place in a piece, with the bonus, and the largest score without it.
template <bool kAligned, class T>
__device__ __forceinline__ float sweep_rows(const Arguments& a, const Row<T>& row, int lane, const float* bonus,
                                            float (&top)[16 / sizeof(T)]) {
  using P = typename Arithmetic<T>::type;
  constexpr int V = static_cast<int>(16 / sizeof(T)), kStep = V * kWarp;
  float plain = -INFINITY;
#pragma unroll
  for (int v = 0; v < V; ++v) top[v] = -INFINITY;
  const P* prices = static_cast<const P*>(a.prices);
  const auto take = [&](int v, decltype(to_arithmetic(T())) logit, P price, float extra) {
    float t = row.score(logit, price);
    if (bonus != nullptr) {
      plain = fmaxf(plain, t);
      t = plus(t, extra);
    }
    top[v] = fmaxf(top[v], t);
  };
  const unsigned cols = static_cast<unsigned>(a.cols);  // below 2^31
  for (unsigned from = static_cast<unsigned>(lane) * V; from + V <= cols; from += kPiecesUnderWay * kStep) {
    // All loads are under way before the first is used; behind the last piece the first one stands in.
    Bytes16 piece[kPiecesUnderWay];
#pragma unroll
    for (int u = 0; u < kPiecesUnderWay; ++u) {
      const unsigned j = from + u * kStep;
      piece[u] = piece_at<kAligned, V>(row.x + (j + V <= cols ? j : 0u), V);
    }
#pragma unroll
    for (int u = 0; u < kPiecesUnderWay; ++u) {
      const unsigned j = from + u * kStep;
      if (j + V > cols) continue;
      const Several<P, V> price = *reinterpret_cast<const Several<P, V>*>(prices + j);
      Several<float, V> extra = {};
      if (bonus != nullptr) extra = *reinterpret_cast<const Several<float, V>*>(bonus + j);
#pragma unroll
      for (int v = 0; v < V; ++v) take(v, to_arithmetic(value_in<T>(piece[u], v)), price.at[v], extra.at[v]);
    }
  }
  // What is left of the row is less than a piece.
  const int64_t cut = a.cols / V * V;
  if (cut / V % kWarp == lane) {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (cut + v < a.cols)
        take(v, to_arithmetic(row.x[cut + v]), prices[cut + v], bonus != nullptr ? bonus[cut + v] : 0.0f);
  }
  if (bonus == nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) plain = fmaxf(plain, top[v]);
  }
  return warp_max(plain);
}

template <class T>
__device__ __forceinline__ float sweep(const Arguments& a, const Row<T>& row, int lane, const float* bonus,
                                       float (&top)[16 / sizeof(T)]) {
  return a.aligned ? sweep_rows<true>(a, row, lane, bonus, top) : sweep_rows<false>(a, row, lane, bonus, top);
}

// ---- The bound of a list.  A lane holds the maxima of groups `lane` and `lane + 32`.

__device__ __forceinline__ int count_above(float a, float b, float bound) {
  return bits_in(__ballot_sync(kAll, a > bound)) + bits_in(__ballot_sync(kAll, b > bound));
}

__device__ __forceinline__ float below(float x) {
  return plus(candidate_below(x), 0.0f);
}

/// A number that at least `count` of the maxima are above, found by halving; below(floor) when no more are above that.
__device__ __forceinline__ float halved(float a, float b, int32_t count, float floor) {
  if (count_above(a, b, below(floor)) <= count) return below(floor);
  const float least = warp_min(fminf(a > -INFINITY ? a : INFINITY, b > -INFINITY ? b : INFINITY));
  float low = below(least > floor ? least : floor), high = warp_max(fmaxf(a, b));
  for (int step = 0; step < kCandidateHalvings; ++step) {
    const float middle = plus(0.5f * low, 0.5f * high);
    const int above = count_above(a, b, middle);
    if (above == count) return middle;
    if (above > count)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/// The bound that the columns of a row's list are above.
__device__ __forceinline__ float bound_of(float a, float b, int lane, int32_t count, float floor) {
  if (count >= kGroups) return below(floor);
  if (count > kCandidateShort) return halved(a, b, count, floor);
  float larger = fmaxf(a, b);  // short lists: maxima of 16 larger groups
  larger = fmaxf(larger, __shfl_xor_sync(kAll, larger, kWarp / 2));
  return halved(lane < kWarp / 2 ? larger : -INFINITY, -INFINITY, count, floor);
}

// ---- The list of a row.

/// Shared memory of a warp.
struct Scratch {
  float top[kGroups];
  int32_t live[kGroups];  // groups above the bound, ascending
  float hits[kHits];
  int32_t columns[kHits];
};

/// Columns above a bound, in ascending order: from shared memory, or, where they are too many, from the row.
template <class T>
struct Hits {
  const Arguments& a;
  const Row<T>& row;
  Scratch& scratch;
  int lane;
  float bound;
  int live;  // groups
  int n;     // hits; -1: not counted yet

  /// use(is_hit, score, column), 32 at a time, by all lanes together.
  template <class Use>
  __device__ __forceinline__ void each(Use use) const {
    if (n >= 0 && n <= kHits) {
      for (int k = lane; k - lane < n; k += kWarp) {
        const bool here = k < n;
        use(here, here ? scratch.hits[k] : 0.0f, here ? scratch.columns[k] : 0);
      }
      return;
    }
    const int64_t chunks = (a.cols + kGroups - 1) / kGroups;
    const int down = kWarp / live, right = kWarp % live;
    int64_t chunk = lane / live;
    int group = lane % live;
    for (int64_t looked = 0; looked < chunks * live; looked += kWarp) {
      const int64_t column = chunk * kGroups + scratch.live[group];
      float score = -INFINITY;
      if (column < a.cols) {
        score = row.at(a, column);
        if (a.bonus != nullptr) score = plus(score, a.bonus[column]);
      }
      use(score > bound, score, static_cast<int32_t>(column));
      chunk += down;
      group += right;
      if (group >= live) {
        group -= live;
        ++chunk;
      }
    }
  }

  /// Hits that `is` holds for.
  template <class Is>
  __device__ __forceinline__ int count(Is is) const {
    int sum = 0;
    each([&](bool hit, float score, int32_t column) { sum += bits_in(__ballot_sync(kAll, hit && is(score, column))); });
    return sum;
  }
};

/// What a list takes of its hits: all that score more than `last`, and of those that score as much, or, in turn, of
/// all, the first from `start` on, and then the first of all.
struct Choice {
  bool in_turn;
  uint32_t last;  // key
  int64_t start;
  int from_start, from_zero;

  __device__ __forceinline__ bool more(uint32_t key) const { return !in_turn && key > last; }
  __device__ __forceinline__ bool equal(uint32_t key) const { return in_turn || key == last; }
};

/// use(is_kept, score, column) for the hits that a choice takes, in ascending order.
template <class T, class Use>
__device__ __forceinline__ void each_kept(const Hits<T>& hits, const Choice& choice, Use use) {
  const unsigned before = (1u << hits.lane) - 1u;
  int after_seen = 0, zero_seen = 0;
  hits.each([&](bool hit, float score, int32_t column) {
    const uint32_t key = key_of(score);
    const bool after = column >= choice.start, tied = hit && choice.equal(key);
    const unsigned tied_after = __ballot_sync(kAll, tied && after), tied_zero = __ballot_sync(kAll, tied && !after);
    const bool taken = after ? after_seen + bits_in(tied_after & before) < choice.from_start
                             : zero_seen + bits_in(tied_zero & before) < choice.from_zero;
    after_seen += bits_in(tied_after);
    zero_seen += bits_in(tied_zero);
    use((hit && choice.more(key)) || (tied && taken), score, column);
  });
}

/// The choice of the `count` best hits, or of all if there are no more than twice as many.
template <class T>
__device__ __forceinline__ Choice best_hits(const Hits<T>& hits, int32_t count, int64_t start, float highest) {
  Choice choice{false, 0, start, 0, 0};
  if (hits.n <= 2 * count) return choice;  // every key is larger than 0
  // The key of the count-th best: more than count - 1 are above low, fewer above last.
  uint32_t low = key_of(hits.bound);
  choice.last = key_of(highest);
  while (choice.last - low > 1) {
    const uint32_t middle = low + (choice.last - low) / 2;
    if (hits.count([&](float score, int32_t) { return key_of(score) > middle; }) >= count)
      low = middle;
    else
      choice.last = middle;
  }
  const int more = hits.count([&](float score, int32_t) { return choice.more(key_of(score)); });
  const int after =
      hits.count([&](float score, int32_t column) { return choice.equal(key_of(score)) && column >= start; });
  choice.from_start = min(count - more, after);
  choice.from_zero = count - more - choice.from_start;
  return choice;
}

/// A warp per row.
template <class T>
__global__ void __launch_bounds__(kListThreads, kBlocks) lists_kernel(const Arguments a) {
  using P = typename Arithmetic<T>::type;
  constexpr int V = static_cast<int>(16 / sizeof(T));
  SELA_SHARED_ARRAY(Scratch, shared, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Scratch& scratch = shared[warp];
  const unsigned before = (1u << lane) - 1u;
  const int64_t width = 2 * static_cast<int64_t>(a.count) + 2;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < a.places; i += warps) {
    const int64_t number_of_row = a.selected != nullptr ? a.selected[i] : i;
    const int32_t label = a.labels[number_of_row];
    if (label < 0) {
      if (lane == 0) {
        a.found[i] = 0;
        a.regret[i] = 0.0f;
      }
      continue;
    }
    const Row<T> row(a, number_of_row, label, true);
    float top[V];
    const float best = sweep(a, row, lane, a.bonus, top);
    // The label's own score, in the same arithmetic: what rounding left of base.
    const float mine = row.possible ? rounded(row.base - static_cast<double>(static_cast<P>(row.base))) : -INFINITY;
    const float regret = best > -INFINITY ? minus(best, mine) : -INFINITY;
    const bool listed = regret > a.slack;
    if (lane == 0) {
      a.regret[i] = regret;
      if (!listed) a.found[i] = 0;
    }
    if (!listed) continue;  // the same for the whole warp

    // Groups to lanes.
#pragma unroll
    for (int step = kGroups / V; step < kWarp; step *= 2) {
#pragma unroll
      for (int v = 0; v < V; ++v) top[v] = fmaxf(top[v], __shfl_xor_sync(kAll, top[v], step));
    }
    // Nobody reads what is written here any more: two of these barriers lie between, from the row before.
    if (lane * V < kGroups) {
#pragma unroll
      for (int v = 0; v < V; ++v) scratch.top[lane * V + v] = top[v];
    }
    __syncwarp();
    const float low_group = scratch.top[lane], high_group = scratch.top[lane + kWarp];

    const float highest = warp_max(fmaxf(low_group, high_group));
    const float good = plus(best, a.floor), tied = minus(highest, a.tie);
    const int64_t start = (a.first_row + number_of_row) * a.count % a.cols;
    const bool in_turn = a.tie > 0.0f && count_above(low_group, high_group, below(tied)) > 2 * a.count;
    const float bound =
        in_turn ? below(tied > good ? tied : good) : bound_of(low_group, high_group, lane, a.count, good);
    const unsigned low_live = __ballot_sync(kAll, low_group > bound);
    const unsigned high_live = __ballot_sync(kAll, high_group > bound);
    if (low_group > bound) scratch.live[bits_in(low_live & before)] = lane;
    if (high_group > bound) scratch.live[bits_in(low_live) + bits_in(high_live & before)] = lane + kWarp;
    __syncwarp();
    Hits<T> hits{a, row, scratch, lane, bound, bits_in(low_live) + bits_in(high_live), -1};
    int n = 0;
    if (hits.live > 0) {  // none: a row with an infinite score
      hits.each([&](bool hit, float score, int32_t column) {
        const unsigned all = __ballot_sync(kAll, hit);
        const int place = n + bits_in(all & before);
        if (hit && place < kHits) {
          scratch.hits[place] = score;
          scratch.columns[place] = column;
        }
        n += bits_in(all);
      });
    }
    hits.n = n;
    __syncwarp();

    Best first{-static_cast<double>(INFINITY), INT32_MAX};
    const auto offer = [&](bool hit, float score, int32_t column) {
      if (!hit) return;
      double exact = static_cast<double>(score);
      if (a.bonus != nullptr)
        exact = row.value(column) +
                (static_cast<double>(static_cast<const P*>(a.prices)[column]) - static_cast<double>(row.own));
      first = better(first, Best{exact, column});
    };
    Choice choice;
    if (in_turn) {
      const int after = hits.count([&](float, int32_t column) { return column >= start; });
      const int from_start = min(a.count, after);
      choice = Choice{true, 0, start, from_start, a.count - from_start};
      each_kept(hits, choice, offer);
    } else {
      hits.each(offer);
      choice = best_hits(hits, a.count, start, highest);
    }
    first = warp_best(first);
    const int32_t head = first.column == INT32_MAX ? label : first.column;

    int32_t* columns = a.columns + i * width;
    float* values = a.values + i * width;
    int length = 1;
    bool has_label = head == label;
    each_kept(hits, choice, [&](bool kept, float, int32_t column) {
      const bool another = kept && column != head;
      const unsigned others = __ballot_sync(kAll, another);
      if (another) {
        const int place = length + bits_in(others & before);
        columns[place] = column;
        values[place] = rounded(row.value(column));
      }
      length += bits_in(others);
      has_label = has_label || __any_sync(kAll, another && column == label) != 0;
    });
    if (lane == 0) {
      columns[0] = head;
      values[0] = rounded(row.value(head));
      if (!has_label) {
        columns[length] = label;
        values[length] = rounded(row.value(label));
      }
      a.found[i] = length + (has_label ? 0 : 1);
    }
  }
}

// ---- Margins of columns.

/// A warp per row: its best score, and what scores are relative to.
template <class T>
__global__ void __launch_bounds__(kListThreads, kBlocks) margin_rows_kernel(const Arguments a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp; i < a.places;
       i += warps) {
    const int64_t number_of_row = a.selected != nullptr ? a.selected[i] : i;
    const int32_t label = a.labels[number_of_row];
    if (label < 0) {
      if (lane == 0) a.bests[i] = -INFINITY;
      continue;
    }
    const Row<T> row(a, number_of_row, label, false);
    float top[16 / sizeof(T)];
    const float best = sweep(a, row, lane, static_cast<const float*>(nullptr), top);
    if (lane == 0) {
      a.bases[i] = row.base;
      a.bests[i] = best;
    }
  }
}

/// The smallest numbers so far, ascending.
__device__ __forceinline__ void keep_smallest(float (&smallest)[kMargins], float x) {
#pragma unroll
  for (int m = 0; m < kMargins; ++m) {
    const float kept = smallest[m];
    smallest[m] = fminf(x, kept);
    x = fmaxf(x, kept);
  }
}

/// blockIdx.x: slabs of rows; blockIdx.y: kMarginColumns columns per thread.
template <class T>
__global__ void __launch_bounds__(kListThreads) margin_columns_kernel(const Arguments a) {
  const int64_t slab = blockIdx.x;
  const int64_t column =
      static_cast<int64_t>(blockIdx.y) * kListThreads * kMarginColumns + static_cast<int>(threadIdx.x);
  const int64_t last = (slab + 1) * a.slab_rows < a.places ? (slab + 1) * a.slab_rows : a.places;
  float smallest[kMarginColumns][kMargins];
#pragma unroll
  for (int c = 0; c < kMarginColumns; ++c) {
#pragma unroll
    for (int m = 0; m < kMargins; ++m) smallest[c][m] = INFINITY;
  }
  for (int64_t i = slab * a.slab_rows; i < last; ++i) {
    const float best = a.bests[i];
    if (!(best > -INFINITY)) continue;
    const Row<T> row(a, a.selected != nullptr ? a.selected[i] : i, a.bases[i]);
#pragma unroll
    for (int c = 0; c < kMarginColumns; ++c) {
      const int64_t j = column + c * kListThreads;
      if (j >= a.cols) continue;
      const float loss = minus(best, row.at(a, j));
      keep_smallest(smallest[c], loss > 0.0f ? loss : INFINITY);
    }
  }
#pragma unroll
  for (int c = 0; c < kMarginColumns; ++c) {
    const int64_t j = column + c * kListThreads;
    if (j >= a.cols) continue;
#pragma unroll
    for (int m = 0; m < kMargins; ++m) a.smallest[(slab * kMargins + m) * a.cols + j] = smallest[c][m];
  }
}

/// A thread per column: the smallest of all slabs, whatever their order.
__global__ void __launch_bounds__(kListThreads) margin_merge_kernel(const Arguments a) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kListThreads + static_cast<int>(threadIdx.x);
  if (column >= a.cols) return;
  float smallest[kMargins];
#pragma unroll
  for (int m = 0; m < kMargins; ++m) smallest[m] = INFINITY;
  for (int64_t k = 0; k < a.slabs * kMargins; ++k) keep_smallest(smallest, a.smallest[k * a.cols + column]);
#pragma unroll
  for (int m = 0; m < kMargins; ++m) a.margins[m * a.cols + column] = smallest[m];
}

}  // namespace rounding_cuda
}  // namespace sela
