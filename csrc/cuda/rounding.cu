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

int64_t size_of(LogitsType type) {
  return type == LogitsType::float64 ? 8 : type == LogitsType::float32 ? 4 : 2;
}

Arguments arguments_of(const CandidateSearch& search, const DevicePrices& prices) {
  if (search.cols < 1 || search.cols > std::numeric_limits<int32_t>::max() - kCandidateGroups ||
      search.stride < search.cols)
    throw std::invalid_argument("candidates: expected 1 <= cols <= stride, cols < 2^31, found cols " +
                                std::to_string(search.cols) + ", stride " + std::to_string(search.stride));
  if (search.type == LogitsType::fixed16)
    throw std::invalid_argument("candidates: expected logits in floating point, found fixed16");
  Arguments a{};
  a.logits = search.logits;
  a.cols = search.cols;
  a.stride = search.stride;
  const int64_t size = size_of(search.type);
  a.aligned =
      reinterpret_cast<uintptr_t>(search.logits) % 16 == 0 && (search.rows == 1 || search.stride * size % 16 == 0);
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

template <class T>
void launch_margins(const Arguments& a, void* stream) {
  using namespace rounding_cuda;
  launch_rows("margin_rows_kernel", margin_rows_kernel<T>, a, stream);
  constexpr int64_t kPer = int64_t{kListThreads} * kMarginColumns;
  const dim3 grid(static_cast<unsigned>(a.slabs), static_cast<unsigned>((a.cols + kPer - 1) / kPer));
  launch("margin_columns_kernel", margin_columns_kernel<T>, grid, kListThreads, 0, stream, a);
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
  using namespace rounding_cuda;
  switch (search.type) {
    case LogitsType::float64:
      return launch_rows("lists_kernel", lists_kernel<double>, a, stream);
    case LogitsType::float16:
      return launch_rows("lists_kernel", lists_kernel<__half>, a, stream);
    case LogitsType::bfloat16:
      return launch_rows("lists_kernel", lists_kernel<__nv_bfloat16>, a, stream);
    default:
      return launch_rows("lists_kernel", lists_kernel<float>, a, stream);
  }
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
  if (a.places <= 0) {
    a.slabs = 0;
  } else {
    switch (search.type) {
      case LogitsType::float64:
        launch_margins<double>(a, stream);
        break;
      case LogitsType::float16:
        launch_margins<__half>(a, stream);
        break;
      case LogitsType::bfloat16:
        launch_margins<__nv_bfloat16>(a, stream);
        break;
      default:
        launch_margins<float>(a, stream);
    }
  }
  launch("margin_merge_kernel", margin_merge_kernel,
         dim3(static_cast<unsigned>((a.cols + kListThreads - 1) / kListThreads)), kListThreads, 0, stream, a);
}

}  // namespace sela
