// Tables that decode Huffman codes of JPEG files, and their cache.
//
// Note [Two coefficients per look-up]
// Decoding is a chain: the next bits can be looked at only when the length of the last code is known.  So a look-up of
// the next kJpegAcBits bits gives as much as they hold: a coefficient with its value, the end of the block, or two of
// these in a row.  k is the place of the last coefficient in zigzag order.  An entry holds
//   bits 0..7    bits used up
//   bits 8..15   where the first value goes, relative to k
//   bits 16..23  where the second value goes, relative to k; with one value only: the first once more
//   bits 24..31  what k grows by
//   bits 32..47, 48..63  the values
// Both values are always written.  What has no value goes kNowhere further, where a table of places leads to waste. The
// end of the block adds kEnd to k, so that k >= 63 says: complete (63), ended (kEnd + k), or too far (bit 6 set).
// What does not fit into the bits uses none and adds kLong; the first value then is the length of the code, or 0 if not
// even that is known, and the second one the symbol.
#include <cstring>
#include <memory>

#include "cpu/jpeg_loops.h"
#include "cpu/thread_local.h"

namespace sela {
namespace {

constexpr uint64_t kNowhere = 64, kEnd = 128, kLong = 255;
/// Values of more bits are left to the long way, which looks at their size.
constexpr int kShortValue = 9;

/// A value of s bits: those below 2^(s-1) are negative.
int extended(int bits, int s) {
  return bits < 1 << (s - 1) ? bits - (1 << s) + 1 : bits;
}

/// One symbol, decoded from the first bits of an index; length 0 = does not fit.
struct Symbol {
  uint8_t length = 0;  ///< with the value's bits
  uint8_t run : 4, size : 4;
  int16_t value = 0;
};

/// put(bits, length of the code, symbol) for all values of the next `bits` bits that begin with a code of at most as
/// many.
template <class Put>
void each_code(const JpegCode& code, int bits, const Put& put) {
  uint32_t next = 0;
  int k = 0;
  for (int length = 1; length <= bits; ++length, next <<= 1) {
    for (int i = 0; i < code.counts[length - 1]; ++i, ++k, ++next) {
      const uint32_t first = next << (bits - length), count = 1u << (bits - length);
      for (uint32_t j = 0; j < count; ++j) put(first + j, length, code.symbols[k]);
    }
  }
}

/// put(bits, symbol with its value) where both fit.
template <class Put>
void each_symbol(const JpegCode& code, int bits, bool ac, const Put& put) {
  each_code(code, bits, [&](uint32_t index, int length, int symbol) {
    Symbol s;
    const int size = ac ? symbol & 15 : symbol;
    if (size > kShortValue || length + size > bits) return;
    s.run = static_cast<uint8_t>(ac ? symbol >> 4 : 0) & 15;
    s.size = static_cast<uint8_t>(size) & 15;
    s.length = static_cast<uint8_t>(length + size);
    const uint32_t rest = index & ((1u << (bits - length)) - 1);
    if (size > 0) s.value = static_cast<int16_t>(extended(static_cast<int>(rest >> (bits - s.length)), size));
    put(index, s);
  });
}

void fill(const JpegCode& code, JpegLongCodes& rest) {
  std::memcpy(rest.symbols, code.symbols, sizeof(rest.symbols));
  uint32_t next = 0;
  int k = 0;
  rest.bound[0] = 0;
  rest.first[0] = 0;
  for (int length = 1; length <= 16; ++length) {
    rest.first[length] = k - static_cast<int32_t>(next);
    next += code.counts[length - 1];
    k += code.counts[length - 1];
    rest.bound[length] = next << (16 - length);
    next <<= 1;
  }
}

void fill(const JpegCode& code, JpegDcTable& table) {
  std::memset(table.fast, 0, sizeof(table.fast));
  each_symbol(code, kJpegDcBits, false, [&](uint32_t index, const Symbol& s) {
    table.fast[index] = static_cast<int32_t>(static_cast<uint32_t>(s.value) << 16 | static_cast<uint32_t>(s.length));
  });
  fill(code, table.rest);
}

uint64_t entry(int length, uint64_t to1, uint64_t to2, uint64_t growth, int value1, int value2) {
  return static_cast<uint64_t>(length) | to1 << 8 | to2 << 16 | growth << 24 |
         static_cast<uint64_t>(static_cast<uint16_t>(value1)) << 32 |
         static_cast<uint64_t>(static_cast<uint16_t>(value2)) << 48;
}

void fill(const JpegCode& code, JpegAcTable& table) {
  constexpr uint32_t kCount = 1u << kJpegAcBits;
  Symbol single[kCount] = {};
  each_symbol(code, kJpegAcBits, true, [&](uint32_t index, const Symbol& s) { single[index] = s; });
  for (uint32_t i = 0; i < kCount; ++i) {
    const Symbol& a = single[i];
    if (a.length == 0) {
      table.fast[i] = entry(0, kNowhere, kNowhere, kLong, 0, 0);
    } else if (a.size == 0) {
      table.fast[i] = entry(a.length, kNowhere, kNowhere, a.run == 15 ? 16 : kEnd, 0, 0);
    } else {
      const uint64_t to = static_cast<uint64_t>(a.run) + 1;
      const Symbol& b = single[(i << a.length) & (kCount - 1)];
      const int both = a.length + b.length;
      if (b.length == 0 || both > kJpegAcBits || (b.size == 0 && b.run == 15))
        table.fast[i] = entry(a.length, to, to, to, a.value, a.value);
      else if (b.size == 0)
        table.fast[i] = entry(both, to, to, to + kEnd, a.value, a.value);
      else
        table.fast[i] = entry(both, to, to + static_cast<uint64_t>(b.run) + 1, to + static_cast<uint64_t>(b.run) + 1,
                              a.value, b.value);
    }
  }
  each_code(code, kJpegAcBits, [&](uint32_t index, int length, int symbol) {
    if (single[index].length == 0) table.fast[index] = entry(0, kNowhere, kNowhere, kLong, length, symbol);
  });
  fill(code, table.rest);
}

/// The last few tables.  A file uses four at most of each kind, which are therefore never dropped before it is done.
template <class Table>
class Cache {
 public:
  const Table* get(const JpegCode& code) {
    Slot* oldest = &slots_[0];
    for (Slot& slot : slots_) {
      if (slot.table != nullptr && same(slot.code, code)) {
        slot.used = ++clock_;
        return slot.table.get();
      }
      if (slot.used < oldest->used) oldest = &slot;
    }
    if (oldest->table == nullptr) oldest->table.reset(new Table);
    oldest->code = code;
    oldest->used = ++clock_;
    fill(code, *oldest->table);
    return oldest->table.get();
  }

 private:
  struct Slot {
    JpegCode code;
    std::unique_ptr<Table> table;
    uint64_t used = 0;
  };
  static bool same(const JpegCode& a, const JpegCode& b) {
    return a.total == b.total && std::memcmp(a.counts, b.counts, sizeof(a.counts)) == 0 &&
           std::memcmp(a.symbols, b.symbols, static_cast<size_t>(a.total)) == 0;
  }
  Slot slots_[8];
  uint64_t clock_ = 0;
};

}  // namespace

const JpegDcTable* jpeg_dc_table(const JpegCode& code) {
  return of_thread<Cache<JpegDcTable>>().get(code);
}

const JpegAcTable* jpeg_ac_table(const JpegCode& code) {
  return of_thread<Cache<JpegAcTable>>().get(code);
}

}  // namespace sela
