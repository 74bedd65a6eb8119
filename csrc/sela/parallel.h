#pragma once
#include <cstdint>
#include <functional>

namespace sela {

/// Number of processors this process may run on (its affinity mask), at least 1.
int available_threads();

/// Calls body(block, worker) once for every block in [0, blocks), on up to `threads` threads (<= 0: all available).
/// Blocks are handed out one by one, so which worker gets which block is not fixed: a body must not let its result
/// depend on `worker`, except for scratch memory.  worker is in [0, min(threads, blocks)).
/// The first exception thrown by a body is rethrown here, after all threads have stopped.
void parallel_blocks(int64_t blocks, int threads, const std::function<void(int64_t block, int worker)>& body);

}  // namespace sela
