// What the sanitizers have to be told about fibers and shared memory: one set of functions, three forms. The scheduler
// itself is never instrumented: ThreadSanitizer would take the order in which it runs the threads for synchronisation.
#pragma once
#include <cstddef>
#include <cstdlib>

#include "simt/fiber.h"

#if defined(SELA_SIMT_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}

namespace sela::simt::sanitizer {

constexpr const char* kVariant = "thread";
constexpr bool kFreshStacks = true;  // a stack used again would look like memory shared by two threads
constexpr unsigned kUnordered = 1;   // switching alone puts nothing in order

// ThreadSanitizer's side of the fibers. Those of a launch must be distinct: were one destroyed or taken again before
// the launch ends, it would be forgotten that a later block's accesses are not in order with its own. Making one costs
// 0.25 ms and 0.8 MB, so they are kept for the next launch. A launch of more threads is put in order every 2,048 (about
// 8,000 are possible).
constexpr int kMaxFibers = 2048;
inline void* fibers[kMaxFibers];
inline int made = 0, used = 0;

inline bool has_room(int threads) {
  return used + threads <= kMaxFibers;
}

/// All that `self`, the caller, did comes before all that the fiber will do.
inline void create(Fiber& self, Fiber& fiber) {
  if (used == made) {
    fibers[made++] = __tsan_create_fiber(0);
  } else {
    void* tag = std::malloc(sizeof(void*));
    __tsan_release(tag);
    __tsan_switch_to_fiber(fibers[used], kUnordered);
    __tsan_acquire(tag);
    __tsan_switch_to_fiber(self.thread_sanitizer, kUnordered);
    std::free(tag);
  }
  fiber.thread_sanitizer = fibers[used++];
}

/// All that the fibers of this launch did comes before all that `self` will do.  Given up are those of a launch that
/// failed: they hold the calls that they were in.
inline void join(Fiber& self, bool give_up) {
  void* tag = std::malloc(sizeof(void*));
  for (int i = 0; i < used; ++i) {
    __tsan_switch_to_fiber(fibers[i], kUnordered);
    __tsan_release(tag);
  }
  __tsan_switch_to_fiber(self.thread_sanitizer, kUnordered);
  __tsan_acquire(tag);
  std::free(tag);
  for (; give_up && made > 0; --made) __tsan_destroy_fiber(fibers[made - 1]);
  used = 0;
}

inline void adopt(Fiber& fiber) {
  fiber.thread_sanitizer = __tsan_get_current_fiber();
}
inline void before_switch(Fiber&, Fiber& to, bool) {
  __tsan_switch_to_fiber(to.thread_sanitizer, kUnordered);
}
inline void after_switch(Fiber&, Fiber&) {}

/// All that the members did comes before all that they will do.  The tag lives for one meeting: were it used again, a
/// member that runs on to the next one would seem to be in order with those that have not left this one.
inline void meet(Fiber& self, Fiber* const* members, int count) {
  void* tag = std::malloc(sizeof(void*));
  for (int i = 0; i < count; ++i) {
    __tsan_switch_to_fiber(members[i]->thread_sanitizer, kUnordered);
    __tsan_release(tag);
  }
  for (int i = 0; i < count; ++i) {
    __tsan_switch_to_fiber(members[i]->thread_sanitizer, kUnordered);
    __tsan_acquire(tag);
  }
  __tsan_switch_to_fiber(self.thread_sanitizer, kUnordered);
  std::free(tag);
}

inline void hide(void*, size_t) {}
inline void show(void*, size_t) {}

}  // namespace sela::simt::sanitizer

#elif defined(SELA_SIMT_ADDRESS)
extern "C" {
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_stack, size_t* old_size);
}

namespace sela::simt::sanitizer {

constexpr const char* kVariant = "address";
constexpr bool kFreshStacks = true;  // a thread that was given up leaves its frames marked

inline void create(Fiber&, Fiber&) {}
inline void adopt(Fiber&) {}
inline void before_switch(Fiber& from, Fiber& to, bool last) {
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_size);
}
inline void after_switch(Fiber& now, Fiber& before) {
  const void* stack = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(now.fake_stack, &stack, &size);
  before.stack = static_cast<char*>(const_cast<void*>(stack));
  before.stack_size = size;
}
inline void meet(Fiber&, Fiber* const*, int) {}
inline bool has_room(int) {
  return true;
}
inline void join(Fiber&, bool) {}

/// Any access to hidden memory is an error, until it is shown again.
inline void hide(void* memory, size_t size) {
  __asan_poison_memory_region(memory, size);
}
inline void show(void* memory, size_t size) {
  __asan_unpoison_memory_region(memory, size);
}

}  // namespace sela::simt::sanitizer

#else
namespace sela::simt::sanitizer {

constexpr const char* kVariant = "plain";
constexpr bool kFreshStacks = false;

inline void create(Fiber&, Fiber&) {}
inline void adopt(Fiber&) {}
inline void before_switch(Fiber&, Fiber&, bool) {}
inline void after_switch(Fiber&, Fiber&) {}
inline void meet(Fiber&, Fiber* const*, int) {}
inline bool has_room(int) {
  return true;
}
inline void join(Fiber&, bool) {}
inline void hide(void*, size_t) {}
inline void show(void*, size_t) {}

}  // namespace sela::simt::sanitizer
#endif
