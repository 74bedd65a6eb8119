#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "sela/dispatch.h"
#include "sela/sinkhorn.h"

namespace sela {

void bind_augment(pybind11::module_& m);
void bind_build(pybind11::module_& m);
void bind_rounding(pybind11::module_& m);
void bind_sinkhorn(pybind11::module_& m);

/// What names from Python mean (sinkhorn.cpp); "" is the instruction set in use.  Throw std::invalid_argument.
LogitsType logits_type(const std::string& name);
Isa isa_of(const std::string& name);

}  // namespace sela
