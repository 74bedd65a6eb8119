// A fuzzer for compilers without libFuzzer: mutates seed files, some of the time along the structure of a JPEG file,
// and runs a target (jpeg.cpp, reader.cpp) on them.
//
//   fuzz_jpeg | fuzz_reader RUNS SEED CRASH_FILE SEED_FILE...
//
// The same arguments run the same inputs.  When a sanitizer or a check ends the process, the input is in CRASH_FILE;
// RUNS 0 runs the seed files themselves, with which a crash is repeated.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fuzz/jpeg_fuzz.h"

namespace {

using Bytes = std::vector<uint8_t>;

const char* crash_file = nullptr;
Bytes current;

void save_current() {
  std::FILE* file = std::fopen(crash_file, "wb");
  if (file == nullptr) return;
  std::fwrite(current.data(), 1, current.size(), file);
  std::fclose(file);
  std::fprintf(stderr, "fuzz: the input is in %s\n", crash_file);
}

void on_abort(int) {
  save_current();
  std::_Exit(1);
}

struct Random {
  uint64_t state;
  uint64_t next() {
    state += 0x9E3779B97F4A7C15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>(next() % n); }
};

/// A marker segment: [begin, end).
struct Segment {
  size_t begin, end;
};

std::vector<Segment> segments_of(const Bytes& data) {
  std::vector<Segment> found;
  size_t at = sela::kFuzzHead + 2;
  while (at + 4 <= data.size() && data[at] == 0xFF) {
    const size_t end = at + 2 + (data[at + 2] << 8 | data[at + 3]);
    if (end > data.size()) break;
    found.push_back({at, end});
    if (data[at + 1] == 0xDA) break;
    at = end;
  }
  return found;
}

void mutate_segment(Bytes& data, Random& random) {
  const std::vector<Segment> segments = segments_of(data);
  if (segments.empty()) return;
  const Segment s = segments[random.below(segments.size())];
  const auto begin = data.begin() + static_cast<std::ptrdiff_t>(s.begin);
  const auto end = data.begin() + static_cast<std::ptrdiff_t>(s.end);
  switch (random.below(5)) {
    case 0:  // away
      data.erase(begin, end);
      break;
    case 1: {  // twice
      const Bytes copy(begin, end);
      data.insert(begin, copy.begin(), copy.end());
      break;
    }
    case 2:  // another length
      data[s.begin + 2 + random.below(2)] ^= static_cast<uint8_t>(1u << random.below(8));
      break;
    case 3:  // another marker
      data[s.begin + 1] = static_cast<uint8_t>(0xC0 + random.below(64));
      break;
    default: {  // a few of its bytes
      const size_t count = 1 + random.below(4);
      for (size_t i = 0; i < count && s.end > s.begin + 4; ++i) {
        uint8_t& byte = data[s.begin + 4 + random.below(s.end - s.begin - 4)];
        byte = random.below(2) == 0 ? static_cast<uint8_t>(random.next()) : static_cast<uint8_t>(random.below(4));
      }
    }
  }
}

void mutate_bytes(Bytes& data, Random& random, const std::vector<Bytes>& seeds) {
  // Headers are a large part of small files: half of the time the other half is meant.
  const size_t first = random.below(2) == 0 ? data.size() / 2 : 0;
  const size_t at = first + random.below(data.size() - first);
  const auto place = data.begin() + static_cast<std::ptrdiff_t>(at);
  switch (random.below(8)) {
    case 0:
      data[at] = static_cast<uint8_t>(random.next());
      break;
    case 1:
      data[at] ^= static_cast<uint8_t>(1u << random.below(8));
      break;
    case 2:
      data.insert(place, static_cast<uint8_t>(random.next()));
      break;
    case 3:
      data.erase(place, place + static_cast<std::ptrdiff_t>(1 + random.below(std::min<size_t>(data.size() - at, 8))));
      break;
    case 4:
      data[at] = 0xFF;
      if (at + 1 < data.size()) data[at + 1] = static_cast<uint8_t>(random.below(2) == 0 ? 0xD0 + random.below(10) : 0);
      break;
    case 5:
      data.resize(at + 1);
      break;
    case 6: {  // a piece of another file
      const Bytes& other = seeds[random.below(seeds.size())];
      const size_t from = random.below(other.size()),
                   count = std::min<size_t>(1 + random.below(32), other.size() - from);
      for (size_t i = 0; i < count && at + i < data.size(); ++i) data[at + i] = other[from + i];
      break;
    }
    default: {  // the rest of another file
      const Bytes& other = seeds[random.below(seeds.size())];
      const size_t from = random.below(other.size());
      data.resize(at + 1);
      data.insert(data.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
    }
  }
}

void run_current() {
  const Bytes exact(current);  // no spare capacity
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: fuzz_jpeg | fuzz_reader RUNS SEED CRASH_FILE SEED_FILE...\n");
    return 2;
  }
  const uint64_t runs = std::strtoull(argv[1], nullptr, 10);
  Random random{std::strtoull(argv[2], nullptr, 10)};
  crash_file = argv[3];
  __sanitizer_set_death_callback(save_current);
  std::signal(SIGABRT, on_abort);
  std::vector<Bytes> seeds;
  for (int i = 4; i < argc; ++i) {
    std::FILE* file = std::fopen(argv[i], "rb");
    if (file == nullptr) {
      std::fprintf(stderr, "fuzz: cannot read %s\n", argv[i]);
      return 2;
    }
    Bytes seed;
    uint8_t piece[4096];
    while (const size_t n = std::fread(piece, 1, sizeof(piece), file)) seed.insert(seed.end(), piece, piece + n);
    std::fclose(file);
    if (!seed.empty()) seeds.push_back(seed);
  }
  for (const Bytes& seed : seeds) {
    current = seed;
    run_current();
  }
  const auto began = std::chrono::steady_clock::now();
  for (uint64_t i = 0; i < runs; ++i) {
    current = seeds[random.below(seeds.size())];
    for (size_t k = 0; k < sela::kFuzzHead && k < current.size(); ++k) current[k] = static_cast<uint8_t>(random.next());
    for (size_t k = random.below(4) + (random.below(8) != 0); k > 0 && !current.empty(); --k)
      random.below(3) == 0 ? mutate_segment(current, random) : mutate_bytes(current, random, seeds);
    run_current();
    if ((i + 1) % 100000 == 0) {
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
      std::printf("%llu runs, %.0f per second\n", static_cast<unsigned long long>(i + 1),
                  static_cast<double>(i + 1) / seconds);
      std::fflush(stdout);
    }
  }
  std::printf("%llu runs, nothing found\n", static_cast<unsigned long long>(runs));
  return 0;
}
