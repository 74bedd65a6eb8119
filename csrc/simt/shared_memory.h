// Shared memory of the running block:
//
//   guard page | gap | dynamic shared memory | gap | object | gap | object | gap | ... | guard page
//
// All of it is filled with poison.  Poison in a gap must stay: a thread that changes it writes past an object.
#pragma once
#include <cstddef>
#include <cstdint>

#include "simt/runner.h"

namespace sela::simt {

class SharedMemory {
 public:
  void open(size_t dynamic_size);  ///< for a new block
  void close();                    ///< after the last one
  void* object(const SharedName& name, size_t size, size_t alignment);
  void* dynamic() const { return base_ + kDynamicAt; }
  /// Name of the object beside a gap that has been written to; null: all is well.
  const char* damaged() const;

 private:
  static constexpr size_t kGap = 128;
  static constexpr size_t kDynamicAt = kGap + 16;  // a multiple of 16, and of no more, as CUDA promises
  static constexpr int kMaxObjects = 64;
  static constexpr size_t kArena = 512 * 1024;
  static_assert(kArena > kMaxDynamicShared + kMaxStaticShared + (kMaxObjects + 2) * (2 * kGap), "all must fit");

  struct Object {
    const SharedName* name;
    unsigned char *begin, *end;
  };
  void poison_up_to(const unsigned char* end);

  unsigned char* base_ = nullptr;
  unsigned char* dynamic_end_ = nullptr;
  unsigned char* end_ = nullptr;       // of the last object
  unsigned char* poisoned_ = nullptr;  // so far
  size_t static_size_ = 0;
  Object objects_[kMaxObjects];
  int count_ = 0;
};

}  // namespace sela::simt
