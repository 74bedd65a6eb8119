// Misaligned accesses, null pointers and indices outside of an array's type: the compiler checks them in the kernels
// (-fsanitize=alignment,null,bounds) and calls these functions, which make them errors of the runner. They stand in for
// UBSan's library, whose interface this is, in the variants that are not linked with it.
#include <cstdint>
#include <cstring>

#include "simt/runner.h"

using sela::simt::fail;

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, information;
  char name[1];  // null-terminated, in quotes
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, access;
};

struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};

/// Here the compiler gives the whole path, everywhere else the path from the root of the project (CMakeLists.txt).
sela::simt::Place place(const SourceLocation& location) {
  constexpr size_t kRoot = sizeof(SELA_SOURCE_DIR) - 1;
  const bool inside = std::strncmp(location.file, SELA_SOURCE_DIR, kRoot) == 0;
  return {location.file + (inside ? kRoot : 0), static_cast<int>(location.line)};
}

}  // namespace

extern "C" {

[[noreturn, gnu::visibility("hidden")]] void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data,
                                                                                   uintptr_t address) {
  if (address == 0) fail(place(data->location), "an access through a null pointer of type %s", data->type->name);
  fail(place(data->location), "a misaligned access: %s needs an address that is a multiple of %d, found %#zx",
       data->type->name, 1 << data->log_alignment, static_cast<size_t>(address));
}

[[noreturn, gnu::visibility("hidden")]] void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data,
                                                                                uintptr_t index) {
  fail(place(data->location), "index %lld is outside of %s", static_cast<long long>(index), data->array->name);
}

}  // extern "C"
