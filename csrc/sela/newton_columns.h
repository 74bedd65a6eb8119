#pragma once
#include <math.h>

#include <cstdint>

#include "sela/host_device.h"

namespace sela {

/// What is wanted of the columns.  With w[j] = offset[j] + d[j] nats and the column sums c[j]:
///   exact     c = target                       (neither strength nor bounds)
///   pulled    c = target exp(-w / strength)    (strength > 0): the optimum of columns that are relaxed by KL
///   bounded   low <= c <= high, c = low where w > 0, c = high where w < 0    (low and high)
/// F (see Note [Sparse semi-dual]) then holds, for target[j] d[j], -strength target exp(-w / strength), and
/// min(low w, high w).
struct NewtonColumns {
  const double* target = nullptr;  ///< [cols] >= 0; 0 keeps a column where it is
  const double* defect = nullptr;  ///< [cols] column sums of the pass minus those over the candidates, at d = 0
  const double* offset = nullptr;  ///< [cols], where the columns are pulled or bounded
  double strength = 0.0;           ///< nats, > 0: pulled
  const double* low = nullptr;     ///< [cols] >= 0
  const double* high = nullptr;    ///< [cols] >= low

  SELA_HOST_DEVICE bool exact() const { return !(strength > 0.0) && low == nullptr; }
};

/// A column's part of F, with its first and second derivative.
struct NewtonTerm {
  double value, gradient, curvature;
};

/// The defect r of a column that moved by d nats: left-out entries grow with it, and what was counted too much stays.
SELA_HOST_DEVICE inline NewtonTerm newton_defect(double r, double d) {
  if (!(r > 0.0)) return {r * d, r, 0.0};
  const double grown = r * exp(d < 300.0 ? d : 300.0);
  return {grown, grown, grown};
}

/// What is wanted of column j at d[j] = d, where its sum is `sum`; the gradient is that of the sum, too.
SELA_HOST_DEVICE inline NewtonTerm newton_wanted(const NewtonColumns& columns, int64_t j, double d, double sum) {
  const double target = columns.target[j];
  if (columns.exact()) return {-(target * d), sum - target, 0.0};
  const double w = columns.offset[j] + d;
  if (columns.strength > 0.0) {
    const double t = -w / columns.strength;
    const double asked = target * exp(t < 300.0 ? t : 300.0);
    return {columns.strength * asked, sum - asked, asked / columns.strength};
  }
  const double low = columns.low[j], high = columns.high[j], value = -((w > 0.0 ? low : high) * w);
  if (w > 0.0 || (w == 0.0 && sum < low)) return {value, sum - low, 0.0};
  return {value, w < 0.0 || sum > high ? sum - high : 0.0, 0.0};
}

/// Whether column j takes part in a step from d, where it has this gradient: not when it rests at its kink.
SELA_HOST_DEVICE inline bool newton_moves(const NewtonColumns& columns, int64_t j, double d, double gradient) {
  return columns.target[j] > 0.0 && (columns.low == nullptr || gradient != 0.0 || columns.offset[j] + d != 0.0);
}

/// Where a step takes column j from d, where it has this gradient: a bounded column stops at its kink.
SELA_HOST_DEVICE inline double newton_moved(const NewtonColumns& columns, int64_t j, double d, double step,
                                            double gradient) {
  const double to = d + step;
  if (columns.low == nullptr || step == 0.0) return to;
  const double before = columns.offset[j] + d, after = columns.offset[j] + to;
  const bool stops = before != 0.0 ? before * after < 0.0 : after * gradient > 0.0;
  return stops ? -columns.offset[j] : to;
}

/// What is added to the Hessian's diagonal.  It keeps every column, and every group of columns that few rows tie to the
/// others, from moving much further than `clip`; it vanishes with the gradient, and convergence is quadratic.
/// `total`: sum of the targets.
SELA_HOST_DEVICE inline double newton_extra(double curvature, double gradient, double clip, double target,
                                            double total) {
  return curvature + fabs(gradient) / clip + 1e-9 * target + 1e-14 * total;
}

}  // namespace sela
