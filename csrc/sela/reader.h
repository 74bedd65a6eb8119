#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "sela/augment.h"
#include "sela/dispatch.h"
#include "sela/index_store.h"
#include "sela/planes.h"

// JPEG files to augmented batches: opening, reading, decoding what is needed, and the fused pass, one image after the
// other in one worker's memory, by threads that live as long as the reader.  Or, into an arena, all but the fused pass.

namespace sela {

/// Images of at most so many pixels in both directions are decoded whole, to RGB, and kept.
constexpr int64_t kSmallSide = 104;
/// Files that are larger are not read.
constexpr int64_t kMostFileBytes = int64_t{1} << 30;

enum class ReadStatus : uint8_t {
  ok = 0,
  other = 1,        ///< not for this decoder: another format, another kind of JPEG, or something wrong with it
  unreadable = 2,   ///< cannot be opened or read; errno says why
  not_regular = 3,  ///< a folder, a pipe, a socket or a device
  too_large = 4,    ///< the header claims more than max_pixels, or the file has more than kMostFileBytes
  no_memory = 5,
  cancelled = 6,  ///< the reader was closed before it came to the image
  no_room = 7,    ///< what the image needs does not fit into the arena any more
};

/// What becomes of an image.
struct ReadView {
  AugmentOptions options;
  EffectOptions effects;
};

struct ReaderOptions {
  std::vector<ReadView> views;
  int threads = 0;       ///< <= 0: all processors
  int32_t channels = 3;  ///< 1: only grey files are read
  bool exact = false;    ///< as in PlanarOptions
  bool exif = false;     ///< turn and mirror images as their EXIF data say
  bool reduce = true;    ///< decode at 1/2, 1/4 or 1/8 where the box is large: see reduction_for
  PixelType type = PixelType::float32;
  bool channels_last = false;
  int64_t max_pixels = 0;                    ///< height * width that a header may claim
  int64_t cache_bytes = int64_t{256} << 20;  ///< room for decoded small images
  int64_t small_side = kSmallSide;           ///< what is small
  Isa isa = Isa::generic;
};

/// The largest of 1, 2, 4, 8 at which a box still has at least twice the output's size in both directions.
int reduction_for(const AugmentOptions& options, const AugmentParameters& parameters, int64_t height, int64_t width);

/// Encoded bytes, or the path of a file that holds them.
struct ReadItem {
  const char* path = nullptr;  ///< zero-terminated; nullptr: data
  const uint8_t* data = nullptr;
  size_t size = 0;
  const uint8_t* index = nullptr;  ///< bytes of a checkpoint index, or nullptr
  size_t index_size = 0;
};

/// Where one view goes.
struct ReadTarget {
  void* out = nullptr;                      ///< [count, C, S, S] as AugmentOutput says
  AugmentParameters* parameters = nullptr;  ///< [count], what was drawn
  AugmentEffects* effects = nullptr;        ///< [count], or nullptr where the view draws none
  uint32_t view = 0;                        ///< its number, < 256
};

/// Images begin at multiples of so many bytes of an arena.
constexpr int64_t kArenaAlignment = 16;

/// Where decoded samples go from which somebody else makes the views.  Files of three channels as their planes, small
/// and turned ones as planes of R, G and B.
struct ReadArena {
  uint8_t* memory = nullptr;
  int64_t bytes = 0;
  /// [views, count], nullptr: no arena, views are made.  Views may share samples.  Undefined where an image is not ok.
  PlanarImage* images = nullptr;
  int64_t* offset = nullptr;  ///< [count] where an image's samples begin in the memory; -1: it has no place
  int64_t* wanted = nullptr;  ///< [count] bytes that it needs, a multiple of kArenaAlignment; 0 where not known
};

/// One batch.  All memory is the caller's, and must live until the batch is done.
struct ReadRequest {
  std::vector<ReadItem> items;
  const int64_t* index = nullptr;   ///< [count] image numbers, [0, 2^40)
  const int64_t* keys = nullptr;    ///< [count] what is drawn goes by, [0, 2^40); nullptr: the image numbers
  std::vector<ReadTarget> targets;  ///< one per view
  ReadArena arena;                  ///< if there is one, `out` of the targets is not looked at
  uint64_t seed = 0;
  uint32_t epoch = 0;
  uint8_t* status = nullptr;  ///< [count] ReadStatus
  int32_t* error = nullptr;   ///< [count] errno of ReadStatus::unreadable, else 0
  /// [count] pixels, as augmented (turned); 0 where not known: ReadStatus::other is then the image's fate whatever is
  /// drawn for it, else that of the boxes at hand
  int32_t* height = nullptr;
  int32_t* width = nullptr;
};

/// Who has which place in an arena: what fits, in the order of the images.  So places do not depend on threads; an
/// image waits until those before it have said what they need, which they do before they are decoded.
class ArenaPlaces {
 public:
  explicit ArenaPlaces(int64_t bytes) : bytes_(bytes) {}
  /// The place of image i, or -1.  Every image takes one, if of 0 bytes, and images are begun in their order.
  int64_t take(int64_t i, int64_t bytes);

 private:
  void wait_for_turn(int64_t i);

  const int64_t bytes_;
  int64_t used_ = 0;  ///< of the image whose turn it is
  std::atomic<int64_t> turn_{0};
  std::atomic<int> waiting_{0};
  std::mutex mutex_;
  std::condition_variable moved_;
};

/// The turn of one image, which passes with it if it takes no place.
class ArenaTurn {
 public:
  /// places: nullptr where there is no arena.
  ArenaTurn(ArenaPlaces* places, int64_t i) : places_(places), i_(i) {}
  ~ArenaTurn() {
    if (places_ != nullptr) places_->take(i_, 0);
  }
  ArenaTurn(const ArenaTurn&) = delete;
  ArenaTurn& operator=(const ArenaTurn&) = delete;
  /// Once.
  int64_t take(int64_t bytes) {
    ArenaPlaces* const places = places_;
    places_ = nullptr;
    return places->take(i_, bytes);
  }

 private:
  ArenaPlaces* places_;
  const int64_t i_;
};

/// A batch on its way.
class ReadBatch {
 public:
  explicit ReadBatch(ReadRequest wanted);
  const ReadRequest request;
  int64_t count() const { return static_cast<int64_t>(request.items.size()); }
  bool done() const { return left_.load(std::memory_order_acquire) == 0; }
  /// Images that nobody has begun are not read any more.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  friend class Reader;
  ArenaPlaces* places() { return request.arena.images != nullptr ? &places_ : nullptr; }
  ArenaPlaces places_;
  std::atomic<int64_t> next_{0}, left_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
};

/// Threads that take images of batches one by one, in the order in which they were submitted.
/// Whatever an image is, its status says so; nothing throws but std::bad_alloc in the calling thread.
/// After a fork, the child can only destroy it.
class Reader {
 public:
  /// store: checkpoint indexes, or nullptr; may be shared.
  /// Throws std::system_error when not one thread can be started.
  Reader(ReaderOptions options, std::shared_ptr<IndexStore> store);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  /// nullptr: closed.
  std::shared_ptr<ReadBatch> submit(ReadRequest request);
  /// Waits until the batch is done, or for so many milliseconds; whether it is done.
  static bool wait(ReadBatch& batch, int milliseconds);
  /// What is begun is finished, the rest cancelled; threads are joined.
  void close();
  bool closed() const;
  /// Whether this is not the process that made it.
  bool elsewhere() const;
  int threads() const;
  const ReaderOptions& options() const;
  /// Bytes of decoded small images that are kept.
  int64_t cached_bytes() const;

 private:
  struct State;
  State* state_;
};

}  // namespace sela
