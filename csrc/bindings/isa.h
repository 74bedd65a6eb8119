#pragma once
#include <string>

#include "sela/dispatch.h"

namespace sela {

/// The instruction set of that name, "" for the one in use.  Throws std::invalid_argument for one that is not there.
Isa isa_of(const std::string& name);

}  // namespace sela
