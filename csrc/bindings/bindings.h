#pragma once
#include <pybind11/pybind11.h>

namespace sela {

void bind_augment(pybind11::module_& m);
void bind_build(pybind11::module_& m);
void bind_newton(pybind11::module_& m);
void bind_sinkhorn(pybind11::module_& m);

}  // namespace sela
