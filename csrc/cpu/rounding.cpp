// Rounding of a plan to labels of admissible cluster sizes: the driver of the candidate search, and the transport
// problem on its lists.
//
// Note [Shortest paths over clusters]
// Rows that sit in the best column of their list, at prices p, are an optimal labelling for the sizes that come out.
// Between clusters a and b lies an edge whose length is the least loss of moving one row of a to b,
//   min over rows i of a that list b of (v[i, a] + p[a]) - (v[i, b] + p[b]) >= 0,
// and one row more in b and one less in a costs least along a shortest path.  Taking a shortest path from a cluster
// with too many rows to one with too few, and adding min(distance, length of the path) to the prices, keeps every
// length >= 0, so after the last path the labels are optimal for admissible sizes (successive shortest paths).
//   Which clusters get the odd rows when the shares are no whole numbers is settled in the same search: a node for the
// reserve of places, with an edge of length p[a] - p[reserve] from every cluster a that may get one place more, and of
// length p[reserve] - p[a] to every one that may get one less.  Places go to the lowest prices first, which makes both
// >= 0 at the start.
//   Per pair of clusters a heap holds the rows; rows that have left their cluster are dropped when they come up.
#include "sela/rounding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/rounding_loops.h"
#include "sela/parallel.h"

namespace sela {
namespace {

constexpr double kFar = std::numeric_limits<double>::infinity();

using BlockFunction = void (*)(const CandidateTask&, int64_t, const CandidateScratch&);

BlockFunction block_function(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return &avx512::candidates_block;
  if (isa == Isa::avx2) return &avx2::candidates_block;
#endif
  (void)isa;
  return &generic::candidates_block;
}

BlockFunction margins_function(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return &avx512::margins_block;
  if (isa == Isa::avx2) return &avx2::margins_block;
#endif
  (void)isa;
  return &generic::margins_block;
}

using SmoothFunction = void (*)(const SmoothPart&, float, const float*, double*);

SmoothFunction smooth_function(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return &avx512::smooth_part;
  if (isa == Isa::avx2) return &avx2::smooth_part;
#endif
  (void)isa;
  return &generic::smooth_part;
}

constexpr int64_t kSmoothPartRows = 4096, kSmoothParts = 64;
constexpr double kLargestStep = 3.0;   // of a price, times the sharpness
constexpr float kSmoothLevel = 20.0f;  // entries so many nats of the sharpened score below the best are left out

void refuse(const std::string& what) {
  throw std::invalid_argument("rounding: " + what);
}

/// Prices and bonus as the loops want them.
struct CandidateNumbers {
  std::vector<float> prices, label_prices, bonus;
};

/// What all workers share of a search whose sizes are in range.
CandidateTask candidate_task(const CandidateSearch& search, CandidateNumbers& numbers) {
  if (search.rows < 0 || search.cols < 1 || search.cols > std::numeric_limits<int32_t>::max() - kCandidateGroups)
    refuse("expected rows >= 0 and 1 <= cols < 2^31, found " + std::to_string(search.rows) + " x " +
           std::to_string(search.cols));
  if (search.stride < search.cols) refuse("expected stride >= cols, found " + std::to_string(search.stride));
  if (!(search.scale > 0.0) || !std::isfinite(search.scale)) refuse("expected a finite scale > 0");
  for (int64_t i = 0; i < search.selected_count; ++i) {
    const int64_t row = search.selected != nullptr ? search.selected[i] : i;
    if (row < 0 || row >= search.rows) refuse("selected row " + std::to_string(row) + " does not exist");
    if (search.labels[row] >= search.cols) refuse("label " + std::to_string(search.labels[row]) + " does not exist");
  }
  CandidateTask task;
  task.search = search;
  task.padded = (search.cols + kCandidateGroups - 1) / kCandidateGroups * kCandidateGroups;
  numbers.prices.assign(static_cast<size_t>(task.padded), -std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < search.cols; ++j)
    numbers.prices[static_cast<size_t>(j)] = static_cast<float>(search.prices[j]);
  task.prices = numbers.prices.data();
  if (search.label_prices != nullptr)
    numbers.label_prices.assign(search.label_prices, search.label_prices + search.cols);
  task.label_prices = numbers.label_prices.data();
  if (search.bonus != nullptr) {
    numbers.bonus.assign(static_cast<size_t>(task.padded), 0.0f);
    for (int64_t j = 0; j < search.cols; ++j)
      numbers.bonus[static_cast<size_t>(j)] = static_cast<float>(search.bonus[j]);
    task.bonus = numbers.bonus.data();
  }
  return task;
}

/// Calls body(block, worker, numbers, columns) for every block of rows, with scratch memory of `arrays` times the
/// padded columns of numbers and one of columns.
template <class Body>
void in_blocks(const CandidateTask& task, int arrays, int threads, const Body& body) {
  const int64_t blocks = (task.search.selected_count + kCandidateRows - 1) / kCandidateRows;
  const int workers =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads > 0 ? threads : available_threads(), blocks)));
  std::vector<std::vector<float>> numbers(static_cast<size_t>(workers));
  std::vector<std::vector<int32_t>> columns(static_cast<size_t>(workers));
  parallel_blocks(blocks, workers, [&](int64_t block, int worker) {
    std::vector<float>& own = numbers[static_cast<size_t>(worker)];
    std::vector<int32_t>& places = columns[static_cast<size_t>(worker)];
    own.resize(static_cast<size_t>(arrays * task.padded));
    places.resize(static_cast<size_t>(task.padded));
    body(block, worker, own.data(), places.data());
  });
}

/// Packs the lists of rows first .. last for sums at a sharpness: groups of rows of about equal length, entry by entry.
/// Entries far below the best one of their row at these prices are left out; rows with one left are only counted.
void pack(const SmoothProblem& problem, const double* prices, float sharpness, int64_t first, int64_t last,
          SmoothPart& part) {
  part.single.assign(static_cast<size_t>(problem.clusters), 0.0);
  part.columns.clear();
  part.values.clear();
  part.lengths.clear();
  part.weights.clear();
  std::vector<int32_t> column, length;  // of the rows with two entries or more, one behind the other
  std::vector<float> value;
  const int32_t width = problem.width;
  column.resize(static_cast<size_t>((last - first) * width));
  value.resize(column.size());
  std::vector<int64_t> start;
  int64_t used = 0;
  int32_t longest = 0;
  std::vector<float> score(static_cast<size_t>(width));
  for (int64_t i = first; i < last; ++i) {
    const int32_t* from = problem.columns + i * width;
    const float* number = problem.values + i * width;
    const int32_t found = problem.found[i];
    if (found == 0) continue;
    float best = -std::numeric_limits<float>::infinity();
    for (int32_t k = 0; k < found; ++k) {
      score[static_cast<size_t>(k)] = static_cast<float>(static_cast<double>(number[k]) + prices[from[k]]);
      best = std::max(best, score[static_cast<size_t>(k)]);
    }
    const float least = best - kSmoothLevel / sharpness;
    int32_t count = 0;
    for (int32_t k = 0; k < found; ++k) {  // no branch: the next entry overwrites one that does not count
      column[static_cast<size_t>(used + count)] = from[k];
      value[static_cast<size_t>(used + count)] = number[k];
      count += score[static_cast<size_t>(k)] >= least;
    }
    if (count == 1) part.single[static_cast<size_t>(column[static_cast<size_t>(used)])] += 1.0;
    if (count <= 1) continue;
    start.push_back(used);
    length.push_back(count);
    longest = std::max(longest, count);
    used += count;
  }
  // Rows by length: those of a group then need little padding.
  std::vector<int32_t> place(static_cast<size_t>(longest) + 2, 0), order(length.size());
  for (int32_t n : length) ++place[static_cast<size_t>(n) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (size_t k = 0; k < length.size(); ++k)
    order[static_cast<size_t>(place[static_cast<size_t>(length[k])]++)] = static_cast<int32_t>(k);
  for (size_t group = 0; group < order.size(); group += kSmoothRows) {
    const size_t count = std::min<size_t>(kSmoothRows, order.size() - group);
    const int32_t n = length[static_cast<size_t>(order[group + count - 1])];
    const size_t at = part.columns.size();
    part.lengths.push_back(n);
    part.columns.resize(at + static_cast<size_t>(n * kSmoothRows), 0);
    part.values.resize(at + static_cast<size_t>(n * kSmoothRows), -std::numeric_limits<float>::infinity());
    part.weights.resize(part.weights.size() + kSmoothRows, 0.0f);
    for (size_t lane = 0; lane < kSmoothRows; ++lane) {
      if (lane >= count) {
        part.values[at + lane] = 0.0f;
        continue;
      }
      const size_t row = static_cast<size_t>(order[group + lane]);
      part.weights[part.weights.size() - kSmoothRows + lane] = 1.0f;
      for (size_t k = 0; k < static_cast<size_t>(length[row]); ++k) {
        part.columns[at + k * kSmoothRows + lane] = column[static_cast<size_t>(start[row]) + k];
        part.values[at + k * kSmoothRows + lane] = value[static_cast<size_t>(start[row]) + k];
      }
    }
  }
}

}  // namespace

void find_candidates_cpu(const CandidateSearch& search, const CandidateLists& lists, int threads, Isa isa) {
  if (search.count < 1 || search.count > search.cols)
    refuse("expected 1 .. cols candidates, found " + std::to_string(search.count));
  CandidateNumbers numbers;
  CandidateTask task = candidate_task(search, numbers);
  task.out = lists;
  const BlockFunction body = block_function(isa);
  in_blocks(task, 3, threads, [&](int64_t block, int, float* own, int32_t* columns) {
    CandidateScratch scratch;
    scratch.scores = own;
    scratch.hits = own + task.padded;
    scratch.order = own + 2 * task.padded;
    scratch.columns = columns;
    body(task, block, scratch);
  });
}

void column_margins_cpu(const CandidateSearch& search, float* margins, int threads, Isa isa) {
  CandidateNumbers numbers;
  const CandidateTask task = candidate_task(search, numbers);
  const BlockFunction body = margins_function(isa);
  // The smallest of all numbers do not depend on who saw which of them.
  std::vector<std::vector<float>> smallest(
      static_cast<size_t>(threads > 0 ? threads : available_threads()),
      std::vector<float>(static_cast<size_t>(kColumnMargins * task.padded), std::numeric_limits<float>::infinity()));
  in_blocks(task, 1, static_cast<int>(smallest.size()), [&](int64_t block, int worker, float* own, int32_t*) {
    CandidateScratch scratch;
    scratch.scores = own;
    scratch.smallest = smallest[static_cast<size_t>(worker)].data();
    body(task, block, scratch);
  });
  std::vector<float> all(kColumnMargins * smallest.size());
  for (int64_t j = 0; j < search.cols; ++j) {
    size_t n = 0;
    for (const std::vector<float>& part : smallest)
      for (int64_t m = 0; m < kColumnMargins; ++m) all[n++] = part[static_cast<size_t>(m * task.padded + j)];
    std::partial_sort(all.begin(), all.begin() + kColumnMargins, all.end());
    for (int64_t m = 0; m < kColumnMargins; ++m) margins[m * search.cols + j] = all[static_cast<size_t>(m)];
  }
}

void smooth_prices_cpu(const SmoothProblem& problem, double* prices, int32_t* labels, int threads, Isa isa) {
  const int64_t rows = problem.rows;
  const int32_t clusters = problem.clusters;
  // Sums over parts are taken in the order of the parts, which depend on nothing but the number of rows.
  const int64_t part_rows =
      std::max<int64_t>(kSmoothPartRows, (rows / kSmoothParts + kSmoothRows) / kSmoothRows * kSmoothRows);
  const int64_t parts = (rows + part_rows - 1) / part_rows;
  std::vector<SmoothPart> packed(static_cast<size_t>(parts));
  std::vector<double> sums(static_cast<size_t>(parts * clusters));
  std::vector<float> sharp(static_cast<size_t>(clusters));
  const SmoothFunction body = smooth_function(isa);
  const auto part_of = [&](int64_t part) {
    return std::pair<int64_t, int64_t>(part * part_rows, std::min(rows, (part + 1) * part_rows));
  };
  double total = 0.0;
  for (int32_t j = 0; j < clusters; ++j) total += problem.wanted[j];
  for (const SmoothStage& stage : problem.stages) {
    for (int iteration = 0; iteration < stage.iterations; ++iteration) {
      for (int32_t j = 0; j < clusters; ++j) sharp[j] = static_cast<float>(stage.sharpness * prices[j]);
      parallel_blocks(parts, threads, [&](int64_t number, int) {
        SmoothPart& part = packed[static_cast<size_t>(number)];
        const auto [first, last] = part_of(number);
        if (iteration == 0) pack(problem, prices, static_cast<float>(stage.sharpness), first, last, part);
        double* sum = sums.data() + number * clusters;
        std::copy(part.single.begin(), part.single.end(), sum);
        body(part, static_cast<float>(stage.sharpness), sharp.data(), sum);
      });
      double error = 0.0;
      for (int32_t j = 0; j < clusters; ++j) {
        if (!(problem.wanted[j] > 0.0)) continue;
        double sum = 0.0;
        for (int64_t part = 0; part < parts; ++part) sum += sums[static_cast<size_t>(part * clusters + j)];
        const double step = sum > 0.0 ? std::log(problem.wanted[j] / sum) : kLargestStep;
        prices[j] += problem.relaxation * std::min(kLargestStep, std::max(-kLargestStep, step)) / stage.sharpness;
        error += std::fabs(sum - problem.wanted[j]);
      }
      if (error <= problem.tolerance * total) break;
    }
  }
  if (labels == nullptr) return;
  // The best columns; a row that is indifferent goes to that one of them which lacks most, rows in their order.
  std::vector<uint8_t> tied(static_cast<size_t>(rows), 0);
  std::vector<std::vector<double>> lacking(static_cast<size_t>(parts));
  parallel_blocks(parts, threads, [&](int64_t number, int) {
    const auto [first, last] = part_of(number);
    std::vector<double>& taken = lacking[static_cast<size_t>(number)];
    taken.assign(static_cast<size_t>(clusters), 0.0);
    for (int64_t i = first; i < last; ++i) {
      double best = -kFar, second = -kFar;
      for (int32_t k = 0; k < problem.found[i]; ++k) {
        const int32_t column = problem.columns[i * problem.width + k];
        const double score = static_cast<double>(problem.values[i * problem.width + k]) + prices[column];
        if (score > best || (score == best && column < labels[i])) {
          second = std::max(second, best);
          best = score;
          labels[i] = column;
        } else {
          second = std::max(second, score);
        }
      }
      tied[static_cast<size_t>(i)] = best > -kFar && second >= best - problem.tie;
      if (best > -kFar && tied[static_cast<size_t>(i)] == 0) taken[static_cast<size_t>(labels[i])] += 1.0;
    }
  });
  std::vector<double> lack(problem.wanted, problem.wanted + clusters);
  for (const std::vector<double>& taken : lacking)
    for (int32_t j = 0; j < clusters; ++j) lack[static_cast<size_t>(j)] -= taken[static_cast<size_t>(j)];
  for (int64_t i = 0; i < rows; ++i) {
    if (tied[static_cast<size_t>(i)] == 0) continue;
    const int32_t* column = problem.columns + i * problem.width;
    const float* value = problem.values + i * problem.width;
    const double best = static_cast<double>(value[std::find(column, column + problem.found[i], labels[i]) - column]) +
                        prices[labels[i]];
    for (int32_t k = 0; k < problem.found[i]; ++k)
      if (static_cast<double>(value[k]) + prices[column[k]] >= best - problem.tie &&
          (lack[static_cast<size_t>(column[k])] > lack[static_cast<size_t>(labels[i])] ||
           (lack[static_cast<size_t>(column[k])] == lack[static_cast<size_t>(labels[i])] && column[k] < labels[i])))
        labels[i] = column[k];
    lack[static_cast<size_t>(labels[i])] -= 1.0;
  }
}

Rounding::Rounding(int64_t rows, int64_t total, int32_t clusters, const double* prices, const int64_t* low,
                   const int64_t* high, int threads)
    : clusters_(clusters), threads_(threads) {
  if (rows < 0 || rows > std::numeric_limits<int32_t>::max() || clusters < 1)
    refuse("expected 0 <= rows < 2^31 and clusters >= 1, found " + std::to_string(rows) + " and " +
           std::to_string(clusters));
  price_.assign(prices, prices + clusters);
  for (double price : price_)
    if (!std::isfinite(price)) refuse("expected finite prices");
  low_.assign(low, low + clusters);
  high_.assign(high, high + clusters);
  int64_t left = total;
  for (int32_t j = 0; j < clusters; ++j) {
    if (low_[j] < 0 || high_[j] < low_[j]) refuse("expected 0 <= low <= high for cluster " + std::to_string(j));
    left -= low_[j];
  }
  // The places above `low` go to the lowest prices.
  wanted_ = low_;
  std::vector<int32_t> order(static_cast<size_t>(clusters));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return price_[a] != price_[b] ? price_[a] < price_[b] : a < b; });
  double reserve = price_[order[0]];
  for (int32_t j : order) {
    if (left <= 0 || high_[j] == low_[j]) continue;
    const int64_t more = std::min(left, high_[j] - low_[j]);
    wanted_[j] += more;
    left -= more;
    reserve = price_[j];
  }
  if (left != 0) refuse("expected sizes that sum to " + std::to_string(total));
  price_.push_back(reserve);

  size_.assign(static_cast<size_t>(clusters), 0);
  label_.assign(static_cast<size_t>(rows), -1);
  list_.resize(static_cast<size_t>(rows));
  cluster_.resize(static_cast<size_t>(clusters));
  closed_.assign(static_cast<size_t>(clusters), 0);
  const size_t nodes = static_cast<size_t>(clusters) + 1;
  distance_.assign(nodes, 0.0);
  reach_.assign(nodes, kFar);
  before_.assign(nodes, -1);
  by_edge_.assign(nodes, -1);
  by_loss_.assign(nodes, 0.0f);
  place_.assign(nodes, 0);
}

float Rounding::value(int64_t row, int32_t column) const {
  const List& list = list_[row];
  for (int64_t k = list.first; k < list.first + list.length; ++k)
    if (column_[k] == column) return value_[k];
  return std::numeric_limits<float>::quiet_NaN();
}

int32_t Rounding::find_slot(const Cluster& cluster, int32_t target) const {
  const size_t room = cluster.slots.size();
  if (room == static_cast<size_t>(clusters_)) return target;
  uint32_t place = (static_cast<uint32_t>(target) * 2654435769u) & static_cast<uint32_t>(room - 1);
  while (cluster.slots[place] >= 0 && cluster.edges[cluster.slots[place]].target != target)
    place = (place + 1) & static_cast<uint32_t>(room - 1);
  return static_cast<int32_t>(place);
}

/// Makes the table of slots at least `room` long.
void Rounding::widen(Cluster& cluster, size_t room) const {
  size_t length = 16;
  while (length < room) length *= 2;
  cluster.slots.assign(std::min(length, static_cast<size_t>(clusters_)), -1);
  for (size_t e = 0; e < cluster.edges.size(); ++e)
    cluster.slots[find_slot(cluster, cluster.edges[e].target)] = static_cast<int32_t>(e);
}

/// Makes room for rows with so many entries in their lists, and for those that arrive later.
void Rounding::reserve(Cluster& cluster, int64_t entries) const {
  const size_t edges = static_cast<size_t>(std::min<int64_t>(entries, clusters_));
  cluster.nodes.reserve(static_cast<size_t>(entries + entries / 8));
  cluster.edges.reserve(edges);
  widen(cluster, 2 * edges);
}

/// The edge to `target`, made if it is missing.
Rounding::Edge& Rounding::edge(Cluster& cluster, int32_t target) {
  if (2 * (cluster.edges.size() + 1) > cluster.slots.size() && cluster.slots.size() < static_cast<size_t>(clusters_))
    widen(cluster, 2 * cluster.slots.size());
  int32_t& slot = cluster.slots[find_slot(cluster, target)];
  if (slot < 0) {
    slot = static_cast<int32_t>(cluster.edges.size());
    cluster.edges.push_back({target, -1, std::numeric_limits<float>::infinity()});
  }
  return cluster.edges[slot];
}

/// Joins two skew heaps, the least loss on top, the lower row among equals.
int32_t Rounding::meld(std::vector<Node>& nodes, int32_t a, int32_t b) const {
  int32_t root = -1;
  int32_t* link = &root;
  while (a >= 0 && b >= 0) {
    if (nodes[b].loss < nodes[a].loss || (nodes[b].loss == nodes[a].loss && nodes[b].row < nodes[a].row))
      std::swap(a, b);
    *link = a;
    const int32_t right = nodes[a].right;
    nodes[a].right = nodes[a].left;
    link = &nodes[a].left;
    a = right;
  }
  *link = a >= 0 ? a : b;
  return root;
}

/// Enters a row of cluster `from` into the heaps of its list.
void Rounding::push(int32_t from, int64_t row) {
  Cluster& cluster = cluster_[from];
  const List& list = list_[row];
  const float mine = value(row, from);
  for (int64_t k = list.first; k < list.first + list.length; ++k) {
    if (column_[k] == from) continue;
    const int32_t node = static_cast<int32_t>(cluster.nodes.size());
    cluster.nodes.push_back({mine - value_[k], static_cast<int32_t>(row), -1, -1});
    Edge& way = edge(cluster, column_[k]);
    way.root = meld(cluster.nodes, way.root, node);
    way.loss = cluster.nodes[way.root].loss;
  }
}

/// Drops rows that are no longer in `from` from the top of a heap.
void Rounding::clean(int32_t from, Edge& way) {
  std::vector<Node>& nodes = cluster_[from].nodes;
  while (way.root >= 0 && label_[nodes[way.root].row] != from)
    way.root = meld(nodes, nodes[way.root].left, nodes[way.root].right);
  way.loss = way.root >= 0 ? nodes[way.root].loss : std::numeric_limits<float>::infinity();
}

/// Takes a row out of its cluster.
void Rounding::leave(int64_t row) {
  const int32_t from = label_[row];
  label_[row] = -1;
  --size_[from];
  Cluster& cluster = cluster_[from];
  const List& list = list_[row];
  for (int64_t k = list.first; k < list.first + list.length; ++k) {
    if (column_[k] == from || cluster.slots.empty()) continue;
    const int32_t slot = cluster.slots[find_slot(cluster, column_[k])];
    if (slot < 0) continue;
    Edge& way = cluster.edges[slot];
    if (way.root >= 0 && cluster.nodes[way.root].row == row) clean(from, way);
  }
}

/// Appends a list to the one a row has; `label` is in both.  Returns the number of columns that are new.
int64_t Rounding::merge(int64_t row, int32_t label, const int32_t* columns, const float* values, int32_t found) {
  const int32_t* at = std::find(columns, columns + found, label);
  if (at == columns + found) refuse("a list does not hold the row's label");
  const float shift = value(row, label) - values[at - columns];  // lists measure from different columns
  const List old = list_[row];
  List merged{static_cast<int64_t>(column_.size()), old.length};
  for (int64_t k = old.first; k < old.first + old.length; ++k) {
    column_.push_back(column_[k]);
    value_.push_back(value_[k]);
  }
  for (int32_t k = 0; k < found; ++k) {
    const auto start = column_.begin() + merged.first;
    if (std::find(start, start + old.length, columns[k]) != start + old.length) continue;
    column_.push_back(columns[k]);
    value_.push_back(values[k] + shift);
    ++merged.length;
  }
  list_[row] = merged;
  return merged.length - old.length;
}

int64_t Rounding::add(const int64_t* rows, int64_t count, const int32_t* labels, const int32_t* columns,
                      const float* values, const int32_t* found, int32_t width) {
  const int64_t total = static_cast<int64_t>(label_.size());
  int64_t fresh = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= total) refuse("row " + std::to_string(rows[i]) + " does not exist");
    if (found[i] < 0 || found[i] > width) refuse("a list is longer than its place");
    for (int32_t k = 0; k < found[i]; ++k)
      if (columns[i * width + k] < 0 || columns[i * width + k] >= clusters_) refuse("a list names an unknown cluster");
  }
  const int64_t entries = std::accumulate(found, found + count, int64_t{0});
  column_.reserve(column_.size() + static_cast<size_t>(entries));
  value_.reserve(value_.size() + static_cast<size_t>(entries));
  std::vector<int64_t> placed;
  placed.reserve(static_cast<size_t>(count));
  std::vector<int64_t> first_of(static_cast<size_t>(clusters_) + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (found[i] == 0) continue;
    const int64_t row = rows[i];
    const int32_t* own = columns + i * width;
    const int32_t before = label_[row], now = labels[i];
    if (std::find(own, own + found[i], now) == own + found[i]) refuse("a list does not hold the row's new label");
    if (before < 0) {
      list_[row] = {static_cast<int64_t>(column_.size()), found[i]};
      column_.insert(column_.end(), own, own + found[i]);
      value_.insert(value_.end(), values + i * width, values + i * width + found[i]);
      fresh += found[i];
    } else {
      leave(row);
      fresh += merge(row, before, own, values + i * width, found[i]);
    }
    label_[row] = now;
    ++size_[now];
    placed.push_back(row);
    ++first_of[static_cast<size_t>(now) + 1];
  }
  // Heaps of different clusters have nothing in common: each is filled by one thread, rows in their order.
  std::partial_sum(first_of.begin(), first_of.end(), first_of.begin());
  std::vector<int64_t> order(placed.size()), next(first_of.begin(), first_of.end() - 1);
  for (int64_t row : placed) order[static_cast<size_t>(next[label_[row]]++)] = row;
  constexpr int64_t kClusters = 16;  // per task
  constexpr int64_t kAhead = 6;
  parallel_blocks((clusters_ + kClusters - 1) / kClusters, threads_, [&](int64_t block, int) {
    for (int64_t j = block * kClusters; j < std::min<int64_t>((block + 1) * kClusters, clusters_); ++j) {
      int64_t entries = 0;
      for (int64_t k = first_of[j]; k < first_of[j + 1]; ++k) entries += list_[order[k]].length;
      if (cluster_[j].nodes.empty()) reserve(cluster_[j], entries);
      for (int64_t k = first_of[j]; k < first_of[j + 1]; ++k) {
        if (k + kAhead < static_cast<int64_t>(order.size())) {  // rows of a cluster lie far apart
          const int64_t first = list_[order[k + kAhead]].first;
          __builtin_prefetch(&column_[first]);
          __builtin_prefetch(&value_[first]);
        }
        push(static_cast<int32_t>(j), order[k]);
      }
    }
  });
  return fresh;
}

/// Shortest distances from all clusters with too many rows, until as many that lack rows are reached as there are
/// sources.  Fills sinks_ (nearest first) and adds the distances to the prices; false when no sink can be reached.
bool Rounding::search() {
  std::fill(reach_.begin(), reach_.end(), kFar);
  settled_.clear();
  sinks_.clear();
  queue_.clear();
  std::vector<double>& p = price_;
  const auto offer = [&](int32_t node, double distance, int32_t from, int32_t by, float loss) {
    if (!(distance + p[node] < reach_[node])) return;
    const bool known = reach_[node] < kFar;
    reach_[node] = distance + p[node];
    distance_[node] = distance;
    before_[node] = from;
    by_edge_[node] = by;
    by_loss_[node] = loss;
    if (!known) {
      place_[node] = static_cast<int32_t>(queue_.size());
      queue_.push_back(node);
    }
    rise(place_[node]);
  };
  size_t sources = 0;
  for (int32_t j = 0; j < clusters_; ++j)
    if (size_[j] > wanted_[j] && closed_[j] == 0) {
      offer(j, 0.0, -1, -1, 0.0f);
      ++sources;
    }
  double last = 0.0;
  while (!queue_.empty() && sinks_.size() < sources) {
    const int32_t node = pop();
    const double distance = distance_[node];
    reach_[node] = -kFar;  // settled: nothing is nearer
    settled_.push_back(node);
    last = distance;
    if (node == clusters_) {  // the reserve: a cluster may give a place back
      for (int32_t j = 0; j < clusters_; ++j)
        if (wanted_[j] > low_[j]) offer(j, distance + std::max(0.0, p[clusters_] - p[j]), node, -1, 0.0f);
      continue;
    }
    if (size_[node] < wanted_[node]) sinks_.push_back(node);
    const Cluster& cluster = cluster_[node];
    const double base = distance + p[node];
    for (size_t e = 0; e < cluster.edges.size(); ++e) {
      const Edge& way = cluster.edges[e];
      const double at = base + static_cast<double>(way.loss);
      // A length below 0 is rounding, or a list of a row that is not at its best: the next read shows it.
      if (at < reach_[way.target])
        offer(way.target, std::max(distance, at - p[way.target]), node, static_cast<int32_t>(e), way.loss);
    }
    if (wanted_[node] < high_[node]) offer(clusters_, distance + std::max(0.0, p[node] - p[clusters_]), node, -1, 0.0f);
  }
  if (sinks_.empty()) return false;
  for (int32_t node : settled_) price_[node] -= last - distance_[node];
  return true;
}

/// The queue of a search: a heap of nodes by distance, the lowest node among equals, that knows where each node is.
bool Rounding::nearer(int32_t a, int32_t b) const {
  return distance_[a] < distance_[b] || (distance_[a] == distance_[b] && a < b);
}

void Rounding::rise(int32_t place) {
  const int32_t node = queue_[place];
  while (place > 0) {
    const int32_t above = (place - 1) / 4;
    if (!nearer(node, queue_[above])) break;
    queue_[place] = queue_[above];
    place_[queue_[place]] = place;
    place = above;
  }
  queue_[place] = node;
  place_[node] = place;
}

int32_t Rounding::pop() {
  const int32_t top = queue_.front(), node = queue_.back();
  queue_.pop_back();
  const int32_t count = static_cast<int32_t>(queue_.size());
  if (count == 0) return top;
  int32_t place = 0;
  for (;;) {
    int32_t best = -1;
    for (int32_t below = 4 * place + 1; below < std::min(4 * place + 5, count); ++below)
      if (best < 0 || nearer(queue_[below], queue_[best])) best = below;
    if (best < 0 || !nearer(queue_[best], node)) break;
    queue_[place] = queue_[best];
    place_[queue_[place]] = place;
    place = best;
  }
  queue_[place] = node;
  place_[node] = place;
  return top;
}

/// Moves one row along every edge of the path that ends at `sink`; false, and nothing is moved, when the path has been
/// spoiled by an earlier one of the same search.
bool Rounding::take_path(int32_t sink) {
  if (size_[sink] >= wanted_[sink]) return false;
  moves_.clear();  // row, to: all chosen before the first one changes a heap
  int32_t node = sink;
  for (; before_[node] >= 0; node = before_[node]) {
    const int32_t from = before_[node];
    if (from == clusters_) {
      if (wanted_[node] <= low_[node]) return false;
    } else if (node == clusters_) {
      if (wanted_[from] >= high_[from]) return false;
    } else {
      const Edge& way = cluster_[from].edges[by_edge_[node]];
      if (way.loss != by_loss_[node]) return false;
      moves_.push_back({cluster_[from].nodes[way.root].row, node});
    }
  }
  if (size_[node] <= wanted_[node]) return false;
  for (node = sink; before_[node] >= 0; node = before_[node]) {
    if (before_[node] == clusters_) --wanted_[node];
    if (node == clusters_) ++wanted_[before_[node]];
  }
  for (const auto& [row, to] : moves_) {
    leave(row);
    label_[row] = to;
    ++size_[to];
    push(to, row);
  }
  ++paths_;
  return true;
}

int64_t Rounding::solve() {
  std::fill(closed_.begin(), closed_.end(), uint8_t{0});
  for (;;) {
    bool over = false;
    for (int32_t j = 0; j < clusters_; ++j) over = over || (size_[j] > wanted_[j] && closed_[j] == 0);
    if (!over) break;
    if (search()) {
      for (int32_t sink : sinks_)
        while (take_path(sink)) {
        }
      continue;
    }
    for (int32_t node : settled_)
      if (node < clusters_) closed_[node] = 1;
  }
  int64_t left = 0;
  for (int32_t j = 0; j < clusters_; ++j) left += std::max<int64_t>(0, size_[j] - wanted_[j]);
  return left;
}

int64_t Rounding::force() {
  std::vector<int64_t> over(static_cast<size_t>(clusters_), 0);
  for (int32_t j = 0; j < clusters_; ++j) over[j] = std::max<int64_t>(0, size_[j] - wanted_[j]);
  int32_t to = 0;
  int64_t moved = 0;
  for (size_t row = 0; row < label_.size(); ++row) {
    const int32_t from = label_[row];
    if (from < 0 || over[from] == 0) continue;
    while (to < clusters_ && size_[to] >= wanted_[to]) ++to;
    if (to == clusters_) break;
    --over[from];
    leave(static_cast<int64_t>(row));
    label_[row] = to;  // in no heap of its new cluster: it stays there
    ++size_[to];
    ++moved;
  }
  return moved;
}

}  // namespace sela
