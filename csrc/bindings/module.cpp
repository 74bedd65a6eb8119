// The Python extension sela_ext._core. One bind_* function per noun; each lives in its own file beside this one.
#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled kernels of sela_ext. Use sela_ext.kernels, which checks arguments before it calls these.";
  sela::bind_all(m);
}
