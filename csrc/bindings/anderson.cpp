// Accelerated Sinkhorn iterations: sela_ext.kernels has checked shapes, types and sizes before.
#include "sela/anderson.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace py = pybind11;

namespace sela {
namespace {

using Vector = py::array_t<double, py::array::c_style>;

std::vector<double> vector_of(const Vector& values) {
  return std::vector<double>(values.data(), values.data() + values.size());
}

Vector next(const Vector& residual, const Vector& steps, const Vector& changes, double cap) {
  if (residual.ndim() != 1 || steps.ndim() != 2 || changes.ndim() != 2 || steps.shape(0) != changes.shape(0) ||
      steps.shape(1) != residual.size() || changes.shape(1) != residual.size())
    throw std::invalid_argument("anderson_next: expected a residual [K], and steps and changes [m, K]");
  Vector out(residual.size());
  anderson_next(residual.data(), steps.data(), changes.data(), static_cast<int>(steps.shape(0)), residual.size(), cap,
                out.mutable_data());
  return out;
}

py::tuple columns_at(const Vector& columns, double weight, const Vector& target, const Vector& potential) {
  if (columns.size() != target.size() || potential.size() != target.size())
    throw std::invalid_argument("column_state: expected column sums, a target and a potential [K]");
  Vector shares(columns.size()), logs(columns.size());
  const ColumnState state = column_state(columns.data(), weight, target.data(), potential.data(), columns.size(),
                                         shares.mutable_data(), logs.mutable_data());
  return py::make_tuple(shares, logs, state.error, state.pulled);
}

Vector centred(const Vector& x, const Vector& target) {
  if (x.size() != target.size()) throw std::invalid_argument("centred: expected two vectors [K]");
  Vector out(x.size(), x.data());
  centre(out.mutable_data(), target.data(), out.size());
  return out;
}

py::dict solve(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride, double scale,
               std::uintptr_t row_weights, double largest_weight, std::uintptr_t maxima, double maxima_scale,
               const std::optional<py::array>& reference, const Vector& target, const Vector& log_target,
               const Vector& potential, const Vector& residual, double error, const Vector& steps,
               const Vector& changes, double tolerance, int64_t passes, int memory, double cap, double restart,
               int64_t patience, double faint, int threads, const std::string& isa) {
  const bool is_double = type == "float64";
  if (target.size() != cols || log_target.size() != cols || potential.size() != cols || residual.size() != cols ||
      steps.size() != changes.size())
    throw std::invalid_argument("anderson: expected a target, a potential and a residual [cols]");
  SinkhornPass pass;
  pass.logits = reinterpret_cast<const void*>(logits);
  pass.type = type == "fixed16" ? LogitsType::fixed16 : logits_type(type);
  pass.rows = rows;
  pass.cols = cols;
  pass.stride = stride;
  pass.scale = scale;
  pass.row_weights = reinterpret_cast<const float*>(row_weights);
  pass.largest_weight = largest_weight;
  pass.maxima = reinterpret_cast<const float*>(maxima);
  pass.maxima_scale = maxima_scale;
  pass.rows_in_all = rows;

  const auto numbers = [&]() -> py::array {
    if (is_double) return py::array_t<double>(rows);
    return py::array_t<float>(rows);
  };
  py::array lse = numbers(), before = numbers();
  if (reference && (reference->size() != rows || reference->itemsize() != before.itemsize()))
    throw std::invalid_argument("anderson: expected a reference [rows] of the type of lse");
  if (reference)
    std::copy_n(static_cast<const char*>(reference->data()), before.nbytes(),
                static_cast<char*>(before.mutable_data()));
  py::array_t<int32_t> labels(rows);
  py::array_t<int64_t> exact(cols + 2 * kSinkhornWords + 1);
  int64_t* words = exact.mutable_data() + cols;

  AndersonOptions options;
  options.target = target.data();
  options.log_target = log_target.data();
  options.tolerance = tolerance;
  options.passes = passes;
  options.memory = memory;
  options.cap = cap;
  options.restart = restart;
  options.patience = patience;
  options.faint = faint;
  AndersonState state;
  state.potential = vector_of(potential);
  state.residual = vector_of(residual);
  state.error = error;
  state.steps = vector_of(steps);
  state.changes = vector_of(changes);
  SinkhornSums sums;
  sums.column_sums = exact.mutable_data();
  sums.lse = lse.mutable_data();
  sums.labels = labels.mutable_data();
  void* from = reference ? before.mutable_data() : nullptr;
  const Isa chosen = isa_of(isa);
  {
    const py::gil_scoped_release release;
    anderson_cpu(pass, options, state, sums, from, words, threads, chosen);
  }
  words[2 * kSinkhornWords] = sums.masked;
  const auto array = [](const std::vector<double>& values) {
    return Vector(static_cast<py::ssize_t>(values.size()), values.data());
  };
  py::dict found;
  found["converged"] = state.converged;
  found["potential"] = array(state.potential);
  found["best"] = array(state.best);
  found["errors"] = array(state.errors);
  found["objectives"] = array(state.objectives);
  found["seconds"] = array(state.seconds);
  found["exact"] = exact;
  found["lse"] = lse;
  found["labels"] = labels;
  found["live"] = sums.live;
  return found;
}

}  // namespace

void bind_anderson(py::module_& m) {
  m.def(
      "anderson_next", &next, py::arg("residual"), py::arg("steps"), py::arg("changes"), py::arg("cap"),
      "The accelerated step from a residual [K], with steps and changes [m, K] behind it, of at most cap nats or so.");
  m.def("column_state", &columns_at, py::arg("columns"), py::arg("weight"), py::arg("target"), py::arg("potential"),
        "What column sums come to: (shares, their logarithms, error, target . potential).");
  m.def("centred", &centred, py::arg("x"), py::arg("target"), "x, shifted so that target . x = 0.");
  m.def("anderson_cpu", &solve, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"), py::arg("stride"),
        py::arg("scale"), py::arg("row_weights"), py::arg("largest_weight"), py::arg("maxima"), py::arg("maxima_scale"),
        py::arg("reference"), py::arg("target"), py::arg("log_target"), py::arg("potential"), py::arg("residual"),
        py::arg("error"), py::arg("steps"), py::arg("changes"), py::arg("tolerance"), py::arg("passes"),
        py::arg("memory"), py::arg("cap"), py::arg("restart"), py::arg("patience"), py::arg("faint"),
        py::arg("threads"), py::arg("isa"),
        "Many passes with Anderson's acceleration, by addresses (0 = absent); see csrc/sela/anderson.h.");
}

}  // namespace sela
