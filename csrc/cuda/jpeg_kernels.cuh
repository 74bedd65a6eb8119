// JPEG files with a checkpoint index to planes: entropy-coded bytes to coefficients, coefficients to samples.
//
// Per box of RandomResizedCrop of a photograph (docs/design/0010-jpeg-on-the-gpu.md): 0.06 MB of upload in, 0.48 MB of
// coefficients cleared and read, 0.24 MB of samples out: 1.3 MB in all, 0.4 us on an H100; only upload and samples must
// move, 0.1 us.  Operations: 72,000 symbols of about 120 instructions, two thirds of the lanes busy, 0.5 us; 240,000
// samples of about 34, 0.3 us.  So instructions bind.
//
// tables_kernel
//   block <- one of a set's codes: what the next 11 bits say
// Files with codes of their own would otherwise upload 18 kB of tables each, a fifth of what a box needs.
//
// entropy_kernel
//   thread e of a block <- entry e: up to four MCUs behind a checkpoint, 100 to 500 bytes
// A symbol per turn, whatever it is: threads do not wait for each other between blocks of coefficients or MCUs, only at
// the end.  Bytes are read four at a time, stuffed zeros one by one where there are any.  Codes lie in shared memory.
// The workspace is cleared by all threads of a block together, then coefficients other than zero are written one by
// one: [entry][MCU][block of the MCU][column of the block][row], so that
//
// transform_kernel
//   warp <- row of blocks of a component; lane 8 i + j <- column j of block i, then row j, four blocks at a time
// reads a column by one load of 16 bytes, 128 bytes per block.  Rows and columns change places by shuffles; a row of
// samples is stored by 8 bytes, four blocks side by side.
//
// Note [Nothing outside]
// Whatever a file, an index or a table holds: bytes are read in [begin, end) of an entry, where the host has put them
// within the upload (as words: kJpegScanRoom bytes follow them); look-ups are by 11 bits; coefficients go to place
// k <= 63 of block b < blocks of MCU m < mcus.  Every turn uses up a bit or ends, and turns are at most 64 per block.
// An entry that ends elsewhere than the next checkpoint says is found out, and so is every anomaly that the CPU's
// decoder knows: both only set a bit of the image's status.
#pragma once

#include <cstdint>

#include "cuda/gpu.cuh"
#include "sela/jpeg_batch.h"
#include "sela/jpeg_transform.h"

namespace sela::jpeg_cuda {

constexpr int kTablesThreads = 256;
constexpr int kEntropyThreads = 64;
constexpr int kTransformThreads = 128;
constexpr unsigned kWarp = 0xffffffffu;
static_assert(kEntropyThreads == kJpegWorkEntries, "a thread per entry of a piece of work");

struct Arguments {
  const uint8_t* scans;
  const JpegDeviceEntry* entries;
  const JpegDeviceImage* images;
  const JpegDeviceSet* sets;
  const uint16_t* quants;
  const JpegDeviceWork* works;
  const JpegDeviceTile* tiles;
  uint32_t set_count, work_count, tile_count;
  JpegDeviceTables* tables;
  int16_t* coefficients;
  uint8_t* planes;
  uint32_t* status;
};

// ---- Bits.

/// Where an entry stands in its bytes.
struct Bits {
  const uint8_t* bytes;
  uint32_t first;  ///< no byte before it was read since the last marker
  uint32_t at;     ///< next byte to be read
  uint32_t end;    ///< no byte from here on is
  uint64_t held;   ///< the next bits, highest first, zeros behind them
  int count;       ///< bits in `held`
  int made_up;     ///< zeros among them, appended where bytes ended
};

/// Bytes at..at + 3, the first one highest.
__device__ inline uint32_t four_bytes(const uint8_t* bytes, uint32_t at) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(bytes + (at & ~3u));
  return __byte_perm(words[0], words[1], 0x0123 + 0x1111 * (at & 3));
}

/// Whether one of four bytes is 0xFF.
__device__ inline bool has_marker(uint32_t w) {
  return ((~w - 0x01010101u) & w & 0x80808080u) != 0;
}

/// Makes at least 32 bits of fewer.
__device__ inline void refill(Bits& r) {
  const uint32_t w = r.end - r.at >= 4 ? four_bytes(r.bytes, r.at) : kWarp;
  if (!has_marker(w)) {
    r.held |= static_cast<uint64_t>(w) << (32 - r.count);
    r.count += 32;
    r.at += 4;
    return;
  }
  for (int i = 0; i < 4 && r.at < r.end; ++i) {
    const uint32_t byte = r.bytes[r.at];
    if (byte == 0xff) {
      if (r.end - r.at < 2 || r.bytes[r.at + 1] != 0) break;  // a marker
      ++r.at;
    }
    ++r.at;
    r.held |= static_cast<uint64_t>(byte) << (56 - r.count);
    r.count += 8;
  }
  if (r.count < 32) {
    r.count += 32;
    r.made_up += 32;
  }
}

__device__ inline void drop(Bits& r, int n) {
  r.held <<= n;
  r.count -= n;
}

/// Begins anew at a byte of which some bits are used up.
__device__ inline void begin(Bits& r, uint32_t at, int used) {
  r.first = r.at = at;
  r.held = 0;
  r.count = r.made_up = 0;
  refill(r);
  drop(r, used);
}

/// Goes on behind the restart marker with this number, which must come now.
__device__ inline bool restart(Bits& r, uint32_t number) {
  const int left = r.count - r.made_up;
  if (left < 0 || left > 7 || r.end - r.at < 2 || r.bytes[r.at] != 0xff) return false;
  uint32_t at = r.at;
  while (r.end - at > 2 && r.bytes[at + 1] == 0xff) ++at;
  if (r.bytes[at + 1] != 0xd0 + number) return false;
  begin(r, at + 2, 0);
  return true;
}

/// Whether the next bit is this one of this byte.
__device__ inline bool stands_at(const Bits& r, uint32_t byte, uint32_t bit) {
  const int left = r.count - r.made_up;
  if (left < 0) return false;
  uint32_t at = r.at;
  for (int n = (left + 7) >> 3; n > 0; --n) {
    --at;
    if (at > r.first && r.bytes[at] == 0 && r.bytes[at - 1] == 0xff) --at;
  }
  return at == byte && (static_cast<uint32_t>(-left) & 7) == bit;
}

// ---- Codes.

/// The code at the begin of 16 bits, length << 8 | symbol, if it has first..last bits; else 0.  No code is shorter.
__device__ inline uint32_t find_code(const JpegDeviceCode& code, uint32_t bits, int first, int last) {
  for (int length = first; length <= last; ++length) {
    if (bits >= code.bound[length - 1]) continue;
    const uint32_t which = (bits >> (16 - length)) + static_cast<uint32_t>(code.first[length - 1]);
    return static_cast<uint32_t>(length) << 8 | code.symbols[which & 255];
  }
  return 0;
}

/// block <- a code of a set: its look-ups; the first one of a set also copies the set itself.
__global__ __launch_bounds__(kTablesThreads) void tables_kernel(const Arguments a) {
  for (uint32_t i = blockIdx.x; i < a.set_count * kJpegSetCodes; i += gridDim.x) {
    const JpegDeviceSet& set = a.sets[i / kJpegSetCodes];
    JpegDeviceTables& tables = a.tables[i / kJpegSetCodes];
    const uint32_t which = i % kJpegSetCodes;
    for (uint32_t bits = threadIdx.x; bits < 1u << kJpegFastBits; bits += kTablesThreads)
      tables.fast[which][bits] =
          static_cast<uint16_t>(find_code(set.code[which], bits << (16 - kJpegFastBits), 1, kJpegFastBits));
    const uint4* from = reinterpret_cast<const uint4*>(&set);
    uint4* to = reinterpret_cast<uint4*>(&tables.set);
    if (which == 0)
      for (uint32_t j = threadIdx.x; j < sizeof(JpegDeviceSet) / 16; j += kTablesThreads) to[j] = from[j];
  }
}

// ---- Entropy-coded bytes to coefficients.

/// Decodes an entry; returns what is wrong with it.
__device__ inline uint32_t decode_entry(const Arguments& a, const JpegDeviceTables& tables,
                                        const JpegDeviceEntry& entry, const JpegDeviceImage& image, uint32_t number) {
  const uint32_t blocks = image.blocks, component_of = image.component_of, all_codes = image.codes;
  const uint32_t interval = image.restart_interval;
  int16_t* to = a.coefficients +
                (image.first_block + static_cast<int64_t>(number - image.first_entry) * (kJpegGroup * blocks)) * 64;
  int32_t dc0 = entry.dc[0], dc1 = entry.dc[1], dc2 = entry.dc[2];
  uint32_t component = 0, codes = all_codes;  // the first block is one of the first component
  uint32_t k = 0, block = 0, mcu = 0;
  Bits r;
  r.bytes = a.scans;
  r.end = entry.end;
  begin(r, entry.begin, entry.bit);
  for (;;) {
    if (r.count < 32) refill(r);
    const uint32_t which = (k == 0 ? codes : codes >> 2) & 3;
    uint32_t found = tables.fast[which][r.held >> (64 - kJpegFastBits)];
    if (found == 0) {
      found = find_code(tables.set.code[which], static_cast<uint32_t>(r.held >> 48), kJpegFastBits + 1, 16);
      if (found == 0) return kJpegBadData;
    }
    const uint32_t run = found >> 4 & 15;  // none of a DC symbol, which is below 16
    const int size = static_cast<int>(found & 15);
    drop(r, static_cast<int>(found >> 8));
    int32_t value = static_cast<int32_t>(r.held >> 1 >> (63 - size));
    if (value < 1 << size >> 1) value += 1 - (1 << size);
    drop(r, size);
    bool stored = size != 0;
    if (k == 0) {
      value += component == 0 ? dc0 : component == 1 ? dc1 : dc2;
      if (component == 0)
        dc0 = value;
      else if (component == 1)
        dc1 = value;
      else
        dc2 = value;
      if (value != static_cast<int16_t>(value)) return kJpegBadData;
      stored = value != 0;
      k = 1;
      if (stored) to[0] = static_cast<int16_t>(value);
    } else if (size == 0 && run != 15) {
      k = 64;
    } else {
      k += run;
      if (k > 63) return kJpegBadData;
      if (stored) to[tables.set.place[k]] = static_cast<int16_t>(value);
      ++k;
    }
    if (k == 64) {
      k = 0;
      to += 64;
      if (++block == blocks) {
        block = 0;
        ++mcu;
        const bool last = mcu == entry.mcus;
        if (interval != 0 && (entry.mcu + mcu) % interval == 0 && (!last || entry.checked)) {
          if (!restart(r, ((entry.mcu + mcu) / interval - 1) & 7)) return kJpegBadData;
          dc0 = dc1 = dc2 = 0;
        }
        if (last) break;
      }
      component = component_of >> (2 * block) & 3;
      codes = all_codes >> (4 * component);
    }
  }
  if (!entry.checked) return r.count < r.made_up ? kJpegBadData : 0;
  const bool right = stands_at(r, entry.end - 2, entry.next_bit) && dc0 == entry.next[0] && dc1 == entry.next[1] &&
                     dc2 == entry.next[2];
  return right ? 0 : kJpegBadTurn;
}

__global__ __launch_bounds__(kEntropyThreads) void entropy_kernel(const Arguments a) {
  SELA_SHARED(JpegDeviceTables, tables);
  constexpr uint32_t kPieces = sizeof(JpegDeviceTables) / 16;
  uint32_t loaded = kWarp;
  for (uint32_t w = blockIdx.x; w < a.work_count; w += gridDim.x) {
    const JpegDeviceWork& work = a.works[w];
    if (work.set != loaded) {
      __syncthreads();  // others may still look up in the last one
      loaded = work.set;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(a.tables + loaded);
      uint8_t* to = reinterpret_cast<uint8_t*>(&tables);
      for (uint32_t i = threadIdx.x; i < kPieces; i += kEntropyThreads) copy_async16(to + 16 * i, from + 16 * i);
      copy_async_commit();
    }
    uint4* clear = reinterpret_cast<uint4*>(a.coefficients + static_cast<int64_t>(work.first_block) * 64);
    for (uint32_t i = threadIdx.x; i < work.blocks * 8; i += kEntropyThreads) clear[i] = make_uint4(0, 0, 0, 0);
    copy_async_wait<0>();
    __syncthreads();
    if (threadIdx.x < work.count) {
      const uint32_t number = work.first + threadIdx.x;
      const JpegDeviceEntry entry = a.entries[number];
      const uint32_t wrong = decode_entry(a, tables, entry, a.images[entry.image], number);
      if (wrong != 0) atomicOr(a.status + entry.image, wrong);
    }
  }
}

// ---- Coefficients to samples.

/// Lane j of eight holds v[0..7] of column j; then of row j.
__device__ inline void transpose(int32_t* v, int lane) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((i & step) != 0) continue;
      const int32_t sent = upper ? v[i] : v[i + step];
      const int32_t got = __shfl_xor_sync(kWarp, sent, step);
      if (upper)
        v[i] = got;
      else
        v[i + step] = got;
    }
  }
}

/// The two 16-bit numbers of a word.
__device__ inline void halves(uint32_t word, int32_t* out) {
  out[0] = static_cast<int16_t>(word);
  out[1] = static_cast<int16_t>(word >> 16);
}

__device__ inline void eight_numbers(const uint4& words, int32_t* out) {
  halves(words.x, out);
  halves(words.y, out + 2);
  halves(words.z, out + 4);
  halves(words.w, out + 6);
}

__global__ __launch_bounds__(kTransformThreads) void transform_kernel(const Arguments a) {
  constexpr uint32_t kWarps = kTransformThreads / 32;
  const uint32_t lane = threadIdx.x & 31, column = lane & 7;
  for (uint32_t t = blockIdx.x * kWarps + (threadIdx.x >> 5); t < a.tile_count; t += gridDim.x * kWarps) {
    const JpegDeviceTile tile = a.tiles[t];
    const JpegDeviceImage& image = a.images[tile.image];
    const JpegDeviceComponent& component = image.component[tile.component];
    const uint32_t h = component.h, across = image.groups * kJpegGroup * h;
    int32_t divisor[8];
    eight_numbers(reinterpret_cast<const uint4*>(a.quants)[component.quant * 8 + column], divisor);
    uint8_t* out = a.planes + component.plane + (static_cast<int64_t>(tile.row) * 8 + column) * component.stride;
    uint32_t seen = 0;
    for (uint32_t x = lane >> 3; x < across; x += kJpegStrip) {  // as many turns for all lanes: 4 divides `across`
      const uint32_t mcu = x * component.reciprocal >> 16;
      const int64_t block = tile.first_block + static_cast<int64_t>(mcu) * image.blocks + (x - mcu * h);
      const uint4 words = reinterpret_cast<const uint4*>(a.coefficients)[block * 8 + column];
      int32_t v[8];
      eight_numbers(words, v);
      const uint32_t first = column == 0 ? words.x >> 16 : words.x;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] *= divisor[i];
        seen |= static_cast<uint32_t>(v[i] + 32768) >> 16 << 10;
      }
      uint2 samples;
      if (__any_sync(kWarp, (first | words.y | words.z | words.w) != 0)) {
        jpeg_pass(v, 1, kJpegFirstShift, 0);
        transpose(v, static_cast<int>(lane));
        jpeg_pass(v, 1, kJpegSecondShift, kJpegBias);
        uint32_t bytes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          seen |= static_cast<uint32_t>(v[i]);
          bytes[i] = jpeg_sample(v[i]);
        }
        samples.x = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
        samples.y = bytes[4] | bytes[5] << 8 | bytes[6] << 16 | bytes[7] << 24;
      } else {
        const int32_t biased = jpeg_flat(__shfl_sync(kWarp, v[0], 0, 8));
        seen |= static_cast<uint32_t>(biased);
        samples.x = samples.y = 0x01010101u * jpeg_sample(biased);
      }
      *reinterpret_cast<uint2*>(out + 8 * x) = samples;
    }
    if (seen >= 2 * kJpegBias) atomicOr(a.status + tile.image, kJpegBadSample);
  }
}

}  // namespace sela::jpeg_cuda
