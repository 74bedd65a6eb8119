// Threads for the CPU kernels: started per call, so nothing has to survive a fork or an interpreter's exit.
#include "sela/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace sela {

int available_threads() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

void parallel_blocks(int64_t blocks, int threads, const std::function<void(int64_t, int)>& body) {
  if (blocks <= 0) return;
  if (threads <= 0) threads = available_threads();
  const int workers = static_cast<int>(std::min<int64_t>(threads, blocks));

  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&](int worker) {
    try {
      for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) body(block, worker);
    } catch (...) {
      next.store(blocks, std::memory_order_relaxed);  // nobody starts another block
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };

  std::vector<std::thread> pool;
  pool.reserve(workers - 1);
  try {
    for (int worker = 1; worker < workers; ++worker) pool.emplace_back(work, worker);
  } catch (...) {
    // The system refuses more threads: the ones that did start, and this one, do the work.
  }
  work(0);
  for (std::thread& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace sela
