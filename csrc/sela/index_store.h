#pragma once
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace sela {

/// What is known of one image.
enum class StoredKind : uint16_t {
  nothing = 0,
  index = 1,  ///< the bytes of write_jpeg_index
  other = 2,  ///< eight bytes, jpeg_digest: the entropy-coded data are damaged, another decoder has to look at it
};

/// Which state of which image a record is of.
struct StoredKey {
  int64_t image = 0;     ///< number, [0, 2^40)
  uint64_t size = 0;     ///< of the file, bytes
  int64_t modified = 0;  ///< nanoseconds since 1970, 0 for bytes in memory
};

// Note [The file of an index store]
//
// Little-endian.  Head, 16 bytes: "SELAJPIX", u32 version (1), u32 CRC-32 of the 12 bytes before it.  Then records,
// each at a multiple of 8, one behind the other:
//    0  "SJRE"
//    4  u32  CRC-32 of bytes 8 .. 47
//    8  u64  number of the image
//   16  u64  size of its file, bytes
//   24  i64  modification time of its file, nanoseconds since 1970; 0 for bytes in memory
//   32  u32  bytes of payload, n
//   36  u16  kind: 1 checkpoint index, 2 verdict "for another decoder"
//   38  u16  0
//   40  u32  CRC-32 of the payload
//   44  u32  0
//   48  payload, then zeros up to a multiple of 8
// The last record of an image counts.  Payloads: kind 1, the bytes of a checkpoint index (csrc/cpu/jpeg_index.cpp);
// kind 2, u64 jpeg_digest of the file.  CRC-32 is that of zlib.
//
// Files are read with pread, not mapped: a file that somebody cuts short is then an error of one call instead of a
// SIGBUS, and pages of a few GB of indexes do not count as memory of this process.

/// Checkpoint indexes by image number, in append-only files.  All functions may be called from any thread; none throws
/// but std::bad_alloc, and none waits for a disk but to read and write.
class IndexStore {
 public:
  /// folder: jpeg_index-<rank>.bin in it is this store's own, to which records are appended, if no other process has
  /// it; jpeg_index-*.bin are read.  "": an unnamed temporary file.  Problems are kept in failure().
  IndexStore(const std::string& folder, int rank);
  ~IndexStore();
  IndexStore(const IndexStore&) = delete;
  IndexStore& operator=(const IndexStore&) = delete;

  /// What is stored of this state of the image; the payload (room is kept) unless it is nothing.
  /// known: whether there is a record of the image at all, be it of another state or damaged.
  StoredKind find(const StoredKey& key, std::vector<uint8_t>& payload, bool* known);

  /// Appends a record; where one of the image is there already, only with `replace`.
  void add(const StoredKey& key, StoredKind kind, const uint8_t* payload, size_t size, bool replace);

  /// Takes in what other processes have written to their files meanwhile.
  void refresh();
  /// Ends writing and reading; the store is empty then.
  void close();

  int64_t size() const;         ///< images
  int64_t bytes() const;        ///< of all files
  std::string failure() const;  ///< why records are not kept (in the folder) any more; "" = they are
  bool writes() const;          ///< whether records are kept, in the folder or in an unnamed file
  std::string path() const;     ///< of the file that is written to; "" = an unnamed one, or none

 private:
  struct File {
    std::string name;
    int descriptor = -1;
    int64_t end = 0;  ///< behind the last good record
  };
  struct Slot {
    uint64_t image = 0;  ///< plus 1; 0 = free
    uint64_t place = 0;  ///< file number << 48 | offset
    uint64_t payload = 0;
  };
  static constexpr size_t kMostFiles = 1024;

  bool open_own(const std::string& folder, int rank);
  bool open_unnamed();
  void read_others();
  void scan(size_t number);
  void scan_files();
  void put(uint64_t image, size_t file, int64_t offset, uint32_t payload);
  const Slot* slot_of(uint64_t image) const;
  void fail(const std::string& what);
  bool elsewhere() const;

  mutable std::mutex mutex_;
  std::string folder_, own_name_, failure_;
  std::vector<File> files_;  ///< the first one is written to
  std::vector<Slot> slots_;
  size_t used_ = 0;
  bool writes_ = false;
  int process_ = 0;
  int64_t replaced_ = 0;
};

}  // namespace sela
