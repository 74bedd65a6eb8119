// Launchers of the candidate search and of the margins of columns.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/rounding_kernels.cuh"
#include "sela/rounding.h"

namespace sela {
namespace {

using rounding_cuda::Arguments;

/// Partial results of the margins may take so many numbers: 64 MB; and there are at most so many slabs of rows.
constexpr int64_t kMarginNumbers = 16 << 20, kMostSlabs = 256;

/// Calls body(T()) with the type of the logits.
template <class Body>
void with_type(LogitsType type, Body body) {
  switch (type) {
    case LogitsType::float64:
      return body(double());
    case LogitsType::float16:
      return body(__half());
    case LogitsType::bfloat16:
      return body(__nv_bfloat16());
    case LogitsType::float32:
      return body(float());
    default:
      throw std::invalid_argument("candidates: expected logits in floating point, found fixed16");
  }
}

template <class T>
bool is_aligned(const CandidateSearch& search) {
  const bool base = reinterpret_cast<uintptr_t>(search.logits) % 16 == 0;
  return base && search.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

Arguments arguments_of(const CandidateSearch& search, const DevicePrices& prices) {
  if (search.cols < 1 || search.cols > std::numeric_limits<int32_t>::max() - kCandidateGroups ||
      search.stride < search.cols)
    throw std::invalid_argument("candidates: expected 1 <= cols <= stride, cols < 2^31, found cols " +
                                std::to_string(search.cols) + ", stride " + std::to_string(search.stride));
  Arguments a{};
  a.logits = search.logits;
  a.cols = search.cols;
  a.stride = search.stride;
  a.scale = search.scale;
  a.prices = prices.prices;
  a.label_prices = prices.label_prices;
  a.bonus = prices.bonus;
  a.labels = search.labels;
  a.selected = search.selected;
  a.places = search.selected_count;
  a.first_row = search.first_row;
  a.count = search.count;
  a.slack = search.slack;
  a.floor = search.floor;
  a.tie = search.tie;
  return a;
}

/// A warp per row, on as many blocks as are resident at once.
template <class Kernel>
void launch_rows(const char* name, Kernel kernel, const Arguments& a, void* stream) {
  using namespace rounding_cuda;
  const int64_t at_once = int64_t{std::max(1, resident_blocks(name, kernel, kListThreads, 0))} * multiprocessors();
  const int64_t wanted = (a.places + kWarps - 1) / kWarps;
  launch(name, kernel, dim3(static_cast<unsigned>(std::min(wanted, at_once))), kListThreads, 0, stream, a);
}

int64_t margin_slabs(int64_t places, int64_t cols) {
  const int64_t room = kMarginNumbers / (kColumnMargins * cols);
  const int64_t wanted = (places + rounding_cuda::kMarginRows - 1) / rounding_cuda::kMarginRows;
  return std::max<int64_t>(1, std::min({wanted, room, kMostSlabs}));
}

}  // namespace

void find_candidates_cuda(const CandidateSearch& search, const DevicePrices& prices, const CandidateLists& lists,
                          void* stream) {
  if (search.count < 1 || search.count > search.cols)
    throw std::invalid_argument("candidates: expected 1 .. cols candidates, found " + std::to_string(search.count));
  Arguments a = arguments_of(search, prices);
  if (a.places <= 0) return;
  a.columns = lists.columns;
  a.values = lists.values;
  a.found = lists.found;
  a.regret = lists.regret;
  with_type(search.type, [&](auto zero) {
    using T = decltype(zero);
    a.aligned = is_aligned<T>(search);
    launch_rows("lists_kernel", rounding_cuda::lists_kernel<T>, a, stream);
  });
}

int64_t column_margins_workspace_cuda(int64_t places, int64_t cols) {
  const int64_t numbers = std::max<int64_t>(places, 1);
  return numbers * static_cast<int64_t>(sizeof(double) + sizeof(float)) +
         margin_slabs(places, cols) * kColumnMargins * cols * static_cast<int64_t>(sizeof(float));
}

void column_margins_cuda(const CandidateSearch& search, const DevicePrices& prices, float* margins, void* scratch,
                         void* stream) {
  using namespace rounding_cuda;
  Arguments a = arguments_of(search, prices);
  a.slabs = margin_slabs(a.places, a.cols);
  a.slab_rows = (a.places + a.slabs - 1) / a.slabs;
  const int64_t numbers = std::max<int64_t>(a.places, 1);
  a.bases = static_cast<double*>(scratch);
  a.bests = reinterpret_cast<float*>(a.bases + numbers);
  a.smallest = a.bests + numbers;
  a.margins = margins;
  if (a.places <= 0) a.slabs = 0;
  with_type(search.type, [&](auto zero) {
    using T = decltype(zero);
    if (a.places <= 0) return;
    a.aligned = is_aligned<T>(search);
    launch_rows("margin_rows_kernel", margin_rows_kernel<T>, a, stream);
    constexpr int64_t kPer = int64_t{kListThreads} * kMarginColumns;
    const dim3 grid(static_cast<unsigned>(a.slabs), static_cast<unsigned>((a.cols + kPer - 1) / kPer));
    launch("margin_columns_kernel", margin_columns_kernel<T>, grid, kListThreads, 0, stream, a);
  });
  launch("margin_merge_kernel", margin_merge_kernel,
         dim3(static_cast<unsigned>((a.cols + kListThreads - 1) / kListThreads)), kListThreads, 0, stream, a);
}

}  // namespace sela
