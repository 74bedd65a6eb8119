// Stacks and the switch between them.
#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "simt/sanitizer.h"

#if defined(__x86_64__)

// Saves the registers that a call must keep, exchanges the stacks, and takes up the other's. swapcontext() would do,
// but asks the kernel for the signal mask each time, which takes ten times as long as all else.
extern "C" void sela_simt_switch(void** from, void* to);
asm(R"(
.text
.type sela_simt_switch, @function
.hidden sela_simt_switch
.globl sela_simt_switch
sela_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sela_simt_switch, .-sela_simt_switch
)");

namespace {

/// The stack as sela_simt_switch expects it: six registers, then where to go on.
void* first_frame(char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // entry's return address: the end of every back trace
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

}  // namespace

#else
#include <ucontext.h>

namespace {

void sela_simt_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

/// The context lies on top of its own stack.
void* first_frame(char* stack, size_t size, void (*entry)()) {
  const size_t usable = (size - sizeof(ucontext_t)) / 64 * 64;
  ucontext_t* context = new (stack + usable) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = usable;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace

#endif

namespace sela::simt {
namespace {

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

void Stacks::map(int count) {
  unmap();
  const size_t step = kSize + page_size();
  void* memory =
      mmap(nullptr, step * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(base_ + step * i, page_size(), PROT_NONE);
  sanitizer::show(base_, step * count);
}

void Stacks::unmap() {
  if (base_ != nullptr) munmap(base_, (kSize + page_size()) * count_);
  base_ = nullptr;
  count_ = 0;
}

char* Stacks::at(int i) const {
  return base_ + (kSize + page_size()) * i + page_size();
}

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_size = Stacks::kSize;
  fiber.fake_stack = nullptr;
  fiber.resume_at = first_frame(stack, Stacks::kSize, entry);
}

void switch_fiber(Fiber& from, Fiber& to, bool last) {
  sanitizer::before_switch(from, to, last);
  sela_simt_switch(&from.resume_at, to.resume_at);
  arrive(from, to);
}

void arrive(Fiber& now, Fiber& before) {
  sanitizer::after_switch(now, before);
}

}  // namespace sela::simt
