#pragma once
#include <memory>

namespace sela {

/// An object of the calling thread, made at its first use and destroyed with the thread.  Throws std::bad_alloc.
///
/// What a library that is opened at run time holds per thread is allocated when a thread first touches it, and glibc
/// ends the process where that fails.  So only a pointer is held, in the part that every thread has from its beginning
/// (model initial-exec; that part is small, and shared by all libraries), and what it points to comes from operator
/// new.
template <class T>
T& of_thread() {
  __attribute__((tls_model("initial-exec"))) static thread_local std::unique_ptr<T> mine;
  if (mine == nullptr) mine.reset(new T());
  return *mine;
}

}  // namespace sela
