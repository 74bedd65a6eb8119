#pragma once
#include <cstdint>

#include "sela/logits.h"

// Between the driver (logits.cpp) and its loop bodies (logits_loops.cpp, one copy per instruction set).

namespace sela {

#define SELA_DECLARE_STORE_ROW(isa)                         \
  namespace isa {                                           \
  int64_t store_row(const StoreLogits& store, int64_t row); \
  }
SELA_DECLARE_STORE_ROW(generic)
#if defined(__x86_64__)
SELA_DECLARE_STORE_ROW(avx2)
SELA_DECLARE_STORE_ROW(avx512)
#endif
#undef SELA_DECLARE_STORE_ROW

}  // namespace sela
