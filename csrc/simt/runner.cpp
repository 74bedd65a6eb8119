// The scheduler: who runs next, who may go on, what went wrong.
//
// It is never instrumented, and keeps clear of the heap and of the standard library's templates while threads run: the
// linker could give it an instrumented copy of them.
#include "simt/runner.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "simt/fiber.h"
#include "simt/sanitizer.h"
#include "simt/shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sela::simt {
namespace {

enum class Wait { nothing, barrier, warp, left };

constexpr uint64_t kMaxBlocks = 1 << 20;
constexpr int kMaxCopies = 64;  // asynchronous copies of a thread under way at a time

struct Thread {
  Fiber fiber;
  int number;  // in its block
  uint3 index;
  Wait wait;
  Place at;      // where it waits
  Place before;  // where it waited before that

  // Its part in a warp operation.
  Operation operation;
  unsigned mask;
  int source;
  uint64_t value;  // given, and when the operation is done, received

  // Asynchronous copies first .. end are under way. Group g is the g-th that was committed; `groups` is still open.
  Copy copies[kMaxCopies];
  int copy_groups[kMaxCopies];
  int copy_first, copy_end, groups;
};

// ---- The launch that is running; one at a time.

constexpr const char* kHostCode = "host code";

struct Runner {
  std::mutex one_launch;
  uint64_t seed = 0, random = 0;
  int multiprocessors = 4, resident_blocks = 2;
  Statistics statistics;

  const char* kernel = kHostCode;
  void (*body)(const void*);
  const void* data;
  int threads, warps;
  Fiber scheduler;
  Thread* now;  // null: the scheduler runs
  Thread all[kMaxThreads];
  int ready[kMaxThreads / kWarpSize];  // threads of each warp that wait for nothing
  Stacks stacks;
  SharedMemory shared;
  char message[1024];  // of a thread that failed; empty: none did
};

Runner runner;

unsigned random_below(unsigned count) {  // splitmix64
  uint64_t z = runner.random += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return static_cast<unsigned>((z ^ z >> 31) % count);
}

void shuffle(unsigned* items, unsigned count) {
  for (unsigned i = count; i > 1; --i) {
    const unsigned j = random_below(i), item = items[i - 1];
    items[i - 1] = items[j];
    items[j] = item;
  }
}

const char* operation_name(Operation operation) {
  static const char* const names[] = {"__syncwarp",      "__shfl_sync",
                                      "__shfl_up_sync",  "__shfl_down_sync",
                                      "__shfl_xor_sync", "a vote (__ballot_sync, __any_sync, __all_sync)"};
  return names[static_cast<int>(operation)];
}

void write_message(const Thread* thread, Place place, const char* format, va_list arguments) {
  int used = 0;
  const auto add = [&used](int length) { used = std::min<int>(used + length, sizeof(runner.message) - 1); };
  if (place.line > 0) add(std::snprintf(runner.message, sizeof(runner.message), "%s:%d: ", place.file, place.line));
  add(std::snprintf(runner.message + used, sizeof(runner.message) - used, "%s", runner.kernel));
  if (thread != nullptr)
    add(std::snprintf(runner.message + used, sizeof(runner.message) - used, ", block (%u, %u, %u), thread (%u, %u, %u)",
                      blockIdx.x, blockIdx.y, blockIdx.z, thread->index.x, thread->index.y, thread->index.z));
  add(std::snprintf(runner.message + used, sizeof(runner.message) - used, ": "));
  std::vsnprintf(runner.message + used, sizeof(runner.message) - used, format, arguments);
}

/// The scheduler's way to fail: run_block returns as soon as there is a message.
[[gnu::format(printf, 3, 4)]] void report(const Thread& thread, Place place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_message(&thread, place, format, arguments);
  va_end(arguments);
}

bool is_same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void describe(Place place, char* text, size_t size) {
  if (place.line > 0)
    std::snprintf(text, size, "%s:%d", place.file, place.line);
  else
    std::snprintf(text, size, "%s", place.file);
}

// ---- Threads.

constexpr Place kStart = {"the start of the kernel", 0};
constexpr Place kEnd = {"the end of the kernel", 0};

/// The running thread waits; returns when the scheduler lets it go on.
void give_control(Wait wait, Place place) {
  Thread& self = *runner.now;
  self.wait = wait;
  self.before = self.at;
  self.at = place;
  switch_fiber(self.fiber, runner.scheduler, wait == Wait::left);
}

void thread_main() {
  arrive(runner.now->fiber, runner.scheduler);
  runner.body(runner.data);
  give_control(Wait::left, kEnd);
}

void take_turn(Thread& thread) {
  --runner.ready[thread.number / kWarpSize];
  ++runner.statistics.switches;
  threadIdx = thread.index;
  runner.now = &thread;
  switch_fiber(runner.scheduler, thread.fiber);
  runner.now = nullptr;
  if (runner.message[0] != '\0') return;
  if (const char* name = runner.shared.damaged()) {
    char from[300], to[300];
    describe(thread.before, from, sizeof(from));
    describe(thread.at, to, sizeof(to));
    report(thread, thread.wait == Wait::left ? thread.before : thread.at,
           "wrote outside of shared memory, next to %s, between %s and %s", name, from, to);
  }
}

void let_go(Thread& thread) {
  thread.wait = Wait::nothing;
  ++runner.ready[thread.number / kWarpSize];
}

// ---- Warps.

/// The warp's lanes that there are: the last warp of a block may be short.
unsigned lanes_of(int warp) {
  const int lanes = std::min(kWarpSize, runner.threads - warp * kWarpSize);
  return lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
}

/// Whether all lanes that this one waits for wait for the same.
bool is_complete(const Thread* warp, const Thread& thread, unsigned members) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (members >> lane & 1)
      if (warp[lane].wait != Wait::warp || warp[lane].mask != thread.mask || warp[lane].operation != thread.operation)
        return false;
  return true;
}

/// Hands out the results of one complete operation.
void complete(Thread* warp, unsigned members) {
  uint64_t given[kWarpSize], ballot = 0;
  Fiber* fibers[kWarpSize];
  int count = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    given[lane] = kNoValue;
    if (!(members >> lane & 1)) continue;
    given[lane] = warp[lane].value;
    if (given[lane] != 0) ballot |= uint64_t{1} << lane;
    fibers[count++] = &warp[lane].fiber;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(members >> lane & 1)) continue;
    warp[lane].value = warp[lane].operation == Operation::ballot ? ballot : given[warp[lane].source];
    let_go(warp[lane]);
  }
  // Shuffles and votes put no memory accesses in order: CUDA says so.
  if (warp[__builtin_ctz(members)].operation == Operation::syncwarp) sanitizer::meet(runner.scheduler, fibers, count);
  ++runner.statistics.warp_operations;
}

void complete_operations(int number) {
  Thread* warp = runner.all + number * kWarpSize;
  unsigned todo = lanes_of(number);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(todo >> lane & 1) || warp[lane].wait != Wait::warp) continue;
    const unsigned members = warp[lane].mask & lanes_of(number);
    if (!is_complete(warp, warp[lane], members)) continue;
    complete(warp, members);
    todo &= ~members;
  }
}

/// Every lane of the warp that waits for nothing runs until it waits for something.
void run_warp(int number) {
  unsigned order[kWarpSize];
  const int lanes = std::min(kWarpSize, runner.threads - number * kWarpSize);
  for (int i = 0; i < lanes; ++i) order[i] = static_cast<unsigned>(i);
  if (runner.seed != 0) shuffle(order, static_cast<unsigned>(lanes));
  for (int i = 0; i < lanes && runner.message[0] == '\0'; ++i) {
    Thread& thread = runner.all[number * kWarpSize + static_cast<int>(order[i])];
    if (thread.wait == Wait::nothing) take_turn(thread);
  }
  complete_operations(number);
}

/// The next warp to run; -1: none can. In order, a warp runs as far as it can; otherwise turns are drawn, half of them
/// for the same warp again, so that some warps run far ahead.
int choose_warp(int last) {
  int candidates[kMaxThreads / kWarpSize], count = 0;
  for (int warp = 0; warp < runner.warps; ++warp)
    if (runner.ready[warp] != 0) candidates[count++] = warp;
  if (count == 0) return -1;
  const bool again = last >= 0 && runner.ready[last] != 0;
  if (runner.seed == 0) return again ? last : candidates[0];
  return again && random_below(2) == 0 ? last : candidates[random_below(static_cast<unsigned>(count))];
}

// ---- Blocks.

/// Nothing can run. All threads wait at one barrier, and go on: true. Otherwise says what is wrong.
bool pass_barrier() {
  const Thread* first = nullptr;
  const Thread* gone = nullptr;
  int waiting = 0;
  for (int i = 0; i < runner.threads; ++i) {
    const Thread& thread = runner.all[i];
    if (thread.wait == Wait::left) gone = &thread;
    if (thread.wait != Wait::barrier) continue;
    ++waiting;
    if (first == nullptr) first = &thread;
    if (!is_same(thread.at, first->at)) {
      report(*first, first->at, "barrier divergence: waits at __syncthreads here, thread (%u, %u, %u) at %s:%d",
             thread.index.x, thread.index.y, thread.index.z, thread.at.file, thread.at.line);
      return false;
    }
  }
  if (gone != nullptr) {
    report(*first, first->at,
           "barrier divergence: waits at __syncthreads with %d of %d threads, thread (%u, %u, %u) has left the kernel",
           waiting, runner.threads, gone->index.x, gone->index.y, gone->index.z);
    return false;
  }
  Fiber* fibers[kMaxThreads];
  for (int i = 0; i < runner.threads; ++i) {
    fibers[i] = &runner.all[i].fiber;
    let_go(runner.all[i]);
  }
  sanitizer::meet(runner.scheduler, fibers, runner.threads);
  ++runner.statistics.barriers;
  return true;
}

/// Nothing can run, and `thread` waits for its warp: says for whom in vain.
void report_stuck_lane(const Thread& thread) {
  const int warp = thread.number / kWarpSize;
  const unsigned members = thread.mask & lanes_of(warp);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(members >> lane & 1)) continue;
    const Thread& other = runner.all[warp * kWarpSize + lane];
    if (other.wait == Wait::left) {
      report(thread, thread.at, "%s with mask %#010x names lane %d, which has left the kernel",
             operation_name(thread.operation), thread.mask, lane);
      return;
    }
    if (other.wait == Wait::barrier) {
      report(thread, thread.at, "deadlock: %s with mask %#010x names lane %d, which waits at __syncthreads, %s:%d",
             operation_name(thread.operation), thread.mask, lane, other.at.file, other.at.line);
      return;
    }
    if (other.mask != thread.mask || other.operation != thread.operation) {
      report(thread, thread.at,
             "lanes disagree: lane %d waits at %s with mask %#010x, lane %d at %s with mask %#010x, %s:%d",
             thread.number % kWarpSize, operation_name(thread.operation), thread.mask, lane,
             operation_name(other.operation), other.mask, other.at.file, other.at.line);
      return;
    }
  }
}

void run_block() {
  int warp = -1;
  while (runner.message[0] == '\0') {
    warp = choose_warp(warp);
    if (warp >= 0) {
      run_warp(warp);
      continue;
    }
    bool all_left = true;
    const Thread* stuck = nullptr;
    for (int i = 0; i < runner.threads; ++i) {
      all_left = all_left && runner.all[i].wait == Wait::left;
      if (stuck == nullptr && runner.all[i].wait == Wait::warp) stuck = &runner.all[i];
    }
    if (all_left) return;
    if (stuck != nullptr)
      report_stuck_lane(*stuck);
    else
      pass_barrier();
  }
}

void prepare_threads() {
  if (sanitizer::kFreshStacks || runner.stacks.count() < runner.threads) runner.stacks.map(runner.threads);
  std::fill(runner.ready, runner.ready + runner.warps, 0);
  for (int i = 0; i < runner.threads; ++i) {
    Thread& thread = runner.all[i];
    const unsigned number = static_cast<unsigned>(i);
    thread.number = i;
    thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
    thread.at = kStart;
    thread.copy_first = thread.copy_end = thread.groups = 0;
    prepare(thread.fiber, runner.stacks.at(i), thread_main);
    sanitizer::create(runner.scheduler, thread.fiber);
    let_go(thread);
  }
}

void check_shape(dim3 grid, dim3 block, size_t dynamic_shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const char* wrong = nullptr;
  if (threads == 0 || threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64)
    wrong = "expected a block of 1 to 1024 threads, at most 1024 x 1024 x 64";
  else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    wrong = "expected a grid of at least one block, at most 2147483647 x 65535 x 65535";
  else if (uint64_t{grid.x} * grid.y * grid.z > kMaxBlocks)
    wrong = "the runner is for small grids, expected at most 1048576 blocks";
  else if (dynamic_shared > kMaxShared)
    wrong = "expected at most 64 KB of dynamic shared memory, all that sm_75 has";
  if (wrong == nullptr) return;
  char found[160];
  std::snprintf(found, sizeof(found), ", found grid %u x %u x %u, block %u x %u x %u, %zu bytes", grid.x, grid.y,
                grid.z, block.x, block.y, block.z, dynamic_shared);
  throw Error(std::string(runner.kernel) + ": " + wrong + found);
}

}  // namespace

// ---- The runner's interface.

void run_grid(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(const void*),
              const void* data) {
  const std::lock_guard<std::mutex> lock(runner.one_launch);
  runner.kernel = name;
  check_shape(grid, block, dynamic_shared);
  runner.body = body;
  runner.data = data;
  runner.message[0] = '\0';
  runner.random = runner.seed;
  gridDim = grid;
  blockDim = block;
  runner.threads = static_cast<int>(block.x * block.y * block.z);
  runner.warps = (runner.threads + kWarpSize - 1) / kWarpSize;
  sanitizer::adopt(runner.scheduler);

  const unsigned blocks = grid.x * grid.y * grid.z;
  const std::unique_ptr<unsigned[]> order(new unsigned[blocks]);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (runner.seed != 0) shuffle(order.get(), blocks);

  ++runner.statistics.launches;
  runner.statistics.dynamic_shared = static_cast<int64_t>(dynamic_shared);
  for (unsigned i = 0; i < blocks && runner.message[0] == '\0'; ++i) {
    blockIdx = {order[i] % grid.x, order[i] / grid.x % grid.y, order[i] / (grid.x * grid.y)};
    if (!sanitizer::has_room(runner.threads)) sanitizer::join(runner.scheduler, false);
    runner.shared.open(dynamic_shared);
    prepare_threads();
    run_block();
    ++runner.statistics.blocks;
    runner.statistics.threads += runner.threads;
  }
  const bool failed = runner.message[0] != '\0';
  sanitizer::join(runner.scheduler, failed);
  runner.shared.close();
  runner.kernel = kHostCode;
  if (failed) throw Error(runner.message);
}

void set_schedule(uint64_t seed) {
  runner.seed = seed;
}

void set_device(int multiprocessors, int resident_blocks) {
  runner.multiprocessors = multiprocessors;
  runner.resident_blocks = resident_blocks;
}

int multiprocessors() {
  return runner.multiprocessors;
}

int resident_blocks() {
  return runner.resident_blocks;
}

const char* variant() {
  return sanitizer::kVariant;
}

Statistics statistics() {
  return runner.statistics;
}

void fail(Place place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_message(runner.now, place, format, arguments);
  va_end(arguments);
  if (runner.now == nullptr) throw Error(runner.message);
  give_control(Wait::left, place);
  std::abort();  // nobody switches back to a thread that failed
}

void barrier(Place place) {
  give_control(Wait::barrier, place);
}

uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int source, Place place) {
  Thread& self = *runner.now;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source = source;
  if (!(mask >> lane() & 1))
    fail(place, "lane %d is not in its own mask %#010x of %s", lane(), mask, operation_name(operation));
  give_control(Wait::warp, place);
  return self.value;
}

int lane() {
  return runner.now->number % kWarpSize;
}

void* shared_object(const SharedName& name, size_t size, size_t alignment) {
  return runner.shared.object(name, size, alignment);
}

void* dynamic_shared() {
  return runner.shared.dynamic();
}

void add_copy(Copy copy, Place place) {
  Thread& self = *runner.now;
  if (self.copy_end == kMaxCopies) {  // those that have landed make room
    const int under_way = self.copy_end - self.copy_first;
    for (int i = 0; i < under_way; ++i) {
      self.copies[i] = self.copies[self.copy_first + i];
      self.copy_groups[i] = self.copy_groups[self.copy_first + i];
    }
    self.copy_first = 0;
    self.copy_end = under_way;
  }
  if (self.copy_end == kMaxCopies)
    fail(place, "more than %d asynchronous copies of a thread are under way; wait for some", kMaxCopies);
  self.copies[self.copy_end] = copy;
  self.copy_groups[self.copy_end++] = self.groups;
}

void commit_copies() {
  ++runner.now->groups;
}

bool next_landing(int groups, Copy* copy) {
  Thread& self = *runner.now;
  if (self.copy_first == self.copy_end || self.copy_groups[self.copy_first] >= self.groups - groups) return false;
  *copy = self.copies[self.copy_first++];
  return true;
}

}  // namespace sela::simt
