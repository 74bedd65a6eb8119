// Candidates of several parts of a matrix, put together.
#include "sela/candidates.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace sela {
namespace {

template <class T>
void move_behind(std::vector<T>& to, std::vector<T>& from) {
  if (to.empty())
    to.swap(from);
  else
    to.insert(to.end(), from.begin(), from.end());
  from = std::vector<T>();
}

}  // namespace

void Candidates::append(Candidates&& other) {
  if (other.cols != cols)
    throw std::invalid_argument("Candidates: expected another part with " + std::to_string(cols) + " columns, found " +
                                std::to_string(other.cols));
  if (!overflow && !other.overflow && rows > 0 && other.rows > 0 && weights.empty() != other.weights.empty())
    throw std::invalid_argument("Candidates: one part has row weights, the other has none");
  const int64_t entries = static_cast<int64_t>(values.size() + other.values.size());
  rows += other.rows;
  overflow = overflow || other.overflow || entries > limit;
  if (overflow) {
    for (Candidates* part : {this, &other}) {
      part->offsets = std::vector<int64_t>();
      part->narrow = std::vector<uint16_t>();
      part->wide = std::vector<uint32_t>();
      part->values = part->weights = std::vector<float>();
    }
    return;
  }
  const int64_t before = static_cast<int64_t>(values.size());
  if (offsets.empty()) offsets.push_back(0);
  for (size_t r = 1; r < other.offsets.size(); ++r) offsets.push_back(before + other.offsets[r]);
  other.offsets = std::vector<int64_t>();
  move_behind(narrow, other.narrow);
  move_behind(wide, other.wide);
  move_behind(values, other.values);
  move_behind(weights, other.weights);
}

}  // namespace sela
