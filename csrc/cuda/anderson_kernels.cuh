// One step of Anderson's method between two passes (see sela/anderson_device.h). The SIMT runner executes this header.
//
// Bytes, operations and floor: 2 * memory + 10 vectors of 8 K bytes from the second-level cache; of K = 3000, 0.7 MB.
// One block, bound by latency: five reductions and a system of 10 equations, some 10 to 20 us. A host that reads the
// sums back, does the same and uploads a potential takes 100 to 300 us: for passes of less than that it pays to do
// several without asking (docs/gpu.md, Anderson's method on the device).
//
// Who does what: thread t has columns t, t + threads, ... of every vector; nobody reads what another thread wrote.
// Every thread knows every sum, in the same order of addition, so all take the same way. The system, that of the least
// squares scaled to columns of length 1, is solved by one thread: Cholesky's decomposition of the products, to whose
// diagonal kRidge is added; a pivot that rounding leaves nothing of drops its column.
#pragma once
#include <math.h>
#include <stdint.h>

#include "cuda/gpu.cuh"
#include "sela/anderson_device.h"

namespace sela {
namespace anderson_cuda {

constexpr int kWarp = 32;
constexpr int kAndersonThreads = 512;  // at most
constexpr int kMemory = kAndersonMemory;
constexpr int kMostSums = 2 * kMemory;  // reduced together
constexpr double kRidge = 1e-13, kSmallestPivot = 1e-15;

template <bool kMax>
__device__ __forceinline__ double warp_all(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, x, step);
    x = kMax ? (other > x ? other : x) : x + other;
  }
  return x;
}

/// Sums (or maxima) over the block in a fixed order, the same for all threads.
template <bool kMax, int N>
__device__ __forceinline__ void block_all(double (&values)[N], double* shared) {
  constexpr int kWarps = kAndersonThreads / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = warp_all<kMax>(values[n]);
    if (threadIdx.x % kWarp == 0) shared[n * kWarps + warp] = values[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = shared[n * kWarps];
    for (int w = 1; w < warps; ++w) {
      const double other = shared[n * kWarps + w];
      values[n] = kMax ? (other > values[n] ? other : values[n]) : values[n] + other;
    }
  }
  __syncthreads();  // shared memory is written again
}

/// gamma of the least squares |residual - changes gamma|, from the products of the changes and those with the residual,
/// which it takes the place of. `lower` [kMemory, kMemory] and `scale` [kMemory] are scratch memory.
__device__ __forceinline__ void solve(const double* gram, int known, double* gamma, double* lower, double* scale) {
  for (int i = 0; i < known; ++i) {
    const double square = gram[i * kMemory + i];
    scale[i] = square > 0.0 ? 1.0 / sqrt(square) : 0.0;
  }
  for (int i = 0; i < known; ++i) {
    double* row = lower + i * kMemory;
    double sum = gamma[i] * scale[i];
    for (int j = 0; j <= i; ++j) {
      const double* other = lower + j * kMemory;
      double product = gram[i * kMemory + j] * scale[i] * scale[j] + (i == j ? kRidge : 0.0);
      for (int k = 0; k < j; ++k) product -= row[k] * other[k];
      if (j < i)
        row[j] = other[j] > 0.0 ? product / other[j] : 0.0;
      else
        row[i] = product > kSmallestPivot ? sqrt(product) : 0.0;
    }
    for (int k = 0; k < i; ++k) sum -= row[k] * gamma[k];
    gamma[i] = row[i] > 0.0 ? sum / row[i] : 0.0;
  }
  for (int i = known - 1; i >= 0; --i) {
    double sum = gamma[i];
    for (int k = i + 1; k < known; ++k) sum -= lower[k * kMemory + i] * gamma[k];
    gamma[i] = lower[i * kMemory + i] > 0.0 ? sum / lower[i * kMemory + i] : 0.0;
  }
  for (int i = 0; i < known; ++i) gamma[i] *= scale[i];
}

__global__ void __launch_bounds__(kAndersonThreads, 1) anderson_kernel(const AndersonStep a) {
  SELA_SHARED_ARRAY(double, shared, kMostSums*(kAndersonThreads / kWarp));
  SELA_SHARED_ARRAY(double, gamma, kMemory);
  SELA_SHARED_ARRAY(double, lower, kMemory* kMemory);
  SELA_SHARED_ARRAY(double, scale, kMemory);
  AndersonDeviceState* s = a.state;
  const int64_t begun = s->begun;
  int64_t known = s->known, next = s->next, plain = s->plain;
  const int64_t ended = s->ended;
  double best = s->best;  // written again behind the first reduction
  const int first = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool one = first == 0;
  if (ended != 0) {  // the next pass is at the same point
    for (int64_t j = first; j < a.cols; j += threads) a.next[j] = a.potential[j];
    return;
  }
  double *at = a.vectors + kAndersonAt * a.cols, *residual = a.vectors + kAndersonResidual * a.cols;
  double *best_at = a.vectors + kAndersonBest * a.cols, *best_residual = a.vectors + kAndersonBestResidual * a.cols;
  double *steps = a.vectors + kAndersonSteps * a.cols, *changes = a.vectors + kAndersonChanges * a.cols;

  // The error, and whether every share is large enough for its logarithm; the residual's mean.
  double sums[3] = {0.0, 0.0, 0.0};
  for (int64_t j = first; j < a.cols; j += threads) {
    const double share = static_cast<double>(a.columns[j]) * a.unit, target = a.target[j];
    const bool clear = share >= a.faint * target && share > 0.0;
    sums[0] += fabs(share - target);
    sums[1] += clear ? 0.0 : 1.0;
    sums[2] += clear ? target * (log(target) - log(share)) : 0.0;
  }
  block_all<false>(sums, shared);
  if (!(sums[1] == 0.0) || !(fabs(sums[2]) < INFINITY)) {
    for (int64_t j = first; j < a.cols; j += threads) a.next[j] = a.potential[j];
    if (one) {
      s->ended = 1;
      s->error = sums[0];
    }
    return;
  }
  const double error = sums[0], mean = sums[2];
  const bool better = begun == 0 || error < best;
  if (better) best = error;

  // The new point takes the place of the one before; their difference goes into the memory.
  for (int64_t j = first; j < a.cols; j += threads) {
    const double f = log(a.target[j]) - log(static_cast<double>(a.columns[j]) * a.unit) - mean;
    if (begun != 0) {
      steps[next * a.cols + j] = a.potential[j] - at[j];
      changes[next * a.cols + j] = f - residual[j];
    }
    at[j] = a.potential[j];
    residual[j] = f;
    if (better) {
      best_at[j] = at[j];
      best_residual[j] = f;
    }
  }
  const int64_t added = next;
  if (begun != 0) {
    known = known < kMemory ? known + 1 : kMemory;
    next = (next + 1) % kMemory;
  }
  const bool back = error > a.restart * best && plain == 0;
  if (back) {
    known = next = 0;
    for (int64_t j = first; j < a.cols; j += threads) {
      at[j] = best_at[j];
      residual[j] = best_residual[j];
    }
  }
  plain = back ? 1 : 0;
  const int count = a.accelerate ? static_cast<int>(known) : 0;

  // Products of the change that was added with all, and of all with the residual.
  double products[kMostSums];
#pragma unroll
  for (int n = 0; n < kMostSums; ++n) products[n] = 0.0;
  if (count > 0) {
    for (int64_t j = first; j < a.cols; j += threads) {
      const double mine = changes[added * a.cols + j], f = residual[j];
#pragma unroll
      for (int k = 0; k < kMemory; ++k) {
        const double other = k < count ? changes[k * a.cols + j] : 0.0;
        products[k] += mine * other;
        products[kMemory + k] += f * other;
      }
    }
    block_all<false>(products, shared);
    if (one) {
#pragma unroll
      for (int k = 0; k < kMemory; ++k) {
        gamma[k] = products[kMemory + k];
        if (k < count) s->gram[added * kMemory + k] = s->gram[k * kMemory + added] = products[k];
      }
      solve(s->gram, count, gamma, lower, scale);
    }
    __syncthreads();
  }

  // The step, and how far it goes.
  double most[2] = {0.0, 0.0}, total[2] = {0.0, 0.0};  // max |step|, max |residual|; sum of the step
  for (int64_t j = first; j < a.cols; j += threads) {
    double step = residual[j];
    for (int k = 0; k < count; ++k) step -= (steps[k * a.cols + j] + changes[k * a.cols + j]) * gamma[k];
    a.next[j] = step;
    most[0] = fabs(step) < INFINITY ? (fabs(step) > most[0] ? fabs(step) : most[0]) : INFINITY;
    most[1] = fabs(residual[j]) > most[1] ? fabs(residual[j]) : most[1];
    total[0] += step;
  }
  block_all<true>(most, shared);
  double part = 1.0;
  const bool broken = !(most[0] < INFINITY);
  if (count > 0 && !broken && 2.0 * most[0] > a.cap) {
    block_all<false>(total, shared);
    const double centre = total[0] / static_cast<double>(a.cols);
    double size[1] = {0.0};
    for (int64_t j = first; j < a.cols; j += threads)
      size[0] = fabs(a.next[j] - centre) > size[0] ? fabs(a.next[j] - centre) : size[0];
    block_all<true>(size, shared);
    const double cap = a.cap > 2.0 * most[1] ? a.cap : 2.0 * most[1];
    part = size[0] > cap ? cap / size[0] : 1.0;
  }
  double centre[1] = {0.0};
  for (int64_t j = first; j < a.cols; j += threads) {
    const double to = at[j] + part * (broken ? residual[j] : a.next[j]);
    a.next[j] = to;
    centre[0] += a.target[j] * to;
  }
  block_all<false>(centre, shared);
  for (int64_t j = first; j < a.cols; j += threads) {
    const double to = a.next[j] - centre[0];
    a.next[j] = a.round ? static_cast<double>(static_cast<float>(to)) : to;
  }
  if (!one) return;
  s->known = known;
  s->next = next;
  s->begun = 1;
  s->plain = plain;
  s->steps += 1;
  s->error = error;
  s->best = best;
}

}  // namespace anderson_cuda
}  // namespace sela
