// The rows that Newton's method works on: those with several candidates, in pieces of equal work; the others are
// counted.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "sela/newton.h"

namespace sela {
namespace {

// Rows are summed in so many pieces at most, each into columns of its own which are then added in order: the bits are
// the same for any number of threads.  A piece must hold several entries per column to be worth its columns.
constexpr int64_t kPieces = 64;
constexpr int64_t kPieceEntries = 8192;

}  // namespace

NewtonRows::NewtonRows(Candidates&& candidates)
    : cols_(candidates.cols),
      offsets_{0},
      narrow_(std::move(candidates.narrow)),
      wide_(std::move(candidates.wide)),
      values_(std::move(candidates.values)),
      weights_(std::move(candidates.weights)),
      counts_(static_cast<size_t>(candidates.cols), 0.0) {
  for (size_t row = 0; row + 1 < candidates.offsets.size(); ++row)
    if (candidates.offsets[row] < candidates.offsets[row + 1])
      weight_ += weights_.empty() ? 1.0 : static_cast<double>(weights_[row]);
  if (candidates.overflow) throw std::invalid_argument("newton: expected candidates that did not overflow");
  compact(candidates.offsets, [](int64_t) { return true; });
  candidates.offsets.clear();
}

/// Keeps the entries for which keep(entry) holds, in their order; rows that have one left are counted from then on.
template <class Keep>
void NewtonRows::compact(const std::vector<int64_t>& offsets, const Keep& keep) {
  const bool wide = !wide_.empty();
  int64_t out = 0, row_out = 0;
  std::vector<int64_t> new_offsets{0};
  for (size_t row = 0; row + 1 < offsets.size(); ++row) {
    const double weight = weights_.empty() ? 1.0 : static_cast<double>(weights_[row]);
    const int64_t first = out;
    for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) {
      if (!keep(k)) continue;
      const size_t from = static_cast<size_t>(k), to = static_cast<size_t>(out++);
      if (wide)
        wide_[to] = wide_[from];
      else
        narrow_[to] = narrow_[from];
      values_[to] = values_[from];
    }
    if (out - first == 1)
      counts_[wide ? wide_[static_cast<size_t>(first)] : narrow_[static_cast<size_t>(first)]] += weight;
    if (out - first <= 1) {
      out = first;
      continue;
    }
    if (!weights_.empty()) weights_[static_cast<size_t>(row_out)] = weights_[row];
    ++row_out;
    new_offsets.push_back(out);
  }
  if (wide)
    wide_.resize(static_cast<size_t>(out));
  else
    narrow_.resize(static_cast<size_t>(out));
  values_.resize(static_cast<size_t>(out));
  if (!weights_.empty()) weights_.resize(static_cast<size_t>(row_out));
  is_wide_ = wide;
  offsets_ = std::move(new_offsets);

  const int64_t piece = std::max({kPieceEntries, 4 * cols_, (out + kPieces - 1) / kPieces});
  pieces_.assign(1, 0);
  for (int64_t row = 0; row < row_out; ++row)
    if (offsets_[static_cast<size_t>(row) + 1] - offsets_[static_cast<size_t>(pieces_.back())] >= piece)
      pieces_.push_back(row + 1);
  if (pieces_.back() != row_out || pieces_.size() == 1) pieces_.push_back(row_out);
}

void NewtonRows::prune(const float* plan, double level) {
  const float smallest = static_cast<float>(std::exp(-level));
  const std::vector<int64_t> offsets = std::move(offsets_);
  compact(offsets, [&](int64_t k) { return plan[k] > smallest; });
}

}  // namespace sela
