// Driver of the fused Sinkhorn pass on the CPU: scratch memory, threads, and the sums over blocks and workers.
#include "sela/sinkhorn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/sinkhorn_loops.h"
#include "sela/parallel.h"

namespace sela {
namespace {

constexpr std::size_t kAlign = 64;

/// Zeroed memory that starts on a cache line.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(kAlign)))) {
    std::fill_n(data_, std::max<int64_t>(count, 1), T());
  }
  ~Aligned() { ::operator delete(data_, std::align_val_t(kAlign)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() { return data_; }

 private:
  T* data_;
};

/// The candidates of one block of rows, until they are put together.
struct KeptBlock {
  std::vector<int32_t> lengths;  // entries per row
  std::vector<int32_t> columns;
  std::vector<float> values;
  void clear() {
    lengths.clear();
    columns.clear();
    values.clear();
  }
};

/// What a worker's `keep` writes to; its memory serves one block after the other.
struct Keeper {
  KeptBlock block;
  int64_t count = 0;
  int64_t room = 0;  // entries that may come before there are too many

  static bool row(void* self, const float* values, const int32_t* columns, int64_t count) {
    Keeper& keeper = *static_cast<Keeper*>(self);
    keeper.count += count;
    if (keeper.count > keeper.room) return false;
    keeper.block.lengths.push_back(static_cast<int32_t>(count));
    keeper.block.columns.insert(keeper.block.columns.end(), columns, columns + count);
    keeper.block.values.insert(keeper.block.values.end(), values, values + count);
    return true;
  }
};

/// Puts the blocks together in their order; each is freed as soon as it is copied.
template <class Index>
void join(std::vector<KeptBlock>& blocks, Candidates& out, std::vector<Index>& columns) {
  size_t entries = 0, rows = 0;
  for (const KeptBlock& block : blocks) {
    entries += block.values.size();
    rows += block.lengths.size();
  }
  out.offsets.reserve(rows + 1);
  out.offsets.push_back(0);
  columns.reserve(entries);
  out.values.reserve(entries);
  for (KeptBlock& block : blocks) {
    for (const int32_t length : block.lengths) out.offsets.push_back(out.offsets.back() + length);
    for (const int32_t column : block.columns) columns.push_back(static_cast<Index>(column));
    out.values.insert(out.values.end(), block.values.begin(), block.values.end());
    block = KeptBlock();
  }
}

/// f(first row, number of rows) for every group of rows that is read, in order.
template <class F>
void for_groups(const SinkhornPass& pass, const SinkhornSample& sample, const F& f) {
  const int64_t step = kSinkhornGroup * sample.every;
  for (int64_t row = sample.start(0); row < pass.rows; row += step) f(row, std::min(kSinkhornGroup, pass.rows - row));
}

void check(const SinkhornPass& pass, const SinkhornSums& sums) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("sinkhorn_pass: " + what); };
  if (pass.rows < 0 || pass.cols < 1 || pass.cols > std::numeric_limits<int32_t>::max() - kSinkhornChunk)
    refuse("expected rows >= 0 and 1 <= cols < 2^31, found " + std::to_string(pass.rows) + " x " +
           std::to_string(pass.cols));
  if (pass.stride < pass.cols)
    refuse("expected stride >= cols, found " + std::to_string(pass.stride) + " < " + std::to_string(pass.cols));
  if (!(pass.scale > 0.0) || !std::isfinite(pass.scale))
    refuse("expected a finite scale > 0, found " + std::to_string(pass.scale));
  if (!(pass.largest_weight > 0.0) || !std::isfinite(pass.largest_weight))
    refuse("expected a finite largest weight > 0, found " + std::to_string(pass.largest_weight));
  if (pass.potential == nullptr || (pass.logits == nullptr && pass.rows > 0) || sums.column_sums == nullptr)
    refuse("logits, potential and column_sums must not be null");
}

using BlockFunction = SinkhornBlockTotals (*)(const SinkhornTask&, int64_t, const SinkhornScratch&);

BlockFunction block_function(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return &avx512::sinkhorn_block;
  if (isa == Isa::avx2) return &avx2::sinkhorn_block;
#endif
  (void)isa;
  return &generic::sinkhorn_block;
}

}  // namespace

double sinkhorn_resolution(int64_t rows, double largest_weight) {
  // Sum <= rows * largest_weight (1 + rounding); 2^61 units leave a factor of two below the end of int64.
  const double bound = std::max<double>(1.0, static_cast<double>(rows)) * largest_weight;
  return std::ldexp(1.0, static_cast<int>(std::ceil(std::log2(bound))) - 61);
}

double sinkhorn_resolution(const SinkhornPass& pass) {
  return sinkhorn_resolution(std::max(pass.rows, pass.rows_in_all), pass.largest_weight);
}

const void* sinkhorn_reference(const SinkhornPass& pass) {
  const bool fits = pass.largest_weight > 2e-8 && pass.largest_weight < 1e17;  // quotients from 2e-38 to 1e37
  return fits || pass.type == LogitsType::float64 ? pass.reference : nullptr;
}

void sinkhorn_pass_cpu(const SinkhornPass& pass, SinkhornSums& sums, int threads, Isa isa, SinkhornSample sample,
                       Candidates* candidates, double* block_totals) {
  check(pass, sums);
  if (sample.every < 1 || sample.first_block < 0)
    throw std::invalid_argument("sinkhorn_pass: expected every >= 1 and a first block >= 0, found " +
                                std::to_string(sample.every) + " and " + std::to_string(sample.first_block));
  const double largest_level = pass.type == LogitsType::float64 ? kLargestLevel64 : kLargestLevel;
  if (candidates != nullptr && !(candidates->level > 0.0 && candidates->level <= largest_level))
    throw std::invalid_argument("sinkhorn_pass: expected a level of candidates in 0 .. " +
                                std::to_string(largest_level) + " nats, found " + std::to_string(candidates->level));
  const int64_t blocks = (pass.rows + kSinkhornRows - 1) / kSinkhornRows;
  const bool is_double = pass.type == LogitsType::float64;

  SinkhornTask task;
  task.pass = pass;
  task.pass.reference = sinkhorn_reference(pass);
  task.out = sums;
  task.padded = (pass.cols + kSinkhornChunk - 1) / kSinkhornChunk * kSinkhornChunk;
  task.units = 1.0 / sinkhorn_resolution(pass);
  task.labels = sums.labels != nullptr;
  task.group_step = kSinkhornGroup * sample.every;
  const double inf = std::numeric_limits<double>::infinity();
  Aligned<float> potential(is_double ? 0 : task.padded);
  Aligned<double> potential64(is_double ? task.padded : 0);
  for (int64_t j = 0; j < task.padded; ++j) {
    const double g = j < pass.cols ? pass.potential[j] : -inf;
    if (is_double)
      potential64.get()[j] = g;
    else
      potential.get()[j] = static_cast<float>(g);
  }
  task.potential = potential.get();
  task.potential64 = potential64.get();

  if (is_double || pass.cols < kSinkhornBoundedColumns) task.pass.bounds = nullptr;
  const int64_t chunks = task.padded / kSinkhornChunk;
  Aligned<float> chunk_potential(SinkhornPass::bounds_stride(pass.cols));
  if (task.pass.bounds != nullptr) {
    std::fill_n(chunk_potential.get(), SinkhornPass::bounds_stride(pass.cols), -std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < chunks; ++c)
      chunk_potential.get()[c] =
          *std::max_element(task.potential + c * kSinkhornChunk, task.potential + (c + 1) * kSinkhornChunk);
    task.mark_words = (chunks + 63) / 64;
  }
  task.chunk_potential = chunk_potential.get();

  const int workers =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads > 0 ? threads : available_threads(), blocks)));
  // The four rows of terms are kept apart by an odd number of cache lines, or they would share the sets of the cache.
  const int64_t terms_stride = task.padded + 16;
  const int64_t terms = is_double ? task.padded : 4 * terms_stride;
  Aligned<int64_t> columns(workers * task.padded);
  Aligned<float> terms_float(is_double ? 0 : workers * terms), partial_float(is_double ? 0 : workers * task.padded);
  Aligned<double> terms_double(is_double ? workers * terms : 0), partial_double(is_double ? workers * task.padded : 0);
  Aligned<int32_t> live(workers * chunks);
  Aligned<uint64_t> marks(workers * kSinkhornAhead * task.mark_words);
  std::vector<SinkhornBlockTotals> totals(static_cast<size_t>(blocks));

  std::atomic<int64_t> kept{0};
  const int64_t room = candidates != nullptr ? task.padded + 16 : 0;
  Aligned<float> kept_values(workers * room);
  Aligned<int32_t> kept_columns(workers * room);
  std::vector<Keeper> keepers(candidates != nullptr ? static_cast<size_t>(workers) : 0);
  std::vector<KeptBlock> kept_blocks(candidates != nullptr ? static_cast<size_t>(blocks) : 0);
  if (candidates != nullptr) task.keep_above = std::exp(-candidates->level);

  const BlockFunction body = block_function(isa);
  parallel_blocks(blocks, workers, [&](int64_t number, int worker) {
    SinkhornScratch scratch;
    scratch.start = sample.start(number);
    if (scratch.start >= kSinkhornRows) return;
    const int64_t left = candidates != nullptr ? candidates->limit - kept.load(std::memory_order_relaxed) : -1;
    if (left >= 0) {
      Keeper& keeper = keepers[static_cast<size_t>(worker)];
      keeper.block.clear();
      keeper.count = 0;
      keeper.room = left;
      scratch.keep = &Keeper::row;
      scratch.sink = &keeper;
      scratch.kept_values = kept_values.get() + worker * room;
      scratch.kept_columns = kept_columns.get() + worker * room;
    }
    scratch.columns = columns.get() + worker * task.padded;
    scratch.terms_stride = terms_stride;
    scratch.live = live.get() + worker * chunks;
    scratch.marks = marks.get() + worker * kSinkhornAhead * task.mark_words;
    if (is_double) {
      scratch.terms = terms_double.get() + worker * terms;
      scratch.partial = partial_double.get() + worker * task.padded;
    } else {
      scratch.terms = terms_float.get() + worker * terms;
      scratch.partial = partial_float.get() + worker * task.padded;
    }
    totals[static_cast<size_t>(number)] = body(task, number, scratch);
    if (scratch.keep != nullptr) {
      const Keeper& keeper = keepers[static_cast<size_t>(worker)];
      kept.fetch_add(keeper.count, std::memory_order_relaxed);
      kept_blocks[static_cast<size_t>(number)] = keeper.block;  // a copy has no room to spare
    }
  });

  if (candidates != nullptr) {
    Candidates& out = *candidates;
    out.overflow = kept.load() > out.limit;
    out.cols = pass.cols;
    out.rows = 0;
    const auto count = [&](int64_t, int64_t rows) { out.rows += rows; };
    for_groups(pass, sample, count);
    out.offsets.clear();
    out.narrow.clear();
    out.wide.clear();
    out.values.clear();
    out.weights.clear();
    if (!out.overflow) {
      if (pass.cols <= kNarrowColumns)
        join(kept_blocks, out, out.narrow);
      else
        join(kept_blocks, out, out.wide);
      const auto add_weights = [&](int64_t first, int64_t rows) {
        out.weights.insert(out.weights.end(), pass.row_weights + first, pass.row_weights + first + rows);
      };
      if (pass.row_weights != nullptr) for_groups(pass, sample, add_weights);
    }
  }

  std::fill_n(sums.column_sums, pass.cols, int64_t{0});
  for (int worker = 0; worker < workers; ++worker)
    for (int64_t j = 0; j < pass.cols; ++j) sums.column_sums[j] += columns.get()[worker * task.padded + j];
  sums.objective = sums.weight = 0.0;
  sums.masked = sums.live = 0;
  for (const SinkhornBlockTotals& t : totals) {
    sums.objective += t.objective;
    sums.weight += t.weight;
    sums.masked += t.masked;
    sums.live += t.live;
  }
  if (block_totals == nullptr) return;
  for (const SinkhornBlockTotals& t : totals) *block_totals++ = t.objective;
  for (const SinkhornBlockTotals& t : totals) *block_totals++ = t.weight;
}

}  // namespace sela
