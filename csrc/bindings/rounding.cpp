// The candidate search, by addresses, and the transport problem as a class: sela_ext.kernels has checked shapes and
// types before.
#include "sela/rounding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace py = pybind11;

namespace sela {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

/// A search as both CPU and device are asked for, by addresses; prices are apart.
CandidateSearch search_of(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                          double scale, std::uintptr_t labels, std::uintptr_t selected, int64_t selected_count) {
  CandidateSearch search;
  search.logits = pointer<const void>(logits);
  search.type = logits_type(type);
  search.rows = rows;
  search.cols = cols;
  search.stride = stride;
  search.scale = scale;
  search.labels = pointer<const int32_t>(labels);
  search.selected = pointer<const int64_t>(selected);
  search.selected_count = selected_count;
  return search;
}

/// The lists that it fills.
CandidateLists lists_of(std::uintptr_t columns, std::uintptr_t values, std::uintptr_t found, std::uintptr_t regret) {
  CandidateLists lists;
  lists.columns = pointer<int32_t>(columns);
  lists.values = pointer<float>(values);
  lists.found = pointer<int32_t>(found);
  lists.regret = pointer<float>(regret);
  return lists;
}

/// What a list holds, and of which rows.
void bound(CandidateSearch& search, int64_t first_row, int32_t count, float slack, float floor, float tie) {
  search.first_row = first_row;
  search.count = count;
  search.slack = slack;
  search.floor = floor;
  search.tie = tie;
}

void find_candidates(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                     double scale, std::uintptr_t prices, std::uintptr_t label_prices, std::uintptr_t bonus,
                     std::uintptr_t labels, std::uintptr_t selected, int64_t selected_count, int32_t count, float slack,
                     float floor, float tie, std::uintptr_t columns, std::uintptr_t values, std::uintptr_t found,
                     std::uintptr_t regret, int threads, const std::string& isa, int64_t first_row) {
  CandidateSearch search = search_of(logits, type, rows, cols, stride, scale, labels, selected, selected_count);
  search.prices = pointer<const double>(prices);
  search.label_prices = pointer<const double>(label_prices);
  search.bonus = pointer<const double>(bonus);
  bound(search, first_row, count, slack, floor, tie);
  const CandidateLists lists = lists_of(columns, values, found, regret);
  const Isa chosen = isa_of(isa);
  const py::gil_scoped_release release;
  find_candidates_cpu(search, lists, threads, chosen);
}

Floats column_margins(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                      double scale, const Doubles& prices, const Ints& labels, const Longs& selected, int threads,
                      const std::string& isa) {
  if (prices.size() != cols || labels.size() != rows)
    throw std::invalid_argument("column_margins: expected prices [K] and labels [N]");
  const auto address = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data); };
  CandidateSearch search = search_of(logits, type, rows, cols, stride, scale, address(labels.data()),
                                     address(selected.data()), selected.size());
  search.prices = prices.data();
  const Isa chosen = isa_of(isa);
  Floats margins({static_cast<py::ssize_t>(kColumnMargins), static_cast<py::ssize_t>(cols)});
  float* out = margins.mutable_data();
  const py::gil_scoped_release release;
  column_margins_cpu(search, out, threads, chosen);
  return margins;
}

void candidates_on_device(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                          double scale, std::uintptr_t prices, std::uintptr_t label_prices, std::uintptr_t bonus,
                          std::uintptr_t labels, std::uintptr_t selected, int64_t selected_count, int32_t count,
                          float slack, float floor, float tie, std::uintptr_t columns, std::uintptr_t values,
                          std::uintptr_t found, std::uintptr_t regret, int64_t first_row, std::uintptr_t stream) {
  CandidateSearch search = search_of(logits, type, rows, cols, stride, scale, labels, selected, selected_count);
  bound(search, first_row, count, slack, floor, tie);
  const DevicePrices device{pointer<const void>(prices), pointer<const void>(label_prices),
                            pointer<const float>(bonus)};
  const CandidateLists lists = lists_of(columns, values, found, regret);
  const py::gil_scoped_release release;
  find_candidates_cuda(search, device, lists, pointer<void>(stream));
}

void margins_on_device(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                       double scale, std::uintptr_t prices, std::uintptr_t labels, std::uintptr_t selected,
                       int64_t selected_count, std::uintptr_t margins, std::uintptr_t scratch, std::uintptr_t stream) {
  const CandidateSearch search = search_of(logits, type, rows, cols, stride, scale, labels, selected, selected_count);
  const DevicePrices device{pointer<const void>(prices), nullptr, nullptr};
  const py::gil_scoped_release release;
  column_margins_cuda(search, device, pointer<float>(margins), pointer<void>(scratch), pointer<void>(stream));
}

py::tuple smooth_prices(const Ints& columns, const Floats& values, const Ints& found, const Doubles& wanted,
                        const Doubles& prices, const Ints& labels, const std::vector<std::pair<double, int>>& stages,
                        double relaxation, double tolerance, double tie, int threads, const std::string& isa) {
  const int64_t rows = found.size();
  const int32_t clusters = static_cast<int32_t>(prices.size());
  if (columns.ndim() != 2 || values.ndim() != 2 || columns.shape(0) != rows || values.shape(0) != rows ||
      values.shape(1) != columns.shape(1) || wanted.size() != clusters || labels.size() != rows)
    throw std::invalid_argument(
        "smooth_prices: expected lists [n, width], found and labels [n], wanted and prices [K]");
  const int32_t width = static_cast<int32_t>(columns.shape(1));
  for (int64_t i = 0; i < rows; ++i)
    for (int32_t k = 0; k < found.data()[i]; ++k)
      if (found.data()[i] > width || columns.data()[i * width + k] < 0 || columns.data()[i * width + k] >= clusters)
        throw std::invalid_argument("smooth_prices: a list is too long or names an unknown cluster");
  SmoothProblem problem;
  problem.rows = rows;
  problem.width = width;
  problem.columns = columns.data();
  problem.values = values.data();
  problem.found = found.data();
  problem.clusters = clusters;
  problem.wanted = wanted.data();
  problem.relaxation = relaxation;
  problem.tolerance = tolerance;
  problem.tie = tie;
  for (const auto& [sharpness, iterations] : stages) problem.stages.push_back({sharpness, iterations});
  const Isa chosen = isa_of(isa);
  py::array_t<double> new_prices(clusters, prices.data());
  py::array_t<int32_t> new_labels(rows, labels.data());
  double* price = new_prices.mutable_data();
  int32_t* label = new_labels.mutable_data();
  {
    const py::gil_scoped_release release;
    smooth_prices_cpu(problem, price, label, threads, chosen);
  }
  return py::make_tuple(new_prices, new_labels);
}

Rounding make_rounding(int64_t rows, int64_t total, const Doubles& prices, const Longs& low, const Longs& high,
                       int threads) {
  if (low.size() != prices.size() || high.size() != prices.size())
    throw std::invalid_argument("rounding: expected as many sizes as prices");
  return Rounding(rows, total, static_cast<int32_t>(prices.size()), prices.data(), low.data(), high.data(), threads);
}

int64_t add(Rounding& rounding, const Longs& rows, const Ints& labels, const Ints& columns, const Floats& values,
            const Ints& found) {
  const int64_t count = rows.size();
  if (columns.ndim() != 2 || values.ndim() != 2 || columns.shape(0) != count || values.shape(0) != count ||
      values.shape(1) != columns.shape(1) || found.size() != count || labels.size() != count)
    throw std::invalid_argument("rounding: expected columns and values [n, width], rows, labels and found [n]");
  const int64_t* row = rows.data();
  const int32_t *label = labels.data(), *column = columns.data(), *length = found.data();
  const float* value = values.data();
  const int32_t width = static_cast<int32_t>(columns.shape(1));
  const py::gil_scoped_release release;
  return rounding.add(row, count, label, column, value, length, width);
}

template <class T>
py::array_t<T> copied(const T* data, int64_t count) {
  return py::array_t<T>(count, data);
}

}  // namespace

void bind_rounding(py::module_& m) {
  m.def("find_candidates_cpu", &find_candidates, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("scale"), py::arg("prices"), py::arg("label_prices"), py::arg("bonus"),
        py::arg("labels"), py::arg("selected"), py::arg("selected_count"), py::arg("count"), py::arg("slack"),
        py::arg("floor"), py::arg("tie"), py::arg("columns"), py::arg("values"), py::arg("found"), py::arg("regret"),
        py::arg("threads"), py::arg("isa"), py::arg("first_row"),
        "The best columns of rows, by addresses (selected: 0 = all rows).");

  m.def("column_margins_cpu", &column_margins, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("scale"), py::arg("prices"), py::arg("labels"), py::arg("selected"),
        py::arg("threads"), py::arg("isa"), "The four smallest losses of each column among rows.");

  m.def("find_candidates_cuda", &candidates_on_device, py::arg("logits"), py::arg("type"), py::arg("rows"),
        py::arg("cols"), py::arg("stride"), py::arg("scale"), py::arg("prices"), py::arg("label_prices"),
        py::arg("bonus"), py::arg("labels"), py::arg("selected"), py::arg("selected_count"), py::arg("count"),
        py::arg("slack"), py::arg("floor"), py::arg("tie"), py::arg("columns"), py::arg("values"), py::arg("found"),
        py::arg("regret"), py::arg("first_row"), py::arg("stream"),
        "The best columns of rows on the current CUDA device, by device addresses (selected: 0 = all rows).");

  m.def("column_margins_workspace_cuda", &column_margins_workspace_cuda, py::arg("selected_count"), py::arg("cols"),
        "Bytes of device memory that column_margins_cuda needs.");

  m.def("column_margins_cuda", &margins_on_device, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("scale"), py::arg("prices"), py::arg("labels"), py::arg("selected"),
        py::arg("selected_count"), py::arg("margins"), py::arg("scratch"), py::arg("stream"),
        "The four smallest losses of each column on the current CUDA device, by device addresses.");

  m.def("smooth_prices", &smooth_prices, py::arg("columns"), py::arg("values"), py::arg("found"), py::arg("wanted"),
        py::arg("prices"), py::arg("labels"), py::arg("stages"), py::arg("relaxation"), py::arg("tolerance"),
        py::arg("tie"), py::arg("threads"), py::arg("isa"),
        "Sharp Sinkhorn iterations on lists; returns new prices, and the labels at them.");

  py::class_<Rounding>(m, "Rounding", py::module_local(), "Labels of admissible cluster sizes from candidate lists.")
      .def(py::init(&make_rounding), py::arg("rows"), py::arg("total"), py::arg("prices"), py::arg("low"),
           py::arg("high"), py::arg("threads"))
      .def("add", &add, py::arg("rows"), py::arg("labels"), py::arg("columns"), py::arg("values"), py::arg("found"),
           "Adds lists; returns how many columns are new to their row.")
      .def("solve", &Rounding::solve, py::call_guard<py::gil_scoped_release>(),
           "Moves rows to admissible sizes; returns how many are left over.")
      .def("force", &Rounding::force, py::call_guard<py::gil_scoped_release>(),
           "Places what is left over regardless of the logits; returns how many rows.")
      .def(
          "labels",
          [](const Rounding& r) { return copied(r.labels().data(), static_cast<int64_t>(r.labels().size())); },
          "Labels [rows], -1 for rows that take no part.")
      .def(
          "prices", [](const Rounding& r) { return copied(r.prices(), static_cast<int64_t>(r.sizes().size())); },
          "Prices [clusters], nats.")
      .def(
          "sizes", [](const Rounding& r) { return copied(r.sizes().data(), static_cast<int64_t>(r.sizes().size())); },
          "Rows per cluster.")
      .def(
          "wanted",
          [](const Rounding& r) { return copied(r.wanted().data(), static_cast<int64_t>(r.wanted().size())); },
          "Sizes that are aimed at.")
      .def(
          "closed",
          [](const Rounding& r) { return copied(r.closed().data(), static_cast<int64_t>(r.closed().size())); },
          "Clusters from which no list leads to one that lacks images.")
      .def("paths", &Rounding::paths, "Paths taken so far.");
}

}  // namespace sela
