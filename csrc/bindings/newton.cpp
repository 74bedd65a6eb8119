// Candidates of a pass and Newton's method on them: sela_ext.kernels has checked sizes before.
#include "sela/newton.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace py = pybind11;

namespace sela {
namespace {

using Vector = py::array_t<double, py::array::c_style>;
using Plan = py::array_t<float, py::array::c_style>;

template <class T>
py::array_t<T> copied(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

const double* vector_of(const char* name, const Vector& value, int64_t length) {
  if (value.ndim() != 1 || value.shape(0) != length)
    throw std::invalid_argument(std::string(name) + ": expected shape [" + std::to_string(length) + "]");
  return value.data();
}

template <class T>
std::vector<T> vector_copy(const py::array_t<T, py::array::c_style | py::array::forcecast>& values) {
  return std::vector<T>(values.data(), values.data() + values.size());
}

std::unique_ptr<Candidates> candidates_of(
    const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& offsets,
    const py::array_t<uint32_t, py::array::c_style | py::array::forcecast>& columns,
    const py::array_t<float, py::array::c_style | py::array::forcecast>& values,
    const py::array_t<float, py::array::c_style | py::array::forcecast>& weights, int64_t cols, double level,
    int64_t limit) {
  auto made = std::make_unique<Candidates>();
  made->level = level;
  made->limit = limit;
  made->cols = cols;
  made->offsets = vector_copy(offsets);
  const std::vector<int64_t>& o = made->offsets;
  bool fits = !o.empty() && o.front() == 0 && o.back() == columns.size() && columns.size() == values.size();
  for (size_t r = 1; fits && r < o.size(); ++r) fits = o[r] >= o[r - 1];
  for (py::ssize_t e = 0; fits && e < columns.size(); ++e) fits = columns.data()[e] < cols;
  made->rows = static_cast<int64_t>(o.size()) - 1;
  fits = fits && (weights.size() == 0 || weights.size() == made->rows);
  if (!fits) throw std::invalid_argument("Candidates: offsets, columns, values and weights do not fit together");
  if (cols <= kNarrowColumns)
    made->narrow.assign(columns.data(), columns.data() + columns.size());
  else
    made->wide = vector_copy(columns);
  made->values = vector_copy(values);
  made->weights = vector_copy(weights);
  return made;
}

py::tuple sums(const NewtonRows& rows, double ratio, const Vector& d, int threads, const std::string& isa) {
  const Isa chosen = isa_of(isa);
  const double* point = vector_of("d", d, rows.cols());
  NewtonSums found;
  Plan plan(rows.entries());
  float* out = plan.mutable_data();
  {
    const py::gil_scoped_release release;
    newton_sums(rows, ratio, point, found, out, threads, chosen);
  }
  return py::make_tuple(copied(found.columns), copied(found.diagonal), found.objective, plan);
}

void prune(NewtonRows& rows, const Plan& plan, double level) {
  if (plan.ndim() != 1 || plan.shape(0) != rows.entries())
    throw std::invalid_argument("plan: expected shape [" + std::to_string(rows.entries()) + "]");
  rows.prune(plan.data(), level);
}

Vector product(const NewtonRows& rows, const Plan& plan, const Vector& x, int threads, const std::string& isa) {
  const Isa chosen = isa_of(isa);
  const double* from = vector_of("x", x, rows.cols());
  if (plan.ndim() != 1 || plan.shape(0) != rows.entries())
    throw std::invalid_argument("plan: expected shape [" + std::to_string(rows.entries()) + "]");
  Vector out(rows.cols());
  double* to = out.mutable_data();
  const float* entries = plan.data();
  {
    const py::gil_scoped_release release;
    newton_product(rows, entries, from, to, threads, chosen);
  }
  return out;
}

using OptionalVector = std::optional<Vector>;

py::tuple solve(NewtonRows& rows, const Vector& target, const Vector& defect, const Vector& d, double ratio,
                double tolerance, int steps, int products, double clip, double reach, double prune, int threads,
                const std::string& isa, const OptionalVector& offset, double strength, const OptionalVector& low,
                const OptionalVector& high) {
  const Isa chosen = isa_of(isa);
  NewtonOptions options;
  options.ratio = ratio;
  options.tolerance = tolerance;
  options.steps = steps;
  options.products = products;
  options.clip = clip;
  options.reach = reach;
  options.prune = prune;
  options.threads = threads;
  const auto given = [&](const char* name, const OptionalVector& value) {
    return value ? vector_of(name, *value, rows.cols()) : nullptr;
  };
  NewtonColumns columns;
  columns.target = vector_of("target", target, rows.cols());
  columns.defect = vector_of("defect", defect, rows.cols());
  columns.offset = given("offset", offset);
  columns.strength = strength;
  columns.low = given("low", low);
  columns.high = given("high", high);
  Vector solution(rows.cols(), vector_of("d", d, rows.cols()));
  double* point = solution.mutable_data();
  NewtonResult result;
  {
    const py::gil_scoped_release release;
    result = newton_solve(rows, columns, point, options, chosen);
  }
  return py::make_tuple(solution, result.error, result.steps, result.products, result.sums, result.stalled);
}

}  // namespace

void bind_newton(py::module_& m) {
  py::class_<Candidates>(m, "Candidates", py::module_local(),
                         "The entries of a plan that count, row by row, as one pass found them.")
      .def(py::init([](double level, int64_t limit) {
             auto made = std::make_unique<Candidates>();
             made->level = level;
             made->limit = limit;
             return made;
           }),
           py::kw_only(), py::arg("level"), py::arg("limit"))
      .def_static("of", &candidates_of, py::kw_only(), py::arg("offsets"), py::arg("columns"), py::arg("values"),
                  py::arg("weights"), py::arg("cols"), py::arg("level"), py::arg("limit"),
                  "Candidates from arrays as the methods below return them; checks them.")
      .def(
          "append", [](Candidates& c, Candidates& other) { c.append(std::move(other)); }, py::arg("other"),
          "Adds the rows of another part behind these, and empties it.")
      .def_readonly("cols", &Candidates::cols)
      .def_readonly("level", &Candidates::level)
      .def_readonly("limit", &Candidates::limit)
      .def_readonly("overflow", &Candidates::overflow)
      .def_readonly("rows", &Candidates::rows)
      .def_property_readonly("entries", [](const Candidates& c) { return c.values.size(); })
      .def(
          "offsets", [](const Candidates& c) { return copied(c.offsets); }, "int64 [rows + 1].")
      .def(
          "columns",
          [](const Candidates& c) { return c.wide.empty() ? py::array(copied(c.narrow)) : py::array(copied(c.wide)); },
          "uint16 or uint32 [entries].")
      .def(
          "values", [](const Candidates& c) { return copied(c.values); }, "float32 [entries]: log p.")
      .def("weights", [](const Candidates& c) { return copied(c.weights); }, "float32 [rows], or empty: all 1.");
  py::class_<NewtonRows>(m, "NewtonRows", py::module_local(), "Candidates in the form that Newton's method works on.")
      .def(py::init([](Candidates& candidates) { return std::make_unique<NewtonRows>(std::move(candidates)); }),
           py::arg("candidates"), "Takes the arrays out of the candidates, which are empty afterwards.")
      .def_property_readonly("cols", &NewtonRows::cols)
      .def_property_readonly("rows", &NewtonRows::rows)
      .def_property_readonly("entries", &NewtonRows::entries)
      .def_property_readonly("weight", &NewtonRows::weight)
      .def(
          "counts", [](const NewtonRows& r) { return copied(r.counts()); }, "float64 [K]: weight of single rows.")
      .def("sums", &sums, py::arg("ratio"), py::arg("d"), py::arg("threads"), py::arg("isa"),
           "Column sums, diagonal of the Hessian, objective and plan at d.")
      .def("prune", &prune, py::arg("plan"), py::arg("level"), "Drops the entries of at most exp(-level) in a plan.")
      .def("product", &product, py::arg("plan"), py::arg("x"), py::arg("threads"), py::arg("isa"),
           "The Hessian at a plan times x.")
      .def("solve", &solve, py::arg("target"), py::arg("defect"), py::arg("d"), py::arg("ratio"), py::arg("tolerance"),
           py::arg("steps"), py::arg("products"), py::arg("clip"), py::arg("reach"), py::arg("prune"),
           py::arg("threads"), py::arg("isa"), py::arg("offset") = py::none(), py::arg("strength") = 0.0,
           py::arg("low") = py::none(), py::arg("high") = py::none(),
           "Newton's method from d: d, error, steps, products, sums, stalled.");
}

}  // namespace sela
