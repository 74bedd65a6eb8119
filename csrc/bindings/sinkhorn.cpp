// The fused Sinkhorn pass, by addresses: sela_ext.kernels has checked shapes, types and devices before.
#include "sela/sinkhorn.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"
#include "sela/logits.h"

namespace py = pybind11;

namespace sela {

Isa isa_of(const std::string& name) {
  if (name.empty()) return cpu_isa();
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512})
    if (name == isa_name(isa) && isa <= cpu_isa()) return isa;
  throw std::invalid_argument("instruction set: expected one up to " + std::string(isa_name(cpu_isa())) + ", found " +
                              name);
}

LogitsType logits_type(const std::string& name) {
  if (name == "float32") return LogitsType::float32;
  if (name == "float16") return LogitsType::float16;
  if (name == "bfloat16") return LogitsType::bfloat16;
  if (name == "float64") return LogitsType::float64;
  throw std::invalid_argument("logits type: expected float32, float16, bfloat16 or float64, found " + name);
}

namespace {

/// Integers behind the column sums: the words of objective and weight, and masked rows.
constexpr int64_t kSinkhornExact = 2 * kSinkhornWords + 1;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

SinkhornPass make_pass(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                       double scale, std::uintptr_t potential, std::uintptr_t row_weights, double largest_weight,
                       std::uintptr_t reference) {
  SinkhornPass pass;
  pass.logits = pointer<const void>(logits);
  pass.type = logits_type(type);
  pass.rows = rows;
  pass.cols = cols;
  pass.stride = stride;
  pass.scale = scale;
  pass.potential = pointer<const double>(potential);
  pass.row_weights = pointer<const float>(row_weights);
  pass.largest_weight = largest_weight;
  pass.reference = pointer<const void>(reference);
  return pass;
}

py::tuple pass_cpu(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                   double scale, std::uintptr_t potential, std::uintptr_t row_weights, double largest_weight,
                   std::uintptr_t reference, std::uintptr_t column_sums, std::uintptr_t lse, std::uintptr_t labels,
                   int threads, const std::string& isa, int64_t every, std::optional<Candidates*> candidates,
                   int64_t first_row, int64_t rows_in_all, std::uintptr_t totals, std::uintptr_t maxima,
                   double maxima_scale, std::uintptr_t bounds, bool bounds_known) {
  if (first_row < 0 || first_row % kSinkhornRows != 0)
    throw std::invalid_argument("sinkhorn_pass: expected first_row at a multiple of 128, found " +
                                std::to_string(first_row));
  const bool fixed = type == "fixed16";
  SinkhornPass pass = make_pass(logits, fixed ? "float32" : type, rows, cols, stride, scale, potential, row_weights,
                                largest_weight, reference);
  if (fixed) pass.type = LogitsType::fixed16;
  pass.maxima = pointer<const float>(maxima);
  pass.maxima_scale = maxima_scale;
  pass.bounds = pointer<uint16_t>(bounds);
  pass.bounds_known = bounds_known;
  pass.rows_in_all = rows_in_all;
  const Isa chosen = isa_of(isa);
  const SinkhornSample sample{every, first_row / kSinkhornRows};
  SinkhornSums sums;
  sums.column_sums = pointer<int64_t>(column_sums);
  sums.lse = pointer<void>(lse);
  sums.labels = pointer<int32_t>(labels);
  {
    const py::gil_scoped_release release;
    sinkhorn_pass_cpu(pass, sums, threads, chosen, sample, candidates.value_or(nullptr), pointer<double>(totals));
  }
  return py::make_tuple(sums.objective, sums.weight, sums.masked, sums.live);
}

py::tuple sums_cpu(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                   double scale, const py::array_t<double, py::array::c_style>& potential, std::uintptr_t row_weights,
                   double largest_weight, const std::optional<py::array>& reference, bool want_labels, int threads,
                   const std::string& isa, int64_t every, std::optional<Candidates*> candidates, int64_t first_row,
                   int64_t rows_in_all, std::uintptr_t maxima, double maxima_scale, std::uintptr_t bounds,
                   bool bounds_known) {
  if (potential.size() != cols || (reference && reference->size() != rows))
    throw std::invalid_argument("sinkhorn_pass: expected a potential [cols] and a reference [rows]");
  const bool is_double = type == "float64";
  const auto numbers = [&](int64_t count) -> py::array {
    if (is_double) return py::array_t<double>(count);
    return py::array_t<float>(count);
  };
  py::array lse = numbers(rows);
  py::array_t<int32_t> labels(want_labels ? rows : 0);
  py::array_t<int64_t> exact(cols + kSinkhornExact);
  py::array_t<double> columns(cols);
  if (reference && reference->itemsize() != lse.itemsize())
    throw std::invalid_argument("sinkhorn_pass: expected a reference of the type of lse");
  std::fill_n(labels.mutable_data(), labels.size(), -1);
  if (every > 1) {  // rows that are not read keep what is known
    if (reference) {
      std::memcpy(lse.mutable_data(), reference->data(), static_cast<size_t>(lse.nbytes()));
    } else if (is_double) {
      std::fill_n(static_cast<double*>(lse.mutable_data()), rows, std::numeric_limits<double>::quiet_NaN());
    } else {
      std::fill_n(static_cast<float*>(lse.mutable_data()), rows, std::numeric_limits<float>::quiet_NaN());
    }
  }
  const auto address = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data); };
  const int64_t blocks = (rows + kSinkhornRows - 1) / kSinkhornRows;
  std::vector<double> totals(static_cast<size_t>(2 * blocks));
  const py::tuple found =
      pass_cpu(logits, type, rows, cols, stride, scale, address(potential.data()), row_weights, largest_weight,
               reference ? address(reference->data()) : 0, address(exact.mutable_data()), address(lse.mutable_data()),
               want_labels ? address(labels.mutable_data()) : 0, threads, isa, every, candidates, first_row,
               rows_in_all, address(totals.data()), maxima, maxima_scale, bounds, bounds_known);
  const int64_t* integers = exact.data();
  int64_t* words = exact.mutable_data() + cols;
  sinkhorn_exact_totals(totals.data(), blocks, largest_weight, words);
  words[2 * kSinkhornWords] = found[2].cast<int64_t>();
  const double resolution = sinkhorn_resolution(std::max(rows, rows_in_all), largest_weight);
  double* sums = columns.mutable_data();
  for (int64_t j = 0; j < cols; ++j) sums[j] = static_cast<double>(integers[j]) * resolution;
  return py::make_tuple(columns, exact, lse, want_labels ? py::object(labels) : py::none(),
                        sinkhorn_total(words, largest_weight), sinkhorn_total(words + kSinkhornWords, largest_weight),
                        found[2], found[3]);
}

StoreLogits store_of(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                     const std::string& kind, double lambda, std::uintptr_t values, std::uintptr_t maxima) {
  StoreLogits store;
  store.logits = pointer<const void>(logits);
  store.type = logits_type(type);
  store.kind = kind == "fixed16" ? LogitsType::fixed16 : logits_type(kind);
  store.rows = rows;
  store.cols = cols;
  store.stride = stride;
  store.lambda = lambda;
  store.values = pointer<uint16_t>(values);
  store.maxima = pointer<float>(maxima);
  return store;
}

int64_t store_cpu(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                  const std::string& kind, double lambda, std::uintptr_t values, std::uintptr_t maxima, int threads,
                  const std::string& isa) {
  const StoreLogits store = store_of(logits, type, rows, cols, stride, kind, lambda, values, maxima);
  const Isa chosen = isa_of(isa);
  const py::gil_scoped_release release;
  return store_logits_cpu(store, threads, chosen);
}

/// What pass, search and workspace on CUDA have in common; fixed16 is no type of logits that users may have.
struct CudaPass {
  SinkhornPass pass;
  SinkhornSample sample;
};

CudaPass cuda_pass(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                   double scale, std::uintptr_t potential, std::uintptr_t row_weights, double largest_weight,
                   std::uintptr_t reference, int64_t rows_in_all, int64_t first_row, int64_t every,
                   std::uintptr_t maxima, double maxima_scale) {
  if (first_row < 0 || first_row % kSinkhornRows != 0)
    throw std::invalid_argument("sinkhorn_pass: expected first_row at a multiple of 128, found " +
                                std::to_string(first_row));
  const bool fixed = type == "fixed16";
  CudaPass found;
  found.pass = make_pass(logits, fixed ? "float16" : type, rows, cols, stride, scale, potential, row_weights,
                         largest_weight, reference);
  if (fixed) found.pass.type = LogitsType::fixed16;
  found.pass.rows_in_all = rows_in_all;
  found.pass.maxima = pointer<const float>(maxima);
  found.pass.maxima_scale = maxima_scale;
  found.sample = {every, first_row / kSinkhornRows};
  return found;
}

void store_cuda(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                const std::string& kind, double lambda, std::uintptr_t values, int64_t values_stride,
                std::uintptr_t maxima, std::uintptr_t saturated, std::uintptr_t stream) {
  StoreLogits store = store_of(logits, type, rows, cols, stride, kind, lambda, values, maxima);
  store.values_stride = values_stride;
  const py::gil_scoped_release release;
  store_logits_cuda(store, pointer<int64_t>(saturated), pointer<void>(stream));
}

void pass_cuda(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride, double scale,
               std::uintptr_t potential, std::uintptr_t row_weights, double largest_weight, std::uintptr_t reference,
               std::uintptr_t column_sums, std::uintptr_t lse, std::uintptr_t labels, std::uintptr_t totals,
               std::uintptr_t masked, std::uintptr_t scratch, std::uintptr_t stream, int64_t rows_in_all,
               int64_t first_row, int64_t every, double level, std::uintptr_t counts, std::uintptr_t maxima,
               double maxima_scale) {
  const CudaPass task = cuda_pass(logits, type, rows, cols, stride, scale, potential, row_weights, largest_weight,
                                  reference, rows_in_all, first_row, every, maxima, maxima_scale);
  SinkhornSums sums;
  sums.column_sums = pointer<int64_t>(column_sums);
  sums.lse = pointer<void>(lse);
  sums.labels = pointer<int32_t>(labels);
  const py::gil_scoped_release release;
  sinkhorn_pass_cuda(task.pass, sums, pointer<double>(totals), pointer<int64_t>(masked), pointer<void>(scratch),
                     pointer<void>(stream), task.sample, {level, pointer<int32_t>(counts)});
}

void candidates_cuda(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                     double scale, std::uintptr_t potential, int64_t first_row, int64_t every, double level,
                     bool has_maxima, std::uintptr_t scratch, std::uintptr_t offsets, std::uintptr_t columns,
                     std::uintptr_t values, std::uintptr_t stream) {
  // The search reads no maxima: that there are some tells how scratch is laid out.
  CudaPass task = cuda_pass(logits, type, rows, cols, stride, scale, potential, 0, 1.0, 0, 0, first_row, every,
                            has_maxima ? scratch : 0, 0.0);
  const py::gil_scoped_release release;
  sinkhorn_candidates_cuda(task.pass, task.sample, level, pointer<const void>(scratch), pointer<const int64_t>(offsets),
                           pointer<int32_t>(columns), pointer<float>(values), pointer<void>(stream));
}

py::tuple workspace_cuda(std::uintptr_t logits, const std::string& type, int64_t rows, int64_t cols, int64_t stride,
                         int64_t first_row, int64_t every, bool candidates, bool has_maxima) {
  const CudaPass task =
      cuda_pass(logits, type, rows, cols, stride, 1.0, 0, 0, 1.0, 0, 0, first_row, every, has_maxima ? logits : 0, 0.0);
  const SinkhornWorkspace need = sinkhorn_workspace_cuda(task.pass, task.sample, candidates);
  return py::make_tuple(need.totals, need.scratch);
}

}  // namespace

void bind_sinkhorn(py::module_& m) {
  m.def("sinkhorn_resolution", py::overload_cast<int64_t, double>(&sinkhorn_resolution), py::arg("rows"),
        py::arg("largest_weight"), "Value of one unit of the integer column sums.");
  m.def("sinkhorn_pass_cpu", &pass_cpu, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("scale"), py::arg("potential"), py::arg("row_weights"), py::arg("largest_weight"),
        py::arg("reference"), py::arg("column_sums"), py::arg("lse"), py::arg("labels"), py::arg("threads"),
        py::arg("isa"), py::arg("every") = 1, py::arg("candidates") = py::none(), py::arg("first_row") = 0,
        py::arg("rows_in_all") = 0, py::arg("totals") = 0, py::arg("maxima") = 0, py::arg("maxima_scale") = 0.0,
        py::arg("bounds") = 0, py::arg("bounds_known") = false,
        "One fused pass on the CPU, by addresses (0 = absent); returns (objective, weight, masked, live).");
  m.def(
      "sinkhorn_sums_cpu", &sums_cpu, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
      py::arg("stride"), py::arg("scale"), py::arg("potential"), py::arg("row_weights"), py::arg("largest_weight"),
      py::arg("reference"), py::arg("want_labels"), py::arg("threads"), py::arg("isa"), py::arg("every"),
      py::arg("candidates"), py::arg("first_row"), py::arg("rows_in_all"), py::arg("maxima"), py::arg("maxima_scale"),
      py::arg("bounds"), py::arg("bounds_known"),
      "The same into new arrays: (column sums, exact integers, lse, labels or None, objective, weight, masked, live).");
  m.def(
      "sinkhorn_exact_totals",
      [](std::uintptr_t totals, int64_t blocks, double largest_weight, std::uintptr_t words) {
        sinkhorn_exact_totals(pointer<const double>(totals), blocks, largest_weight, pointer<int64_t>(words));
      },
      py::arg("totals"), py::arg("blocks"), py::arg("largest_weight"), py::arg("words"),
      "The eight words of the totals of objective and weight, by addresses, from those of blocks [2, blocks].");
  m.def(
      "sinkhorn_total",
      [](std::uintptr_t words, double largest_weight) {
        return sinkhorn_total(pointer<const int64_t>(words), largest_weight);
      },
      py::arg("words"), py::arg("largest_weight"), "The total that four words stand for, by their address.");
  m.def("store_logits_cpu", &store_cpu, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("kind"), py::arg("lam"), py::arg("values"), py::arg("maxima"), py::arg("threads"),
        py::arg("isa"), "Logits to 16 bits, by addresses; returns how many finite entries were stored as -inf.");
  m.def("store_logits_cuda", &store_cuda, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("kind"), py::arg("lam"), py::arg("values"), py::arg("values_stride"),
        py::arg("maxima"), py::arg("saturated"), py::arg("stream"),
        "Logits to 16 bits on the current CUDA device, by device addresses; what is stored as -inf is counted there.");
  m.def("sinkhorn_bounds_stride", &SinkhornPass::bounds_stride, py::arg("cols"),
        "Entries of the chunk bounds of one row.");
  m.def("sinkhorn_workspace_cuda", &workspace_cuda, py::arg("logits"), py::arg("type"), py::arg("rows"),
        py::arg("cols"), py::arg("stride"), py::arg("first_row") = 0, py::arg("every") = 1,
        py::arg("candidates") = false, py::arg("has_maxima") = false,
        "Device memory of a pass on CUDA beside its arrays: doubles of totals, bytes of scratch.");
  m.def("sinkhorn_pass_cuda", &pass_cuda, py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("stride"), py::arg("scale"), py::arg("potential"), py::arg("row_weights"), py::arg("largest_weight"),
        py::arg("reference"), py::arg("column_sums"), py::arg("lse"), py::arg("labels"), py::arg("totals"),
        py::arg("masked"), py::arg("scratch"), py::arg("stream"), py::arg("rows_in_all") = 0, py::arg("first_row") = 0,
        py::arg("every") = 1, py::arg("level") = 0.0, py::arg("counts") = 0, py::arg("maxima") = 0,
        py::arg("maxima_scale") = 0.0, "One fused pass on the current CUDA device, by device addresses.");
  m.def("sinkhorn_candidates_cuda", &candidates_cuda, py::arg("logits"), py::arg("type"), py::arg("rows"),
        py::arg("cols"), py::arg("stride"), py::arg("scale"), py::arg("potential"), py::arg("first_row"),
        py::arg("every"), py::arg("level"), py::arg("has_maxima"), py::arg("scratch"), py::arg("offsets"),
        py::arg("columns"), py::arg("values"), py::arg("stream"),
        "The candidates that such a pass has counted, by device addresses.");
}

}  // namespace sela
