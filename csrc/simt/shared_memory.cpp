// Never instrumented, like all of the runner, and free of memset and memcmp, which sanitizers watch all the same.
#include "simt/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "simt/sanitizer.h"

namespace sela::simt {
namespace {

constexpr uint64_t kPoison8 = 0x0001000100010001ull * kPoison;

unsigned char poison_at(const unsigned char* p) {
  return static_cast<unsigned char>(reinterpret_cast<uintptr_t>(p) % 2 == 0 ? kPoison & 0xFF : kPoison >> 8);
}

bool is_poison(const unsigned char* p, const unsigned char* end) {
  for (; p < end && reinterpret_cast<uintptr_t>(p) % 8 != 0; ++p)
    if (*p != poison_at(p)) return false;
  for (; p + 8 <= end; p += 8)
    if (*reinterpret_cast<const uint64_t*>(p) != kPoison8) return false;
  for (; p < end; ++p)
    if (*p != poison_at(p)) return false;
  return true;
}

}  // namespace

void SharedMemory::open(size_t dynamic_size) {
  constexpr size_t kGuard = 4096;
  if (base_ == nullptr) {
    void* memory = mmap(nullptr, kArena + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(memory) + kGuard;
  }
  // Mapped afresh for every block, so that no sanitizer takes the shared memory of two blocks for the same.
  mmap(base_, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  sanitizer::hide(base_, kArena);
  count_ = 0;
  static_size_ = 0;
  poisoned_ = base_;
  end_ = dynamic_end_ = static_cast<unsigned char*>(dynamic()) + dynamic_size;
  poison_up_to(end_ + kGap);
  sanitizer::show(dynamic(), dynamic_size);
}

void SharedMemory::close() {
  if (base_ != nullptr) sanitizer::show(base_, kArena);
}

void SharedMemory::poison_up_to(const unsigned char* end) {
  for (; poisoned_ < end; poisoned_ += 8) *reinterpret_cast<uint64_t*>(poisoned_) = kPoison8;
}

void* SharedMemory::object(const SharedName& name, size_t size, size_t alignment) {
  for (int i = 0; i < count_; ++i)
    if (objects_[i].name == &name) return objects_[i].begin;
  const size_t dynamic_size = static_cast<size_t>(dynamic_end_ - static_cast<unsigned char*>(dynamic()));
  static_size_ = (static_size_ + alignment - 1) / alignment * alignment + size;
  if (static_size_ > kMaxStaticShared)
    fail(name.place,
         "%s brings static shared memory to %zu bytes, a block has at most 48 KB; take dynamic shared memory",
         name.name, static_size_);
  if (static_size_ + dynamic_size > kMaxDynamicShared)
    fail(name.place, "%s brings shared memory to %zu bytes, a block has at most 227 KB", name.name,
         static_size_ + dynamic_size);
  if (count_ == kMaxObjects)
    fail(name.place, "%s is one object of shared memory more than the runner allows", name.name);
  // Aligned as its type needs and no further, so that wider accesses than the type promises are found.
  const uintptr_t step = std::max<size_t>(alignment, 16);
  uintptr_t at = (reinterpret_cast<uintptr_t>(end_) + kGap + step - 1) / step * step;
  if (alignment < 16) at += alignment;
  unsigned char* begin = reinterpret_cast<unsigned char*>(at);
  end_ = begin + size;
  poison_up_to(end_ + kGap);
  sanitizer::show(begin, size);
  objects_[count_++] = {&name, begin, end_};
  return begin;
}

const char* SharedMemory::damaged() const {
  const char* before = "dynamic shared memory";
  if (!is_poison(base_, base_ + kDynamicAt)) return before;
  const unsigned char* gap = dynamic_end_;
  for (int i = 0; i < count_; ++i) {
    if (!is_poison(gap, objects_[i].begin)) return before;
    gap = objects_[i].end;
    before = objects_[i].name->name;
  }
  return is_poison(gap, gap + kGap) ? nullptr : before;
}

}  // namespace sela::simt
