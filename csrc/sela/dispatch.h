#pragma once
#include <string>

namespace sela {

/// Instruction sets that the loop bodies in csrc/cpu are compiled for, slowest first.
enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

/// The instruction set in use: the best one that both this build and this processor have, unless the environment
/// variable SELA_CPU_ISA (generic | avx2 | avx512) asks for another; read once, at the first call.
/// Throws std::runtime_error when SELA_CPU_ISA names an unknown or an unavailable one.
Isa cpu_isa();

const char* isa_name(Isa isa);

}  // namespace sela
