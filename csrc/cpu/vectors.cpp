// Rows of feature vectors: gathered, widened to float32, and seen through noise and left-out features.
//
// A thread takes blocks of rows.  A row is widened into its place in the output first; the view then changes it there,
// eight features at a time: two draws of four words for the noise, one of eight halves for what is left out.
#include "sela/vectors.h"

#include <algorithm>
#include <cstring>

#include "sela/parallel.h"
#include "sela/philox.h"

namespace sela {
namespace {

constexpr int64_t kBlock = 64;  // rows that a thread takes at once
constexpr int kGroup = 8;       // features that share their draws
// Four bytes sum to 510 in the mean, with a variance of 4 (2^16 - 1) / 12 = 21845.
constexpr int32_t kByteSum = 510;
constexpr float kByteScale = 1.0f / 147.80054127f;

template <class To, class From>
To bits_as(From value) {
  To out;
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

float widen_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  // The exponent's offset is 112 less than float's; the product also gets numbers below the normal ones right.
  const float value = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t bits = magnitude < 0x7C00u ? bits_as<uint32_t>(value) : (magnitude << 13) | 0x7F800000u;
  return bits_as<float>(bits | sign);
}

void widen(const VectorRows& task, int64_t row, float* out) {
  const int64_t first = row * task.width, width = task.width;
  switch (task.type) {
    case LogitsType::float16: {
      const uint16_t* from = static_cast<const uint16_t*>(task.rows) + first;
      for (int64_t c = 0; c < width; ++c) out[c] = widen_half(from[c]);
      break;
    }
    case LogitsType::bfloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(task.rows) + first;
      for (int64_t c = 0; c < width; ++c) out[c] = bits_as<float>(static_cast<uint32_t>(from[c]) << 16);
      break;
    }
    case LogitsType::float64: {
      const double* from = static_cast<const double*>(task.rows) + first;
      for (int64_t c = 0; c < width; ++c) out[c] = static_cast<float>(from[c]);
      break;
    }
    default:
      std::memcpy(out, static_cast<const float*>(task.rows) + first, sizeof(float) * width);
  }
}

bool all_finite(const float* row, int64_t width) {
  uint32_t largest = 0;
  for (int64_t c = 0; c < width; ++c) largest = std::max(largest, bits_as<uint32_t>(row[c]) & 0x7FFFFFFFu);
  return largest < 0x7F800000u;
}

float byte_sum(uint32_t word) {
  const uint32_t sum = (word & 0xFFu) + ((word >> 8) & 0xFFu) + ((word >> 16) & 0xFFu) + (word >> 24);
  return static_cast<float>(static_cast<int32_t>(sum) - kByteSum) * kByteScale;
}

void see(const VectorRows& task, int64_t number, float* row) {
  const float kept_scale = 1.0f / (1.0f - static_cast<float>(task.dropout) / 65536.0f);
  const auto words = [&](int64_t draw) {
    return philox_image(task.seed, task.epoch, static_cast<uint64_t>(number), task.view, static_cast<uint32_t>(draw),
                        Purpose::vector);
  };
  for (int64_t first = 0; first < task.width; first += kGroup) {
    const int64_t draw = first / kGroup * 3;
    float scale[kGroup], noise[kGroup];
    std::fill_n(scale, kGroup, 1.0f);
    std::fill_n(noise, kGroup, 0.0f);
    if (task.noise != nullptr)
      for (int part = 0; part < 2; ++part) {
        const PhiloxWords drawn = words(draw + part);
        for (int i = 0; i < 4; ++i) noise[4 * part + i] = byte_sum(drawn.word[i]);
      }
    if (task.dropout != 0) {
      const PhiloxWords drawn = words(draw + 2);
      for (int i = 0; i < 4; ++i) {
        scale[2 * i] = (drawn.word[i] & 0xFFFFu) < task.dropout ? 0.0f : kept_scale;
        scale[2 * i + 1] = (drawn.word[i] >> 16) < task.dropout ? 0.0f : kept_scale;
      }
    }
    const int64_t last = std::min<int64_t>(kGroup, task.width - first);
    for (int64_t i = 0; i < last; ++i) {
      const int64_t c = first + i;
      float seen = (row[c] - task.mean[c]) * scale[i];
      if (task.noise != nullptr) seen += task.noise[c] * noise[i];
      row[c] = task.mean[c] + seen;
    }
  }
}

}  // namespace

void vector_rows_cpu(const VectorRows& task, float* out, uint8_t* finite, int threads) {
  const bool viewed = task.mean != nullptr && (task.noise != nullptr || task.dropout != 0);
  parallel_blocks((task.count + kBlock - 1) / kBlock, threads, [&](int64_t block, int) {
    for (int64_t i = block * kBlock; i < std::min(task.count, (block + 1) * kBlock); ++i) {
      float* row = out + i * task.width;
      widen(task, task.index[i], row);
      finite[i] = all_finite(row, task.width);
      if (viewed) see(task, task.number[i], row);
    }
  });
}

}  // namespace sela
