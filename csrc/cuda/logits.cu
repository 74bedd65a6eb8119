// Launcher of the conversion of logits to 16 bits.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/logits_kernels.cuh"
#include "sela/logits.h"

namespace sela {
namespace {

using namespace logits_cuda;

template <class T>
void launch_store(const StoreArguments& a, void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0 &&
                       (a.rows == 1 || a.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
  const auto kernel = aligned ? store_kernel<T, true> : store_kernel<T, false>;
  const int64_t per_block = a.one_warp ? kStoreThreads / kWarp : 1;
  const int64_t at_once =
      static_cast<int64_t>(std::max(1, resident_blocks("store_kernel", kernel, kStoreThreads, 0))) * multiprocessors();
  const int64_t blocks = std::min((a.rows + per_block - 1) / per_block, at_once);
  launch("store_kernel", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kStoreThreads), 0, stream, a);
}

}  // namespace

void store_logits_cuda(const StoreLogits& store, int64_t* saturated, void* stream) {
  check_store(store);
  if (store.rows == 0) return;
  StoreArguments a{};
  a.logits = store.logits;
  a.rows = store.rows;
  a.cols = store.cols;
  a.stride = store.stride;
  a.values_stride = store.values_stride != 0 ? store.values_stride : store.cols;
  a.lambda = store.lambda;
  a.values = store.values;
  a.maxima = store.maxima;
  a.saturated = reinterpret_cast<unsigned long long*>(saturated);
  a.kind = static_cast<int>(store.kind);
  a.one_warp = store.cols <= kStoreWarpColumns;
  a.wide_stores = reinterpret_cast<uintptr_t>(a.values) % 16 == 0 && a.values_stride % kStoreColumns == 0;
  switch (store.type) {
    case LogitsType::float64:
      return launch_store<double>(a, stream);
    case LogitsType::float16:
      return launch_store<__half>(a, stream);
    case LogitsType::bfloat16:
      return launch_store<__nv_bfloat16>(a, stream);
    default:
      return launch_store<float>(a, stream);
  }
}

}  // namespace sela
