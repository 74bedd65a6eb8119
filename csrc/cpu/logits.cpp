// Driver of the conversion of logits to 16 bits on the CPU.
#include "sela/logits.h"

#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/logits_loops.h"
#include "sela/parallel.h"

namespace sela {
namespace {

using RowFunction = int64_t (*)(const StoreLogits&, int64_t);

RowFunction row_function(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return &avx512::store_row;
  if (isa == Isa::avx2) return &avx2::store_row;
#endif
  (void)isa;
  return &generic::store_row;
}

}  // namespace

void check_store(const StoreLogits& store) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("store_logits: " + what); };
  if (store.rows < 0 || store.cols < 1 || store.stride < store.cols)
    refuse("expected rows >= 0 and stride >= cols >= 1, found " + std::to_string(store.rows) + " x " +
           std::to_string(store.cols) + ", stride " + std::to_string(store.stride));
  if (!(store.lambda > 0.0) || !std::isfinite(store.lambda))
    refuse("expected a finite lambda > 0, found " + std::to_string(store.lambda));
  if (store.type == LogitsType::fixed16 || store.kind == LogitsType::float32 || store.kind == LogitsType::float64)
    refuse("expected logits in floating point, and a kind of 16 bits");
  if (store.values_stride != 0 && store.values_stride < store.cols)
    refuse("expected values_stride >= cols, found " + std::to_string(store.values_stride) + " < " +
           std::to_string(store.cols));
}

int64_t store_logits_cpu(const StoreLogits& store, int threads, Isa isa) {
  check_store(store);
  std::atomic<int64_t> saturated{0};
  const RowFunction store_row = row_function(isa);
  const int64_t blocks = (store.rows + kSinkhornRows - 1) / kSinkhornRows;
  parallel_blocks(blocks, threads, [&](int64_t block, int) {
    int64_t count = 0;
    const int64_t first = block * kSinkhornRows;
    for (int64_t row = first; row < store.rows && row < first + kSinkhornRows; ++row) count += store_row(store, row);
    saturated.fetch_add(count, std::memory_order_relaxed);
  });
  return saturated.load();
}

}  // namespace sela
