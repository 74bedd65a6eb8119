#pragma once
#include <pybind11/pybind11.h>

namespace sela {

void bind_anderson(pybind11::module_& m);
void bind_anderson_device(pybind11::module_& m);
void bind_augment(pybind11::module_& m);
void bind_augment_device(pybind11::module_& m);
void bind_build(pybind11::module_& m);
void bind_jpeg(pybind11::module_& m);
void bind_jpeg_batch(pybind11::module_& m);
void bind_mapped_faults(pybind11::module_& m);
void bind_newton(pybind11::module_& m);
void bind_newton_device(pybind11::module_& m);
void bind_reader(pybind11::module_& m);
void bind_rounding(pybind11::module_& m);
void bind_sinkhorn(pybind11::module_& m);
void bind_vectors(pybind11::module_& m);

/// All of them: the contents of sela_ext._core.
inline void bind_all(pybind11::module_& m) {
  bind_build(m);
  bind_anderson(m);
  bind_anderson_device(m);
  bind_augment(m);
  bind_augment_device(m);
  bind_jpeg(m);
  bind_jpeg_batch(m);
  bind_mapped_faults(m);
  bind_newton(m);
  bind_newton_device(m);
  bind_reader(m);
  bind_rounding(m);
  bind_sinkhorn(m);
  bind_vectors(m);
}

}  // namespace sela
