#pragma once
#include <cstddef>
#include <cstdint>

namespace sela {

/// Bytes before the file proper: they choose instruction set, scale, box and what is done to the index.
constexpr size_t kFuzzHead = 12;

}  // namespace sela

/// One execution: libFuzzer's entrance, which driver.cpp calls as well.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
