// What a mapped file that cannot be read does to the process.
#include "sela/mapped_faults.h"

#include "bindings/bindings.h"

namespace sela {

void bind_mapped_faults(pybind11::module_& m) {
  m.def("mapped_faults_begin", &mapped_faults_begin,
        "Have a mapped file that cannot be read any more end the process with its name; False where something is there "
        "for SIGBUS.");
  m.def("mapped_faults_end", &mapped_faults_end, "Have SIGBUS do again what it does by itself.");
}

}  // namespace sela
