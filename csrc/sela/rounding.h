#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "sela/dispatch.h"
#include "sela/host_device.h"
#include "sela/sinkhorn.h"

namespace sela {

/// Candidates: the few clusters that a row may go to.  A column's score is t[j] = scale * logits[j] + prices[j] (nats);
/// a row's label has the score scale * logits[label] + label_prices[label], and regret is the best score minus that.
///
/// A row with a label >= 0 gets a list when its regret is above `slack`: first the best column (the lowest of equals),
/// then, in ascending order, the other good ones, then its label if that is missing.  Good are the columns that score
/// at least the best score + `floor`, after their bonus; if there are more than 2 * count of them, then between `count`
/// and 2 * count of the best, none left out above one that is in.  Of columns with equal scores the list then takes
/// those that follow column ((first_row + row) * count) % cols, cyclically, so that many equal rows do not all list the
/// same few.  Columns at -inf (logit or price) are never listed, unless as the label.
struct CandidateSearch {
  const void* logits = nullptr;  ///< [rows, cols] row-major, elements of `type`
  LogitsType type = LogitsType::float32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;                    ///< elements from one row to the next, >= cols
  double scale = 1.0;                    ///< > 0, finite; rounded to float unless type is float64
  const double* prices = nullptr;        ///< [cols], finite or -inf: column left out
  const double* label_prices = nullptr;  ///< [cols], finite
  const double* bonus = nullptr;      ///< [cols] >= 0, finite: makes a column good, and better among good ones; or null
  const int32_t* labels = nullptr;    ///< [rows], -1: the row is left out
  const int64_t* selected = nullptr;  ///< [selected_count] rows to look at, or null: all
  int64_t selected_count = 0;         ///< rows when `selected` is null
  int64_t first_row = 0;              ///< number of row 0 in the matrix that the rows are a part of
  int32_t count = 0;                  ///< columns per list, 1 .. cols
  float slack = 0.0f;                 ///< nats; -inf: every row gets a list
  float floor = 0.0f;                 ///< nats; -inf: any column is good
  float tie = 0.0f;                   ///< nats >= 0; columns that score so little less than the best are its equals
                                      ///< where there are many of them
};

/// Outputs by place in `selected`; width = 2 * count + 2.
struct CandidateLists {
  int32_t* columns = nullptr;  ///< [selected_count, width]
  float* values = nullptr;     ///< [selected_count, width] scale * (logits[column] - logits[label]): no prices
  int32_t* found = nullptr;    ///< [selected_count] length of the list, 0 without one
  float* regret = nullptr;     ///< [selected_count] nats; 0 for rows left out, -inf for rows without any column
};

/// One read of the selected rows.  The result depends on neither threads nor scheduling.
/// Throws std::invalid_argument for sizes out of range.
void find_candidates_cpu(const CandidateSearch& search, const CandidateLists& lists, int threads, Isa isa);

/// Prices as the kernels use them, in device memory at multiples of 16 bytes: float, or double where the logits are
/// float64.
struct DevicePrices {
  const void* prices = nullptr;        ///< [cols]
  const void* label_prices = nullptr;  ///< [cols]; not for margins
  const float* bonus = nullptr;        ///< [cols] or null
};

/// The same on the current CUDA device, in the order of `stream` (a cudaStream_t): all pointers are device memory, and
/// prices and bonus those of `prices`.  Lists are the CPU's, number by number (its generic loops excepted, whose last
/// bits may differ).  Labels and selected rows must be in range.  Nothing waits for the device.
/// Throws std::runtime_error without CUDA, on a device the build has no code for, and when the launch fails.
void find_candidates_cuda(const CandidateSearch& search, const DevicePrices& prices, const CandidateLists& lists,
                          void* stream);

/// What bounds a list (cpu/rounding_loops.cpp, Note [Bound of the list]): groups of columns, column % kCandidateGroups;
/// steps of halving; and lists of up to so many columns go by the maxima of 16 larger groups.
constexpr int64_t kCandidateGroups = 64;
constexpr int kCandidateHalvings = 10;
constexpr int32_t kCandidateShort = 6;

/// A hair below x, for strict comparisons; not the next float, which may count as zero.
SELA_SHARED_INLINE float candidate_below(float x) {
  return x - (1e-30f + 1e-6f * (x < 0.0f ? -x : x));
}

/// Number of losses that column_margins_cpu looks for.
constexpr int kColumnMargins = 4;

/// margins[m * cols + j]: the m-th smallest loss (best score - score of j, nats, > 0) of column j among the selected
/// rows, m < kColumnMargins; +inf where fewer rows lose anything finite.  Of the search logits, scale, prices, labels
/// and selected count.
void column_margins_cpu(const CandidateSearch& search, float* margins, int threads, Isa isa);

/// Bytes of device memory that column_margins_cuda needs for so many selected rows.
int64_t column_margins_workspace_cuda(int64_t selected_count, int64_t cols);

/// The same as column_margins_cpu on the current CUDA device; see find_candidates_cuda.  margins and scratch are device
/// memory, scratch at a multiple of 8 bytes.
void column_margins_cuda(const CandidateSearch& search, const DevicePrices& prices, float* margins, void* scratch,
                         void* stream);

/// So many sharp Sinkhorn iterations.
struct SmoothStage {
  double sharpness = 1.0;  ///< > 0
  int iterations = 0;      ///< at most
};

/// Brings prices nearer to those at which the best columns of the lists have the wanted sizes: per stage, `iterations`
/// times or until sum_j |wanted[j] - sum_i q[i, j]| <= tolerance * sum_j wanted[j],
///   p[j] += relaxation / sharpness * log(wanted[j] / sum_i q[i, j]),   q[i, :] = softmax(sharpness * (v[i, :] + p))
///   over row i's list,
/// with logarithms of at most 3.  Columns of which nothing is wanted keep their price.  Entries that are 20 nats
/// of the sharpened score below the best of their row when a stage begins are left out of it.
struct SmoothProblem {
  int64_t rows = 0;
  int32_t width = 0;                 ///< of the lists
  const int32_t* columns = nullptr;  ///< [rows, width]
  const float* values = nullptr;     ///< [rows, width]
  const int32_t* found = nullptr;    ///< [rows]
  int32_t clusters = 0;
  const double* wanted = nullptr;  ///< [clusters] >= 0
  std::vector<SmoothStage> stages;
  double relaxation = 1.0;  ///< 0 .. 2: above 1 errors that fade slowly do so twice as fast and more
  double tolerance = 0.0;
  double tie = 0.0;  ///< nats: columns within this of a row's best are as good
};

/// prices: [clusters], changed.  labels: [rows], or null when not wanted: the best column of each list at the new
/// prices, the lowest of equals; a row to which several are as good takes that which lacks most rows at its turn.
/// Untouched without a list.  The result does not depend on threads.
void smooth_prices_cpu(const SmoothProblem& problem, double* prices, int32_t* labels, int threads, Isa isa);

/// Labels of admissible cluster sizes that lose as little as possible: a transport problem on candidate lists, solved
/// by successive shortest paths over the clusters (see Note [Shortest paths over clusters] in rounding.cpp).
///
/// With prices p, row i in cluster j is settled when v[i, j] + p[j] is the largest of its list; then the labels are
/// optimal for the sizes they have, and every path moves them to sizes nearer to the admissible ones at least cost.
class Rounding {
 public:
  /// `total` rows take part; cluster j is to get low[j] .. high[j] of them, sum low <= total <= sum high.
  /// prices: [clusters], the starting point.  Throws std::invalid_argument for sizes out of range.
  Rounding(int64_t rows, int64_t total, int32_t clusters, const double* prices, const int64_t* low, const int64_t* high,
           int threads);

  /// Adds lists, as find_candidates_cpu made them with `width` columns for `count` rows, which go to `labels` [count].
  /// Both this label and the one that a row has must be in its list.  Returns how many columns are new to their row.
  int64_t add(const int64_t* rows, int64_t count, const int32_t* labels, const int32_t* columns, const float* values,
              const int32_t* found, int32_t width);

  /// Moves rows until all sizes are admissible or no list leads further.  Returns the number of rows that are left in
  /// clusters that are too full; closed() then says from which clusters no list leads to one that lacks images.
  int64_t solve();

  /// Last resort: rows left over go, lowest first, to the clusters that lack some, lowest first, whatever their logits
  /// say.  Returns their number.
  int64_t force();

  const std::vector<int32_t>& labels() const { return label_; }   ///< [rows], -1 for rows that take no part
  const double* prices() const { return price_.data(); }          ///< [clusters]
  const std::vector<int64_t>& sizes() const { return size_; }     ///< [clusters]
  const std::vector<int64_t>& wanted() const { return wanted_; }  ///< [clusters] sizes aimed at, low .. high
  const std::vector<uint8_t>& closed() const { return closed_; }  ///< [clusters]
  int64_t paths() const { return paths_; }                        ///< paths taken so far

 private:
  struct Node {
    float loss;  ///< v[row, from] - v[row, to]
    int32_t row, left, right;
  };
  struct Edge {
    int32_t target;
    int32_t root;  ///< of the heap, -1 when empty
    float loss;    ///< of the root, +inf when empty
  };
  struct Cluster {
    std::vector<Edge> edges;
    std::vector<Node> nodes;
    std::vector<int32_t> slots;  ///< target -> edge: direct when as long as there are clusters, else open addressing
  };
  struct List {
    int64_t first = 0;
    int32_t length = 0;
  };

  Edge& edge(Cluster& cluster, int32_t target);
  int32_t find_slot(const Cluster& cluster, int32_t target) const;
  int32_t meld(std::vector<Node>& nodes, int32_t a, int32_t b) const;
  void push(int32_t from, int64_t row);
  void leave(int64_t row);
  void clean(int32_t from, Edge& edge);
  void widen(Cluster& cluster, size_t room) const;
  void reserve(Cluster& cluster, int64_t entries) const;
  int64_t merge(int64_t row, int32_t label, const int32_t* columns, const float* values, int32_t found);
  bool search();
  bool nearer(int32_t a, int32_t b) const;
  void rise(int32_t place);
  int32_t pop();
  bool take_path(int32_t sink);
  float value(int64_t row, int32_t column) const;

  int32_t clusters_;
  int threads_;
  std::vector<double> price_;  ///< [clusters + 1]: the last one is that of the reserve
  std::vector<int64_t> low_, high_, wanted_, size_;
  std::vector<int32_t> label_;
  std::vector<List> list_;
  std::vector<int32_t> column_;  ///< lists, one behind the other
  std::vector<float> value_;
  std::vector<Cluster> cluster_;
  std::vector<uint8_t> closed_;
  int64_t paths_ = 0;

  // Of one search; [clusters + 1].
  std::vector<double> distance_, reach_;   ///< reach = distance + price; -inf once settled
  std::vector<int32_t> before_, by_edge_;  ///< the node and its edge that the shortest path comes by
  std::vector<float> by_loss_;             ///< loss of that edge at the time
  std::vector<int32_t> queue_, place_, settled_, sinks_;
  std::vector<std::pair<int64_t, int32_t>> moves_;
};

}  // namespace sela
