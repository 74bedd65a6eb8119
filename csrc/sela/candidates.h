#pragma once
#include <cstdint>
#include <vector>

namespace sela {

/// The entries of a plan that count, row by row (CSR): those with p[i, j] > exp(-level) at the potential of one pass.
/// On trained logits they are one or two of thousands of columns, and all that Newton's method needs of a row.
/// Rows that are masked or of weight 0 have none.  The order is that of the rows, then of the columns.
struct Candidates {
  double level = 16.0;  ///< nats, > 0, <= kLargestLevel (float64: kLargestLevel64); set before the pass
  int64_t limit = 0;    ///< with more entries than this nothing is kept; set before the pass

  bool overflow = false;  ///< there were more than `limit`: all arrays are empty
  int64_t rows = 0;       ///< rows read by the pass
  int64_t cols = 0;
  std::vector<int64_t> offsets;  ///< [rows + 1]: entries of the r-th row read are offsets[r] .. offsets[r + 1]
  std::vector<uint16_t> narrow;  ///< [entries] columns, where cols <= 65,536; else empty
  std::vector<uint32_t> wide;    ///< [entries] columns, where cols > 65,536; else empty
  std::vector<float> values;     ///< [entries] log p[i, j], so that p at the potential g + d is softmax(value + d)
  std::vector<float> weights;    ///< [rows] row weights; empty: all 1

  /// Adds the rows of another part behind these, and empties it.  Both with weights or both without, unless one of
  /// them has no rows; more than `limit` entries together: overflow.
  /// Throws std::invalid_argument for another number of columns, or weights in one of them only.
  void append(Candidates&& other);
};

/// The pass leaves out terms from 26 nats on, relative to a reference that may be 2 nats off; float64 leaves out none.
constexpr double kLargestLevel = 24.0, kLargestLevel64 = 40.0;

/// Widest matrix whose columns fit into 16 bits.
constexpr int64_t kNarrowColumns = 65536;

}  // namespace sela
