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

// For benchmarks alone, by ctypes, which has no lock held: multiply-adds on the calling thread (rowops.h), how many
// they were, 0 where there are none of the kind. A symbol, not an operator: it takes no tensor, and nobody else needs
// it.
extern "C" __attribute__((visibility("default"))) int64_t condense_spin(int64_t element_size, int64_t rounds) {
  const auto spin = element_size == 8   ? condense::row_ops<double>().spin
                    : element_size == 4 ? condense::row_ops<float>().spin
                                        : condense::row_ops<float>().spin_pairs;
  return spin ? spin(rounds) : 0;
}
