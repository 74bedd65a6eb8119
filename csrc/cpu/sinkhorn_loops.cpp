// The fused Sinkhorn pass over one block of rows: log-sum-exp, column sums, objective and labels in one read.
//
// Note [Fused pass]
// A row is swept twice, but only the first sweep reads memory: it writes the terms e[j] = exp(t[j] - ref) to a buffer
// in the first-level cache and sums them; the second adds e / sum to the column sums.  ref is the row's log-sum-exp of
// an earlier pass, so no sweep for the maximum is needed; should the sum leave its safe range, the row is done again
// from its maximum, and that is also where rows with NaN or infinities are found.
//   t - ref is computed as fma(x, scale, -ref) + g: exact products, one rounding where the numbers are already small,
// then g.  The rounding of ref is the same for the whole row and cancels.  Multiplying by log2(e) comes last.
//   Dense rows go four at a time, so that g and the column sums are loaded once for four rows.  Peaked rows go one by
// one, and chunks of 32 columns whose terms all lie far below the reference cost two fma per vector and no exp.  Which
// form a row takes is decided by the row itself (a few probed chunks), and both forms of a dense row do the same
// operations in the same order: a bad row never changes the bits of its neighbours.
//
// Note [Chunk bounds]
// Most bytes of peaked logits are read to find out that they do not count.  So a pass can write down, for each row and
// chunk, a bound u >= x[j] (1/64 of the bytes of float32), and later passes skip chunks by it without reading them.
// Rounding is monotonic: x[j] <= u and g[j] <= G, the largest potential of the chunk, give
//     fma(x[j], scale, -ref) + g[j]  <=  fma(u, scale, -ref) + G
// for the rounded results too, so that a chunk that is dead by its bound is dead by its terms, without any margin; the
// others are read and tested as ever.  Hence the bits of all results are the same with bounds and without.  Rows that
// were masked get bounds of +inf, and are read as a whole, always.
#include "cpu/sinkhorn_loops.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/simd_double.h"

namespace sela {
namespace SELA_ISA {
namespace {

constexpr int64_t W = vfloat::kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Safe range of a row's sum relative to its reference.  Dense: terms below 1e-38 are lost, 1e-18 of the sum at most.
constexpr float kDenseLow = 1e-20f, kHigh = 1e30f;
// Skipping: what is dropped must stay below e^-17 of the sum, so the sum must not be far below 1 (e^-2, see
// dead_level).
constexpr float kSkipLow = 0.1353f;
// Fewer columns than this are not worth a probe.
constexpr int64_t kProbeColumns = kSinkhornBoundedColumns;
constexpr int kProbes = 4;
static_assert(kProbeColumns >= 2 * kProbes * kSinkhornChunk, "probes are whole chunks");
// How far chunks are asked for in advance, in rows; a multiple of 4.
constexpr int64_t kLookAhead = 16;
static_assert(kLookAhead + 4 <= kSinkhornAhead, "marks of the rows at work must stay");
// A row is summed in pieces of this many columns: rounding then grows with the square root of a long row's length only.
constexpr int64_t kSumColumns = 1024;
// Vectors before this one hold columns below 2^24, which float counts exactly.
constexpr float kExactVectors = static_cast<float>((1 << 24) / W - 1);

/// Terms below exp(-level) count as dead: 26 nats, more when there are so many columns that they would add up.
inline float dead_level(int64_t cols) {
  const float needed = std::log(static_cast<float>(cols)) + 19.0f;
  return needed > 26.0f ? needed : 26.0f;
}

/// Logits x[j .. j + W) of one row; zeros behind the last column.
template <class T>
inline vfloat load_logits(const T* x, int64_t j, int64_t cols) {
  if (j + W <= cols) return load(x + j);
  if (j >= cols) return set1(0.0f);
  return load_tail(x + j, cols - j);
}

/// Best column of one row, lane by lane, then over the lanes.
struct Best {
  vfloat value = set1(-kInfinity);
  vfloat vector = set1(0.0f);  // number of the vector, exact in float up to 2^24 vectors
  inline void offer(vfloat t, float number) {
    vector = select_greater(t, value, set1(number), vector);
    value = max(t, value);
  }
  inline int32_t column() const {
    float lane[W];
    for (int64_t l = 0; l < W; ++l) lane[l] = static_cast<float>(l);
    const vfloat top = set1(reduce_max(value));
    if (!any(vector_at_least(kExactVectors))) {  // column numbers are exact in float: lowest of the best ones
      const vfloat columns = fma(vector, set1(static_cast<float>(W)), load(lane));
      return static_cast<int32_t>(-reduce_max(set1(0.0f) - select_greater(top, value, set1(kInfinity), columns)));
    }
    float values[W], numbers[W];
    store(values, select_greater(top, value, set1(0.0f), set1(1.0f)));
    store(numbers, vector);
    int64_t column = std::numeric_limits<int32_t>::max();
    for (int64_t l = 0; l < W; ++l) {
      const int64_t j = static_cast<int64_t>(numbers[l]) * W + l;
      if (values[l] > 0.0f && j < column) column = j;
    }
    return static_cast<int32_t>(column);
  }
  inline vmask vector_at_least(float number) const { return not_below(vector, set1(number)); }
};

/// First sweep over R dense rows: terms to `terms`, sums to `sums`.
/// `ahead` is the distance in bytes to the row that is prefetched meanwhile: four interleaved rows look random to the
/// hardware's own prefetcher (without: half the speed from memory).
template <int R, bool kLabels, class T>
inline void dense_terms(const T* const* x, const float* ref, int64_t cols, const float* g, float scale, float* terms,
                        int64_t terms_stride, int64_t ahead, float* sums, int32_t* labels) {
  constexpr int64_t kPerLine =
      W * static_cast<int64_t>(sizeof(T)) >= 64 ? 1 : 64 / (W * static_cast<int64_t>(sizeof(T)));
  const vfloat s = set1(scale);
  vfloat minus[R], sum[R], total[R];
  Best best[R];
  for (int q = 0; q < R; ++q) {
    minus[q] = set1(-ref[q]);
    total[q] = sum[q] = set1(0.0f);
  }
  const int64_t full = cols / W * W;
  for (int64_t j = 0; j < full;) {
    const int64_t end = j + kSumColumns < full ? j + kSumColumns : full;
    for (; j < end; j += W) {
      const vfloat gj = load(g + j);
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q) {
        if (kPerLine == 1 || j / W % kPerLine == 0) prefetch(x[q] + j, ahead);
        const vfloat t = fma(load(x[q] + j), s, minus[q]) + gj;
        if (kLabels) best[q].offer(t, static_cast<float>(j / W));
        const vfloat e = exp(t);
        store(terms + q * terms_stride + j, e);
        sum[q] = sum[q] + e;
      }
    }
    for (int q = 0; q < R; ++q) {
      total[q] = total[q] + sum[q];
      sum[q] = set1(0.0f);
    }
  }
  if (full < cols) {
    const vfloat gj = load(g + full);
    for (int q = 0; q < R; ++q) {
      const vfloat t = fma(load_tail(x[q] + full, cols - full), s, minus[q]) + gj;
      if (kLabels) best[q].offer(t, static_cast<float>(full / W));
      const vfloat e = exp(t);
      store(terms + q * terms_stride + full, e);
      sum[q] = sum[q] + e;
    }
  }
  for (int q = 0; q < R; ++q) {
    sums[q] = reduce_add(total[q] + sum[q]);
    if (kLabels) labels[q] = best[q].column();
  }
}

/// Second sweep over R dense rows: partial[j] += sum_q factor[q] * terms[q, j].
template <int R>
inline void dense_add(const float* terms, int64_t terms_stride, const float* factor, int64_t cols, float* partial) {
  vfloat f[R];
  for (int q = 0; q < R; ++q) f[q] = set1(factor[q]);
  for (int64_t j = 0; j < cols; j += W) {  // scratch rows are padded: no tail
    vfloat a = load(partial + j);
#pragma GCC unroll 4
    for (int q = 0; q < R; ++q) a = fma(load(terms + q * terms_stride + j), f[q], a);
    store(partial + j, a);
  }
}

/// Fixed point holds the distance from the row maximum: its logits are the negative of what is loaded.
template <class T>
constexpr bool kNegative = std::is_same_v<T, fixed_bits>;

/// Largest logits, lane by lane, of a chunk that begins at x and is not the last.
template <class T>
inline vfloat chunk_maximum(const T* x) {
  vfloat a = load(x), b = load(x + W);
#pragma GCC unroll 4
  for (int64_t v = 2 * W; v < kSinkhornChunk; v += 2 * W) {
    a = kNegative<T> ? min(load(x + v), a) : max(load(x + v), a);
    b = kNegative<T> ? min(load(x + v + W), b) : max(load(x + v + W), b);
  }
  return kNegative<T> ? set1(0.0f) - min(a, b) : max(a, b);
}

/// Four numbers to bfloat16, up.
inline void bounds_up(const float* top, uint16_t* out) {
  typedef uint32_t four __attribute__((vector_size(16)));
  typedef int32_t four_signed __attribute__((vector_size(16)));
  typedef uint16_t four_narrow __attribute__((vector_size(8)));
  four bits;
  std::memcpy(&bits, top, sizeof(bits));
  const four negative = reinterpret_cast<four>(reinterpret_cast<four_signed>(bits) >> 31);
  const four_narrow up = __builtin_convertvector((bits + (0xffffu & ~negative)) >> 16, four_narrow);
  std::memcpy(out, &up, sizeof(up));
}

/// Writes the bounds of one row, see Note [Chunk bounds].  NaN is not looked for: such a row will be masked.  This is
/// the first to read the row, so it asks for the one `ahead` bytes further, too.
template <class T>
inline void write_bounds(const T* x, int64_t cols, int64_t ahead, uint16_t* bounds) {
  constexpr int64_t kBytes = kSinkhornChunk * static_cast<int64_t>(sizeof(T));
  const int64_t count = SinkhornPass::bounds_stride(cols), full = cols / kSinkhornChunk;
  for (int64_t c = 0; c < count; c += 4) {
    vfloat best[4];
    if (c + 4 <= full) {
      const T* at = x + c * kSinkhornChunk;
      for (int64_t byte = 0; byte < 4 * kBytes; byte += 64) prefetch(at, ahead + byte);
      for (int k = 0; k < 4; ++k) best[k] = chunk_maximum(at + k * kSinkhornChunk);
    } else {
      for (int k = 0; k < 4; ++k) {
        const int64_t j = (c + k) * kSinkhornChunk;
        if (c + k < full) {
          best[k] = chunk_maximum(x + j);
        } else if (j < cols) {
          T padded[kSinkhornChunk];
          for (T& value : padded) value = x[j];
          std::memcpy(padded, x + j, static_cast<size_t>(cols - j) * sizeof(T));
          best[k] = chunk_maximum(padded);
        } else {
          best[k] = set1(-kInfinity);
        }
      }
    }
    float top[4];
    reduce_max4(best[0], best[1], best[2], best[3], top);
    bounds_up(top, bounds + c);
  }
}

/// marks: one bit for each chunk that its bound does not show to be dead.
inline void mark_chunks(const uint16_t* bounds, const float* chunk_potential, float ref, float scale, float level,
                        int64_t cols, uint64_t* marks) {
  const int64_t chunks = (cols + kSinkhornChunk - 1) / kSinkhornChunk;
  const vfloat s = set1(scale), minus = set1(-ref), dead = set1(-level);
  for (int64_t first = 0; first < chunks; first += 64) {
    uint64_t word = 0;
    for (int64_t c = 0; c < 64 && first + c < chunks; c += W) {
      const vfloat u = load(reinterpret_cast<const bfloat_bits*>(bounds) + first + c);
      word |= static_cast<uint64_t>(bits(not_below(fma(u, s, minus) + load(chunk_potential + first + c), dead))) << c;
    }
    if (chunks - first < 64) word &= (uint64_t{1} << (chunks - first)) - 1;  // an infinite reference marks them
    marks[first / 64] = word;
  }
}

inline bool is_marked(const uint64_t* marks, int64_t chunk) {
  return (marks[chunk / 64] >> (chunk % 64) & 1) != 0;
}

/// First sweep over one peaked row.  Live chunks are packed: terms of chunk live[k] at terms + 32 k.  With marks (not
/// null) only the marked chunks are looked at.  Returns the sum; `count` chunks are live.
template <bool kLabels, class T>
inline float peaked_terms(const T* x, float ref, int64_t cols, const float* g, float scale, float level, float* terms,
                          int64_t ahead, const uint64_t* marks, int32_t* live, int64_t* count, int32_t* label) {
  constexpr int64_t kVectors = kSinkhornChunk / W;
  const vfloat s = set1(scale), minus = set1(-ref), dead = set1(-level);
  vfloat sum = set1(0.0f);
  Best best;
  int64_t n = 0;
  const auto chunk = [&](int64_t j, auto load_at) {
    vfloat t[kVectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) t[v] = fma(load_at(j + v * W), s, minus) + load(g + j + v * W);
    vmask alive = not_below(t[0], dead);  // NaN counts as alive and so reaches the sum
#pragma GCC unroll 8
    for (int64_t v = 1; v < kVectors; ++v) alive = alive | not_below(t[v], dead);
    if (!any(alive)) return;
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      if (kLabels) best.offer(t[v], static_cast<float>(j / W + v));
      const vfloat e = exp(t[v]);
      store(terms + n * kSinkhornChunk + v * W, e);
      sum = sum + e;
    }
    live[n++] = static_cast<int32_t>(j / kSinkhornChunk);
  };
  const int64_t full = cols / kSinkhornChunk * kSinkhornChunk;
  const auto whole = [&](int64_t k) { return load(x + k); };
  const auto last = [&](int64_t k) { return load_logits(x, k, cols); };
  if (marks != nullptr) {
    for (int64_t first = 0; first < full; first += 64 * kSinkhornChunk)
      for (uint64_t left = marks[first / (64 * kSinkhornChunk)]; left != 0; left &= left - 1) {
        const int64_t j = first + __builtin_ctzll(left) * kSinkhornChunk;
        if (j < full) chunk(j, whole);
      }
  } else {
    for (int64_t j = 0; j < full; j += kSinkhornChunk) {
      for (int64_t byte = 0; byte < kSinkhornChunk * static_cast<int64_t>(sizeof(T)); byte += 64)
        prefetch(x + j, ahead + byte);
      chunk(j, whole);
    }
  }
  if (full < cols && (marks == nullptr || is_marked(marks, full / kSinkhornChunk))) chunk(full, last);
  *count = n;
  if (kLabels) *label = best.column();
  return reduce_add(sum);
}

/// Second sweep over one peaked row: partial += factor * terms of the live chunks.
inline void peaked_add(const float* terms, const int32_t* live, int64_t count, float factor, float* partial) {
  const vfloat f = set1(factor);
  for (int64_t k = 0; k < count; ++k) {
    float* p = partial + live[k] * kSinkhornChunk;
#pragma GCC unroll 8
    for (int64_t v = 0; v < kSinkhornChunk; v += W)
      store(p + v, fma(load(terms + k * kSinkhornChunk + v), f, load(p + v)));
  }
}

/// True when the probed chunks of a row hold a live term: all of four, or at least half of four and of four more
/// between them.  `marks`, if not null, spare reading some.
template <class T>
inline bool looks_dense(const T* x, float ref, int64_t cols, const float* g, float scale, float level,
                        const uint64_t* marks) {
  const vfloat s = set1(scale), minus = set1(-ref), dead = set1(-level);
  const int64_t step = cols / (2 * kSinkhornChunk * kProbes) * kSinkhornChunk;
  int live = 0;
  for (int probe = 0; probe < 2 * kProbes; ++probe) {
    const int64_t j = (probe < kProbes ? 2 * probe : 2 * (probe - kProbes) + 1) * step;
    if (probe == kProbes && (2 * live < kProbes || live == kProbes)) break;
    if (marks != nullptr && !is_marked(marks, j / kSinkhornChunk)) continue;
    vmask alive = not_below(fma(load(x + j), s, minus) + load(g + j), dead);
    for (int64_t v = W; v < kSinkhornChunk; v += W)
      alive = alive | not_below(fma(load(x + j + v), s, minus) + load(g + j + v), dead);
    live += any(alive);
  }
  return live >= kProbes;  // broken off: of four
}

/// max_j of scale * x[j] + g[j], NaN ignored.
template <class T>
inline float row_maximum(const T* x, int64_t cols, const float* g, float scale) {
  const vfloat s = set1(scale);
  vfloat a = set1(-kInfinity), b = a;
  const int64_t full = cols / (2 * W) * (2 * W);
  for (int64_t j = 0; j < full; j += 2 * W) {
    a = max(fma(load(x + j), s, load(g + j)), a);
    b = max(fma(load(x + j + W), s, load(g + j + W)), b);
  }
  for (int64_t j = full; j < cols; j += W) a = max(fma(load_logits(x, j, cols), s, load(g + j)), a);
  return reduce_max(max(a, b));
}

/// The careful form, for rows that the others could not do: finds the best column m and computes every term relative to
/// it, t[j] = (x[j] - x[m]) * scale + (g[j] - g[m]), so that the largest term is 1 however large the numbers are.
/// Returns the sum and its reference, or NaN for a row to mask.
template <class T>
float careful_terms(const T* x, int64_t cols, const float* g, float scale, float* terms, double* ref, int32_t* label) {
  float row[W], best = -kInfinity, best_x = 0.0f;
  int64_t best_j = -1;
  for (int64_t j = 0; j < cols; j += W) {
    store(row, load_logits(x, j, cols));
    for (int64_t v = 0; v < W && j + v < cols; ++v) {
      const float t = scale * row[v] + g[j + v];
      if (!(t < kInfinity)) return std::numeric_limits<float>::quiet_NaN();  // NaN and +inf
      if (t > best) {
        best = t;
        best_x = row[v];
        best_j = j + v;
      }
    }
  }
  if (best_j < 0) return std::numeric_limits<float>::quiet_NaN();  // all -inf
  const vfloat xm = set1(best_x), gm = set1(g[best_j]), s = set1(scale);
  vfloat sum = set1(0.0f);
  for (int64_t j = 0; j < cols; j += W) {
    const vfloat e = exp(fma(load_logits(x, j, cols) - xm, s, load(g + j) - gm));
    store(terms + j, e);
    sum = sum + e;
  }
  *ref = static_cast<double>(best_x) * scale + g[best_j];
  *label = static_cast<int32_t>(best_j);
  return reduce_add(sum);
}

/// Adds a block's partial sums to the integer ones and clears them.
template <class A>
inline void flush(A* partial, int64_t cols, double units, int64_t* columns) {
  for (int64_t j = 0; j < cols; ++j) columns[j] += static_cast<int64_t>(static_cast<double>(partial[j]) * units + 0.5);
  std::memset(partial, 0, static_cast<size_t>(cols) * sizeof(A));
}

/// values[k] = log(values[k] / sum), to about 1e-7, for values between 1e-30 and 1e30; compilers make vectors of it.
inline void log_shares(float* values, int64_t count, float sum) {
  const float factor = 1.0f / sum;
  for (int64_t k = 0; k < count; ++k) {
    const float x = values[k] * factor;
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // x = m 2^exponent, m in [sqrt(1/2), sqrt(2))
    bits -= exponent * (1 << 23);
    float m;
    std::memcpy(&m, &bits, sizeof(m));
    const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;  // log m = 2 atanh s
    const float series = s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
    values[k] = static_cast<float>(exponent) * 0.693147181f + 2.0f * (s + s * series);
  }
}

/// Hands the candidates of one row to the sink: terms above keep_above * sum.  Without `live` the terms lie column by
/// column, else chunk by chunk.  Returns whether the next row's are wanted.
inline bool keep_row(const SinkhornTask& task, const SinkhornScratch& scratch, const float* terms, float sum,
                     const int32_t* live, int64_t live_count) {
  const float level = static_cast<float>(task.keep_above) * sum;
  int64_t n = 0;
  if (live == nullptr) {
    for (int64_t j = 0; j < task.pass.cols; j += W)
      n += pack_greater(load(terms + j), level, static_cast<int32_t>(j), scratch.kept_values + n,
                        scratch.kept_columns + n);
  } else {
    for (int64_t k = 0; k < live_count; ++k)
      for (int64_t v = 0; v < kSinkhornChunk; v += W)
        n += pack_greater(load(terms + k * kSinkhornChunk + v), level,
                          static_cast<int32_t>(live[k] * kSinkhornChunk + v), scratch.kept_values + n,
                          scratch.kept_columns + n);
  }
  log_shares(scratch.kept_values, n, sum);
  return scratch.keep(scratch.sink, scratch.kept_values, scratch.kept_columns, n);
}

/// One row after its first sweep: writes its results, counts it, and returns the factor of its terms.
struct RowWriter {
  const SinkhornTask& task;
  SinkhornBlockTotals& totals;

  /// What lse has more than the log-sum-exp of the row as it is stored.
  double shift(int64_t row) const {
    return task.pass.maxima != nullptr ? task.pass.maxima_scale * static_cast<double>(task.pass.maxima[row]) : 0.0;
  }
  float finish(int64_t row, double ref, float sum, int32_t label) const {
    const double lse = shift(row) + (ref + std::log(static_cast<double>(sum)));
    if (task.out.lse != nullptr) static_cast<float*>(task.out.lse)[row] = static_cast<float>(lse);
    if (task.labels) task.out.labels[row] = label;
    const float weight = task.pass.row_weights != nullptr ? task.pass.row_weights[row] : 1.0f;
    if (weight > 0.0f) {
      totals.objective += static_cast<double>(weight) * lse;
      totals.weight += static_cast<double>(weight);
    }
    return weight / sum;
  }
  void mask(int64_t row) const {
    if (task.pass.bounds != nullptr && !task.pass.bounds_known) {  // +inf: nothing of this row is to be skipped
      const int64_t count = SinkhornPass::bounds_stride(task.pass.cols);
      for (int64_t c = 0; c < count; ++c) task.pass.bounds[row * count + c] = 0x7f80;
    }
    if (task.out.lse != nullptr) static_cast<float*>(task.out.lse)[row] = std::numeric_limits<float>::quiet_NaN();
    if (task.labels) task.out.labels[row] = -1;
    ++totals.masked;
  }
};

/// kKeep: hands the candidates of the rows on as well.
template <bool kLabels, bool kKeep, class T>
SinkhornBlockTotals block_float(const SinkhornTask& task, int64_t block, const SinkhornScratch& scratch) {
  const SinkhornPass& pass = task.pass;
  const int64_t cols = pass.cols, stride = scratch.terms_stride;
  const int64_t first = block * kSinkhornRows;
  const int64_t last = first + kSinkhornRows < pass.rows ? first + kSinkhornRows : pass.rows;
  const float size = static_cast<float>(pass.scale), scale = kNegative<T> ? -size : size, level = dead_level(cols);
  const int64_t ahead = task.group_step * pass.stride * static_cast<int64_t>(sizeof(T));
  const float* g = task.potential;
  const float* reference = static_cast<const float*>(pass.reference);
  float* terms = static_cast<float*>(scratch.terms);
  float* partial = static_cast<float*>(scratch.partial);
  SinkhornBlockTotals totals;
  const RowWriter writer{task, totals};
  bool keeping = kKeep;

  const int64_t chunks = task.padded / kSinkhornChunk, bounds_stride = SinkhornPass::bounds_stride(cols);
  const bool bounded = pass.bounds != nullptr && pass.bounds_known;
  const bool writes_bounds = pass.bounds != nullptr && !pass.bounds_known;
  const auto logits_of = [&](int64_t row) { return static_cast<const T*>(pass.logits) + row * pass.stride; };
  // The rows that are read, by their number in this block, and back.
  const auto row_at = [&](int64_t number) {
    return first + scratch.start + number / kSinkhornGroup * task.group_step + number % kSinkhornGroup;
  };
  const auto number_of = [&](int64_t row) {
    const int64_t behind = row - first - scratch.start;
    return behind / task.group_step * kSinkhornGroup + behind % task.group_step;
  };
  const auto marks_of = [&](int64_t row) {
    return bounded ? scratch.marks + number_of(row) % kSinkhornAhead * task.mark_words : nullptr;
  };
  const auto reference_of = [&](int64_t row) {
    if (reference == nullptr) return std::numeric_limits<float>::quiet_NaN();
    return static_cast<float>(static_cast<double>(reference[row]) - writer.shift(row));
  };
  const auto mark = [&](int64_t row, float ref) {
    mark_chunks(pass.bounds + row * bounds_stride, task.chunk_potential, ref, size, level, cols, marks_of(row));
  };
  // Marks the chunks of a row to come, and asks for them unless it will be read as a whole.
  const auto look = [&](int64_t row) {
    const float ref = reference_of(row);
    if (!bounded || !(ref == ref)) return;
    mark(row, ref);
    const uint64_t* marks = marks_of(row);
    const T* x = logits_of(row);
    int64_t count = 0;
    for (int64_t w = 0; w < task.mark_words; ++w) count += __builtin_popcountll(marks[w]);
    if (2 * count > chunks) return;
    for (int64_t w = 0; w < task.mark_words; ++w) {
      for (uint64_t left = marks[w]; left != 0; left &= left - 1) {
        const T* chunk = x + (w * 64 + __builtin_ctzll(left)) * kSinkhornChunk;
        constexpr int64_t kBytes = kSinkhornChunk * static_cast<int64_t>(sizeof(T));
        for (int64_t byte = 0; byte < kBytes; byte += 64) prefetch(chunk, byte);
        prefetch(chunk, kBytes - 1);  // rows need not begin on a cache line
      }
    }
  };

  // The sums of a dense row are in; redo it carefully if they are out of range.  Adds nothing to the column sums.
  const auto finish_dense = [&](int64_t row, const T* x, float ref, float& sum, int32_t label, float* own) {
    if (!(sum > kDenseLow && sum < kHigh)) {  // the reference was far off: from the row's maximum, then
      ref = row_maximum(x, cols, g, scale);
      dense_terms<1, kLabels>(&x, &ref, cols, g, scale, own, stride, ahead, &sum, &label);
    }
    double exact = ref;
    if (!(sum > kDenseLow && sum < kHigh)) {
      sum = careful_terms(x, cols, g, scale, own, &exact, &label);
      if (!(sum > 0.0f)) {
        writer.mask(row);
        std::memset(own, 0, static_cast<size_t>(task.padded) * sizeof(float));  // 0 * NaN would spoil the sums
        return 0.0f;
      }
    }
    return writer.finish(row, exact, sum, label);
  };

  const auto look_at = [&](int64_t number) {
    const int64_t row = row_at(number);
    if (row < last) look(row);
  };
  for (int64_t number = 0; number < kLookAhead; ++number) look_at(number);
  for (int64_t i = row_at(0), number = kLookAhead; i < last; i += task.group_step, number += kSinkhornGroup) {
    for (int64_t next = number; next < number + kSinkhornGroup; ++next) look_at(next);
    const int64_t n = last - i < 4 ? last - i : 4;
    const T* x[4];
    float ref[4];
    bool dense[4];
    bool together = n == 4;
    for (int64_t q = 0; q < n; ++q) {
      x[q] = logits_of(i + q);
      if (writes_bounds) write_bounds(x[q], cols, ahead, pass.bounds + (i + q) * bounds_stride);
      ref[q] = reference_of(i + q);
      if (!(ref[q] == ref[q])) {
        ref[q] = row_maximum(x[q], cols, g, scale);
        if (bounded) mark(i + q, ref[q]);
      }
      dense[q] = cols < kProbeColumns || looks_dense(x[q], ref[q], cols, g, scale, level, marks_of(i + q));
      together = together && dense[q];
    }
    float sum[4], factor[4];
    int32_t label[4] = {-1, -1, -1, -1};
    if (together) {
      dense_terms<4, kLabels>(x, ref, cols, g, scale, terms, stride, ahead, sum, label);
      for (int q = 0; q < 4; ++q) factor[q] = finish_dense(i + q, x[q], ref[q], sum[q], label[q], terms + q * stride);
      dense_add<4>(terms, stride, factor, cols, partial);
      totals.live += 4 * chunks;
      if (kKeep)
        for (int q = 0; q < 4 && keeping; ++q)
          keeping = factor[q] > 0.0f ? keep_row(task, scratch, terms + q * stride, sum[q], nullptr, 0)
                                     : scratch.keep(scratch.sink, nullptr, nullptr, 0);
      continue;
    }
    for (int64_t q = 0; q < n; ++q) {
      if (!dense[q]) {
        int64_t live = 0;
        float s = 0.0f;
        for (int attempt = 0; attempt < 3; ++attempt) {
          s = peaked_terms<kLabels>(x[q], ref[q], cols, g, scale, level, terms, ahead, marks_of(i + q), scratch.live,
                                    &live, label);
          if (s > kSkipLow && s < kHigh) break;
          const bool moved = attempt == 0 && s > 1e-30f && s < kHigh;  // its sum tells where to
          ref[q] = moved ? ref[q] + std::log(s) : row_maximum(x[q], cols, g, scale);
          if (bounded) mark(i + q, ref[q]);
          s = 0.0f;
        }
        if (s > 0.0f) {
          const float f = writer.finish(i + q, ref[q], s, label[0]);
          peaked_add(terms, scratch.live, live, f, partial);
          totals.live += live;
          if (kKeep && keeping)
            keeping = f > 0.0f ? keep_row(task, scratch, terms, s, scratch.live, live)
                               : scratch.keep(scratch.sink, nullptr, nullptr, 0);
          continue;
        }
      }
      dense_terms<1, kLabels>(x + q, ref + q, cols, g, scale, terms, stride, ahead, sum, label);
      const float f = finish_dense(i + q, x[q], ref[q], sum[0], label[0], terms);
      dense_add<1>(terms, stride, &f, cols, partial);
      totals.live += chunks;
      if (kKeep && keeping)
        keeping = f > 0.0f ? keep_row(task, scratch, terms, sum[0], nullptr, 0)
                           : scratch.keep(scratch.sink, nullptr, nullptr, 0);
    }
  }
  flush(partial, cols, task.units, scratch.columns);
  totals.live *= kSinkhornChunk;
  return totals;
}

// ---- float64: the same in plain form, one row at a time.

SinkhornBlockTotals block_double(const SinkhornTask& task, int64_t block, const SinkhornScratch& scratch) {
  const SinkhornPass& pass = task.pass;
  const int64_t cols = pass.cols, full = cols / D * D;
  const int64_t first = block * kSinkhornRows;
  const int64_t last = first + kSinkhornRows < pass.rows ? first + kSinkhornRows : pass.rows;
  const double inf = std::numeric_limits<double>::infinity();
  const double* g = task.potential64;
  const double* reference = static_cast<const double*>(pass.reference);
  double* terms = static_cast<double*>(scratch.terms);
  double* partial = static_cast<double*>(scratch.partial);
  SinkhornBlockTotals totals;
  bool keeping = scratch.keep != nullptr;

  for (int64_t i = first + scratch.start; i < last; ++i) {
    if ((i - first - scratch.start) % task.group_step >= kSinkhornGroup) continue;
    totals.live += task.padded;
    const double* x = static_cast<const double*>(pass.logits) + i * pass.stride;
    double ref = reference != nullptr ? reference[i] : std::numeric_limits<double>::quiet_NaN(), sum = 0.0;
    int64_t label = -1;
    for (int attempt = ref == ref ? 0 : 1; attempt < 2; ++attempt) {
      if (attempt == 1 || task.labels) {
        double best = -inf;
        label = -1;
        for (int64_t j = 0; j < cols; ++j) {
          const double t = x[j] * pass.scale + g[j];
          if (t > best) {
            best = t;
            label = j;
          }
        }
        if (attempt == 1) ref = best;
      }
      vdouble total = {};
      for (int64_t j = 0; j < full; j += D) {
        const vdouble e = exp64((load64(x + j) * pass.scale + load64(g + j)) - ref);
        std::memcpy(terms + j, &e, sizeof(e));
        total += e;
      }
      if (full < cols) {
        double tail[D];
        for (int64_t v = 0; v < D; ++v) tail[v] = full + v < cols ? x[full + v] : 0.0;
        const vdouble e = exp64((load64(tail) * pass.scale + load64(g + full)) - ref);
        std::memcpy(terms + full, &e, sizeof(e));
        total += e;
      }
      sum = 0.0;
      for (int64_t v = 0; v < D; ++v) sum += total[v];
      if (sum > 1e-200 && sum < 1e200) break;
    }
    const bool bad = !(sum > 1e-200 && sum < 1e200);
    const double lse = bad ? std::numeric_limits<double>::quiet_NaN() : ref + std::log(sum);
    if (task.out.lse != nullptr) static_cast<double*>(task.out.lse)[i] = lse;
    if (task.labels) task.out.labels[i] = bad ? -1 : static_cast<int32_t>(label);
    totals.masked += bad;
    const double weight = pass.row_weights != nullptr ? static_cast<double>(pass.row_weights[i]) : 1.0;
    if (bad || !(weight > 0.0)) {
      if (keeping) keeping = scratch.keep(scratch.sink, nullptr, nullptr, 0);
      continue;
    }
    totals.objective += weight * lse;
    totals.weight += weight;
    const double factor = weight / sum;
    for (int64_t j = 0; j < cols; ++j) partial[j] += terms[j] * factor;
    if (!keeping) continue;
    int64_t n = 0;
    for (int64_t j = 0; j < cols; ++j) {
      if (!(terms[j] > task.keep_above * sum)) continue;
      scratch.kept_values[n] = static_cast<float>(std::log(terms[j] / sum));
      scratch.kept_columns[n++] = static_cast<int32_t>(j);
    }
    keeping = scratch.keep(scratch.sink, scratch.kept_values, scratch.kept_columns, n);
  }
  flush(partial, cols, task.units, scratch.columns);
  return totals;
}

template <class T>
SinkhornBlockTotals block_of(const SinkhornTask& task, int64_t block, const SinkhornScratch& scratch) {
  if (scratch.keep != nullptr)
    return task.labels ? block_float<true, true, T>(task, block, scratch)
                       : block_float<false, true, T>(task, block, scratch);
  return task.labels ? block_float<true, false, T>(task, block, scratch)
                     : block_float<false, false, T>(task, block, scratch);
}

}  // namespace

SinkhornBlockTotals sinkhorn_block(const SinkhornTask& task, int64_t block, const SinkhornScratch& scratch) {
  const FlushToZero flush_to_zero;
  switch (task.pass.type) {
    case LogitsType::float64:
      return block_double(task, block, scratch);
    case LogitsType::float16:
      return block_of<half_bits>(task, block, scratch);
    case LogitsType::bfloat16:
      return block_of<bfloat_bits>(task, block, scratch);
    case LogitsType::fixed16:
      return block_of<fixed_bits>(task, block, scratch);
    default:
      return block_of<float>(task, block, scratch);
  }
}

}  // namespace SELA_ISA
}  // namespace sela
