// Entropy-coded bytes to coefficients.
//
// Note [Interleaved blocks]
// kLanes blocks that lie side by side are transformed at once, a block per 128-bit lane of a vector.  Their
// coefficients are therefore kept row by row: row 0 of all of them, row 1 of all of them, ...  Behind the last row
// there is one more, for the writes of Note [Two coefficients per look-up] that go nowhere.
//
// Note [Bits]
// `held` is shifted to the left as bits are used up; 8 bytes are or-ed in below the `count` bits that are still valid,
// which makes at least 56 valid ones without a branch.  Bits beyond `count` are right, too, but are loaded again.  A
// look-up uses kJpegAcBits at most, hence kLookups of them between two loads, and the long way 31.
//   Reading beyond the end is not looked for but between MCUs: kJpegSlack readable bytes follow the data.
#include <cstring>

#include "cpu/jpeg_loops.h"
#include "cpu/jpeg_simd.h"

namespace sela {
namespace SELA_ISA {
namespace {

/// Look-ups that 56 bits are enough for, and those that are left when a DC difference came out of its table.
constexpr int kLookups = 56 / kJpegAcBits;
constexpr int kLookupsBehindDc = (56 - kJpegDcBits) / kJpegAcBits;

struct Places {
  int16_t at[128];
  constexpr Places() : at() {
    for (int k = 0; k < 128; ++k)
      at[k] = static_cast<int16_t>(k < 64 ? (kJpegZigzag[k] >> 3) * 8 * kLanes + (kJpegZigzag[k] & 7) : 64 * kLanes);
  }
};
constexpr Places kPlaces;

inline __attribute__((always_inline)) void load_bits(JpegBits& r) {
  uint64_t next;
  std::memcpy(&next, r.at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  next = __builtin_bswap64(next);
#endif
  r.held |= next >> r.count;
  r.at += (63 - r.count) >> 3;
  r.count |= 56;
}

inline __attribute__((always_inline)) void drop(JpegBits& r, int n) {
  r.held <<= n;
  r.count -= n;
}

/// A value of s >= 1 bits.
inline __attribute__((always_inline)) int32_t value_of(JpegBits& r, int s) {
  const int32_t bits = static_cast<int32_t>(r.held >> (64 - s));
  drop(r, s);
  return bits < 1 << (s - 1) ? bits - (1 << s) + 1 : bits;
}

/// A symbol of any length, or -1.
__attribute__((noinline)) int long_symbol(uint64_t held, const JpegLongCodes& codes, int* length) {
  const uint32_t bits = static_cast<uint32_t>(held >> 48);
  for (int n = 1; n <= 16; ++n) {
    if (bits >= codes.bound[n]) continue;
    *length = n;
    return codes.symbols[static_cast<int32_t>(bits >> (16 - n)) + codes.first[n]];
  }
  *length = 0;
  return -1;
}

/// The next DC difference; *wrong is set at a bad code.  Leaves bits for kLookupsBehindDc.
inline __attribute__((always_inline)) int32_t read_dc(JpegBits& r, const JpegDcTable& table, uint32_t* wrong) {
  load_bits(r);
  const int32_t e = table.fast[r.held >> (64 - kJpegDcBits)];
  if (__builtin_expect((e & 255) != 0, 1)) {
    drop(r, e & 63);
    return e >> 16;
  }
  int length = 0;
  const int size = long_symbol(r.held, table.rest, &length);
  if (size < 0) {
    *wrong = 1;
    return 0;
  }
  drop(r, length);
  const int32_t difference = size > 0 ? value_of(r, size) : 0;
  load_bits(r);
  return difference;
}

/// A symbol the long way, after k; e: what its bits look up.  Returns the new k.
template <bool kStore>
inline __attribute__((always_inline)) uint32_t read_long(JpegBits& r, const JpegAcTable& table, uint64_t e,
                                                         const uint16_t* quant, int16_t* block, uint32_t k,
                                                         uint32_t* wrong) {
  load_bits(r);
  int length = static_cast<int>(e >> 32) & 255, symbol = static_cast<int>(e >> 48);
  if (__builtin_expect((e & 63) != 0 || length == 0, 0)) {
    symbol = long_symbol(r.held, table.rest, &length);
    if (symbol < 0) {
      *wrong = 1;
      return 128;
    }
  }
  drop(r, length);
  const int size = symbol & 15;
  if (size == 0) return symbol == 0xF0 ? k + 16 : k + 128;
  const int32_t value = value_of(r, size);
  k += static_cast<uint32_t>(symbol >> 4) + 1;
  if (kStore) {
    const int32_t product = value * quant[k & 63];
    *wrong |= static_cast<uint32_t>(product < -32768 || product > 32767);
    block[kPlaces.at[k]] = static_cast<int16_t>(value);
  }
  return k;
}

/// What a look-up found and where it began.
struct Step {
  uint64_t entry = 0, held = 0;
  int count = 0;
  uint32_t before = 0;
};

/// Up to kTimes look-ups, until k >= 63.
template <int kTimes, bool kStore>
inline __attribute__((always_inline)) void look_up(JpegBits& r, const JpegAcTable& table, int16_t* block, uint32_t& k,
                                                   Step& step) {
#pragma GCC unroll 5
  for (int i = 0; i < kTimes; ++i) {
    const uint64_t e = table.fast[r.held >> (64 - kJpegAcBits)];
    step = {e, r.held, r.count, k};
    drop(r, static_cast<int>(e & 63));
    if (kStore) {
      block[kPlaces.at[k + ((e >> 8) & 255)]] = static_cast<int16_t>(e >> 32);
      block[kPlaces.at[k + ((e >> 16) & 255)]] = static_cast<int16_t>(e >> 48);
    }
    k += static_cast<uint32_t>(e >> 24) & 255;
    if (k >= 63) break;
  }
}

/// The AC coefficients of a block, behind a DC difference.  Returns k as in Note [Two coefficients per look-up].
template <bool kStore>
inline __attribute__((always_inline)) uint32_t read_ac(JpegBits& r, const JpegAcTable& table, const uint16_t* quant,
                                                       int16_t* block, uint32_t* wrong) {
  uint32_t k = 0;
  Step step;
  look_up<kLookupsBehindDc, kStore>(r, table, block, k, step);
  for (;;) {
    if (k >= 63) {
      const uint64_t e = step.entry;
      const bool unfit = (e & 63) == 0;
      // What followed the 64th coefficient in the same look-up belongs to the next block.
      const bool beyond = k != 63 && step.before + ((e >> 8) & 255) == 63;
      if (__builtin_expect(!unfit && !beyond, 1)) return k;
      r.held = step.held;
      r.count = step.count;
      k = read_long<kStore>(r, table, e, quant, block, step.before, wrong);
      if (k >= 63) return k;
    }
    load_bits(r);
    look_up<kLookups, kStore>(r, table, block, k, step);
  }
}

}  // namespace

int jpeg_lanes() {
  return kLanes;
}

bool jpeg_read(const JpegScan& scan, JpegBits& bits, int first, int last, int32_t* dc, JpegCoefficients& out) {
  JpegBits r = bits;
  uint32_t wrong = 0;
  for (int m = first; m < last; ++m) {
    for (int b = 0; b < scan.blocks; ++b) {
      const JpegBlock& which = scan.block[b];
      const int c = which.component;
      int16_t* const block = out.value + which.place[m];
      const int32_t level = dc[c] + read_dc(r, *scan.dc[c], &wrong);
      dc[c] = level;
      wrong |= static_cast<uint32_t>(level > scan.dc_limit[c] || level < -scan.dc_limit[c]);
      const uint32_t k = read_ac<true>(r, *scan.ac[c], scan.quant[c], block, &wrong);
      block[0] = static_cast<int16_t>(level);
      out.last[which.batch[m]] |= static_cast<uint8_t>(k & 63);
      wrong |= k & 64;
    }
    if (wrong != 0 || r.at > r.last) return false;
  }
  bits = r;
  return true;
}

bool jpeg_skip(const JpegScan& scan, JpegBits& bits, int64_t count, int32_t* dc) {
  JpegBits r = bits;
  uint32_t wrong = 0;
  for (int64_t m = 0; m < count; ++m) {
    for (int b = 0; b < scan.blocks; ++b) {
      const int c = scan.block[b].component;
      dc[c] += read_dc(r, *scan.dc[c], &wrong);
      wrong |= static_cast<uint32_t>(dc[c] > scan.dc_limit[c] || dc[c] < -scan.dc_limit[c]);
      wrong |= read_ac<false>(r, *scan.ac[c], nullptr, nullptr, &wrong) & 64;
    }
    if (wrong != 0 || r.at > r.last) return false;
  }
  bits = r;
  return true;
}

int64_t jpeg_unstuff(const uint8_t* from, const uint8_t* end, uint8_t* out, uint32_t* marks, int64_t* found,
                     const uint8_t** stop) {
  const uint8_t* at = from;
  uint8_t* to = out;
  int64_t zeros = 0;
  for (;;) {
    while (end - at >= kCopied) {
      const int64_t plain = copy_to_ff(at, to);
      at += plain;
      to += plain;
      if (plain < kCopied) break;
    }
    while (at < end && *at != 0xFF) *to++ = *at++;
    if (end - at < 2 || at[1] != 0) break;
    *to++ = 0xFF;
    at += 2;
    marks[zeros++] = static_cast<uint32_t>(to - out);
  }
  *found = zeros;
  *stop = at;
  return to - out;
}

}  // namespace SELA_ISA
}  // namespace sela
