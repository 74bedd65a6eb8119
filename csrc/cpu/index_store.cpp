// Checkpoint indexes in append-only files: see Note [The file of an index store].
#include "sela/index_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace sela {
namespace {

constexpr char kMagic[8] = {'S', 'E', 'L', 'A', 'J', 'P', 'I', 'X'};
constexpr char kRecordMagic[4] = {'S', 'J', 'R', 'E'};
constexpr uint64_t kVersion = 1;
constexpr int64_t kHead = 16, kRecord = 48;
/// The largest picture that a header can claim has 2^24 groups of MCUs of 11 bytes.
constexpr uint32_t kMostPayload = 256 << 20;
constexpr char kPrefix[] = "jpeg_index-", kSuffix[] = ".bin";

uint32_t crc32(const uint8_t* data, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c & 1u) != 0 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = 0xFFFFFFFFu;
  for (size_t i = 0; i < size; ++i) crc = table[(crc ^ data[i]) & 255u] ^ (crc >> 8);
  return crc ^ 0xFFFFFFFFu;
}

void put_number(uint8_t* to, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(value >> (8 * i));
}

uint64_t number(const uint8_t* from, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(from[i]) << (8 * i);
  return value;
}

/// Reads exactly `size` bytes; false at the end of the file or an error.
bool read_at(int descriptor, uint8_t* to, size_t size, int64_t offset) {
  while (size > 0) {
    const ssize_t got = pread(descriptor, to, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got;
    size -= static_cast<size_t>(got);
    offset += got;
  }
  return true;
}

bool write_at(int descriptor, const uint8_t* from, size_t size, int64_t offset) {
  while (size > 0) {
    const ssize_t put = pwrite(descriptor, from, size, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      if (put == 0) errno = ENOSPC;
      return false;
    }
    from += put;
    size -= static_cast<size_t>(put);
    offset += put;
  }
  return true;
}

int64_t length_of(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) ? static_cast<int64_t>(status.st_size) : -1;
}

void head_of_file(uint8_t* head) {
  std::memcpy(head, kMagic, sizeof(kMagic));
  put_number(head + 8, kVersion, 4);
  put_number(head + 12, crc32(head, 12), 4);
}

bool is_head(const uint8_t* head) {
  uint8_t expected[kHead];
  head_of_file(expected);
  return std::memcmp(head, expected, kHead) == 0;
}

struct RecordHead {
  StoredKey key;
  StoredKind kind;
  uint32_t payload, crc;
  int64_t whole() const { return kRecord + (static_cast<int64_t>(payload) + 7) / 8 * 8; }
};

bool read_record_head(const uint8_t* p, RecordHead& out) {
  if (std::memcmp(p, kRecordMagic, 4) != 0 || number(p + 4, 4) != crc32(p + 8, kRecord - 8)) return false;
  const uint64_t image = number(p + 8, 8);
  out.key = {static_cast<int64_t>(image), number(p + 16, 8), static_cast<int64_t>(number(p + 24, 8))};
  out.payload = static_cast<uint32_t>(number(p + 32, 4));
  out.kind = static_cast<StoredKind>(number(p + 36, 2));
  out.crc = static_cast<uint32_t>(number(p + 40, 4));
  return image < uint64_t{1} << 40 && out.payload <= kMostPayload;
}

uint64_t spread(uint64_t x) {
  x *= 0x9E3779B97F4A7C15u;
  return x ^ (x >> 32);
}

std::string reason(const std::string& what, int error) {
  return what + ": " + std::strerror(error);
}

}  // namespace

IndexStore::IndexStore(const std::string& folder, int rank) : folder_(folder), process_(getpid()) {
  writes_ = (!folder.empty() && open_own(folder, rank)) || open_unnamed();
  if (!folder.empty()) read_others();
  scan_files();
}

IndexStore::~IndexStore() {
  close();
}

/// A fork shares the descriptors, and may have copied a mutex that is held: there, the store is empty.
bool IndexStore::elsewhere() const {
  return getpid() != process_;
}

void IndexStore::fail(const std::string& what) {
  writes_ = false;
  if (failure_.empty()) failure_ = what;
}

bool IndexStore::open_own(const std::string& folder, int rank) {
  own_name_ = kPrefix + std::to_string(rank) + kSuffix;
  const std::string path = folder + "/" + own_name_;
  const int descriptor = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0666);
  if (descriptor < 0) {
    fail(reason(path, errno));
    return false;
  }
  if (length_of(descriptor) < 0) {
    ::close(descriptor);
    fail(path + ": not a regular file");
    return false;
  }
  if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    ::close(descriptor);
    fail(path + ": in use by another process");
    return false;
  }
  // A file that is none of ours is left alone; an empty one, or one of which only a part of the head was written, is
  // begun.
  uint8_t head[kHead], expected[kHead];
  head_of_file(expected);
  const int64_t length = length_of(descriptor);
  const size_t there = static_cast<size_t>(std::min(length, kHead));
  const bool readable = read_at(descriptor, head, there, 0);
  if (!readable || std::memcmp(head, expected, there) != 0) {
    ::close(descriptor);
    fail(path + ": not a file of checkpoint indexes of this version");
    return false;
  }
  if (length < kHead && (ftruncate(descriptor, 0) != 0 || !write_at(descriptor, expected, kHead, 0))) {
    const int error = errno;
    ::close(descriptor);
    fail(reason(path, error));
    return false;
  }
  files_.push_back({own_name_, descriptor, kHead});
  return true;
}

bool IndexStore::open_unnamed() {
  own_name_.clear();
  const char* chosen = std::getenv("TMPDIR");
  const std::string folder = chosen != nullptr && *chosen != '\0' ? chosen : "/tmp";
  int descriptor = -1;
#ifdef O_TMPFILE
  descriptor = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
#endif
  if (descriptor < 0) {
    std::string name = folder + "/sela-index-XXXXXX";
    descriptor = mkstemp(&name[0]);
    if (descriptor >= 0) {
      unlink(name.c_str());
      fcntl(descriptor, F_SETFD, FD_CLOEXEC);
    }
  }
  uint8_t head[kHead];
  head_of_file(head);
  if (descriptor < 0 || !write_at(descriptor, head, kHead, 0)) {
    fail(reason(folder, errno));
    if (descriptor >= 0) ::close(descriptor);
    files_.push_back({"", -1, kHead});  // its place
    return false;
  }
  files_.push_back({"", descriptor, kHead});
  return true;
}

void IndexStore::read_others() {
  DIR* const folder = opendir(folder_.c_str());
  if (folder == nullptr) return;
  while (const dirent* entry = readdir(folder)) {
    const std::string name = entry->d_name;
    const size_t length = name.size(), ends = sizeof(kPrefix) + sizeof(kSuffix) - 2;
    if (length <= ends || name.compare(0, sizeof(kPrefix) - 1, kPrefix) != 0 ||
        name.compare(length - (sizeof(kSuffix) - 1), std::string::npos, kSuffix) != 0)
      continue;
    const bool open_already =
        std::any_of(files_.begin(), files_.end(), [&name](const File& file) { return file.name == name; });
    if (open_already || files_.size() >= kMostFiles) continue;
    const std::string path = folder_ + "/" + name;
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor < 0) continue;
    uint8_t head[kHead];
    if (length_of(descriptor) < 0 || !read_at(descriptor, head, kHead, 0) || !is_head(head)) {
      ::close(descriptor);
      continue;
    }
    files_.push_back({name, descriptor, kHead});
  }
  closedir(folder);
}

void IndexStore::scan_files() {
  for (size_t i = 0; i < files_.size(); ++i) scan(i);
  File& own = files_.front();
  if (writes_ && length_of(own.descriptor) > own.end && ftruncate(own.descriptor, static_cast<off_t>(own.end)) != 0)
    fail(reason(folder_ + "/" + own.name, errno));
}

/// Takes in the records of a file from its `end` on.
void IndexStore::scan(size_t number_of_file) {
  File& file = files_[number_of_file];
  if (file.descriptor < 0) return;
  const int64_t length = length_of(file.descriptor);
  uint8_t head[kRecord];
  RecordHead record;
  while (length - file.end >= kRecord) {
    if (!read_at(file.descriptor, head, kRecord, file.end) || !read_record_head(head, record)) return;
    if (record.whole() > length - file.end) return;  // torn, or being written
    put(static_cast<uint64_t>(record.key.image), number_of_file, file.end, record.payload);
    file.end += record.whole();
  }
}

const IndexStore::Slot* IndexStore::slot_of(uint64_t image) const {
  if (slots_.empty()) return nullptr;
  const size_t mask = slots_.size() - 1;
  for (size_t i = spread(image) & mask;; i = (i + 1) & mask) {
    if (slots_[i].image == 0) return nullptr;
    if (slots_[i].image == image + 1) return &slots_[i];
  }
}

void IndexStore::put(uint64_t image, size_t file, int64_t offset, uint32_t payload) {
  auto insert = [](std::vector<Slot>& slots, const Slot& slot) {
    const size_t mask = slots.size() - 1;
    size_t i = spread(slot.image - 1) & mask;
    while (slots[i].image != 0 && slots[i].image != slot.image) i = (i + 1) & mask;
    const bool fresh = slots[i].image == 0;
    slots[i] = slot;
    return fresh;
  };
  if ((used_ + 1) * 3 > slots_.size() * 2) {
    std::vector<Slot> larger(std::max<size_t>(1024, slots_.size() * 2));
    for (const Slot& slot : slots_)
      if (slot.image != 0) insert(larger, slot);
    slots_.swap(larger);
  }
  if (insert(slots_, {image + 1, static_cast<uint64_t>(file) << 48 | static_cast<uint64_t>(offset), payload})) ++used_;
}

StoredKind IndexStore::find(const StoredKey& key, std::vector<uint8_t>& payload, bool* known) {
  *known = false;
  if (elsewhere()) return StoredKind::nothing;
  Slot slot;
  int descriptor = -1;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Slot* found = slot_of(static_cast<uint64_t>(key.image));
    if (found == nullptr) return StoredKind::nothing;
    slot = *found;
    descriptor = files_[slot.place >> 48].descriptor;
  }
  *known = true;
  const size_t whole = static_cast<size_t>(kRecord) + slot.payload;
  payload.resize(whole);
  RecordHead record;
  if (!read_at(descriptor, payload.data(), whole, static_cast<int64_t>(slot.place & ((uint64_t{1} << 48) - 1))) ||
      !read_record_head(payload.data(), record) || record.payload != slot.payload || record.key.image != key.image ||
      record.key.size != key.size || record.key.modified != key.modified)
    return StoredKind::nothing;
  // An index has a checksum of its own, which its reader looks at.
  if (record.kind != StoredKind::index &&
      (record.kind != StoredKind::other || crc32(payload.data() + kRecord, slot.payload) != record.crc))
    return StoredKind::nothing;
  payload.erase(payload.begin(), payload.begin() + kRecord);
  return record.kind;
}

void IndexStore::add(const StoredKey& key, StoredKind kind, const uint8_t* payload, size_t size, bool replace) {
  if (elsewhere() || size > kMostPayload || key.image < 0 || key.image >= int64_t{1} << 40) return;
  std::vector<uint8_t> record(static_cast<size_t>(kRecord) + (size + 7) / 8 * 8);
  uint8_t* const p = record.data();
  std::memcpy(p, kRecordMagic, 4);
  put_number(p + 8, static_cast<uint64_t>(key.image), 8);
  put_number(p + 16, key.size, 8);
  put_number(p + 24, static_cast<uint64_t>(key.modified), 8);
  put_number(p + 32, size, 4);
  put_number(p + 36, static_cast<uint64_t>(kind), 2);
  put_number(p + 40, crc32(payload, size), 4);
  put_number(p + 4, crc32(p + 8, kRecord - 8), 4);
  std::memcpy(p + kRecord, payload, size);

  const std::lock_guard<std::mutex> lock(mutex_);
  if (!writes_) return;
  const bool there = slot_of(static_cast<uint64_t>(key.image)) != nullptr;
  if (there && !replace) return;
  File& own = files_.front();
  // Images whose files change all the time, or two data sets that share a store, must not fill the disk.
  replaced_ += there ? 1 : 0;
  if (replaced_ > 1000 + 4 * static_cast<int64_t>(used_))
    return fail(
        "jpeg index: records of the same images keep replacing each other; is the store shared by different data?");
  if (!write_at(own.descriptor, p, record.size(), own.end)) {
    const int error = errno;
    fail(reason(own.name.empty() ? "temporary file" : folder_ + "/" + own.name, error));
    if (ftruncate(own.descriptor, static_cast<off_t>(own.end)) != 0) own.end = length_of(own.descriptor);
    return;
  }
  put(static_cast<uint64_t>(key.image), 0, own.end, static_cast<uint32_t>(size));
  own.end += static_cast<int64_t>(record.size());
}

void IndexStore::refresh() {
  if (elsewhere()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (folder_.empty() || files_.empty()) return;
  read_others();
  for (size_t i = 1; i < files_.size(); ++i) scan(i);
}

void IndexStore::close() {
  if (!elsewhere()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const File& file : files_)
      if (file.descriptor >= 0) ::close(file.descriptor);
    files_.clear();
    slots_.clear();
    used_ = 0;
    writes_ = false;
  }
}

int64_t IndexStore::size() const {
  if (elsewhere()) return 0;
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(used_);
}

int64_t IndexStore::bytes() const {
  if (elsewhere()) return 0;
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const File& file : files_) total += file.descriptor >= 0 ? file.end : 0;
  return total;
}

std::string IndexStore::failure() const {
  if (elsewhere()) return "";
  const std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

bool IndexStore::writes() const {
  if (elsewhere()) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  return writes_;
}

std::string IndexStore::path() const {
  if (elsewhere()) return "";
  const std::lock_guard<std::mutex> lock(mutex_);
  return files_.empty() || files_.front().name.empty() ? "" : folder_ + "/" + files_.front().name;
}

}  // namespace sela
