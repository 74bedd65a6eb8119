#pragma once
#include <cstdint>

namespace sela {

/// Pairs of differences that are kept.
constexpr int kAndersonMemory = 10;

/// Where the iteration is; all zeros before the first step.
struct AndersonDeviceState {
  int64_t known;  ///< pairs in the memory
  int64_t next;   ///< where the next pair goes
  int64_t begun;  ///< there is a point before this one
  int64_t plain;  ///< the step to this point was the plain one from the best
  int64_t ended;  ///< 1: a column receives next to nothing, or a number is not finite: nothing is done any more
  int64_t steps;  ///< taken
  double error;   ///< of the latest point
  double best;    ///< smallest error
  double gram[kAndersonMemory * kAndersonMemory];  ///< products of the changes, by their places in the memory
};
static_assert(sizeof(AndersonDeviceState) == (8 + kAndersonMemory * kAndersonMemory) * 8,
              "read back as 64-bit numbers");

/// Vectors [cols], one behind the other: the point before and its residual, the best one and its residual, and the
/// memory: differences of potentials, then those of residuals.
enum AndersonVector : int {
  kAndersonAt,
  kAndersonResidual,
  kAndersonBest,
  kAndersonBestResidual,
  kAndersonSteps,
  kAndersonChanges = kAndersonSteps + kAndersonMemory,
  kAndersonVectors = kAndersonChanges + kAndersonMemory,
};

/// One step of the column potential between two passes on a CUDA device, without the host: see
/// sela_ext/assign/anderson.py for the method.  All pointers are device memory.
struct AndersonStep {
  const int64_t* columns = nullptr;  ///< [cols] integer column sums of the pass at `potential`
  const double* potential = nullptr;
  double* next = nullptr;          ///< [cols] the potential for the next pass
  const double* target = nullptr;  ///< [cols] shares b > 0 of sum 1
  double* vectors = nullptr;       ///< [kAndersonVectors, cols]
  AndersonDeviceState* state = nullptr;
  int64_t cols = 0;
  double unit = 1.0;       ///< of the column sums, over the weight: shares are columns * unit
  double faint = 1e-9;     ///< part of its target below which a share must be summed with more care: ends the iteration
  double restart = 3.0;    ///< an error this many times the best one: back to the best point
  double cap = 10.0;       ///< nats that an accelerated step may go, or twice as far as the plain one
  bool accelerate = true;  ///< false: plain Sinkhorn steps
  bool round = true;       ///< potentials are float32 numbers
};

/// residual = log b - log share; the next potential is the point plus the accelerated step, with sum b g = 0.
/// Throws std::runtime_error without CUDA, and when the launch fails.
void anderson_step_cuda(const AndersonStep& step, void* stream);

}  // namespace sela
