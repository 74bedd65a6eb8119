// The SIMT runner, test-only: executes CUDA kernels thread by thread on the CPU, so that they can be checked, and
// sanitised, on a machine without a GPU.  Kernels see it through cuda/gpu.cuh (simt/simt.h), launchers through
// cuda/launch.h (simt/launch.h); this header is what lies behind both.
//
// The blocks of a grid run one after another, in any order.  In a block every thread is a fiber that runs until it
// waits: at a barrier, for its warp, or because it left.  Then another thread goes on, which one is up to the schedule.
// A kernel that depends on who goes first therefore gives different results for different schedules.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace sela::simt {

/// A kernel did what CUDA forbids or leaves undefined. The message starts with "file:line: " of the kernel's code.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A line of a kernel's source. Functions of the kernels' surface take file and line as defaulted arguments, which the
/// compiler fills in where they are called.
struct Place {
  const char* file = "";
  int line = 0;
};

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;               // threads of a block
constexpr size_t kMaxStaticShared = 48 * 1024;  // bytes of static shared memory of a block
constexpr size_t kUnasked = 48 * 1024;    // both kinds together, of a kernel that asks for no more (cuda/launch.h)
constexpr size_t kMaxShared = 64 * 1024;  // both kinds together, of one that asks: the least of all devices (sm_75)
constexpr uint16_t kPoison = 0xFFFE;      // shared memory that nobody wrote: NaN as half, bfloat16, float, double
constexpr uint64_t kNoValue = 0xFFFFFFFFFFFFFFFE;  // a shuffle from a lane that took no part: NaN too

// ---- Launches.

/// Runs body(data) as every thread of the grid; returns when all have left, throws Error when one went wrong.
void run_grid(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(const void*),
              const void* data);

/// 0: blocks, warps and lanes in order.  Any other seed: blocks shuffled, warps in random turns, lanes shuffled.
void set_schedule(uint64_t seed);

/// What the launchers believe of the device.
void set_device(int multiprocessors, int resident_blocks);
int multiprocessors();
int resident_blocks();

/// "plain", "thread" or "address": the sanitizer this build is made for.
const char* variant();

/// Counts over all launches of this process.
struct Statistics {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t threads = 0;
  int64_t switches = 0;         ///< times a thread went on
  int64_t barriers = 0;         ///< __syncthreads() of whole blocks
  int64_t warp_operations = 0;  ///< __syncwarp, shuffles and votes of whole groups of lanes
  int64_t dynamic_shared = 0;   ///< not a count: bytes of it that a block of the latest launch had
};
Statistics statistics();

// ---- What a thread of a running kernel may ask for.

/// Ends the launch with an Error of this thread at this place; printf's format. Does not return.
[[noreturn]] void fail(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

/// Waits until all threads of the block wait at this very place.
void barrier(Place place);

enum class Operation { syncwarp, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot };

/// Waits until all lanes in `mask` wait for the same operation with the same mask. Returns what lane `source` gave as
/// its value (kNoValue when it is not in the mask), or for a ballot the lanes whose value is not 0.
uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int source, Place place);

/// This thread's number in its warp.
int lane();

/// Names one declaration of shared memory in a kernel.
struct SharedName {
  const char* name;
  Place place;
};

/// The block's object of this name: poisoned when a thread of the block asks for it first.
void* shared_object(const SharedName& name, size_t size, size_t alignment);
void* dynamic_shared();

/// An asynchronous copy of 16 bytes that has been asked for, but has not landed.
struct Copy {
  void* to;
  const void* from;
};
void add_copy(Copy copy, Place place);
void commit_copies();
/// The next copy that has to land before at most `groups` committed ones are under way; false: none.
bool next_landing(int groups, Copy* copy);

}  // namespace sela::simt
