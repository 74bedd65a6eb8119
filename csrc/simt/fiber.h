// Fibers: threads of control that take turns on one processor, each on a stack of its own.
#pragma once
#include <cstddef>

namespace sela::simt {

struct Fiber {
  void* resume_at = nullptr;  ///< stack pointer, while it does not run
  char* stack = nullptr;      ///< lowest address
  size_t stack_size = 0;
  void* thread_sanitizer = nullptr;  ///< ThreadSanitizer's and AddressSanitizer's notes about it
  void* fake_stack = nullptr;
};

/// Stacks of the same size, one mapping, a guard page below each: running out of a stack is a fault, not a mystery.
class Stacks {
 public:
  static constexpr size_t kSize = 128 * 1024;
  ~Stacks() { unmap(); }
  void map(int count);  ///< fresh ones; the former are gone
  void unmap();
  char* at(int i) const;
  int count() const { return count_; }

 private:
  char* base_ = nullptr;
  int count_ = 0;
};

/// Lets `fiber` call entry() on this stack when it is switched to first. entry never returns.
void prepare(Fiber& fiber, char* stack, void (*entry)());

/// Suspends `from`, which is running, and goes on with `to`; returns when somebody switches to `from` again.
/// last: nobody will.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

/// To be called first by an entry function: `now` has been switched to from `before`.
void arrive(Fiber& now, Fiber& before);

}  // namespace sela::simt
