#pragma once
#include <string>

#include "sela/dispatch.h"
#include "sela/sinkhorn.h"

namespace sela {

/// What names from Python mean (sinkhorn.cpp); "" is the instruction set in use.  Throw std::invalid_argument.
LogitsType logits_type(const std::string& name);
Isa isa_of(const std::string& name);

}  // namespace sela
