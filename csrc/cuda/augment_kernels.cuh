// Kernels of the fused augmentation of small images from uint8 data that stay on the device (see sela/augment.h for
// what they compute, cpu/augment_loops.cpp for the same on a CPU).
//
// Bytes, operations and floor, per image of 32 x 32 RGB resampled to 32 x 32, float16 out:
//   bytes       3,072 in + 6,144 out + 8 of the index: 9.2 kB, 3.1 ns on an H100 at 3.0 TB/s
//   operations  read off the disassembly for sm_90, float16, NCHW, the paper's set with every operation on: 130
//               instructions per output pixel: an input row 30 (6 byte loads, 6 conversions, 6 multiply-adds, 12 around
//               them), mixing two rows 18, the luma's sum and 3 stores 21, brightness 3, contrast 3, saturation 8,
//               hue 34, loads, normalisation and output 13. Per image 1,500 instructions of a warp more: weights, copy,
//               plan, reduction, two barriers. In all 5,700 of a warp: 6.1 ns at 132 x 4 x 1.75e9 per second
//   floor       6.1 ns: issue of instructions binds, by 2.0 over memory; of images that are only cropped and mirrored
//               (80 per pixel) 4.3 ns, by 1.4. No exp; per pixel one reciprocal and one floor where the hue turns.
//   shared      17.4 kB per block of 32 x 32 RGB, 64.6 kB at the limit of 64 x 64 (Turing has 65.5); 64 registers: 8
//               blocks, 32 warps
//   sample_kernel: 8 bytes in, 60 out and about 1,000 instructions per image: 0.03 ns of memory, 0.03 ns of issue.
//
// Who does what. A block of 128 threads takes images blockIdx, blockIdx + gridDim, ...; what it needs of an image is
// read once, all the rest is shared memory and registers, and the output is written once.
//
//   draw       thread t < 16 draws the parameters of the block's t-th next image: the draws cost 1 / 16 per image
//   begin      16-byte asynchronous copies of the rows of the box; meanwhile threads 0-63 make the weights of columns,
//              64-127 those of rows. Both for the next image while this one is being finished
//   resample   a thread owns a column of the output and a run of rows: columns along the warp, so that shared loads and
//              stores are free of conflicts; while rows are enlarged, its last two horizontally resampled inputs stay
//              in registers, and every input row is resampled once per run
//                  warp 0: rows 0-7 | warp 1: rows 8-15 | warp 2: rows 16-23 | warp 3: rows 24-31      (32 x 32)
//              with it go gray, the operations before the contrast, and the luma's sum: per thread in order of its
//              rows, then over the warp by shuffles, then over warps in order. The same bits for any grid
//   finish     a thread owns 8 pixels in a row (4 of float32): 16-byte loads of planes, contrast, the other operations,
//              normalisation, 16-byte stores (3 adjacent ones per thread if channels are last)
//
// Arithmetic is that of the AVX2 and AVX-512 loops, multiply-add for multiply-add; only the contrast's mean is summed
// in another order, and the hue's reciprocal is the hardware's (1 unit in the last place). float to [0, 1] costs
// nothing: it is a modifier of the multiply-add.
#pragma once
#include <math.h>
#include <stdint.h>

#include "cuda/augment_pixels.cuh"
#include "cuda/gpu.cuh"
#include "sela/augment.h"
#include "sela/resample.h"

namespace sela {
namespace augment_cuda {

constexpr int kThreads = 128;               // a 32 x 32 image is 8 pixels per thread
constexpr int kWarps = kThreads / 32;       // each leaves one partial sum of the luma
constexpr int kAxisThreads = kThreads / 2;  // one half of the block per axis; kAugmentCudaSide outputs at most
constexpr int kBatch = 16;                  // images whose parameters are drawn at a time

/// One output of an axis.
struct alignas(16) Tap {
  int32_t start, count;  ///< inputs under it, within the box
  float first, second;   ///< weights of the first two
};

/// Where things lie in shared memory, bytes from its start; sizes in floats.
struct Layout {
  int32_t taps, plans, partial, planes, weights, input, bytes;
  int32_t plane;   ///< floats from one channel to the next, a multiple of 8
  int32_t weight;  ///< floats of the weights of one axis; 0 where all images are enlarged
};

/// What the kernel is given. Pointers are device memory; null: absent.
struct Arguments {
  AugmentOptions options;
  const uint8_t* images;  // [image_count, height, width, channels]
  int64_t image_count;
  int32_t height, width;
  const int64_t* index;  // [count]
  int64_t count;
  uint64_t seed;
  uint32_t epoch, view;
  const AugmentParameters* given;  // [count], or null: drawn
  AugmentParameters* drawn;        // [count]: where drawn ones are left, or null
  void* out;
  bool aligned;              // every plane of the output (image, with channels last) starts at a multiple of 16 bytes
  int32_t column_bits;       // threads along a row: the power of two from size up
  int32_t run;               // rows per thread, a multiple of kRows
  float inverse_pixels;      // 1 / size^2
  float scale[3], shift[3];  // v * scale + shift normalises
  Layout layout;
};

/// Shared memory for images of height x width.
inline Layout lay_out(int32_t size, int32_t height, int32_t width, int32_t channels) {
  Layout l{};
  int32_t at = 0;
  auto take = [&at](int64_t bytes) {
    const int32_t begin = at;
    at += static_cast<int32_t>((bytes + 15) / 16 * 16);
    return begin;
  };
  const int32_t longest = height > width ? height : width;
  l.plane = (size * size + 7) / 8 * 8;
  l.weight = longest > size ? 2 * longest + size : 0;  // size * ceil(2 * longest / resampled) and less
  l.taps = take(int64_t{2} * size * static_cast<int64_t>(sizeof(Tap)));
  l.plans = take(kBatch * static_cast<int64_t>(sizeof(Plan)));
  l.partial = take(kWarps * static_cast<int64_t>(sizeof(float)));
  l.planes = take(int64_t{4} * channels * l.plane);
  l.weights = take(int64_t{8} * l.weight);
  l.input = take(int64_t{height} * width * channels + 15);  // bytes keep their place within 16
  l.bytes = at;
  return l;
}

// ---- Before an image: its parameters, its plan, its bytes, its weights.

/// Plans of images first, first + gridDim, ...: the block's next kBatch ones, one per thread.
template <int kChannels>
__device__ __forceinline__ void draw(const Arguments& a, int64_t first, Plan* plans) {
  const int t = static_cast<int>(threadIdx.x);
  const int64_t i = first + static_cast<int64_t>(t) * gridDim.x;
  if (t >= kBatch || i >= a.count) return;
  const int64_t image = a.index[i];
  AugmentParameters p;
  if (a.given != nullptr) {
    p = a.given[i];
  } else {
    p = sample_parameters(a.options, a.height, a.width, a.seed, a.epoch, static_cast<uint64_t>(image), a.view);
    if (a.drawn != nullptr) a.drawn[i] = p;
  }
  plans[t] = make_plan(a.options, kChannels == 3, a.height, a.width, p, image < a.image_count ? image : -1);
}

/// The first of the rows that a plan's box lies in, whole rows of the image; never read where there is no image.
template <int kChannels>
__device__ __forceinline__ const uint8_t* box_rows(const Arguments& a, const Plan& p) {
  const int64_t row = int64_t{kChannels} * a.width;
  return a.images + p.image * a.height * row + p.top * row;
}
/// Where that byte comes to lie within 16 bytes, in the image and in shared memory.
__device__ __forceinline__ int place_within_16(const uint8_t* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15u);
}

/// Starts the copy of the rows of p's box. Nothing outside them is read.
template <int kChannels>
__device__ __forceinline__ void start_copy(const Arguments& a, const Plan& p, uint8_t* input) {
  if (p.image >= 0) {
    const int t = static_cast<int>(threadIdx.x);
    const uint8_t* rows = box_rows<kChannels>(a, p);
    const int begin = place_within_16(rows), end = begin + p.height * a.width * kChannels;
    const int whole = (begin + 15) / 16, beyond = end / 16;  // chunks that lie inside altogether
    for (int chunk = whole + t; chunk < beyond; chunk += kThreads)
      copy_async16(input + 16 * chunk, rows + (16 * chunk - begin));
    if (begin != 0 || end % 16 != 0) {
      const int head = 16 * whole < end ? 16 * whole : end, tail = 16 * beyond > head ? 16 * beyond : head;
      const int byte = t < 32 ? begin + t : tail + t - 32;
      if (byte < (t < 32 ? head : end)) input[byte] = rows[byte - begin];
    }
  }
  copy_async_commit();
}

/// The weights of both axes: columns by the first half of the block, rows by the second.
__device__ __forceinline__ void make_taps(const Arguments& a, const Plan& p, Tap* taps, float* weights) {
  const int32_t size = a.options.size;
  const bool rows = threadIdx.x >= kAxisThreads;
  const int i = static_cast<int>(threadIdx.x) - (rows ? kAxisThreads : 0);
  if (i >= size) return;
  const int32_t length = rows ? p.height : p.width, resampled = rows ? p.tall : p.wide;
  const int32_t output = rows                      ? p.first_row + i
                         : (p.flags & kFlip) != 0u ? p.first_col + size - 1 - i
                                                   : p.first_col + i;
  const AxisScale axis = axis_scale(length, resampled, static_cast<int32_t>(most_taps(length, resampled)));
  const float middle = axis_middle(axis, output);
  const AxisSpan span = axis_span(axis, middle);
  float total = 0.0f;
#pragma unroll 1
  for (int32_t k = 0; k < axis.taps; ++k) total += axis_weight(axis, middle, span, k);
  total = total > 0.0f ? (rows ? 1.0f : 1.0f / 255.0f) / total : 0.0f;
  Tap tap = {span.start, span.count, axis_weight(axis, middle, span, 0) * total,
             axis_weight(axis, middle, span, 1) * total};
  taps[(rows ? size : 0) + i] = tap;
  if ((p.flags & kEnlarges) == 0u) {
    float* own = weights + (rows ? a.layout.weight : 0) + i;
#pragma unroll 1
    for (int32_t k = 0; k < span.count; ++k) own[k * size] = axis_weight(axis, middle, span, k) * total;
  }
}

// ---- Resampling: one column of the output.

/// A column of the output while it passes down an enlarged box: two inputs of a row under the column's weights, and the
/// two latest input rows resampled like that.
template <int kChannels>
struct Column {
  const uint8_t* first;  ///< in the first row of the box
  const uint8_t* second;
  float first_weight, second_weight;
  int32_t row;     ///< bytes from one row to the next
  int32_t last;    ///< bytes to the box's last row
  int32_t offset;  ///< bytes to the row after the latest
  int32_t latest;  ///< number of the row in `below`
  float above[kChannels], below[kChannels];

  /// The next input row. Those behind the last one repeat it, under a weight of zero.
  __device__ __forceinline__ void advance() {
    const int32_t here = offset < last ? offset : last;
    offset += row;
    ++latest;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      above[c] = below[c];
      below[c] =
          fmaf(static_cast<float>(second[here + c]), second_weight, static_cast<float>(first[here + c]) * first_weight);
    }
  }
};

/// One output where a side shrinks, from all the inputs under it. box: the first byte of the box.
template <int kChannels>
__device__ __forceinline__ void reduce_box(const uint8_t* box, int32_t row, const Tap& x, const Tap& y, const float* wx,
                                           const float* wy, int32_t size, bool rows_first, float (&value)[kChannels]) {
  const uint8_t* corner = box + y.start * row + x.start * kChannels;
  const int32_t outer = rows_first ? x.count : y.count, inner = rows_first ? y.count : x.count;
  const int32_t outer_step = rows_first ? kChannels : row, inner_step = rows_first ? row : kChannels;
  const float* outer_weight = rows_first ? wx : wy;
  const float* inner_weight = rows_first ? wy : wx;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) value[c] = 0.0f;
#pragma unroll 1
  for (int32_t o = 0; o < outer; ++o) {
    float part[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) part[c] = 0.0f;
#pragma unroll 1
    for (int32_t i = 0; i < inner; ++i) {
      const uint8_t* pixel = corner + o * outer_step + i * inner_step;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) part[c] = fmaf(static_cast<float>(pixel[c]), inner_weight[i * size], part[c]);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = fmaf(part[c], outer_weight[o * size], value[c]);
  }
}

/// The whole image into planes [kChannels, layout.plane], with gray and the operations before the contrast.
/// Returns this thread's share of the luma's sum, where the contrast needs it.
template <int kChannels>
__device__ __forceinline__ float resample(const Arguments& a, const Plan& p, const uint8_t* box, const Tap* taps,
                                          const float* weights, float* planes) {
  const int32_t size = a.options.size, row = a.width * kChannels;
  const int t = static_cast<int>(threadIdx.x);
  const int32_t x = t & ((1 << a.column_bits) - 1), own = x < size ? x : size - 1;
  const int32_t from = (t >> a.column_bits) * a.run;
  const int32_t until = from + a.run < size ? from + a.run : size;
  const bool enlarges = (p.flags & kEnlarges) != 0u, rows_first = (p.flags & kRowsFirst) != 0u;
  const bool contrast = (p.flags & kContrast) != 0u;
  const Tap* row_taps = taps + size;
  const Tap tap = taps[own];
  const int32_t second = tap.start + 1 < p.width ? tap.start + 1 : tap.start;
  Column<kChannels> column{};
  column.first = box + tap.start * kChannels;
  column.second = box + second * kChannels;
  column.first_weight = tap.first;
  column.second_weight = tap.second;
  column.row = row;
  column.last = (p.height - 1) * row;
  column.latest = from < until ? row_taps[from].start - 1 : 0;
  column.offset = (column.latest + 1) * row;
  float sum = 0.0f;
  for (int32_t y = from; y < until; y += kRows) {
    float v[kChannels][kRows];
    if (enlarges) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const Tap mix = row_taps[y + j < until ? y + j : until - 1];
#pragma unroll 1
        while (column.latest <= mix.start) column.advance();
#pragma unroll
        for (int c = 0; c < kChannels; ++c) v[c][j] = fmaf(column.below[c], mix.second, column.above[c] * mix.first);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int32_t line = y + j < until ? y + j : until - 1;
        float value[kChannels];
        reduce_box<kChannels>(box, row, tap, row_taps[line], weights + own, weights + a.layout.weight + line, size,
                              rows_first, value);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) v[c][j] = value[c];
      }
    }
    if ((p.flags & kGrayFirst) != 0u) make_gray(v);
    apply(p.operations & 63u, p, v);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (x < size && y + j < until) {
        if (contrast) sum += brightness_of(v, j);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) planes[c * a.layout.plane + (y + j) * size + x] = v[c][j];
      }
    }
  }
  return sum;
}

/// Contrast, the operations after it, gray, normalisation, output.
template <class T, int kChannels, bool kLast>
__device__ __forceinline__ void finish(const Arguments& a, const Plan& p, const float* planes, const float* partial,
                                       int64_t i) {
  constexpr int kCount = kPixels<T>;
  const int32_t pixels = a.options.size * a.options.size;
  float offset = 0.0f;
  if ((p.flags & kContrast) != 0u) {
    float mean = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) mean += partial[w];
    offset = (1.0f - p.contrast) * (mean * a.inverse_pixels);
  }
  const float absent = p.image < 0 ? NAN : 0.0f;
  T* out = static_cast<T*>(a.out) + i * (int64_t{kChannels} * pixels);
  for (int32_t at = static_cast<int32_t>(threadIdx.x) * kCount; at < pixels; at += kThreads * kCount) {
    float v[kChannels][kCount];
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int k = 0; k < kCount; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(planes + c * a.layout.plane + at + k);
        v[c][k] = four.x;
        v[c][k + 1] = four.y;
        v[c][k + 2] = four.z;
        v[c][k + 3] = four.w;
      }
    if ((p.flags & kColour) != 0u) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[c][j] = __saturatef(fmaf(v[c][j], p.contrast, offset));
    }
    apply(p.operations >> 6, p, v);
    if ((p.flags & kGrayLast) != 0u) make_gray(v);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[c][j] = fmaf(v[c][j], a.scale[c], a.shift[c] + absent);
    if (a.aligned) {  // then pixels is a multiple of kCount
      if constexpr (kLast) {
#pragma unroll
        for (int s = 0; s < kChannels; ++s)
          store_16(out + at * kChannels + s * kCount, [&v, s](int e) {
            const int element = s * kCount + e;
            return v[element % kChannels][element / kChannels];
          });
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) store_16(out + c * pixels + at, [&v, c](int e) { return v[c][e]; });
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (at + j < pixels) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            store_one(out + (kLast ? (at + j) * kChannels + c : c * pixels + at + j), v[c][j]);
        }
    }
  }
}

template <class T, int kChannels, bool kLast>
__global__ void __launch_bounds__(kThreads, 8) augment_kernel(const Arguments a) {
  SELA_DYNAMIC_SHARED(unsigned char, memory);
  Tap* taps = reinterpret_cast<Tap*>(memory + a.layout.taps);
  Plan* plans = reinterpret_cast<Plan*>(memory + a.layout.plans);
  float* partial = reinterpret_cast<float*>(memory + a.layout.partial);
  float* planes = reinterpret_cast<float*>(memory + a.layout.planes);
  float* weights = reinterpret_cast<float*>(memory + a.layout.weights);
  uint8_t* input = memory + a.layout.input;

  Plan plan;  // of the image that is resampled, `at`, and then waits to be finished
  int64_t at = -1, next = blockIdx.x;
  int slot = kBatch - 1;
  while (true) {
    if (next < a.count) {
      if (++slot == kBatch) {
        slot = 0;
        draw<kChannels>(a, next, plans);
        __syncthreads();
      }
      start_copy<kChannels>(a, plans[slot], input);
      make_taps(a, plans[slot], taps, weights);
    }
    if (at >= 0) finish<T, kChannels, kLast>(a, plan, planes, partial, at);
    if (next >= a.count) break;
    at = next;
    next += gridDim.x;
    plan = plans[slot];
    copy_async_wait<0>();
    __syncthreads();  // input and weights are there; planes and partial of the image before have been read
    const uint8_t* box = input + place_within_16(box_rows<kChannels>(a, plan)) + plan.left * kChannels;
    float sum = resample<kChannels>(a, plan, box, taps, weights, planes);
    if ((plan.flags & kContrast) != 0u) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kEveryLane, sum, lanes);
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    }
    __syncthreads();  // planes and partial are there; input, weights and this plan are free
  }
}

constexpr int kSampleThreads = 128;

/// drawn[i] for image index[i] of height x width, one per thread.
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(const Arguments a) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSampleThreads + threadIdx.x; i < a.count;
       i += static_cast<int64_t>(gridDim.x) * kSampleThreads)
    a.drawn[i] =
        sample_parameters(a.options, a.height, a.width, a.seed, a.epoch, static_cast<uint64_t>(a.index[i]), a.view);
}

}  // namespace augment_cuda
}  // namespace sela
