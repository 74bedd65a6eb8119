#pragma once
#include <memory>

namespace sela {

/// An object of the calling thread, made at its first use and destroyed with the thread.  Throws std::bad_alloc.
///
/// What a library that is opened at run time holds per thread is allocated when a thread first touches it, and glibc
/// ends the process where that fails.  So only a pointer is held, which takes next to nothing, and what it points to
/// comes from operator new.  (The part that every thread has from its beginning would be safer still, but it is small,
/// and one such variable would have all of the library's in it: with the CUDA runtime's it could not be loaded.)
template <class T>
T& of_thread() {
  static thread_local std::unique_ptr<T> mine;
  if (mine == nullptr) mine.reset(new T());
  return *mine;
}

}  // namespace sela
