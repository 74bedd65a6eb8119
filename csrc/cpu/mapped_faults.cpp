// A handler of SIGBUS. It may interrupt any code at any place, also the allocator, so nothing here takes memory or
// locks: open, read, write, pause, and _exit are allowed in a handler (POSIX, signal-safety).
#include "sela/mapped_faults.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sela {
namespace {

constexpr int kStatus = 3;  // of DataError
constexpr std::size_t kLongestPath = 4096;

/// Looks in the text of /proc/self/maps, byte by byte, for the path of the map that an address lies in.
class MapSearch {
 public:
  explicit MapSearch(std::uintptr_t address) : address_(address) {}

  /// Whether the line that ends with this byte is the one.
  bool take(char byte) {
    if (byte == '\n') {
      const bool found = start_ <= address_ && address_ < end_;
      if (!found) {
        start_ = end_ = length_ = 0;
        part_ = kStart;
      }
      return found;
    }
    if (part_ == kPath || (part_ == kFields && byte == '/')) {
      part_ = kPath;
      if (length_ < kLongestPath) path_[length_++] = byte < ' ' || byte == '\x7f' ? '?' : byte;
    } else if (part_ == kStart && byte == '-') {
      part_ = kEnd;
    } else if (part_ == kEnd && byte == ' ') {
      part_ = kFields;
    } else if (part_ != kFields) {
      std::uintptr_t& number = part_ == kStart ? start_ : end_;
      number = number * 16 + static_cast<std::uintptr_t>(byte <= '9' ? byte - '0' : byte - 'a' + 10);
    }
    return false;
  }

  const char* path() const { return path_; }
  std::size_t length() const { return length_; }

 private:
  enum Part { kStart, kEnd, kFields, kPath };

  std::uintptr_t address_;
  std::uintptr_t start_ = 0, end_ = 0;
  Part part_ = kStart;
  char path_[kLongestPath] = {};
  std::size_t length_ = 0;
};

void say(const char* text, std::size_t length) {
  while (length > 0) {
    const ssize_t done = write(STDERR_FILENO, text, length);
    if (done <= 0) return;
    text += done;
    length -= static_cast<std::size_t>(done);
  }
}

void say(const char* text) {
  say(text, std::strlen(text));
}

void say_file(std::uintptr_t address) {
  const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  MapSearch search(address);
  char block[512];
  for (ssize_t count = 0; maps >= 0 && (count = read(maps, block, sizeof block)) > 0;) {
    for (ssize_t i = 0; i < count; ++i) {
      if (!search.take(block[i])) continue;
      if (search.length() == 0) break;
      say(search.path(), search.length());
      return;
    }
  }
  say("a mapped file");
}

std::atomic_flag telling = ATOMIC_FLAG_INIT;

void tell(int, siginfo_t* fault, void*) {
  while (telling.test_and_set()) pause();  // another thread has met the same, and ends the process
  say("sela: error: data: ");
  say_file(reinterpret_cast<std::uintptr_t>(fault->si_addr));
  say(" was read, and could not be: it became shorter while it was in use, or its disk failed; put it back as it was, "
      "then resume\n");
  _exit(kStatus);
}

}  // namespace

bool mapped_faults_begin() {
  struct sigaction found;
  if (sigaction(SIGBUS, nullptr, &found) != 0 || (found.sa_flags & SA_SIGINFO) || found.sa_handler != SIG_DFL) {
    return false;
  }
  struct sigaction ours;
  std::memset(&ours, 0, sizeof ours);
  ours.sa_sigaction = tell;
  ours.sa_flags = SA_SIGINFO;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGBUS, &ours, nullptr) == 0;
}

void mapped_faults_end() {
  signal(SIGBUS, SIG_DFL);
}

}  // namespace sela
