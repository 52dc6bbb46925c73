#include "rowops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CONDENSE_ISA isa_default
#define CONDENSE_ISA_NAME "default"
#define CONDENSE_ISA_BYTES 16
#define CONDENSE_ISA_PAIRS 0
#include "rowops_isa.h"
#undef CONDENSE_ISA
#undef CONDENSE_ISA_NAME
#undef CONDENSE_ISA_BYTES

// Clang spells the pragma differently; there the portable loops serve alone.
#if defined(__x86_64__) && !defined(__clang__)
#define CONDENSE_HAS_X86_ISAS 1
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_ps

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define CONDENSE_ISA isa_avx2
#define CONDENSE_ISA_NAME "avx2"
#define CONDENSE_ISA_BYTES 32
#include "rowops_isa.h"
#undef CONDENSE_ISA
#undef CONDENSE_ISA_NAME
#undef CONDENSE_ISA_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define CONDENSE_ISA isa_avx512
#define CONDENSE_ISA_NAME "avx512"
#define CONDENSE_ISA_BYTES 64
#include "rowops_isa.h"
#undef CONDENSE_ISA
#undef CONDENSE_ISA_NAME
#undef CONDENSE_ISA_PAIRS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define CONDENSE_ISA isa_avx512_bf16
#define CONDENSE_ISA_NAME "avx512_bf16"
#define CONDENSE_ISA_PAIRS 1
#include "rowops_isa.h"
#pragma GCC pop_options
#endif

namespace condense {
namespace {

enum class InstructionSet { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

#if defined(CONDENSE_HAS_X86_ISAS)
InstructionSet best_of_processor() {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512Bf16 : InstructionSet::kAvx512;
  // Every processor with AVX2 and FMA has F16C, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2 ? InstructionSet::kAvx2 : InstructionSet::kDefault;
}

InstructionSet most_allowed() {
  const char* asked = std::getenv("CONDENSE_CPU_CAPABILITY");
  if (!asked || !std::strcmp(asked, "avx512_bf16")) return InstructionSet::kAvx512Bf16;
  if (!std::strcmp(asked, "avx512")) return InstructionSet::kAvx512;
  if (!std::strcmp(asked, "avx2")) return InstructionSet::kAvx2;
  if (!std::strcmp(asked, "default")) return InstructionSet::kDefault;
  std::fprintf(stderr,
               "CONDENSE_CPU_CAPABILITY: expected default, avx2, avx512 or avx512_bf16, got %s; it is ignored.\n",
               asked);
  return InstructionSet::kAvx512Bf16;
}
#endif

}  // namespace

template <class T>
const RowOps<T>& row_ops() {
#if defined(CONDENSE_HAS_X86_ISAS)
  static const InstructionSet chosen = std::min(best_of_processor(), most_allowed());
  if (chosen == InstructionSet::kAvx512Bf16) return isa_avx512_bf16::row_ops<T>();
  if (chosen == InstructionSet::kAvx512) return isa_avx512::row_ops<T>();
  if (chosen == InstructionSet::kAvx2) return isa_avx2::row_ops<T>();
#endif
  return isa_default::row_ops<T>();
}

template const RowOps<float>& row_ops<float>();
template const RowOps<double>& row_ops<double>();

}  // namespace condense
