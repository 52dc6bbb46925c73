// Every operator of the library. What they compute: docs/. Their schemas: condense_kernels/ops/<op>/schema.txt, of
// which setup.py makes schemas.h.
#include <torch/csrc/stable/library.h>

#include <string>

#include "rowops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(condense, m) {
  for (const char* schema : condense::kSchemas) m.def(schema);
  m.def("cpu_capability() -> str");  // which instruction set the CPU kernels run with
}

static std::string cpu_capability() { return condense::row_ops<float>().instruction_set; }

STABLE_TORCH_LIBRARY_IMPL(condense, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
