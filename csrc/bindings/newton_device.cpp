// Newton's method on a CUDA device, by addresses: sela_ext.kernels has checked shapes, types and devices before.
#include "sela/newton_device.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace sela {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

/// Addresses of offsets, columns, values and weights; rows, columns and entries; units.
using Rows = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, double>;
/// Addresses of column sums, totals and plan.
using Sums = std::tuple<Address, Address, Address>;
/// Addresses of target, defect, offset, low and high; strength.
using Columns = std::tuple<Address, Address, Address, Address, Address, double>;

NewtonDeviceRows rows_of(const Rows& given) {
  const auto& [offsets, columns, values, weights, rows, cols, entries, units] = given;
  return {pointer<const int64_t>(offsets),
          pointer<const int32_t>(columns),
          pointer<const float>(values),
          pointer<const float>(weights),
          rows,
          cols,
          entries,
          units};
}

NewtonDeviceSums sums_of(const Sums& given) {
  const auto& [columns, totals, plan] = given;
  return {pointer<int64_t>(columns), pointer<double>(totals), pointer<float>(plan)};
}

void count(const Rows& rows, Address plan, double level, Address kept, Address counts, Address stream) {
  const py::gil_scoped_release release;
  newton_count_cuda(rows_of(rows), pointer<const float>(plan), level, pointer<int64_t>(kept), pointer<int64_t>(counts),
                    pointer<void>(stream));
}

void compact(const Rows& rows, Address plan, double level, Address ends, Address offsets, Address columns,
             Address values, Address weights, Address stream) {
  const py::gil_scoped_release release;
  newton_compact_cuda(rows_of(rows), pointer<const float>(plan), level, pointer<const int64_t>(ends),
                      pointer<int64_t>(offsets), pointer<int32_t>(columns), pointer<float>(values),
                      pointer<float>(weights), pointer<void>(stream));
}

void sums(const Rows& rows, double ratio, Address d, const Sums& out, Address stream) {
  const py::gil_scoped_release release;
  newton_sums_cuda(rows_of(rows), ratio, pointer<const double>(d), sums_of(out), pointer<void>(stream));
}

void product(const Rows& rows, Address x, double largest, const Sums& out, Address stream) {
  const py::gil_scoped_release release;
  newton_product_cuda(rows_of(rows), pointer<const double>(x), largest, sums_of(out), pointer<void>(stream));
}

void rounds(const Rows& rows, const Columns& columns, Address counts, double weight, double total, double ratio,
            double tolerance, int64_t steps, int64_t products, double clip, double reach, bool want_plan,
            Address vectors, Address state, const Sums& out, int64_t count, Address stream) {
  NewtonDeviceSolve solve;
  const auto& [target, defect, offset, low, high, strength] = columns;
  solve.columns = {pointer<const double>(target), pointer<const double>(defect),
                   pointer<const double>(offset), strength,
                   pointer<const double>(low),    pointer<const double>(high)};
  solve.counts = pointer<const int64_t>(counts);
  solve.weight = weight;
  solve.total = total;
  solve.ratio = ratio;
  solve.tolerance = tolerance;
  solve.steps = steps;
  solve.products = products;
  solve.clip = clip;
  solve.reach = reach;
  solve.want_plan = want_plan;
  solve.vectors = pointer<double>(vectors);
  solve.state = pointer<NewtonState>(state);
  const py::gil_scoped_release release;
  newton_rounds_cuda(rows_of(rows), solve, sums_of(out), count, pointer<void>(stream));
}

}  // namespace

void bind_newton_device(py::module_& m) {
  m.attr("NEWTON_TILE_ROWS") = kNewtonTileRows;
  m.attr("NEWTON_VECTORS") = static_cast<int>(kNewtonVectors);
  m.attr("NEWTON_POINT") = static_cast<int>(kNewtonPoint);
  m.attr("NEWTON_PER_POINT") = static_cast<int>(kNewtonPerPoint);
  m.def("newton_count_cuda", &count, py::arg("rows"), py::arg("plan"), py::arg("level"), py::arg("kept"),
        py::arg("counts"), py::arg("stream"),
        "Entries that remain per row, and rows with a single one counted, by device addresses.");
  m.def("newton_compact_cuda", &compact, py::arg("rows"), py::arg("plan"), py::arg("level"), py::arg("ends"),
        py::arg("offsets"), py::arg("columns"), py::arg("values"), py::arg("weights"), py::arg("stream"),
        "The rows of the entries that remain, by device addresses.");
  m.def("newton_sums_cuda", &sums, py::arg("rows"), py::arg("ratio"), py::arg("d"), py::arg("sums"), py::arg("stream"),
        "Sums over candidates at d, by device addresses.");
  m.def("newton_product_cuda", &product, py::arg("rows"), py::arg("x"), py::arg("largest"), py::arg("sums"),
        py::arg("stream"), "The Hessian at a plan times x, by device addresses.");
  m.def("newton_rounds_cuda", &rounds, py::arg("rows"), py::arg("columns"), py::arg("counts"), py::arg("weight"),
        py::arg("total"), py::arg("ratio"), py::arg("tolerance"), py::arg("steps"), py::arg("products"),
        py::arg("clip"), py::arg("reach"), py::arg("want_plan"), py::arg("vectors"), py::arg("state"), py::arg("sums"),
        py::arg("count"), py::arg("stream"), "So many rounds of Newton's method, by device addresses.");
}

}  // namespace sela
