// The reader's threads and its queue of batches; reader_image.cpp has what is done for an image.
#include "sela/reader.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "cpu/reader_cache.h"
#include "cpu/reader_image.h"
#include "sela/parallel.h"

namespace sela {
namespace {

/// Signals are the main thread's business: threads started while this lives do not get any.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

ReadBatch::ReadBatch(ReadRequest wanted) : request(std::move(wanted)), places_(request.arena.bytes), left_(count()) {}

void ArenaPlaces::wait_for_turn(int64_t i) {
  constexpr int kLooks = 200;  // a small image is over in microseconds, less than it takes to fall asleep
  for (int look = 0; look < kLooks; ++look) {
    if (turn_.load(std::memory_order_acquire) == i) return;
    std::this_thread::yield();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  waiting_.fetch_add(1);
  moved_.wait(lock, [this, i] { return turn_.load() == i; });
  waiting_.fetch_sub(1);
}

int64_t ArenaPlaces::take(int64_t i, int64_t bytes) {
  wait_for_turn(i);
  const bool fits = bytes > 0 && bytes <= bytes_ - used_;
  const int64_t place = fits ? used_ : -1;
  if (fits) used_ += bytes;
  turn_.store(i + 1);
  if (waiting_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    moved_.notify_all();
  }
  return place;
}

/// Shared by the reader and its threads.  A forked child leaks it: its threads are not there, and its mutex may be held
/// by one of them.
struct Reader::State {
  ReaderOptions options;
  std::shared_ptr<IndexStore> store;
  SmallImages small;
  const pid_t process = getpid();

  mutable std::mutex mutex;
  std::condition_variable submitted;
  std::deque<std::shared_ptr<ReadBatch>> queue;
  bool closing = false;
  std::vector<std::thread> threads;
  int started = 0;

  State(ReaderOptions o, std::shared_ptr<IndexStore> s)
      : options(std::move(o)), store(std::move(s)), small(options.cache_bytes) {}

  /// The batch that has images left, or nullptr to end.
  std::shared_ptr<ReadBatch> next(const ReadBatch* used_up) {
    std::unique_lock<std::mutex> lock(mutex);
    if (!queue.empty() && queue.front().get() == used_up) queue.pop_front();
    submitted.wait(lock, [this] { return closing || !queue.empty(); });
    return queue.empty() ? nullptr : queue.front();
  }

  /// Reads image i.  Nothing may leave a thread: where there is no memory for a reader of images, the image's status
  /// says so, and the next one tries again.
  void read(std::optional<ImageReader>& images, const ReadRequest& request, int64_t i, ArenaTurn& turn) noexcept {
    try {
      if (!images) images.emplace(options, store.get(), small);
    } catch (...) {  // std::bad_alloc: nothing else is thrown
      request.error[i] = 0;
      request.height[i] = request.width[i] = 0;
      request.status[i] = static_cast<uint8_t>(ReadStatus::no_memory);
      return;
    }
    images->read(request, i, turn);
  }

  void work() {
#ifdef __linux__
    pthread_setname_np(pthread_self(), "sela-read");
#endif
    std::optional<ImageReader> images;
    std::shared_ptr<ReadBatch> batch;
    while ((batch = next(batch.get())) != nullptr) {
      const int64_t count = batch->count();
      for (int64_t i; (i = batch->next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
        {
          ArenaTurn turn(batch->places(), i);
          if (batch->cancelled_.load(std::memory_order_relaxed)) {
            batch->request.status[i] = static_cast<uint8_t>(ReadStatus::cancelled);
          } else {
            read(images, batch->request, i, turn);
          }
        }
        if (batch->left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          const std::lock_guard<std::mutex> lock(batch->mutex_);
          batch->finished_.notify_all();
        }
      }
    }
  }
};

Reader::Reader(ReaderOptions options, std::shared_ptr<IndexStore> store)
    : state_(new State(std::move(options), std::move(store))) {
  const int wanted = state_->options.threads > 0 ? state_->options.threads : available_threads();
  const SignalsBlocked blocked;
  try {
    state_->threads.reserve(static_cast<size_t>(wanted));
    for (int i = 0; i < wanted; ++i) state_->threads.emplace_back([this_state = state_] { this_state->work(); });
  } catch (...) {
    if (state_->threads.empty()) {  // else the ones that did start do the work
      delete state_;
      throw;
    }
  }
  state_->started = static_cast<int>(state_->threads.size());
}

Reader::~Reader() {
  if (elsewhere()) return;
  close();
  delete state_;
}

std::shared_ptr<ReadBatch> Reader::submit(ReadRequest request) {
  auto batch = std::make_shared<ReadBatch>(std::move(request));
  if (batch->count() == 0) return closed() ? nullptr : batch;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    if (state_->closing) return nullptr;
    state_->queue.push_back(batch);
  }
  state_->submitted.notify_all();
  return batch;
}

bool Reader::wait(ReadBatch& batch, int milliseconds) {
  if (batch.done()) return true;
  std::unique_lock<std::mutex> lock(batch.mutex_);
  return batch.finished_.wait_for(lock, std::chrono::milliseconds(milliseconds), [&batch] { return batch.done(); });
}

void Reader::close() {
  if (elsewhere()) return;
  std::vector<std::thread> threads;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->closing = true;
    for (const std::shared_ptr<ReadBatch>& batch : state_->queue) batch->cancel();
    threads.swap(state_->threads);
  }
  state_->submitted.notify_all();
  for (std::thread& thread : threads) thread.join();
}

bool Reader::closed() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->closing;
}

bool Reader::elsewhere() const {
  return getpid() != state_->process;
}

int Reader::threads() const {
  return state_->started;
}

const ReaderOptions& Reader::options() const {
  return state_->options;
}

int64_t Reader::cached_bytes() const {
  return state_->small.bytes();
}

}  // namespace sela
