// Run-time choice of the instruction set.
#include "sela/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sela {
namespace {

#if defined(__x86_64__)
/// Conversions to and from half precision, of which Clang 14 has no __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("SELA_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
    if (std::string(wish) != isa_name(isa)) continue;
    if (isa > best)
      throw std::runtime_error(std::string("SELA_CPU_ISA=") + wish + ": this processor has " + isa_name(best) +
                               " at best; unset SELA_CPU_ISA or name a lower one");
    return isa;
  }
  throw std::runtime_error(std::string("SELA_CPU_ISA: expected generic, avx2 or avx512, found \"") + wish + "\"");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace sela
