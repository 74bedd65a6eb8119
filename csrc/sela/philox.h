#pragma once
#include <cstdint>

#include "sela/host_device.h"

namespace sela {

/// What a random number is for.  Numbers drawn for different purposes are independent, whatever their counters.
enum class Purpose : uint32_t { shuffle = 0, crop = 1, flip = 2, colour = 3, effects = 4, noise = 5, vector = 6 };

/// Four random 32-bit words.
struct PhiloxWords {
  uint32_t word[4];
};

/// Philox4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
/// A pure function of counter and key: no state to carry, save or share.
SELA_HOST_DEVICE inline PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// Words for one draw of one view of one image: image < 2^40, view < 256, draw < 65536.
/// Counter words: image bits 0-31; image bits 32-39, view, draw; epoch; purpose.
SELA_HOST_DEVICE inline PhiloxWords philox_image(uint64_t seed, uint32_t epoch, uint64_t image, uint32_t view,
                                                 uint32_t draw, Purpose purpose) {
  const uint32_t high = static_cast<uint32_t>(image >> 32) & 0xFFu;
  const PhiloxWords counter = {{static_cast<uint32_t>(image), (high << 24) | ((view & 0xFFu) << 16) | (draw & 0xFFFFu),
                                epoch, static_cast<uint32_t>(purpose)}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

/// The upper 24 bits as a float in [0, 1), exactly.
SELA_HOST_DEVICE inline float unit_float(uint32_t word) {
  return static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
}

/// An integer in [0, n) from one word; n >= 1.  The bias is below n / 2^32.
SELA_HOST_DEVICE inline int32_t below(uint32_t word, int32_t n) {
  return static_cast<int32_t>((static_cast<uint64_t>(word) * static_cast<uint32_t>(n)) >> 32);
}

}  // namespace sela
