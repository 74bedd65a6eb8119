#pragma once
#include <string>

#include "sela/augment.h"
#include "sela/dispatch.h"
#include "sela/jpeg.h"
#include "sela/sinkhorn.h"

namespace sela {

/// What names from Python mean (sinkhorn.cpp); "" is the instruction set in use.  Throw std::invalid_argument.
LogitsType logits_type(const std::string& name);
Isa isa_of(const std::string& name);
/// The same of a torch dtype (augment.cpp).
PixelType pixel_type(const std::string& dtype);

/// What Python calls these (jpeg.cpp).
const char* name_of(JpegStatus status);
const char* name_of(JpegColour colour);

}  // namespace sela
