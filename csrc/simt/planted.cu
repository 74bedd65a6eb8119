// Kernels with one planted bug each, and, with kBug = false, without it. Every line that a checker has to name ends in
// "BUG" and the name of the bug: test_planted.py looks for it.
#include <memory>
#include <stdexcept>

#include "cuda/gpu.cuh"
#include "cuda/launch.h"
#include "simt/planted.h"

namespace sela::simt {
namespace {

constexpr int kThreads = 64;  // two warps
constexpr int kBlocks = 3;

struct Arguments {
  const float* in;  // [count]: 0, 1, 2 ...
  float* out;       // [count], zeros
  int count;        // kThreads * kBlocks
};

__device__ __forceinline__ int global_thread() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

/// Every thread takes the value of a thread of the other warp.
template <bool kBug>
__global__ void missing_barrier_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = a.in[global_thread()];
  if (!kBug) __syncthreads();
  a.out[global_thread()] = values[(t + 33) % kThreads];  // BUG missing_barrier
}

/// The same in two rounds: a warp may write the second round's values while another one still reads the first's.
template <bool kBug>
__global__ void missing_barrier_before_reuse_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    values[t] = a.in[global_thread()] + static_cast<float>(round);  // BUG missing_barrier_before_reuse
    __syncthreads();
    sum += values[(t + 33) % kThreads];
    if (!kBug) __syncthreads();
  }
  a.out[global_thread()] = sum;
}

/// A barrier of the warp where one of the block is needed: warp 0 writes, warp 1 reads.
template <bool kBug>
__global__ void warp_race_kernel(const Arguments a) {
  SELA_SHARED(float, total);
  if (threadIdx.x == 0) total = a.in[kThreads - 1];
  if (kBug)
    __syncwarp();
  else
    __syncthreads();
  if (threadIdx.x >= 32) a.out[global_thread()] = total;  // BUG warp_race
}

/// Every lane takes the value of another one of its warp, which has not been waited for.
template <bool kBug>
__global__ void missing_warp_barrier_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = a.in[global_thread()];
  if (!kBug) __syncwarp();
  a.out[global_thread()] = values[t ^ 1];  // BUG missing_warp_barrier
}

/// A shuffle brings the lanes together, but puts none of their accesses to memory in order.
template <bool kBug>
__global__ void shuffle_for_a_barrier_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = a.in[global_thread()];
  const int zero = __shfl_sync(0xffffffffu, t, 0) & 31;
  if (!kBug) __syncwarp();
  a.out[global_thread()] = values[(t ^ 1) + zero];  // BUG shuffle_for_a_barrier
}

/// All blocks add to one sum.
template <bool kBug>
__global__ void plain_add_kernel(const Arguments a) {
  if (threadIdx.x != 0) return;
  if (kBug)
    a.out[0] += a.in[blockIdx.x];  // BUG plain_add
  else
    atomicAdd(&a.out[0], a.in[blockIdx.x]);
}

/// Takes the value of the block before, which has not run, or is running, or has run.
template <bool kBug>
__global__ void block_order_kernel(const Arguments a) {
  const int t = global_thread(), before = t - kThreads;
  const float given = before < 0 ? 0.0f : (kBug ? a.out[before] : a.in[before]);  // BUG block_order
  a.out[t] = a.in[t] + given;
}

/// Reads one value too many.
template <bool kBug>
__global__ void one_too_many_kernel(const Arguments a) {
  const int last = kBug ? a.count : a.count - 1;
  float sum = 0.0f;
  for (int k = static_cast<int>(threadIdx.x); k <= last; k += kThreads) sum += a.in[k];  // BUG one_too_many
  a.out[global_thread()] = sum;
}

/// Writes one value too many.
template <bool kBug>
__global__ void write_past_the_end_kernel(const Arguments a) {
  const int t = global_thread();
  a.out[kBug ? t + 1 : t] = a.in[t];  // BUG write_past_the_end
}

/// Half of a warp goes to a barrier that the rest never sees.
template <bool kBug>
__global__ void barrier_in_a_branch_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = a.in[global_thread()];
  if (!kBug || t < 16) {
    __syncthreads();  // BUG barrier_in_a_branch
    a.out[global_thread()] = values[kThreads - 1 - t];
  }
}

/// Both branches hold a barrier, but not the same.
template <bool kBug>
__global__ void two_barriers_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = a.in[global_thread()];
  if (kBug && t % 2 == 0)
    __syncthreads();  // BUG two_barriers
  else
    __syncthreads();
  a.out[global_thread()] = values[kThreads - 1 - t];
}

/// Only every second value is written before all are read.
template <bool kBug>
__global__ void unwritten_shared_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  if (!kBug || t % 2 == 0) values[t] = a.in[global_thread()];
  __syncthreads();
  a.out[global_thread()] = values[kThreads - 1 - t];  // BUG unwritten_shared
}

/// Writes behind an array of shared memory, by way of a pointer.
template <bool kBug>
__global__ void past_shared_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  float* first = values;
  first[kBug ? t + 1 : t] = a.in[global_thread()];  // BUG past_shared
  __syncthreads();
  a.out[global_thread()] = first[t];
}

/// Writes before an array of shared memory.
template <bool kBug>
__global__ void before_shared_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  float* last = values + kThreads - 1;
  last[kBug ? -t - 1 : -t] = a.in[global_thread()];  // BUG before_shared
  __syncthreads();
  a.out[global_thread()] = last[-t];
}

/// Writes behind it by way of the array itself, whose bounds the compiler knows.
template <bool kBug>
__global__ void past_array_kernel(const Arguments a) {
  SELA_SHARED_ARRAY(float, values, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  values[kBug ? t + 1 : t] = a.in[global_thread()];  // BUG past_array
  __syncthreads();
  a.out[global_thread()] = values[kBug ? 1 : t];
}

/// The same in dynamic shared memory.
template <bool kBug>
__global__ void past_dynamic_shared_kernel(const Arguments a) {
  SELA_DYNAMIC_SHARED(float, values);
  const int t = static_cast<int>(threadIdx.x);
  values[kBug ? t + 1 : t] = a.in[global_thread()];  // BUG past_dynamic_shared
  __syncthreads();
  a.out[global_thread()] = values[t];
}

/// Names 16 lanes, and all 32 come.
template <bool kBug>
__global__ void wrong_mask_kernel(const Arguments a) {
  const float x = a.in[global_thread()];
  a.out[global_thread()] = __shfl_xor_sync(kBug ? 0x0000ffffu : 0xffffffffu, x, 1);  // BUG wrong_mask
}

/// All lanes name all 32, but half of them ask for something else.
template <bool kBug>
__global__ void lanes_disagree_kernel(const Arguments a) {
  float x = a.in[global_thread()];
  if (threadIdx.x % 32 < 16)
    x = __shfl_xor_sync(kBug ? 0xffffffffu : 0x0000ffffu, x, 1);  // BUG lanes_disagree
  else
    x = __shfl_down_sync(kBug ? 0xffffffffu : 0xffff0000u, x, 1);
  a.out[global_thread()] = x;
}

/// Names lanes that have left.
template <bool kBug>
__global__ void lanes_left_kernel(const Arguments a) {
  if (threadIdx.x % 32 >= 16) return;
  const float x = a.in[global_thread()];
  a.out[global_thread()] = __shfl_xor_sync(kBug ? 0xffffffffu : 0x0000ffffu, x, 1);  // BUG lanes_left
}

/// Reads from a lane outside of the mask.
template <bool kBug>
__global__ void inactive_lane_kernel(const Arguments a) {
  if (threadIdx.x % 32 >= 16) return;
  const float x = a.in[global_thread()];
  a.out[global_thread()] = __shfl_sync(0x0000ffffu, x, kBug ? 16 : 15);  // BUG inactive_lane
}

/// Half of the warp waits for the other at a warp's barrier, the other at the block's.
template <bool kBug>
__global__ void deadlock_kernel(const Arguments a) {
  a.out[global_thread()] = a.in[global_thread()];
  if (!kBug || threadIdx.x % 32 < 16) __syncwarp();  // BUG deadlock
  __syncthreads();
}

/// Four values per thread by asynchronous copies, read before they have landed.
template <bool kBug>
__global__ void early_read_kernel(const Arguments a) {
  SELA_DYNAMIC_SHARED(float, values);
  const int t = static_cast<int>(threadIdx.x);
  if (t >= kThreads / 4) return;
  copy_async16(values + 4 * t, a.in + blockIdx.x * kThreads + 4 * t);
  copy_async_commit();
  if (!kBug) copy_async_wait<0>();
  for (int i = 4 * t; i < 4 * t + 4; ++i) a.out[blockIdx.x * kThreads + i] = values[i];  // BUG early_read
}

/// They have landed for the thread that asked for them; another one reads them without a barrier.
template <bool kBug>
__global__ void copy_race_kernel(const Arguments a) {
  SELA_DYNAMIC_SHARED(float, values);
  const int t = static_cast<int>(threadIdx.x);
  if (t < kThreads / 4) copy_async16(values + 4 * t, a.in + blockIdx.x * kThreads + 4 * t);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kBug) __syncthreads();
  a.out[global_thread()] = values[kThreads - 1 - t];  // BUG copy_race
}

/// A copy of 16 bytes from an address that is none of its multiples.
template <bool kBug>
__global__ void misaligned_copy_kernel(const Arguments a) {
  SELA_DYNAMIC_SHARED(float, values);
  if (threadIdx.x != 0) return;
  copy_async16(values, a.in + (kBug ? 1 : 4));  // BUG misaligned_copy
  copy_async_commit();
  copy_async_wait<0>();
  a.out[global_thread()] = values[0];
}

/// A load of 16 bytes from an address that is none of its multiples.
template <bool kBug>
__global__ void misaligned_load_kernel(const Arguments a) {
  if (threadIdx.x != 0) return;
  const float4* from = reinterpret_cast<const float4*>(a.in + (kBug ? 1 : 4));
  const float4 x = *from;  // BUG misaligned_load
  a.out[global_thread()] = x.x + x.w;
}

/// The same from shared memory, which a GPU aligns no better than its type needs.
template <bool kBug>
__global__ void misaligned_shared_kernel(const Arguments a) {
  struct Four {
    float x[4];
  };
  struct alignas(16) Aligned {
    float x[4];
  };
  using Values = typename std::conditional<kBug, Four, Aligned>::type;
  SELA_SHARED(Values, values);
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 4; ++i) values.x[i] = a.in[i];
  const float4 x = *reinterpret_cast<const float4*>(&values);  // BUG misaligned_shared
  a.out[global_thread()] = x.x + x.w;
}

using Kernel = void (*)(Arguments);
struct Planted {
  const char* name;
  Kernel with_bug, without_bug;
};

#define SELA_PLANTED(name) {#name, name##_kernel<true>, name##_kernel<false>}
const Planted kPlanted[] = {
    SELA_PLANTED(missing_barrier),
    SELA_PLANTED(missing_barrier_before_reuse),
    SELA_PLANTED(warp_race),
    SELA_PLANTED(missing_warp_barrier),
    SELA_PLANTED(shuffle_for_a_barrier),
    SELA_PLANTED(plain_add),
    SELA_PLANTED(block_order),
    SELA_PLANTED(one_too_many),
    SELA_PLANTED(write_past_the_end),
    SELA_PLANTED(barrier_in_a_branch),
    SELA_PLANTED(two_barriers),
    SELA_PLANTED(unwritten_shared),
    SELA_PLANTED(past_shared),
    SELA_PLANTED(before_shared),
    SELA_PLANTED(past_array),
    SELA_PLANTED(past_dynamic_shared),
    SELA_PLANTED(wrong_mask),
    SELA_PLANTED(lanes_disagree),
    SELA_PLANTED(lanes_left),
    SELA_PLANTED(inactive_lane),
    SELA_PLANTED(deadlock),
    SELA_PLANTED(early_read),
    SELA_PLANTED(copy_race),
    SELA_PLANTED(misaligned_copy),
    SELA_PLANTED(misaligned_load),
    SELA_PLANTED(misaligned_shared),
};

}  // namespace

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const Planted& planted : kPlanted) names.push_back(planted.name);
  return names;
}

std::vector<float> run_planted(const std::string& name, bool with_bug) {
  constexpr int kCount = kThreads * kBlocks;
  for (const Planted& planted : kPlanted) {
    if (name != planted.name) continue;
    const std::unique_ptr<float[]> in(new float[kCount]),
        out(new float[kCount]());  // to the byte, for AddressSanitizer
    for (int i = 0; i < kCount; ++i) in[i] = static_cast<float>(i);
    const Arguments arguments = {in.get(), out.get(), kCount};
    launch(planted.name, with_bug ? planted.with_bug : planted.without_bug, kBlocks, kThreads, kThreads * sizeof(float),
           nullptr, arguments);
    return std::vector<float>(out.get(), out.get() + kCount);
  }
  throw std::invalid_argument("planted: no such bug: " + name);
}

}  // namespace sela::simt
